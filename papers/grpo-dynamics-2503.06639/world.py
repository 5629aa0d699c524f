"""A policy over finitely many answers, right or wrong: GRPO's optimum, found numerically, and the paper's formulas."""

import torch
from torch.distributions import Binomial

from alignkit.advantages import group_normalize
from alignkit.kl import categorical
from alignkit.losses.policy import surrogate


def h(p, ref, beta, eps):
    """Success rate of the optimum after a policy with success rate p: the paper's map, of groups without end."""
    return (ref.logit() + 1 / (beta * (p * (1 - p) + eps).sqrt())).sigmoid()


def optimum(advantages, old_logps, ref_logps, beta):
    """The minimum of GRPO's expected loss with the exact KL, by natural gradients."""
    logits = old_logps
    for _ in range(60):
        leaf = logits.clone().requires_grad_()
        logps = leaf.log_softmax(-1)
        loss = old_logps.exp() @ surrogate(logps, old_logps, advantages) + beta * categorical(logps, ref_logps)
        logits = logits - torch.autograd.grad(loss, leaf)[0] / logps.detach().exp() / (2 * beta)
    return logits.softmax(-1)


def fixed_point(low, high, ref, beta, eps):
    """Of h, by bisection between low and high, and the slope of h there."""
    for _ in range(60):
        middle = (low + high) / 2
        rises = h(middle, ref, beta, eps) > middle
        low, high = torch.where(rises, middle, low), torch.where(rises, high, middle)
    leaf = low.clone().requires_grad_()
    return low, torch.autograd.grad(h(leaf, ref, beta, eps).sum(), leaf)[0]


def gap(p, size):
    """Mean advantage of a right answer less that of a wrong one, over all groups of this size; without end 1 / sd."""
    right = torch.arange(size + 1, dtype=p.dtype)
    rewards = (torch.arange(size) < right[:, None]).to(p)
    of_right = (group_normalize(rewards, correction=0, eps=1e-9) * rewards).sum(-1)
    return Binomial(size, p).log_prob(right).exp() @ of_right / (size * p * (1 - p))
