"""The loss on labels that SFT and iterative SFT share."""

from torch import Tensor

from alignkit.logps import token_logps, vocab_mean_logps
from alignkit.losses.supervised import nll, smoothed_nll


def label_nll(logits: Tensor, labels: Tensor, mask: Tensor, smoothing: float) -> Tensor:
    """Negative log-likelihoods [B, T] of labels where `mask`, smoothed if asked; logits [B, T, V] predict the next."""
    logps = token_logps(logits, labels, mask)
    return smoothed_nll(logps, vocab_mean_logps(logits, mask), smoothing=smoothing) if smoothing else nll(logps)
