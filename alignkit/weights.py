"""Aggregations as data: a mask goes in, weights come out, and the loss is `weigh(per_token, weights)`.

Compute the weights on the mask of the *whole* optimizer step (all micro-batches, all ranks), then slice them
with the rows: sums over slices add up to the sum over the whole, so neither the micro-batch size nor the
number of processes changes the gradient. Weights are float64 (float32 on devices without it) and take the
dtype of what they weigh.

Rows are the leading axes of the mask. Means of per-row means (`sequence_mean`, `group_mean`) run over the rows
that have a token, as an empty row has no mean; sums (`sequence_sum`, `constant_length`, `row_mean`) count every
row, as an empty one sums to 0.
"""

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from alignkit.masking import promote


def _real(mask: Tensor) -> Tensor:
    return mask.to(torch.float32 if mask.device.type == "mps" else torch.float64)


def token_mean(mask: Bool[Tensor, "*batch time"]) -> Float[Tensor, "*batch time"]:
    """1 / N for each of the N True tokens of the batch.

    DAPO, Yu et al. 2025, arXiv:2503.14476 eq. 8; also the usual choice for SFT.
    """
    return _real(mask) / mask.sum().clamp(min=1)


def sequence_mean(mask: Bool[Tensor, "*batch time"]) -> Float[Tensor, "*batch time"]:
    """Mean over rows of the mean over a row's tokens: 1 / (rows with a token * tokens of the row).

    GRPO, Shao et al. 2024, arXiv:2402.03300 eq. 3.
    """
    per_row = _real(mask) / mask.sum(-1, keepdim=True).clamp(min=1)
    return per_row / mask.any(-1).sum().clamp(min=1)


def sequence_sum(mask: Bool[Tensor, "*batch time"]) -> Float[Tensor, "*batch time"]:
    """Mean over rows of the sum over a row's tokens: 1 / rows. The unbiased policy gradient of REINFORCE."""
    return _real(mask) / max(mask[..., 0].numel(), 1)


def constant_length(mask: Bool[Tensor, "*batch time"], *, length: float) -> Float[Tensor, "*batch time"]:
    """1 / (rows * length), `length` a constant of the run such as the longest allowed answer.

    Dr. GRPO, Liu et al. 2025, arXiv:2503.20783 sec. 3.2.
    """
    return sequence_sum(mask) / length


def group_mean(mask: Bool[Tensor, "rows *inner time"], *, size: int) -> Float[Tensor, "rows *inner time"]:
    """Mean over groups of the mean over a group's tokens; a group is `size` consecutive rows of the first axis.

    Raises ValueError if the rows do not divide into groups of `size`.
    """
    if size < 1 or mask.shape[0] % size:
        raise ValueError(f"size={size} does not divide the mask's {mask.shape[0]} rows into whole groups")
    groups = mask.reshape(mask.shape[0] // size, -1)
    return sequence_mean(groups).reshape(mask.shape)


def row_mean(mask: Bool[Tensor, "rows *inner time"]) -> Float[Tensor, "rows"]:
    """1 / B for each entry of the first axis: one weight per example or preference pair (DPO, reward models)."""
    rows = mask.shape[0]
    return _real(mask.new_ones(rows)) / max(rows, 1)


def weigh(x: Shaped[Tensor, "*shape"], weights: Float[Tensor, "*weights"]) -> Float[Tensor, ""]:
    """sum(x * weights), reading `x` only where the weight is not 0.

    `x` may have size 1 along an axis of `weights` (a per-row loss against per-token weights); any other
    difference in shape raises ValueError, because broadcasting would count elements twice.
    """
    if x.dim() != weights.dim() or any(n not in (1, w) for n, w in zip(x.shape, weights.shape)):
        raise ValueError(
            f"x has shape {tuple(x.shape)} but weights {tuple(weights.shape)}: give the loss the shape of its "
            "weights (size 1 where it is constant), or use the aggregation made for it, e.g. row_mean for [B]"
        )
    x = promote(x)
    weights = weights.to(x.dtype)
    return torch.where(weights != 0, x * weights, 0).sum()
