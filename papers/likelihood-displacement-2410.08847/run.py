"""DPO on one pair of single tokens: its flow in closed form, a constructed geometry, and a learned one."""

import runpy
from pathlib import Path

import torch
from torch.func import jvp

WORLD = runpy.run_path(str(Path(__file__).with_name("world.py")))
BETA, descent = WORLD["BETA"], WORLD["descent"]
STEPS, RATE = 4000, 0.1
LOGGED = sorted({round(10 ** (i / 20)) - 1 for i in range(73)})


def formula(seed):
    """Over 200 random instances: the largest gaps in d/dt log pi(z), and what precedes a fall of pi(y_+)."""
    torch.set_default_dtype(torch.float64)
    gaps, first_gaps, falls, sign = [], [], [], torch.eye(12)[0] - torch.eye(12)[1]  # y_+ is token 0, y_- token 1
    for _ in range(200):
        weight, hidden, ref, rate = torch.randn(12, 6), 0.5 * torch.randn(6), torch.randn(()), 10 ** torch.rand(())
        weight[1] = weight[0] + 0.5 * torch.randn(6)
        _, flow = descent(weight, hidden, ref, rate)
        measured = jvp(lambda w, h: WORLD["log_probs"](w @ h), (weight, hidden), flow)[1]
        p, apart = (weight @ hidden).softmax(-1), weight[0] - weight[1]
        pace = BETA * torch.sigmoid(-BETA * (apart @ hidden - ref))
        first = pace * rate * (weight - p @ weight) @ apart
        second = pace * (hidden @ hidden) * (sign - sign @ p)
        gaps.append((measured - first - second).abs().max())
        first_gaps.append((measured - first).abs().max())
        falls += [first[0]] if measured[0] < 0 else []
    falls = torch.stack(falls)
    shares = {"falls": len(falls) / 200, "falls_without": (falls >= 0).double().mean()}
    return {"gap": max(gaps), "gap_of_first_term": min(first_gaps)} | shares


def constructed(seed):
    """Probabilities and the loss of No over Never, where their difference points to Yes, at two ratios of rates."""
    torch.set_default_dtype(torch.float64)
    out = {}
    for end, rate in (("", 100.0), ("_of_equal_rates", 1.0)):
        weight, hidden = WORLD["geometry"]()
        ref, course = (weight[0] - weight[1]) @ hidden, []
        for _ in range(STEPS):
            loss, (of_weight, of_hidden) = descent(weight, hidden, ref, rate)
            course.append([*(weight @ hidden).softmax(-1)[:3], loss])
            weight, hidden = weight + RATE * of_weight / rate**0.5, hidden + RATE * of_hidden / rate**0.5
        for name, x in zip(("no", "never", "yes", "loss"), zip(*course)):
            out |= {f"{name}{end}": x[-1], f"{name}{end}_course": [x[i] for i in LOGGED]}
    return out


def learned(seed):
    """Fall of pi(y_+), by training on y_+ over a synonym in one context of a network at a time."""
    return WORLD["learned"]()
