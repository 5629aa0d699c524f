"""Policy losses whose importance ratio is that of a whole answer. Advantages are one per row, unless said.

s below is the geometric mean of a row's token ratios, exp(mean of logps - old_logps over the True positions), w their
product, and [x] is x without its gradient. A result [..., 1] is one loss per row: `weights.weigh` multiplies it by the
sum of the row's weights, so that `sequence_mean` makes a mean over rows. A row without tokens has a ratio of 1.

A clip of the joint ratio needs nothing from here: it is `policy.clipped_surrogate` on `logps.sum(-1, keepdim=True)`.
"""

import torch
from jaxtyping import Bool, Float, Real
from torch import Tensor, maximum

from alignkit.masking import clip, finite_exp, lengths, masked_mean, masked_sum, promote


def gspo(
    logps: Float[Tensor, "*batch time"],
    old_logps: Float[Tensor, "*batch time"],
    advantages: Real[Tensor, "*batch"],
    mask: Bool[Tensor, "*batch time"],
    *,
    low: float | Tensor,
    high: float | Tensor,
) -> Float[Tensor, "*batch 1"]:
    """-min(s A, clip(s, 1 - low, 1 + high) A): group sequence policy optimisation.

    Zheng et al. 2025, arXiv:2507.18071 eq. 5; weigh it with `sequence_mean`. Bounds of s are a hundred times tighter
    than those of a token's ratio (3e-4 and 4e-4 in the paper).

    Elsewhere: AReaL averages over tokens afterwards, so that long answers count more.
    """
    ratio, advantages = finite_exp(_mean_log_ratio(logps, old_logps, mask)), promote(advantages)[..., None]
    return maximum(-ratio * advantages, -clip(ratio, 1 - low, 1 + high) * advantages)


def gspo_token(
    logps: Float[Tensor, "*batch time"],
    old_logps: Float[Tensor, "*batch time"],
    advantages: Real[Tensor, "*batch time"],
    mask: Bool[Tensor, "*batch time"],
    *,
    low: float | Tensor,
    high: float | Tensor,
) -> Float[Tensor, "*batch time"]:
    """-min(s_t A_t, clip(s_t, 1 - low, 1 + high) A_t) with s_t = [s] pi_t / [pi_t]; 0 where `mask` is False.

    `gspo` with an advantage for each token: Zheng et al. 2025, arXiv:2507.18071 sec. 4.3. Weighed with `sequence_mean`
    it has the value and gradient of `gspo` if they are constant over a row.

    Elsewhere: `gspo` (verl) is this one.
    """
    logps, advantages = (torch.where(mask, promote(x), 0) for x in (logps, advantages))
    ratio = finite_exp(_mean_log_ratio(logps, old_logps, mask).detach() + logps - logps.detach())
    return maximum(-ratio * advantages, -clip(ratio, 1 - low, 1 + high) * advantages)


def luspo(
    logps: Float[Tensor, "*batch time"],
    old_logps: Float[Tensor, "*batch time"],
    advantages: Real[Tensor, "*batch"],
    mask: Bool[Tensor, "*batch time"],
    *,
    low: float | Tensor,
    high: float | Tensor,
) -> Float[Tensor, "*batch 1"]:
    """Length * gspo: the length-unbiased sequence policy optimisation of Liu et al. 2026, arXiv:2602.05261.

    Weighed with `sequence_mean` it is `gspo` weighed with `sequence_sum`.

    Elsewhere: `luspo` (TRL) is that sum, which also takes per-token terms; Liger multiplies the loss by the length and
    takes the plain mean, which is this for one loss per row, but for per-token terms a mean over the padding.
    """
    return lengths(mask)[..., None] * gspo(logps, old_logps, advantages, mask, low=low, high=high)


def gmpo(
    logps: Float[Tensor, "*batch time"],
    old_logps: Float[Tensor, "*batch time"],
    advantages: Real[Tensor, "*batch"],
    mask: Bool[Tensor, "*batch time"],
    *,
    low: float | Tensor = 0.4,
    high: float | Tensor = 0.4,
) -> Float[Tensor, "*batch 1"]:
    """-A exp(mean_t c_t), with c = min(l, high) where A > 0, else max(l, -low), of l = logps - old_logps.

    The geometric mean of token ratios, each clipped in log space to [exp(-low), exp(high)] on the side that A pushes
    to: geometric-mean policy optimisation, Zhao et al. 2025, arXiv:2507.20673.

    Elsewhere: `geo_mean` (verl).
    """
    log_ratio, advantages = promote(logps) - promote(old_logps), promote(advantages)[..., None]
    clipped = torch.where(advantages > 0, log_ratio.clamp(max=high), log_ratio.clamp(min=-low))
    return -advantages * finite_exp(masked_mean(clipped, mask, -1)[..., None])


def topr(
    logps: Float[Tensor, "*batch time"],
    old_logps: Float[Tensor, "*batch time"],
    advantages: Real[Tensor, "*batch"],
    mask: Bool[Tensor, "*batch time"],
) -> Float[Tensor, "*batch time"]:
    """-A log pi_t where A >= 0, -[min(w, 1)] A log pi_t where A < 0; 0 where `mask` is False.

    Tapered off-policy REINFORCE, Le Roux et al. 2025, arXiv:2503.14286. The paper sums over a row's tokens: weigh it
    with `sequence_sum`.
    """
    advantages = promote(advantages)[..., None]
    weight = torch.where(advantages < 0, _joint_log_ratio(logps, old_logps, mask).clamp(max=0).exp(), 1)
    return _reinforce(logps, weight, advantages, mask)


def vespo(
    logps: Float[Tensor, "*batch time"],
    old_logps: Float[Tensor, "*batch time"],
    advantages: Real[Tensor, "*batch"],
    mask: Bool[Tensor, "*batch time"],
    *,
    k_pos: float | Tensor = 2.0,
    lambda_pos: float | Tensor = 3.0,
    k_neg: float | Tensor = 3.0,
    lambda_neg: float | Tensor = 2.0,
) -> Float[Tensor, "*batch time"]:
    """-[w^k exp(lambda (1 - w))] A log pi_t, (k, lambda) by the sign of A; 0 where `mask` is False.

    The weight is 1 at w = 1, largest at w = k / lambda, and vanishes towards 0 and infinity. Variational sequence-level
    soft policy optimisation, Shen et al. 2026, arXiv:2602.10693.

    Elsewhere: TRL clamps the log-ratios of tokens to 20 and w to at least 1e-8.
    """
    log_w, advantages = _joint_log_ratio(logps, old_logps, mask), promote(advantages)[..., None]
    options = (k_pos, lambda_pos), (k_neg, lambda_neg)
    positive, negative = ((k * log_w - decay * torch.expm1(log_w)).exp() for k, decay in options)
    return _reinforce(logps, torch.where(advantages > 0, positive, negative), advantages, mask)


def _reinforce(logps: Tensor, weight: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, -weight.detach() * advantages * torch.where(mask, promote(logps), 0), 0)


def _joint_log_ratio(logps: Tensor, old_logps: Tensor, mask: Tensor) -> Tensor:
    return masked_sum(promote(logps) - promote(old_logps), mask, -1)[..., None]


def _mean_log_ratio(logps: Tensor, old_logps: Tensor, mask: Tensor) -> Tensor:
    return masked_mean(promote(logps) - promote(old_logps), mask, -1)[..., None]
