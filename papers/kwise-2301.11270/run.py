"""Rankings of a Plackett-Luce model with linear rewards: its likelihood against the loss on all pairs of a ranking."""

import runpy
from pathlib import Path

import torch
from torch.distributions import Multinomial

from alignkit.losses.listwise import all_pairs, plackett_luce
from alignkit.losses.reward import bradley_terry

WORLD = runpy.run_path(str(Path(__file__).with_name("world.py")))
REPEATS, NS = 500, (500, 2000, 8000)


def kwise(scores):
    """The likelihood of a ranking whose answers stand best first."""
    return plackett_luce(scores, scores > -torch.inf)


def pairs(scores):
    """The mean of Bradley-Terry over all pairs of a ranking."""
    return all_pairs(scores, -torch.arange(scores.shape[-1]).expand_as(scores), scores > -torch.inf)


def neighbours(scores):
    """The same over pairs of neighbours only."""
    return bradley_terry(scores[..., :-1], scores[..., 1:]).mean(-1)


def asymptotics(seed):
    """By listing all rankings of K answers: mean gradients at the truth, covariances of sqrt(N) (estimate - truth)."""
    out, ratios = {}, []
    for k in (2, 3, 4, 5):
        covariances = []
        for loss in (kwise, pairs, neighbours):
            slope, second, curvature = WORLD["moments"](loss, *WORLD["rankings"](k))
            covariances.append(curvature.inverse() @ second @ curvature.inverse())
            out |= {
                f"slope_{loss.__name__}_{k}": slope.abs().max(),
                f"trace_{loss.__name__}_{k}": covariances[-1].trace(),
            }
            out[f"information_{loss.__name__}_{k}"] = (second - curvature).abs().max()
        out[f"gain_{k}"] = torch.linalg.eigvalsh(covariances[1] - covariances[0]).min()
        ratios.append(covariances[1].trace() / covariances[0].trace())
    return out | {"ratios": ratios, "same_2": abs(ratios[0] - 1), "ratio_4": ratios[2]}


def simulation(seed):
    """N times the squared error of both estimates, K = 4, and its excess over the trace for large N at N = 8000."""
    (ranked, chance), exact, out = WORLD["rankings"](4), asymptotics(seed), {}
    for n in NS:
        counts = Multinomial(n, chance).sample((REPEATS,))
        for loss in (kwise, pairs):
            name, found = loss.__name__, WORLD["estimates"](loss, ranked, counts)
            errors = n * (found - WORLD["TRUTH"]).square().sum(-1)
            out[f"{name}_{n}"], out[f"{name}_excess_se"] = errors.mean(), errors.std() / REPEATS**0.5
            out[f"{name}_excess"] = errors.mean() - exact[f"trace_{name}_4"]
    return out | {f"{x}_change": out[f"{x}_8000"] / out[f"{x}_500"] for x in ("kwise", "pairs")}
