"""Losses on demonstrations."""

from jaxtyping import Float
from torch import Tensor

from alignkit.masking import promote


def nll(logps: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """-log p: the negative log-likelihood of each token."""
    return -promote(logps)


def smoothed_nll(
    logps: Float[Tensor, "*shape"], vocab_mean_logps: Float[Tensor, "*shape"], *, smoothing: float | Tensor
) -> Float[Tensor, "*shape"]:
    """-(1 - s) log p(token) - s mean_v log p(v), the cross-entropy against a smoothed one-hot target.

    Szegedy et al. 2016, arXiv:1512.00567 sec. 7, with the uniform prior; the mean is `logps.vocab_mean_logps`.
    """
    return -(1 - smoothing) * promote(logps) - smoothing * promote(vocab_mean_logps)
