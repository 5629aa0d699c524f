"""A Plackett-Luce model with linear rewards on a few prompts: its rankings, and estimates from counts of them."""

from itertools import permutations

import torch
from torch.autograd import grad
from torch.autograd.functional import hessian, jacobian

TRUTH, PROMPTS, STEPS = torch.tensor([1.0, -0.5, 0.25], dtype=torch.float64), 8, 8


def rankings(k):
    """Features of the answers of each prompt in each order, best first, [rankings, k, 3], and how likely each is."""
    answers = torch.randn(PROMPTS, k, len(TRUTH), generator=torch.Generator().manual_seed(k), dtype=torch.float64)
    ranked = answers[:, torch.tensor(list(permutations(range(k))))]
    weight = (ranked @ TRUTH).exp()
    chance = (weight / weight.flip(-1).cumsum(-1).flip(-1)).prod(-1) / PROMPTS
    return ranked.flatten(0, 1), chance.flatten()


def moments(loss, ranked, chance):
    """Mean gradient, mean product of gradients and mean Hessian, at the truth."""
    each = jacobian(lambda theta: loss(ranked @ theta), TRUTH)
    return chance @ each, each.T @ (chance[:, None] * each), hessian(lambda theta: chance @ loss(ranked @ theta), TRUTH)


def estimates(loss, ranked, counts):
    """Where the mean loss is least, for each row of counts, by Newton's method."""
    theta = torch.zeros(len(counts), len(TRUTH), dtype=torch.float64)
    for _ in range(STEPS):
        theta.requires_grad_()
        total = (counts * loss(torch.einsum("mkd,rd->rmk", ranked, theta))).sum()
        (slope,) = grad(total, theta, create_graph=True)
        rows = [grad(slope[:, i].sum(), theta, retain_graph=True)[0] for i in range(len(TRUTH))]
        theta = (theta - torch.linalg.solve(torch.stack(rows, 1), slope)).detach()
    return theta
