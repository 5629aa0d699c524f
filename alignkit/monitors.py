"""What to watch while a policy learns: how far an update goes, what is sampled, and signs of reward hacking.

Metrics are sums of what is weighed like a loss, so those of micro-batches add up. With `token_mean` and `row_mean` of
the step's mask they are means, whatever weighs the loss.
"""

import torch
from jaxtyping import Bool, Float, Real
from torch import Tensor

from alignkit.kl import k3
from alignkit.masking import finite_exp, lengths, masked_sum, promote
from alignkit.types import Batch, Metrics
from alignkit.weights import weigh


def policy_metrics(
    logps: Float[Tensor, "*batch time"],
    old_logps: Float[Tensor, "*batch time"],
    advantages: Real[Tensor, "*batch #time"],
    mask: Bool[Tensor, "*batch time"],
    tokens: Float[Tensor, "*batch time"],
    rows: Float[Tensor, "*batch"],
    *,
    rewards: Real[Tensor, "*batch"],
    sampler_logps: Float[Tensor, "*batch time"] | None = None,
    ref_logps: Float[Tensor, "*batch time"] | None = None,
    **columns: Tensor,
) -> Metrics:
    """What a policy gradient on sampled answers is watched by, weighed with `tokens` or `rows` as in `weigh_each`.

    Of the update: `ratio` = exp(logps - old_logps), `approx_kl` of the old policy to the new (k3), and `advantage`, its
    size |A|. Of the answers: `reward`, and `length` in tokens. With `ref_logps` the `kl` of the policy that sampled to
    the reference (k3). With `sampler_logps` how far what sampled computes from it: `sampler_gap`, the size of the
    difference of log-probs, and `sampler_kl` (k3), both 0 for the same numbers. Any other of `columns`, such as
    `entropy` or `truncated`, is a metric as it is.
    """
    signals = {
        "reward": rewards,
        "length": lengths(mask),
        "advantage": promote(advantages).abs(),
        "ratio": finite_exp(promote(logps) - promote(old_logps)),
        "approx_kl": k3(old_logps, logps),
    }
    if ref_logps is not None:
        signals["kl"] = k3(old_logps, ref_logps)
    if sampler_logps is not None:
        signals["sampler_gap"] = (promote(old_logps) - promote(sampler_logps)).abs()
        signals["sampler_kl"] = k3(sampler_logps, old_logps)
    return weigh_each(signals | columns, tokens, rows)


def zero_variance(rewards: Real[Tensor, "*batch group"]) -> Bool[Tensor, "*batch group"]:
    """Whether all rewards of its group are equal, for each member: with group baselines it teaches nothing.

    Its mean is the share of such groups. `filters.dynamic_sampling` keeps the others.

    Elsewhere: `frac_reward_zero_std` (TRL).
    """
    return (rewards == rewards[..., :1]).all(-1, keepdim=True).expand(rewards.shape)


def weigh_each(signals: Batch, *weights: Tensor) -> Metrics:
    """`weights.weigh` of each signal with those weights that have as many axes, such as tokens [B, T] and rows [B].

    Raises ValueError unless exactly one of the weights fits each signal.
    """
    shapes, by_axes = [tuple(w.shape) for w in weights], {w.dim(): w for w in weights}
    if len(by_axes) < len(weights):
        raise ValueError(f"weights of shapes {shapes}: give one for each number of axes, e.g. of tokens and of rows")
    for name, x in signals.items():
        if x.dim() not in by_axes:
            raise ValueError(f"the signal {name!r} has shape {tuple(x.shape)}, which no weights of {shapes} fit")
    return {name: weigh(x, by_axes[x.dim()]) for name, x in signals.items()}


def correlation(x: Real[Tensor, "*batch n"], y: Real[Tensor, "*batch n"]) -> Float[Tensor, "*batch"]:
    """Pearson's correlation of `x` and `y` along the last axis; 0 where either is constant.

    Of scores [..., G] and `masking.lengths`, within groups: whether the longer of two answers to the same prompt gets
    more, which most of a policy's gain may come from: Singhal et al. 2023, arXiv:2310.03716.
    """
    return (_direction(x) * _direction(y)).sum(-1)


def frontier_point(
    scores: Real[Tensor, "*batch"], kl: Float[Tensor, "*batch time"], mask: Bool[Tensor, "*batch time"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """(mean over rows of the row's sum of kl, mean score): where a policy stands between reference and reward.

    Gao et al. 2022, arXiv:2210.10760, plot the score against the square root of this distance.
    """
    return masked_sum(kl, mask, -1).mean(), promote(scores).mean()


def on_frontier(kl: Real[Tensor, "*batch n"], scores: Real[Tensor, "*batch n"]) -> Bool[Tensor, "*batch n"]:
    """Whether no other point of the row has a score at least as high for a KL at most as large, one of them strictly.

    The points are `frontier_point` of policies or of moments of a run. Duplicates do not exclude each other.
    """
    kl, scores = promote(kl), promote(scores)
    nearer, higher = kl[..., None, :] - kl[..., None], scores[..., None, :] - scores[..., None]
    dominates = (nearer <= 0) & (higher >= 0) & ((nearer < 0) | (higher > 0))
    return ~dominates.any(-1)


def _direction(x: Tensor) -> Tensor:
    """The deviations from the mean, with norm 1; exactly 0 if they all are."""
    x = promote(x)
    x = x - x[..., :1]  # the mean of equal numbers is off by rounding, that of zeros is not
    x = x - x.mean(-1, keepdim=True)
    square = (x**2).sum(-1, keepdim=True)
    return x * torch.where(square > 0, square, 1).rsqrt()
