"""From scores of whole answers to rewards."""

import torch
from jaxtyping import Bool, Float, Int, Real
from torch import Tensor

from alignkit.masking import clip, last_index, promote


def kl_shaped(
    scores: Real[Tensor, "*batch"],
    kl: Float[Tensor, "*batch time"],
    mask: Bool[Tensor, "*batch time"],
    *,
    coef: float | Tensor,
) -> Float[Tensor, "*batch time"]:
    """r_t = -coef kl_t, plus the score at the last True position; 0 where `mask` is False.

    A row without a True position has nowhere to put its score and is 0. Ziegler et al. 2019, arXiv:1909.08593
    eq. 2; Ouyang et al. 2022, arXiv:2203.02155 eq. 2.
    """
    penalty = -coef * promote(kl)
    last = torch.arange(mask.shape[-1], device=mask.device) == last_index(mask)[..., None]
    return torch.where(mask, penalty + torch.where(last, promote(scores)[..., None], 0), 0)


def clip_score(scores: Real[Tensor, "*batch"], *, limit: float | Tensor) -> Float[Tensor, "*batch"]:
    """min(max(score, -limit), limit)."""
    return clip(scores, -limit, limit)


def scale_score(scores: Real[Tensor, "*batch"], std: float | Tensor, *, eps: float = 1e-8) -> Float[Tensor, "*batch"]:
    """Score / (std + eps), `std` usually that of `controllers.running_moments`."""
    return promote(scores) / (std + eps)


def normalize_score(
    scores: Real[Tensor, "*batch"], mean: float | Tensor, std: float | Tensor, *, eps: float = 1e-8
) -> Float[Tensor, "*batch"]:
    """(score - mean) / (std + eps)."""
    return (promote(scores) - mean) / (std + eps)


def missing_eos(
    scores: Real[Tensor, "*batch"],
    ids: Int[Tensor, "*batch time"],
    mask: Bool[Tensor, "*batch time"],
    *,
    eos: int,
    penalty: float | Tensor,
) -> Float[Tensor, "*batch"]:
    """Score - penalty where no True position of the row holds the token `eos`: the answer was cut off.

    The "EOS trick", detail 23 of Huang et al. 2024, arXiv:2403.17031 (after Ziegler et al. 2019, arXiv:1909.08593):
    there a score of -1 replaces the answer's own; subtracting is TRL's `missing_eos_penalty`.
    """
    ended = (mask & (ids == eos)).any(-1)
    return promote(scores) - torch.where(ended, 0.0, penalty)
