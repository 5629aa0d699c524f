"""Losses of reward models, one number per comparison."""

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from alignkit.masking import promote


def bradley_terry(
    chosen: Float[Tensor, "*batch"],
    rejected: Float[Tensor, "*batch"],
    *,
    margin: float | Float[Tensor, "*batch"] | Float[Tensor, ""] = 0.0,
) -> Float[Tensor, "*batch"]:
    """-log sigmoid(r_w - r_l - margin).

    Stiennon et al. 2020, arXiv:2009.01325 sec. 3.4; margin as in Touvron et al. 2023, arXiv:2307.09288 eq. 2. Raises
    ValueError unless the rewards, and a margin given as a tensor, have one shape, as [B] against [B, 1] would
    compare every answer with every other.
    """
    shapes = [tuple(x.shape) for x in (chosen, rejected, margin) if isinstance(x, Tensor) and x.dim()]
    if len(set(shapes)) > 1:
        raise ValueError(f"chosen, rejected and margin must have one shape, not {shapes}")
    return -logsigmoid(promote(chosen) - promote(rejected) - margin)


def centering(chosen: Float[Tensor, "*batch"], rejected: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """(r_w + r_l)^2: add a small multiple to keep rewards centred on 0.

    Eisenstein et al. 2023, arXiv:2312.09244 eq. 2. Raises ValueError unless the rewards have one shape.
    """
    if chosen.shape != rejected.shape:
        raise ValueError(f"chosen and rejected must have one shape, not {tuple(chosen.shape)}, {tuple(rejected.shape)}")
    return (promote(chosen) + promote(rejected)) ** 2
