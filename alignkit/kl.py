"""Estimators of KL(pi || ref), one number per token, un-reduced.

With l = log pi(x) - log ref(x) and x drawn from pi: Schulman, "Approximating KL divergence", 2020
(http://joschu.net/blog/kl-approx.html). Which one is unbiased depends on where it is used: k1 and k3 have the
right expectation; as a *loss*, k1 has zero expected gradient, k2 the gradient of KL(pi || ref), k3 that of
KL(ref || pi).
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from alignkit.masking import promote


def k1(logps: Float[Tensor, "*shape"], ref_logps: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """l: unbiased, high variance, takes both signs."""
    return promote(logps) - promote(ref_logps)


def k2(logps: Float[Tensor, "*shape"], ref_logps: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """l^2 / 2: biased, low variance, never negative (TRL's "mse")."""
    return 0.5 * k1(logps, ref_logps) ** 2


def k3(logps: Float[Tensor, "*shape"], ref_logps: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """exp(-l) - 1 + l: unbiased, low variance, never negative."""
    log_ratio = k1(logps, ref_logps)
    return torch.expm1(-log_ratio) + log_ratio


def abs(logps: Float[Tensor, "*shape"], ref_logps: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """|l|: a penalty rather than an estimate (TRL's "abs")."""
    return k1(logps, ref_logps).abs()


def full(
    logits: Float[Tensor, "*batch time vocab"],
    ref_logits: Float[Tensor, "*batch time vocab"],
    mask: Bool[Tensor, "*batch time"],
) -> Float[Tensor, "*batch time"]:
    """sum_v pi(v) (log pi(v) - log ref(v)): the exact KL of the distribution that predicts each token.

    Aligned with the tokens like log-probs: element t is the KL of the predictions made from ids[:t], and 0
    where `mask` is False. Entries with pi(v) = 0 contribute 0.
    """
    from_previous = torch.where(mask[..., 1:, None], promote(logits[..., :-1, :]), 0).log_softmax(-1)
    ref = torch.where(mask[..., 1:, None], promote(ref_logits[..., :-1, :]), 0).log_softmax(-1)
    possible = from_previous > -torch.inf
    terms = torch.where(possible, from_previous, 0) - torch.where(possible, ref, 0)
    return torch.nn.functional.pad((from_previous.exp() * terms).sum(-1), (1, 0))
