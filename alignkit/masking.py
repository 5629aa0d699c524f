"""Sums, means and variances over the True positions of a mask; whatever lies elsewhere is never read.

Elements are selected with `torch.where`, not multiplied away, so NaN or inf under a False mask reaches
neither value nor gradient.
"""

import math

import torch
from jaxtyping import Bool, Float, Int, Real, Shaped
from torch import Tensor


def promote(x: Shaped[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """`x` in at least float32; float64 stays float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def clip(x: Real[Tensor, "*shape"], low: float | Tensor, high: float | Tensor) -> Float[Tensor, "*shape"]:
    """max(min(x, high), low); each bound a float or a tensor."""
    return promote(x).clamp(max=high).clamp(min=low)


def finite_exp(x: Real[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """exp(x), constant just below overflow: at inf the gradient of a clipped ratio would be NaN."""
    x = promote(x)
    return x.clamp(max=math.log(torch.finfo(x.dtype).max) - 1).exp()


def masked_sum(
    x: Shaped[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], dim: int | None = None
) -> Float[Tensor, "*reduced"]:
    """Sum of `x` where `mask`; over everything, or over one axis.

    An empty selection sums to 0.
    """
    return torch.where(mask, promote(x), 0).sum(dim)


def masked_mean(
    x: Shaped[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], dim: int | None = None
) -> Float[Tensor, "*reduced"]:
    """Mean of `x` where `mask`; over everything, or over one axis.

    The mean of an empty selection is 0, so that a row without tokens stays finite.
    """
    return masked_sum(x, mask, dim) / mask.sum(dim).clamp(min=1)


def masked_var(
    x: Shaped[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], dim: int | None = None, *, correction: int = 1
) -> Float[Tensor, "*reduced"]:
    """Variance of `x` where `mask`: sum of squared deviations / (n - correction).

    `correction` is 1 for the unbiased estimate (Bessel) and 0 for the population's. With n <= correction
    elements the deviations are 0, and so is the result.
    """
    x = torch.where(mask, promote(x), 0)
    mean = masked_mean(x, mask, dim)
    deviation = x - (mean if dim is None else mean.unsqueeze(dim))
    return masked_sum(deviation**2, mask, dim) / (mask.sum(dim) - correction).clamp(min=1)


def whiten(
    x: Real[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
    *,
    correction: int = 1,
    eps: float = 1e-8,
    shift_mean: bool = True,
) -> Float[Tensor, "*shape"]:
    """(x - mean) / sqrt(var + eps) over all True positions jointly; 0 at the others.

    `shift_mean=False` adds the mean back: the scale changes, the mean stays (used for rewards).
    The defaults are TRL's; peers differ in `correction` and `eps`.

    Elsewhere: of rewards, `whiten_rewards` (TRL 0.7, torchtune).
    """
    x = torch.where(mask, promote(x), 0)
    mean, var = masked_mean(x, mask), masked_var(x, mask, correction=correction)
    white = (x - mean) * torch.rsqrt(var + eps)
    return torch.where(mask, white if shift_mean else white + mean, 0)


def lengths(mask: Bool[Tensor, "*batch time"]) -> Int[Tensor, "*batch"]:
    """Number of True positions of each row."""
    return mask.sum(-1)


def last_index(mask: Bool[Tensor, "*batch time"]) -> Int[Tensor, "*batch"]:
    """Index of the last True position of each row, -1 where there is none."""
    positions = torch.arange(mask.shape[-1], device=mask.device)
    return torch.where(mask, positions, -1).amax(-1)
