"""A gold score and proxies of several sizes, trained on which of two answers it prefers."""

from math import atan, pi, sqrt

import torch

from alignkit.kl import categorical
from alignkit.losses.reward import bradley_terry

DIM, BEND, PAIRS, RIDGE, CHUNK = 24, 0.25, 5000, 1e-3, 16


def features(*shape):
    """Those of answers of the reference policy: x and its squares, centred."""
    x = torch.randn(*shape, DIM)
    return torch.cat([x, x**2 - 1], -1)


def scores(sizes, *, groups, n):
    """Gold and proxy scores of random answers, [groups, n] and [sizes, groups, n].

    The gold score has mean 0 and variance 1, and falls far out in all directions; a proxy of size m sees m squares.
    """
    weights = torch.nn.functional.normalize(torch.randn(DIM), dim=0)
    gold = torch.cat([weights, torch.full((DIM,), -BEND)]) / sqrt(1 + 2 * DIM * BEND**2)
    pairs = features(PAIRS, 2).double()
    chosen = (pairs @ gold.double()).argmax(-1)
    difference = pairs[range(PAIRS), chosen], pairs[range(PAIRS), 1 - chosen]
    every = torch.stack([gold, *(train(*difference, DIM + size).float() for size in sizes)], -1)
    found = torch.cat([features(CHUNK, n) @ every for _ in range(groups // CHUNK)])
    return found[..., 0], found[..., 1:].movedim(-1, 0)


def train(chosen, rejected, seen):
    """A linear reward model on the first `seen` features."""
    theta = torch.zeros(2 * DIM, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(2 * DIM) < seen
    optimizer = torch.optim.LBFGS([theta], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        reward = mask * theta
        loss = bradley_terry(chosen @ reward, rejected @ reward).mean() + RIDGE * reward.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return (mask * theta).detach()


def fitted(d, slope, curve):
    """Least squares of the curve d (alpha - beta slope), where the form with slope d peaks, and R^2."""
    terms = torch.stack([d, -d * slope], -1)
    alpha, beta = torch.linalg.lstsq(terms, curve[:, None]).solution[:, 0]
    missed = d * (alpha - beta * slope) - curve
    fit = 1 - missed.square().sum() / (curve - curve.mean()).square().sum()
    return {"alpha": alpha, "beta": beta, "peak": alpha / (2 * beta), "fit": fit}


def heavy(t):
    """(expected error, KL) if the tail beyond t of an error with 3 degrees of freedom gets probability t^-0.8."""
    tail, above = (atan(sqrt(3) / t) - sqrt(3) * t / (t**2 + 3)) / pi, sqrt(3) / pi / (1 + t**2 / 3)  # P, E[X; X > t]
    new, old = torch.tensor([[t**-0.8, 1 - t**-0.8], [tail, 1 - tail]], dtype=torch.float64)
    return above * (new[0] / old[0] - new[1] / old[1]), categorical(new.log(), old.log())
