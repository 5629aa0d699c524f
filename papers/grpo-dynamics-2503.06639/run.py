"""Success rates from one GRPO optimum to the next: the paper's recurrence, and groups of finite size."""

import runpy
from math import log
from pathlib import Path

import torch

from alignkit.advantages import group_center
from alignkit.masking import whiten

WORLD = runpy.run_path(str(Path(__file__).with_name("world.py")))
EPS, BETAS = (1e-5, 1e-4, 1e-3, 1e-2), (0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0)
REFS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)


def step(seed):
    """One optimum after a uniform policy over 50 answers, which are its group, against the closed forms."""
    ref_logps, every = torch.randn(50, dtype=torch.float64).log_softmax(-1), torch.ones(50, dtype=torch.bool)
    old_logps, gaps, centred = torch.full_like(ref_logps, -log(50)), [], []
    for right in (1, 5, 25, 45, 49):
        rewards, ref = (torch.arange(50) < right).double(), ref_logps[:right].exp().sum()
        for beta, eps in ((0.5, 1e-2), (1.0, 1e-5), (1.0, 1e-2), (5.0, 1e-5), (5.0, 1e-2)):
            advantages = whiten(rewards, every, correction=0, eps=eps), group_center(rewards)
            found = [WORLD["optimum"](a, old_logps, ref_logps, beta)[:right].sum() for a in advantages]
            gaps += [abs(found[0] - WORLD["h"](rewards.mean(), ref, beta, eps))]
            centred += [abs(found[1] - (ref.logit() + 1 / beta).sigmoid())]
    return {"gap": max(gaps), "centred_gap": max(centred)}


def dynamics(seed):
    """10,000 iterations from p_ref in each cell of a grid: which settle, and what becomes of the others."""
    eps, ref, beta = torch.cartesian_prod(*(torch.tensor(x, dtype=torch.float64) for x in (EPS, REFS, BETAS))).T
    path = [ref]
    for _ in range(10_000):
        path = [*path[-2:], WORLD["h"](path[-1], ref, beta, eps)]
    before, last, after = path[-2], path[-1], WORLD["h"](path[-1], ref, beta, eps)
    moving = abs(after - last) > 1e-9
    fixed, slope = WORLD["fixed_point"](torch.minimum(last, after), torch.maximum(last, after), ref, beta, eps)
    cycling = moving & (abs(after - before) < 1e-9)
    return {
        "cells": len(ref), "moving": moving.sum(), "cycling": cycling.sum(), "not_of_two": (moving & ~cycling).sum(),
        "swing": abs(after - last).max(), "slope": slope[moving].abs().min(),
        "gain": (fixed.logit() - ref.logit()).min(),
    }  # fmt: skip


def groups(seed, iterations=40):
    """Groups of finite size: p_ref = 0.001 with beta = 3, where groups without end cycle; and the gap at p = 0.3."""
    ref, p = torch.tensor([0.001, 0.3], dtype=torch.float64)
    errors = [WORLD["gap"](p, size) - 1 / (p * (1 - p)).sqrt() for size in (64, 256)]
    out = {"order": (errors[0] / errors[1]).log() / log(4)}
    maps = {size: lambda p, size=size: (ref.logit() + WORLD["gap"](p, size) / 3).sigmoid() for size in (8, 64, 512)}
    for size, step in (maps | {"endless": lambda p: WORLD["h"](p, ref, 3.0, 1e-5)}).items():
        path = [ref]
        for _ in range(iterations):
            path += [step(path[-1])]
        out |= {f"swing_{size}": abs(path[-1] - path[-2]), f"path_{size}": path}
    return out
