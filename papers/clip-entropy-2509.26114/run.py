"""Entropy of tabular policies under GRPO with different clips, for random rewards, which have nothing to teach."""

from math import inf

import torch
from torch.nn.functional import pad

from alignkit.advantages import group_normalize
from alignkit.logps import entropy, token_logps
from alignkit.losses.policy import clip_fraction, clipped_surrogate
from alignkit.weights import sequence_mean, weigh

CLIPS = {"none": (1.0, inf), "low": (0.2, inf), "high": (1.0, 0.2), "both": (0.2, 0.2)}  # name: (low, high)
CLIPS |= {"high_0.28": (0.2, 0.28), "high_0.5": (0.2, 0.5), "low_0.28": (0.28, 0.2), "low_0.5": (0.5, 0.2)}
CONTEXTS, ARMS, GROUP, ITERATIONS, STEPS, LR = 256, 16, 16, 40, 8, 0.5


def ceilings(seed):
    """How probable a token of positive advantage may become before it is clipped, on a fine grid."""
    grid, out = torch.linspace(0, 2, 2_000_001, dtype=torch.float64)[1:].log(), {}
    for old, high in ((0.01, 0.2), (0.9, 0.2), (0.01, 0.28)):
        stopped = clip_fraction(grid, torch.full_like(grid, old).log(), torch.ones_like(grid), low=0.2, high=high)
        out[f"{old:g}_by_{high:g}"] = grid[~stopped].max().exp()
    return out


def random_rewards(seed):
    """Rewards are fair coins, policies broad at first."""
    return trained(seed, CLIPS, torch.full((CONTEXTS, ARMS), 0.5))


def random_peaked(seed):
    """Rewards are fair coins, policies peaked."""
    return trained(seed, ("none", "low", "high", "both"), torch.full((CONTEXTS, ARMS), 0.5), scale=3.0)


def real_rewards(seed):
    """Each arm has a chance of success of its own."""
    return trained(seed, ("none", "both", "high_0.28"), torch.rand(CONTEXTS, ARMS) ** 3)


def trained(seed, clips, chances, scale=1.0):
    """GRPO: change of the mean entropy by `<clip>`, its mean over the iterations, share clipped by last steps."""
    out, mask = {}, torch.arange(CONTEXTS + 1).expand(GROUP, -1) > 0  # contexts are the steps of time of all answers
    for name, (low, high) in ((name, CLIPS[name]) for name in clips):
        torch.manual_seed(1000 + seed)  # the same for all clips, and not that of the chances
        logits, curve = (scale * torch.randn(CONTEXTS + 1, ARMS)).requires_grad_(), []
        for _ in range(ITERATIONS):
            curve.append(entropy(logits[None], mask[:1])[mask[:1]].mean().item())
            actions = logits[:-1].detach().softmax(-1).multinomial(GROUP, replacement=True)
            rewards = torch.bernoulli(chances.gather(1, actions))
            ids, advantages = pad(actions.T, (1, 0)), pad(group_normalize(rewards).T, (1, 0))
            old = token_logps(logits.expand(GROUP, -1, -1), ids, mask).detach()
            for _ in range(STEPS):
                logps = token_logps(logits.expand(GROUP, -1, -1), ids, mask)
                loss = weigh(clipped_surrogate(logps, old, advantages, low=low, high=high), sequence_mean(mask))
                logits.data -= LR * CONTEXTS * torch.autograd.grad(loss, logits)[0]
        out |= {name: curve[-1] - curve[0], f"mean_{name}": sum(curve) / len(curve), f"curve_{name}": curve}
        out[f"clipped_{name}"] = clip_fraction(logps, old, advantages, low=low, high=high)[mask].double().mean()
    return out
