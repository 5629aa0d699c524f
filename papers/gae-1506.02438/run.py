"""Policy gradients from `gae` in random worlds, against the gradient of the return by dynamic programming."""

import runpy
from pathlib import Path

import torch
from torch.nn.functional import pad

from alignkit.advantages import gae

own = runpy.run_path(str(Path(__file__).with_name("world.py")))
LAMBDAS, PADDING = (0.0, 0.5, 0.8, 0.95, 1.0), 5.0  # PADDING: rewards and values after the end, not to be read


def enumeration(seed):
    """All episodes of a small world: bias and variance without sampling error."""
    torch.set_default_dtype(torch.float64)
    return measured(own["draw"](states=3, actions=2, time=4))


def sampled(seed):
    """200,000 episodes of a larger one."""
    torch.set_default_dtype(torch.float64)
    return measured(own["draw"](states=6, actions=3, time=12), number=200_000)


def measured(world, number=0):
    """For exact and for wrong values at each lambda: bias over |g|, total variance, and the mean along g less 1."""
    chance, states, actions = world.episodes(number)
    true, mask, exact = world.gradient(), states < len(world.logits), world.values(world.logits)
    critics, out = {"exact": exact, "wrong": exact + 2 * torch.randn_like(exact)}, {"mixture": 0.0}
    rewards = pad(world.rewards, (0, 0, 0, 1), value=PADDING)[states, actions]
    discount = world.gamma ** torch.arange(world.time)
    for name, critic in critics.items():
        values = pad(critic, (0, 1), value=PADDING)[torch.arange(world.time), states]
        for lam in LAMBDAS:
            advantages, _ = gae(rewards, values, mask, gamma=world.gamma, lam=lam)
            if not number:
                gaps = advantages - own["mixture"](rewards * mask, values * mask, world.gamma, lam)
                out["mixture"] = max(out["mixture"], gaps[mask].abs().max().item())
            grads = scores(advantages * discount, states, actions, world.logits)
            mean, along = chance @ grads, grads @ true.flatten() / true.square().sum()
            out[f"{name}_bias_{lam:g}"] = (mean - true.flatten()).norm() / true.norm()
            out[f"{name}_variance_{lam:g}"] = chance @ (grads - mean).square().sum(-1)
            out[f"{name}_along_{lam:g}"] = chance @ along - 1
            out[f"{name}_along_{lam:g}_se"] = along.std() / len(along) ** 0.5
        out[f"{name}_bias"] = max(out[f"{name}_bias_{lam:g}"] for lam in LAMBDAS)
    return out | {"ended": chance @ (~mask.all(-1)).double()}


def scores(weights, states, actions, logits):
    """sum_t weight_t grad log pi(a_t | s_t) of each episode; 0 weight at the end state, whose number is clamped."""
    at = states.clamp(max=len(logits) - 1) * logits.shape[-1] + actions
    taken = torch.zeros(len(states), logits.numel()).scatter_add(1, at, weights).unflatten(1, logits.shape)
    return (taken - taken.sum(-1, keepdim=True) * logits.softmax(-1)).flatten(1)
