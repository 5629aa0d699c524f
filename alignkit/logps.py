"""Log-probabilities of tokens, aligned with the tokens they score.

`logps[..., t] = log p(ids[..., t] | ids[..., :t])`: the logits or hidden states at t - 1 predict token t. The shift
happens here and nowhere else; position 0, which nothing predicts, and masked positions are 0. The mean over a
row's tokens (IPO, SimPO) is `masking.masked_mean(logps, mask, -1)`.

With `sampling` the distribution is the one that was sampled: tempered, filtered and renormalised over what is left. The
token itself is always left, so that rounding at the edge of a filter cannot make what was drawn impossible.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import linear, pad

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


def head_logps(
    hidden: Float[Tensor, "*batch time dim"],
    weight: Float[Tensor, "vocab dim"],
    ids: Int[Tensor, "*batch time"],
    mask: Bool[Tensor, "*batch time"],
    *,
    bias: Float[Tensor, "vocab"] | None = None,
    chunk: int = 512,
    sampling: Sampling | None = None,
) -> Float[Tensor, "*batch time"]:
    """`token_logps(hidden @ weight.T + bias, ids, mask)` without ever holding [..., T, V].

    The head runs on `chunk` positions at a time, only on those that count, and again in the backward pass.
    Works under `grad`, `vmap`, `jvp` and double backward (under a transform on every position, as shapes must
    not depend on data).
    """
    counted = mask[..., 1:]
    targets = torch.where(counted, ids[..., 1:], 0)
    return _head(partial(_picked, sampling=sampling), hidden, weight, bias, targets, counted, chunk)


def head_entropy(
    hidden: Float[Tensor, "*batch time dim"],
    weight: Float[Tensor, "vocab dim"],
    mask: Bool[Tensor, "*batch time"],
    *,
    bias: Float[Tensor, "vocab"] | None = None,
    chunk: int = 512,
    sampling: Sampling | None = None,
) -> Float[Tensor, "*batch time"]:
    """`entropy(hidden @ weight.T + bias, mask)` without ever holding [..., T, V]; see `head_logps`."""
    counted = mask[..., 1:]
    return _head(partial(_entropies, sampling=sampling), hidden, weight, bias, counted.long(), counted, chunk)


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


_Statistic: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def _head(
    statistic: _Statistic,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    counted: Tensor,
    chunk: int,
) -> Tensor:
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1 position")
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
    hidden = hidden[..., :-1, :]
    if torch._C._are_functorch_transforms_active():  # shapes must not depend on the mask here
        rows = torch.where(counted[..., None], hidden, 0).reshape(-1, hidden.shape[-1])
        out = _Chunked.apply(rows, weight, bias, targets.reshape(-1), statistic, chunk)
        return pad(torch.where(counted, out.reshape(counted.shape), 0), (1, 0))
    where = counted.nonzero(as_tuple=True)
    out = _Chunked.apply(hidden[where], weight, bias, targets[where], statistic, chunk)
    return pad(torch.zeros(counted.shape, dtype=out.dtype, device=out.device).index_put(where, out), (1, 0))


class _Chunked(torch.autograd.Function):
    """statistic(rows @ weight.T + bias, targets), `chunk` rows at a time; logits are recomputed when needed."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        rows: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, statistic: _Statistic, chunk: int
    ) -> Tensor:
        parts = zip(rows.split(chunk), targets.split(chunk))
        return torch.cat([statistic(promote(linear(x, weight, bias)), t) for x, t in parts])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.statistic, ctx.chunk = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        kind = output.device.type  # what is recomputed must be what was computed
        ctx.autocast = {"device_type": kind, "dtype": torch.get_autocast_dtype(kind)}
        ctx.autocast["enabled"] = torch.is_autocast_enabled(kind)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, bias, targets = ctx.saved_tensors
        wanted = [i for i in range(3) if ctx.needs_input_grad[i]]
        d_rows: list[Tensor] = []
        sums: dict[int, Tensor] = {}
        for x, t, g in zip(rows.split(ctx.chunk), targets.split(ctx.chunk), grad.split(ctx.chunk)):
            inputs = [x, weight, bias]
            with torch.autocast(**ctx.autocast):
                vjp = torch.func.vjp(_at(ctx.statistic, t, inputs, wanted), *(inputs[i] for i in wanted))[1]
            for i, d in zip(wanted, vjp(g)):
                if i == 0:
                    d_rows.append(d)
                else:
                    sums[i] = sums[i] + promote(d) if i in sums else promote(d)
        d_weight, d_bias = (sums[i].to(x.dtype) if i in sums else None for i, x in ((1, weight), (2, bias)))
        return torch.cat(d_rows) if d_rows else None, d_weight, d_bias, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        rows, weight, bias, targets = ctx.saved_tensors
        d_rows, d_weight, d_bias = (
            torch.zeros_like(x) if d is None else d for x, d in zip((rows, weight, bias), tangents)
        )
        out = []
        for x, t, dx in zip(rows.split(ctx.chunk), targets.split(ctx.chunk), d_rows.split(ctx.chunk)):
            # forward-mode AD does not nest, so transpose the (linear) vjp instead
            inputs = [x, weight, bias]
            value, vjp = torch.func.vjp(_at(ctx.statistic, t, inputs, [0, 1, 2]), *inputs)[:2]
            out.append(torch.func.vjp(vjp, torch.zeros_like(value))[1]((dx, d_weight, d_bias))[0])
        return torch.cat(out)


def _at(statistic: _Statistic, targets: Tensor, inputs: list[Tensor], places: list[int]) -> Callable[..., Tensor]:
    """statistic(rows @ weight.T + bias, targets) as a function of those `inputs` that stand at `places`."""

    def head(*values: Tensor) -> Tensor:
        rows, weight, bias = (dict(zip(places, values)).get(i, x) for i, x in enumerate(inputs))
        return statistic(promote(linear(rows, weight, bias)), targets)

    return head
