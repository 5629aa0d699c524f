"""What losses make of flipped labels: their mean over flips, and the weights of a log-linear policy fitted to them."""

import runpy
from functools import partial
from pathlib import Path

import torch
from torch.func import grad

from alignkit.losses.preference import dpo, robust_dpo

WORLD = runpy.run_path(str(Path(__file__).with_name("world.py")))
BETA, RATES, SIZES = WORLD["BETA"], (0.1, 0.2, 0.3, 0.4), (1_000, 4_000, 16_000, 64_000)


def losses(rate):
    """Of a margin; rDPO and cDPO know the rate of flips."""
    robust, cdpo = (partial(loss, beta=BETA, smoothing=rate) for loss in (robust_dpo, dpo))
    return {"robust": robust, "cdpo": cdpo, "dpo": partial(dpo, beta=BETA)}


def flips(seed):
    """Largest gap over margins of each loss's mean over flips to DPO's loss on clean labels; the worst over rates."""
    margin, clean = torch.linspace(-10, 10, 201, dtype=torch.float64), partial(dpo, beta=BETA)
    far, slope = margin.new_tensor(200.0), grad(lambda margin, loss: loss(margin).sum())
    out = {"robust_gap": [], "robust_slope_gap": [], "far_slope_gap": [], "cdpo_gap": [], "dpo_gap": []}
    for rate in RATES:
        robust, *biased = (partial(mean_over_flips, loss=loss, rate=rate) for loss in losses(rate).values())
        out["robust_gap"].append((robust(margin) - clean(margin)).abs().max())
        out["robust_slope_gap"].append((slope(margin, robust) - slope(margin, clean)).abs().max())
        out["far_slope_gap"].append((slope(far, losses(rate)["robust"]) + BETA * rate / (1 - 2 * rate)).abs())
        for name, loss in zip(("cdpo_gap", "dpo_gap"), biased):
            out[name].append((loss(margin) - clean(margin)).abs().max())
    return {name: (min if name in ("cdpo_gap", "dpo_gap") else max)(x) for name, x in out.items()}


def mean_over_flips(margin, loss, rate):
    """The mean of a loss if the two answers are exchanged with probability `rate`."""
    return (1 - rate) * loss(margin) + rate * loss(-margin)


def estimates(seed):
    """Errors of fitted weights for growing n, 30 % of labels flipped; and which fits diverge, 40 % of 100 flipped."""
    truth, logs = WORLD["truth"](), torch.tensor(SIZES).double().log()
    data = {size: WORLD["labelled"](truth, size, 0.3) for size in SIZES}
    few, out, cosines = WORLD["labelled"](truth, 100, 0.4), {}, []
    for name, loss in losses(0.3).items():
        weights = torch.stack([WORLD["fitted"](data[size], loss) for size in SIZES])
        errors = (weights - truth).norm(dim=-1)
        out |= {f"{name}_{size}": error for size, error in zip(SIZES, errors)}
        out[f"{name}_slope"] = torch.cov(torch.stack([logs, errors.log()]))[0, 1] / logs.var()
        out[f"{name}_diverged"] = diverges(few, losses(0.4)[name])
        cosines.append(torch.cosine_similarity(weights[-1], truth, dim=0))
    return out | {"cosine_64000": min(cosines)}


def diverges(pairs, loss):
    """Whether the loss is lower still a million times further out, which a convex one with a minimum cannot be."""
    weights = WORLD["fitted"](pairs, loss)
    return loss(pairs @ (1e6 * weights)).mean() < loss(pairs @ weights).mean()
