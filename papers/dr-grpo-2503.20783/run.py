"""Exact pushes on the chance to stop and on the success rate, and where the former leads in training."""

import runpy
from functools import partial
from math import comb, log
from pathlib import Path

import torch

from alignkit.advantages import group_center, group_normalize
from alignkit.weights import constant_length, group_mean, sequence_mean, token_mean

WORLD = runpy.run_path(str(Path(__file__).with_name("world.py")))
CONSTANT = partial(constant_length, length=WORLD["START"])
METHODS = {"grpo": (group_normalize, sequence_mean), "no_std": (group_center, sequence_mean)}
METHODS |= {"group_tokens": (group_normalize, partial(group_mean, size=WORLD["GROUP"]))}
METHODS |= {"all_tokens": (group_normalize, token_mean), "dr_grpo": (group_center, CONSTANT)}


def lengths(seed):
    """Expected pushes, A = 1 of right answers and -1 of wrong ones: sums over all lengths but a chance of 1e-13."""
    torch.set_default_dtype(torch.float64)
    means, constants, closed = [], [], []
    for stop in torch.tensor([0.05, 0.2, 0.5, 0.9]):
        each = torch.arange(1, int(30 / stop))
        right, odds = torch.arange(2).repeat_interleave(len(each)), 2 * len(each) * stop * (1 - stop) ** (each - 1)
        rows = stop.logit().repeat(2), right, each.repeat(2), 2 * right - 1
        means += [WORLD["push"](*rows, sequence_mean, odds.repeat(2))]
        constants += [WORLD["push"](*rows, CONSTANT, odds.repeat(2))]
        closed += [(-stop * log(stop) / (1 - stop) - stop) * torch.tensor([-1, 1])]
    means, gap = torch.stack(means), (torch.stack(means) - torch.stack(closed)).abs().max()
    pushes = {"mean_right": means[:, 1].min(), "mean_wrong": means[:, 0].max()}
    return pushes | {"mean_gap": gap, "constant": torch.stack(constants).abs().max()}


def difficulty(seed, size=64):
    """The gradient in the logit of the success rate p, expected over groups, as a share of the true p (1 - p)."""
    torch.set_default_dtype(torch.float64)
    right, shares, closed = torch.arange(1, size), [], []  # groups of equal rewards add nothing
    rewards, mean = (torch.arange(size) < right[:, None]).double(), right / size
    advantages = [group_normalize(rewards, correction=c, eps=0) for c in (0, 1)] + [group_center(rewards)]
    for p in (0.02, 0.1, 0.5, 0.9, 0.98):
        chance = torch.tensor([comb(size, k) * p**k * (1 - p) ** (size - k) for k in range(1, size)]) / (p * (1 - p))
        shares += [torch.stack([chance @ (a * (rewards - p)).mean(-1) for a in advantages])]
        spread, left = chance @ (mean * (1 - mean)).sqrt(), 1 - 1 / size
        closed += [torch.stack([spread, spread * left**0.5, torch.tensor(left)])]
    shares, gaps = torch.stack(shares), (torch.stack(shares) - torch.stack(closed)).abs().amax(0)
    weights = {"extreme": shares[[0, -1], 1].min() / shares[2, 1], "shares": shares[:, 1:].T}
    return weights | {"std_gap": gaps[:2].max(), "centre_gap": gaps[2]}


def drift(seed):
    """Mean lengths after training, over those at the start, and the moves of the logits to stop."""
    out = {}
    for name, method in METHODS.items():
        moves, ratios = WORLD["train"](*method)
        out |= {f"{name}_wrong": ratios[-1, 0], f"{name}_right": ratios[-1, 1], f"{name}_path": ratios[::20]}
        out |= {f"{name}_wrong_moved": moves[0], f"{name}_right_moved": moves[1]}
    return out
