"""Mean and variance of policy gradients with several baselines, by sums over all groups of answers."""

from itertools import product

import torch
from torch.autograd.functional import jacobian

from alignkit.advantages import group_center, group_normalize, leave_one_out, remax
from alignkit.losses.policy import reinforce


def groups(seed):
    """One prompt with 5 answers, policy and rewards drawn; all groups of k = 2 and 4 of them."""
    logits, drawn = torch.randn(2, 5, dtype=torch.float64)
    rewards = 2 + 0.5 * drawn
    estimators = {
        "none": lambda r: r, "rloo": leave_one_out, "centre": group_center, "grpo": group_normalize,
        "remax": lambda r: remax(r, rewards[logits.argmax()].expand_as(r)),
    }  # fmt: skip
    truth, out = -jacobian(lambda x: x.softmax(-1) @ rewards, logits), {}
    for k in (2, 4):
        members = torch.tensor(list(product(range(5), repeat=k)))
        chance, seen = logits.softmax(-1)[members].prod(-1), rewards[members]
        others = (seen.sum(-1, keepdim=True) - seen) / (k - 1)
        out[f"formula{k}"] = (leave_one_out(seen) - (seen - others)).abs().max()
        for name, advantage in estimators.items():
            a = advantage(seen)
            each = jacobian(lambda x, a=a, m=members: reinforce(x.log_softmax(-1)[m], a).mean(-1), logits)
            mean = chance @ each
            scale = mean @ truth / (truth @ truth)
            out[f"{name}{k}_scale_gap"] = abs(scale - (1 if name != "centre" else 1 - 1 / k))
            out[f"{name}{k}_bias"] = (mean - truth).norm() / truth.norm()
            out[f"{name}{k}_off_axis"] = (mean - scale * truth).norm() / (scale * truth).norm()
            out[f"{name}{k}_variance"] = chance @ ((each - mean) ** 2).sum(-1) / truth.norm() ** 2
    return out


def arms(seed):
    """Two arms of rewards 1 > r > 0, the first with chance p: where the greedy baseline has less variance than none."""
    grid = (torch.arange(64, dtype=torch.float64) + 0.5) / 64
    p, r = torch.cartesian_prod(grid, grid).T
    logits, rewards = torch.stack([p, 1 - p], -1).log(), torch.stack([torch.ones_like(r), r], -1)
    greedy = rewards.gather(-1, logits.argmax(-1, keepdim=True))
    spread = []
    for advantages in (rewards, remax(rewards, greedy.expand_as(rewards))):
        leaf = logits.clone().requires_grad_()
        losses = reinforce(leaf.log_softmax(-1), advantages)
        each = torch.stack([torch.autograd.grad(loss.sum(), leaf, retain_graph=True)[0] for loss in losses.T])
        chance = leaf.detach().softmax(-1).T[..., None]
        spread += [(chance * (each - (chance * each).sum(0)) ** 2).sum((0, 2))]
    less, told = spread[1] < spread[0], p < 0.5 + 0.5 * r / (1 - r)
    return {"mismatches": (less != told).sum(), "worse": 1 - less.double().mean(), "map": less.view(64, 64).long()}
