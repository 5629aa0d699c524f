"""Log-probabilities of tokens, aligned with the tokens they score.

`logps[..., t] = log p(ids[..., t] | ids[..., :t])`: the logits or hidden states at t - 1 predict token t. The shift
happens here and nowhere else; position 0, which nothing predicts, and masked positions are 0. The mean over a
row's tokens (IPO, SimPO) is `masking.masked_mean(logps, mask, -1)`.

With `sampling` the distribution is the one that was sampled: tempered, filtered and renormalised over what is left. The
token itself is always left, so that rounding at the edge of a filter cannot make what was drawn impossible.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from alignkit.masking import promote
from alignkit.sampling import Sampling, filter_logits


def token_logps(
    logits: Float[Tensor, "*batch time vocab"],
    ids: Int[Tensor, "*batch time"],
    mask: Bool[Tensor, "*batch time"],
    *,
    sampling: Sampling | None = None,
) -> Float[Tensor, "*batch time"]:
    """log_softmax(logits[t - 1])[ids[t]] where `mask[t]`, else 0.

    Elsewhere: with top-k or top-p, NeMo-RL filters again as here, slime replays the recorded nucleus; others divide by
    the whole vocabulary, which biases the ratio.
    """
    counted, logits = _predictions(logits, mask)
    picked = _picked(logits, torch.where(counted, ids[..., 1:], 0), sampling)
    return pad(torch.where(counted, picked, 0), (1, 0))


def sequence_logps(
    logits: Float[Tensor, "*batch time vocab"],
    ids: Int[Tensor, "*batch time"],
    mask: Bool[Tensor, "*batch time"],
) -> Float[Tensor, "*batch"]:
    """Sum of `token_logps` over the masked tokens: log p(answer | prompt) when the mask covers the answer."""
    return token_logps(logits, ids, mask).sum(-1)


def vocab_mean_logps(
    logits: Float[Tensor, "*batch time vocab"], mask: Bool[Tensor, "*batch time"]
) -> Float[Tensor, "*batch time"]:
    """Mean over the vocabulary of log_softmax(logits[t - 1]) where `mask[t]`, else 0; for label smoothing."""
    counted, logits = _predictions(logits, mask)
    return pad(torch.where(counted, logits.log_softmax(-1).mean(-1), 0), (1, 0))


def entropy(
    logits: Float[Tensor, "*batch time vocab"], mask: Bool[Tensor, "*batch time"], *, sampling: Sampling | None = None
) -> Float[Tensor, "*batch time"]:
    """Entropy in nats of the distribution that predicts token t, -sum_v p log p, where `mask[t]`, else 0.

    Entries with p = 0 (filtered to -inf) contribute 0.
    """
    counted, logits = _predictions(logits, mask)
    return pad(torch.where(counted, _entropies(logits, None, sampling), 0), (1, 0))


def log_sum_sq_probs(
    logits: Float[Tensor, "*batch time vocab"], mask: Bool[Tensor, "*batch time"]
) -> Float[Tensor, "*batch time"]:
    """log sum_v p(v)^2 of the distribution that predicts token t where `mask[t]`, else 0; for the weights of WPO.

    Minus the Renyi entropy of order 2, and the log of the mean probability of a token drawn from p. Zhou et al. 2024,
    arXiv:2406.11827.
    """
    counted, logits = _predictions(logits, mask)
    return pad(torch.where(counted, (2 * logits).logsumexp(-1) - 2 * logits.logsumexp(-1), 0), (1, 0))


def vocab_logps(
    logits: Float[Tensor, "*batch time vocab"], mask: Bool[Tensor, "*batch time"]
) -> Float[Tensor, "*batch time vocab"]:
    """log_softmax(logits[t - 1]) of all tokens that may stand at t where `mask[t]`, else 0.

    Divide `logits` by a temperature for that of the distribution.
    """
    counted, logits = _predictions(logits, mask)
    return pad(torch.where(counted[..., None], logits.log_softmax(-1), 0), (0, 0, 1, 0))


def top_candidates(
    logits: Float[Tensor, "*batch time vocab"], mask: Bool[Tensor, "*batch time"], *, k: int
) -> Int[Tensor, "*batch time k"]:
    """The `k` likeliest tokens at t, likeliest first, where `mask[t]`, else 0."""
    counted, logits = _predictions(logits, mask)
    return pad(torch.where(counted[..., None], logits.topk(k, -1).indices, 0), (0, 0, 1, 0))


def candidate_logps(
    logits: Float[Tensor, "*batch time vocab"],
    candidates: Int[Tensor, "*batch time k"],
    mask: Bool[Tensor, "*batch time"],
) -> Float[Tensor, "*batch time k"]:
    """log_softmax(logits[t - 1])[candidates[t]] where `mask[t]`, else 0: `token_logps` of k tokens at each position.

    `.log_softmax(-1)` of it renormalises over the candidates; `with_tail` keeps the mass of the others.
    """
    counted, logits = _predictions(logits, mask)
    candidates = torch.where(counted[..., None], candidates[..., 1:, :], 0)
    picked = logits.gather(-1, candidates) - logits.logsumexp(-1, keepdim=True)
    return pad(torch.where(counted[..., None], picked, 0), (0, 0, 1, 0))


def with_tail(logps: Float[Tensor, "*shape k"]) -> Float[Tensor, "*shape k+1"]:
    """[logps, log(1 - sum exp(logps))]: candidates and one bucket for all other tokens, which sum to 1.

    The bucket is never smaller than the rounding error of 1 (about 1e-7 in float32), so that it stays comparable where
    the candidates are all there is. A divergence of such vectors is at most that of the whole vocabulary.
    """
    logps = promote(logps)
    inside = logps.logsumexp(-1, keepdim=True).clamp(max=-torch.finfo(logps.dtype).eps)
    return torch.cat([logps, (-torch.expm1(inside)).log()], -1)


def _predictions(logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Which tokens count, and the logits that predict them; position 0 is left out."""
    counted = mask[..., 1:]
    return counted, torch.where(counted[..., None], promote(logits[..., :-1, :]), 0)


def _picked(logits: Tensor, targets: Tensor, sampling: Sampling | None = None) -> Tensor:
    logits = _sampled(logits, targets, sampling)
    return logits.gather(-1, targets[..., None]).squeeze(-1) - logits.logsumexp(-1)


def _entropies(logits: Tensor, _: Tensor | None = None, sampling: Sampling | None = None) -> Tensor:
    logps = _sampled(logits, None, sampling).log_softmax(-1)
    return -(logps.exp() * torch.where(logps > -torch.inf, logps, 0)).sum(-1)


def _sampled(logits: Tensor, targets: Tensor | None, sampling: Sampling | None) -> Tensor:
    """The logits of what could be drawn, the targets among them."""
    if sampling is None or sampling.is_plain:
        return logits
    left = filter_logits(logits, **sampling.filters)
    if targets is None:
        return left
    at = targets[..., None]
    return left.scatter(-1, at, logits.gather(-1, at) / sampling.temperature)
