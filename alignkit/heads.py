"""The last layer of a language model, a chunk of positions at a time: statistics of logits that are never held whole.

Each function here equals one of `logps` (or a divergence) on `head.logits(hidden)`, in value and gradient, without
[..., T, V]: the head runs only on the positions that count, a chunk at a time, and again in the backward pass. They
work under `grad`, `vmap`, `jvp` and double backward (under a transform on every position, as shapes must not depend on
data). `chunk` is by default as many positions as have 2^22 logits, and at least 32 (512 on an accelerator).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import linear, pad

from alignkit.logps import _entropies, _picked
from alignkit.masking import promote
from alignkit.sampling import Sampling

LOGITS, ROWS = 2**22, {"cpu": 32}
"""Of a chunk: logits, but at least as many rows (512 on accelerators, which fewer leave idle)."""


class Head(NamedTuple):
    """logits = cap(scale (x W^T + bias)), where cap(z) = softcap tanh(z / softcap), or z without a `softcap`."""

    weight: Tensor
    """[V, d]"""
    bias: Tensor | None = None
    """[V]"""
    scale: float = 1.0
    """Of Cohere and Granite, and of what is sampled: one over the temperature."""
    softcap: float | None = None
    """Of Gemma."""

    def logits(self, x: Tensor) -> Tensor:
        """Logits [..., V] in at least float32 of hidden states [..., d]."""
        z = promote(linear(x, self.weight, self.bias))
        z = z if self.scale == 1 else z * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


def head_logps(
    hidden: Float[Tensor, "*batch time dim"],
    head: Head,
    ids: Int[Tensor, "*batch time"],
    mask: Bool[Tensor, "*batch time"],
    *,
    sampling: Sampling | None = None,
    chunk: int | None = None,
) -> Float[Tensor, "*batch time"]:
    """`logps.token_logps(head.logits(hidden), ids, mask)`."""
    targets = torch.where(mask[..., 1:], ids[..., 1:], 0)
    return _where(mask, partial(row_logps, sampling=sampling, chunk=chunk), hidden, head, targets)


def head_entropy(
    hidden: Float[Tensor, "*batch time dim"],
    head: Head,
    mask: Bool[Tensor, "*batch time"],
    *,
    sampling: Sampling | None = None,
    chunk: int | None = None,
) -> Float[Tensor, "*batch time"]:
    """`logps.entropy(head.logits(hidden), mask)`."""

    def entropies(x: Tensor, head: Head) -> Tensor:
        return _chunked(partial(_entropies, sampling=sampling), [x], [head], chunk)

    return _where(mask, entropies, hidden, head)


def head_candidate_logps(
    hidden: Float[Tensor, "*batch time dim"],
    head: Head,
    candidates: Int[Tensor, "*batch time k"],
    mask: Bool[Tensor, "*batch time"],
    *,
    chunk: int | None = None,
) -> Float[Tensor, "*batch time k"]:
    """`logps.candidate_logps(head.logits(hidden), candidates, mask)`."""
    targets = torch.where(mask[..., 1:, None], candidates[..., 1:, :], 0)

    def picked(x: Tensor, head: Head, targets: Tensor) -> Tensor:
        return _chunked(_candidates, [x, targets], [head], chunk)

    return _where(mask, picked, hidden, head, targets)


def head_top_candidates(
    hidden: Float[Tensor, "*batch time dim"],
    head: Head,
    mask: Bool[Tensor, "*batch time"],
    *,
    k: int,
    chunk: int | None = None,
) -> Int[Tensor, "*batch time k"]:
    """`logps.top_candidates(head.logits(hidden), mask, k=k)`."""
    size = _size(chunk, [head])

    @torch.no_grad()
    def top(x: Tensor, head: Head) -> Tensor:
        return torch.cat([head.logits(part).topk(k, -1).indices for part in x.split(size)])

    return _where(mask, top, hidden, head)


def head_divergence(
    hidden: Float[Tensor, "*batch time dim"],
    head: Head,
    teacher_hidden: Float[Tensor, "*batch time teacher_dim"],
    teacher_head: Head,
    mask: Bool[Tensor, "*batch time"],
    *,
    divergence: Callable[[Tensor, Tensor], Tensor],
    chunk: int | None = None,
) -> Float[Tensor, "*batch time"]:
    """`divergence(log-probs, the teacher's)` where `mask`, else 0, such as `distillation.reverse_kl`.

    The two vocabularies must be the same; ValueError if they are of different sizes.
    """
    if len(head.weight) != len(teacher_head.weight):
        raise ValueError(
            f"teacher_head has a vocabulary of {len(teacher_head.weight)} tokens, head one of {len(head.weight)}: a "
            "divergence needs the same"
        )

    def compared(x: Tensor, heads: tuple[Head, Head], y: Tensor) -> Tensor:
        return _chunked(partial(_divergences, divergence=divergence), [x, y], heads, chunk)

    return _where(mask, compared, hidden, (head, teacher_head), teacher_hidden[..., :-1, :])


def row_logps(
    x: Float[Tensor, "rows dim"],
    head: Head,
    targets: Int[Tensor, "rows"],
    *,
    sampling: Sampling | None = None,
    chunk: int | None = None,
) -> Float[Tensor, "rows"]:
    """log p(targets[i]) as hidden state `x[i]` predicts it."""
    if sampling is not None and not sampling.is_filtered and head.softcap is None:
        head, sampling = head._replace(scale=head.scale / sampling.temperature), None
    return _chunked(_logps if sampling is None else partial(_picked, sampling=sampling), [x, targets], [head], chunk)


def row_measures(
    x: Float[Tensor, "rows dim"],
    head: Head,
    targets: Int[Tensor, "rows"],
    *,
    sampling: Sampling | None = None,
    chunk: int | None = None,
) -> tuple[Float[Tensor, "rows"], Float[Tensor, "rows"]]:
    """(log p(targets[i]), entropy in nats) as hidden state `x[i]` predicts it, with the head run once."""
    both = _chunked(partial(_both, sampling=sampling), [x, targets], [head], chunk)
    return both[:, 0], both[:, 1]


def _logps(logits: Tensor, targets: Tensor) -> Tensor:
    """The statistic that has a backward pass written out."""
    return _picked(logits, targets)


def _both(logits: Tensor, targets: Tensor, sampling: Sampling | None) -> Tensor:
    return torch.stack([_picked(logits, targets, sampling), _entropies(logits, None, sampling)], -1)


def _candidates(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.gather(-1, targets) - logits.logsumexp(-1, keepdim=True)


def _divergences(logits: Tensor, other: Tensor, divergence: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    return divergence(logits.log_softmax(-1), other.log_softmax(-1))


def _where(mask: Tensor, fn: Callable[..., Tensor], hidden: Tensor, head: Any, *columns: Tensor) -> Tensor:
    """`fn(rows of hidden, head, *rows of columns)` of the positions before those that count, put at these, else 0."""
    counted, hidden = mask[..., 1:], hidden[..., :-1, :]
    if torch._C._are_functorch_transforms_active():  # shapes must not depend on the mask here
        flat = [torch.where(_like(counted, x), x, 0).flatten(0, counted.dim() - 1) for x in (hidden, *columns)]
        out = fn(flat[0], head, *flat[1:])
        out = out.reshape(*counted.shape, *out.shape[1:])
        out = torch.where(_like(counted, out), out, 0)
    else:
        where = counted.nonzero(as_tuple=True)
        out = fn(hidden[where], head, *(x[where] for x in columns))
        out = out.new_zeros(*counted.shape, *out.shape[1:]).index_put(where, out)
    return pad(out, (0, 0) * (out.dim() - counted.dim()) + (1, 0))


def _like(mask: Tensor, x: Tensor) -> Tensor:
    return mask.reshape(*mask.shape, *[1] * (x.dim() - mask.dim()))


def _size(chunk: int | None, heads: Sequence[Head]) -> int:
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1 position")
    least = ROWS.get(heads[0].weight.device.type, 512)
    return chunk or max(LOGITS // sum(len(head.weight) for head in heads), least)


@dataclass(frozen=True)
class _Statistic:
    """`fn(logits of each head, *other columns)` as a function of tensors alone."""

    fn: Callable[..., Tensor]
    heads: tuple[tuple[bool, float, float | None], ...]
    """Of each whether it has a bias, its scale and its softcap."""
    columns: int

    def made(self, tensors: Sequence[Tensor]) -> list[Head]:
        """The heads with these weights and biases."""
        rest = iter(tensors)
        return [Head(next(rest), next(rest) if biased else None, scale, cap) for biased, scale, cap in self.heads]

    def __call__(self, *inputs: Tensor) -> Tensor:
        columns, heads = inputs[: self.columns], self.made(inputs[self.columns :])
        return self.fn(*(head.logits(x) for head, x in zip(heads, columns)), *columns[len(heads) :])

    @property
    def is_logps(self) -> bool:
        """Whether passes are written out for it, which no transform goes through."""
        plain = self.fn is _logps and self.heads[0][2] is None
        return plain and not torch._C._are_functorch_transforms_active()


def _chunked(fn: Callable[..., Tensor], columns: Sequence[Tensor], heads: Sequence[Head], chunk: int | None) -> Tensor:
    """`fn(logits, *other columns)` by chunks; the first columns are the hidden states of the heads."""
    tensors = [x for head in heads for x in (head.weight, head.bias) if x is not None]
    forms = tuple((head.bias is not None, head.scale, head.softcap) for head in heads)
    statistic = _Statistic(fn, forms, len(columns))
    out: Tensor = _Chunked.apply(statistic, _size(chunk, heads), *columns, *tensors)
    return out


class _Chunked(torch.autograd.Function):
    """statistic(*columns, *tensors), `chunk` rows of the columns at a time; logits are recomputed when needed."""

    generate_vmap_rule = True

    @staticmethod
    def forward(statistic: _Statistic, chunk: int, *inputs: Tensor) -> Tensor:
        call = partial(_logps_forward, statistic) if statistic.is_logps else statistic
        return torch.cat([call(*part) for part in _parts(statistic, chunk, inputs)])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.statistic, ctx.chunk, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        kind = output.device.type  # what is recomputed must be what was computed
        ctx.autocast = {"device_type": kind, "dtype": torch.get_autocast_dtype(kind)}
        ctx.autocast["enabled"] = torch.is_autocast_enabled(kind)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, n = ctx.saved_tensors, ctx.statistic.columns
        wanted = [i for i in range(len(inputs)) if ctx.needs_input_grad[i + 2]]
        if ctx.statistic.is_logps and not torch.is_grad_enabled():
            grads = _logps_backward(ctx, grad, wanted)
        else:
            grads = {}
            for part, g in zip(_parts(ctx.statistic, ctx.chunk, inputs), grad.split(ctx.chunk)):
                with torch.autocast(**ctx.autocast):
                    vjp = torch.func.vjp(_at(ctx.statistic, part, wanted), *(part[i] for i in wanted))[1]
                for i, d in zip(wanted, vjp(g)):
                    if i < n:
                        grads.setdefault(i, []).append(d)
                    else:
                        grads[i] = grads[i] + promote(d) if i in grads else promote(d)
        whole = {i: torch.cat(d) if i < n else d.to(inputs[i].dtype) for i, d in grads.items()}
        return None, None, *(whole.get(i) for i in range(len(inputs)))

    @staticmethod
    def jvp(ctx: Any, _: None, __: None, *tangents: Tensor | None) -> Tensor:
        inputs = ctx.saved_tensors
        places = [i for i, x in enumerate(inputs) if x.is_floating_point()]
        moves = [torch.zeros_like(x) if d is None else d for x, d in zip(inputs, tangents)]
        out = []
        parts = (_parts(ctx.statistic, ctx.chunk, x) for x in (inputs, moves))
        for part, move in zip(*parts):
            # forward-mode AD does not nest, so transpose the (linear) vjp instead
            value, vjp = torch.func.vjp(_at(ctx.statistic, part, places), *(part[i] for i in places))[:2]
            out.append(torch.func.vjp(vjp, torch.zeros_like(value))[1](tuple(move[i] for i in places))[0])
        return torch.cat(out)


def _parts(statistic: _Statistic, chunk: int, inputs: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """The inputs with the columns cut into chunks."""
    n = statistic.columns
    return [(*part, *inputs[n:]) for part in zip(*(x.split(chunk) for x in inputs[:n]))]


def _at(statistic: _Statistic, inputs: Sequence[Tensor], places: list[int]) -> Callable[..., Tensor]:
    """The statistic as a function of those `inputs` that stand at `places`."""

    def at(*values: Tensor) -> Tensor:
        given = dict(zip(places, values))
        return statistic(*(given.get(i, x) for i, x in enumerate(inputs)))

    return at


def _logps_forward(statistic: _Statistic, *inputs: Tensor) -> Tensor:
    """The statistic with the logsumexp in place of the logits; to the last bit what `_both` has."""
    x, targets, *tensors = inputs
    logits = statistic.made(tensors)[0].logits(x)
    peak, picked = logits.amax(-1, keepdim=True), logits.gather(-1, targets[:, None])
    return (picked - logits.sub_(peak).exp_().sum(-1, keepdim=True).log_().add_(peak))[:, 0]


def _logps_backward(ctx: Any, grad: Tensor, wanted: list[int]) -> dict[int, Any]:
    """Of scale (x W^T + bias): with E the one-hot targets, d logits = grad (E - softmax), in place and summed in place.

    The gradient scales the rows of x, not those of the logits, which leaves one pass over them.
    """
    x, targets, *tensors = ctx.saved_tensors
    with torch.autocast(**ctx.autocast):
        kind = linear(x[:0], tensors[0][:0]).dtype
    (head,), total = ctx.statistic.made([y.to(kind) for y in tensors]), torch.promote_types(kind, torch.float32)
    sums = {i: torch.zeros(y.shape, dtype=total, device=y.device) for i, y in enumerate(tensors, 2) if i in wanted}
    d_rows = []
    for rows, at, g in zip(x.split(ctx.chunk), targets.split(ctx.chunk), grad.split(ctx.chunk)):
        minus = head.logits(rows.to(kind)).softmax(-1)
        minus.scatter_add_(-1, at[:, None], minus.new_full((len(at), 1), -1.0))
        g, minus = (-head.scale * g)[:, None], minus.to(kind)
        if 0 in wanted:
            d_rows.append((g * promote(minus @ head.weight)).to(x.dtype))
        moved = (g * promote(rows)).to(kind)
        if 2 in wanted and kind == total:
            sums[2].addmm_(minus.T, moved)
        elif 2 in wanted:
            sums[2] += minus.T @ moved
        if 3 in wanted:
            sums[3] += promote(minus).T @ g[:, 0]
    return sums | ({0: d_rows} if 0 in wanted else {})
