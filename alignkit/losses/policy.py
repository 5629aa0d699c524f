"""Policy-gradient losses, per token or per sequence; and what to watch while they run.

`ratio` below is exp(logps - old_logps), `advantages` a constant.
"""

from jaxtyping import Bool, Float, Real
from torch import Tensor, maximum

from alignkit.masking import clip, promote


def reinforce(logps: Float[Tensor, "*shape"], advantages: Real[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """-A log pi: Williams 1992, doi:10.1007/BF00992696."""
    return -promote(advantages) * promote(logps)


def clipped_surrogate(
    logps: Float[Tensor, "*shape"],
    old_logps: Float[Tensor, "*shape"],
    advantages: Real[Tensor, "*shape"],
    *,
    low: float | Tensor = 0.2,
    high: float | Tensor = 0.2,
) -> Float[Tensor, "*shape"]:
    """-min(ratio A, clip(ratio, 1 - low, 1 + high) A).

    Schulman et al. 2017, arXiv:1707.06347 eq. 7 (low = high); separate bounds ("clip-higher"): DAPO, Yu et al. 2025,
    arXiv:2503.14476 eq. 8.
    """
    ratio, advantages = (promote(logps) - promote(old_logps)).exp(), promote(advantages)
    return maximum(-ratio * advantages, -clip(ratio, 1 - low, 1 + high) * advantages)


def clip_fraction(
    logps: Float[Tensor, "*shape"],
    old_logps: Float[Tensor, "*shape"],
    advantages: Real[Tensor, "*shape"],
    *,
    low: float | Tensor = 0.2,
    high: float | Tensor = 0.2,
) -> Bool[Tensor, "*shape"]:
    """Where the clipped branch of `clipped_surrogate` is active, that is, where its gradient is 0."""
    ratio = (promote(logps) - promote(old_logps)).exp()
    return ((ratio > 1 + high) & (advantages > 0)) | ((ratio < 1 - low) & (advantages < 0))
