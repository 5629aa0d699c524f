"""Policy gradients of answers that another policy sampled, by enumeration of all answers of a small language model."""

import math

import torch

from alignkit.importance import sequence_log_ratio, truncated
from alignkit.losses.policy import reinforce
from alignkit.testing.worlds import reward_loss, sequences

CAP, MISMATCHES = 2.0, (0.25, 0.5, 1.0)  # the latter: standard deviation of the sampler's logits around the trainer's
WEIGHTS = {
    "none": lambda log_ratio, mask: torch.ones_like(log_ratio),
    "token_is": lambda log_ratio, mask: truncated(log_ratio, cap=math.inf),
    "token_tis": lambda log_ratio, mask: truncated(log_ratio, cap=CAP),
    "sequence_is": lambda log_ratio, mask: truncated(sequence_log_ratio(log_ratio, mask), cap=math.inf),
    "sequence_tis": lambda log_ratio, mask: truncated(sequence_log_ratio(log_ratio, mask), cap=CAP),
}


def enumeration(seed):
    """`<weights>_bias_<mismatch>` over |g|, `_cosine_` with g and total `_variance_` of one answer's gradient."""
    world, out = sequences(vocab=4, time=4, seed=seed), {}
    true = torch.func.grad(lambda logits: reward_loss(world.logps(logits).sum(-1), world))(world.logits).flatten()
    for mismatch in (0.0, *MISMATCHES):
        sampler = world.logits + mismatch * 2 * (world.old_logits - world.logits)
        sampler_logps = world.logps(sampler)
        chance = sampler_logps.sum(-1).exp()
        for name, weights in WEIGHTS.items():
            grads = gradients(world, sampler_logps, weights)
            mean = chance @ grads
            out[f"{name}_bias_{mismatch:g}"] = (mean - true).norm() / true.norm()
            out[f"{name}_cosine_{mismatch:g}"] = mean @ true / mean.norm() / true.norm()
            out[f"{name}_variance_{mismatch:g}"] = chance @ (grads - mean).square().sum(-1)
    out["sequence_is_bias"] = max(out[f"sequence_is_bias_{x:g}"] for x in MISMATCHES)
    out["no_mismatch"] = max(out[f"{name}_bias_0"] for name in WEIGHTS)
    out["token_tis_share"] = out["token_tis_bias_0.5"] / out["none_bias_0.5"]
    out["sequence_tis_share"] = out["sequence_tis_bias_0.5"] / out["none_bias_0.5"]
    return out


def gradients(world, sampler_logps, weights):
    """Of each answer's loss, -sum_t w_t r log pi_t: [answers, parameters]."""

    def losses(logits):
        logps = world.logps(logits)
        w = weights(logps - sampler_logps, world.mask)
        return torch.where(world.mask, w * reinforce(logps, world.rewards[:, None]), 0).sum(-1)

    return torch.func.jacrev(losses)(world.logits).flatten(1)
