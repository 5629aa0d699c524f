"""Expected gradients of KL estimates, by sums over all tokens or answers, against the gradient of the exact KL."""

from functools import partial

import torch

from alignkit.advantages import discounted_returns
from alignkit.kl import importance_weighted, k1, k2, k3, score_function
from alignkit.losses.policy import reinforce
from alignkit.masking import masked_sum
from alignkit.shaping import kl_shaped
from alignkit.testing.worlds import sequences


def slope(logits, chance, estimate, logps=lambda x: x.log_softmax(-1)):
    """Gradient of the mean of `estimate(log-probs)` with these constant chances."""
    leaf = logits.clone().requires_grad_()
    return torch.autograd.grad(chance @ estimate(logps(leaf)), leaf)[0]


def tokens(seed, step=1.0):
    """One of 20 tokens: |g - truth| / |truth|, truth = gradient of KL(pi || ref), pi drawn `step` away from ref."""
    draw = torch.Generator().manual_seed(seed)
    ref, away, aside = torch.randn(3, 20, generator=draw, dtype=torch.float64).log_softmax(-1)
    logits, old = ref + step * away, (ref + step * (away + 0.5 * aside)).log_softmax(-1)
    exact, on, off = (partial(slope, logits, chance) for chance in (ref.new_ones(20), logits.softmax(-1), old.exp()))
    truth, forward = exact(lambda x: x.exp() * (x - ref)), exact(lambda x: ref.exp() * (ref - x))
    found = {
        "k1": on(lambda x: k1(x, ref)), "k2": on(lambda x: k2(x, ref)), "k3": on(lambda x: k3(x, ref)),
        "k1_reward": on(lambda x: score_function(k1(x, ref), x)), "off_k2": off(lambda x: k2(x, ref)),
        "k3_reward": on(lambda x: score_function(k3(x, ref), x)), "off_k3": off(lambda x: k3(x, ref)),
        "off_k2_weighted": off(lambda x: importance_weighted(k2(x, ref), x.detach(), old)),
        "off_k3_weighted": off(lambda x: importance_weighted(k3(x, ref), x, old)),
    }  # fmt: skip
    out = {name: (g - truth).norm() / truth.norm() for name, g in found.items()}
    out |= {"k1_size": found["k1"].norm() / truth.norm(), "k3_forward": (found["k3"] - forward).norm() / forward.norm()}
    return out if step < 1 else out | {"k3_order": (tokens(seed, 1e-2)["k3"] / tokens(seed, 1e-3)["k3"]).log10()}


def answers(seed):
    """The same error for all answers of up to 4 tokens out of 4, and the KL of whole answers."""
    world = sequences(4, 4, seed=seed)
    logps, ref, mask = world.logps(world.logits), world.logps(world.ref_logits), world.mask
    returns = discounted_returns(kl_shaped(torch.zeros(len(ref)), k1(logps, ref), mask, coef=1.0), mask, gamma=1.0)
    on = partial(slope, world.logits, logps.sum(-1).exp(), logps=world.logps)
    truth = slope(world.logits, ref.new_ones(len(ref)), lambda x: x.sum(-1).exp() * (x - ref).sum(-1), world.logps)
    losses = {"in_reward": lambda x: reinforce(x, returns), "k2_tokens": lambda x: k2(x, ref)}
    return {k: (on(lambda x, f=f: masked_sum(f(x), mask, -1)) - truth).norm() / truth.norm() for k, f in losses.items()}


def descent(seed):
    """KL(pi || ref) left after 1,000 steps down the expected gradient of a KL loss alone, as a share."""
    (start, ref), out = torch.randn(2, 20, dtype=torch.float64).log_softmax(-1), {}
    for k in (k1, k2, k3):
        logits, path = start, []
        for _ in range(1001):
            path += [logits.softmax(-1) @ (logits.log_softmax(-1) - ref)]
            logits = logits - 4 * slope(logits, logits.softmax(-1), lambda x, k=k: k(x, ref))
        out |= {f"{k.__name__}_left": path[-1] / path[0], f"{k.__name__}_path": path[:201:5]}
    return out
