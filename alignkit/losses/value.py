"""Losses of value functions, per token."""

from jaxtyping import Bool, Float
from torch import Tensor, maximum

from alignkit import masking
from alignkit.masking import promote


def squared(values: Float[Tensor, "*shape"], returns: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """(V - R)^2 / 2."""
    return 0.5 * (promote(values) - promote(returns)) ** 2


def clipped_value(
    values: Float[Tensor, "*shape"],
    old_values: Float[Tensor, "*shape"],
    returns: Float[Tensor, "*shape"],
    *,
    clip: float | Tensor,
) -> Float[Tensor, "*shape"]:
    """max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2) / 2.

    OpenAI baselines; Huang et al. 2022, "The 37 Implementation Details of Proximal Policy Optimization", detail 9.
    """
    return maximum(squared(values, returns), squared(_clipped(values, old_values, clip), returns))


def value_clip_fraction(
    values: Float[Tensor, "*shape"],
    old_values: Float[Tensor, "*shape"],
    returns: Float[Tensor, "*shape"],
    *,
    clip: float | Tensor,
) -> Bool[Tensor, "*shape"]:
    """Where the clipped branch of `clipped_value` is the larger."""
    return squared(_clipped(values, old_values, clip), returns) > squared(values, returns)


def _clipped(values: Tensor, old_values: Tensor, clip: float | Tensor) -> Tensor:
    old_values = promote(old_values)
    return masking.clip(values, old_values - clip, old_values + clip)
