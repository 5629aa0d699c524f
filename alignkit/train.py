"""One exact optimizer step, and the handling of columns around it."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from alignkit.data import mix, token_parts
from alignkit.types import Aggregate, Aggregates, Batch, Metrics


def split(batch: Batch, rows: int | None) -> Iterator[Batch]:
    """The batch in parts of `rows` rows (the last may be smaller), all of it if None."""
    size = _rows(batch)
    if rows is not None and rows < 1:
        raise ValueError(f"rows={rows} must be at least 1, or None for the whole batch")
    step = rows or max(size, 1)
    for i in range(0, max(size, 1), step):
        yield {name: column[i : i + step] for name, column in batch.items()}


def split_tokens(batch: Batch, tokens: int | None, *, least: int = 1) -> Iterator[Batch]:
    """The batch in the parts of `data.token_parts`, all of it if `tokens` is None."""
    if tokens is None:
        yield batch
        return
    for part in token_parts(batch, tokens, least=least):
        yield {name: column[part] for name, column in batch.items()}


def minibatches(
    batch: Batch, size: int, *, epochs: int = 1, generator: torch.Generator | None = None
) -> Iterator[Batch]:
    """`epochs` passes over the rows in parts of `size`, each pass in a new random order.

    Raises ValueError if `size` does not divide the rows: a smaller last part would be an optimizer step of its own.
    """
    _parts(batch, size)
    for _ in range(epochs):
        order = torch.randperm(_rows(batch), generator=generator)
        for part in order.split(size):
            place = part.sort().values  # rows of one prompt that follow one another still do
            yield {name: column[place.to(column.device)] for name, column in batch.items()}


def rollouts(
    collect: Callable[[int], Batch], state: dict[str, Any], *, size: int, epochs: int = 1, seed: int, start: int = 0
) -> Iterator[Batch]:
    """On-policy minibatches for ever from step `start` on: rollout after rollout, each `epochs` times in new orders.

    `collect(i)` makes rollout i, all of one number of rows, when its first minibatch is due. It lies in
    `state["rollout"]`, so a stream that is continued with its state goes on in the midst of one. See `minibatches`.
    """
    if epochs < 1:
        raise ValueError(f"epochs={epochs} must be at least 1")
    if not start:
        state["rollout"] = collect(0)
    while True:
        i, done = divmod(start, epochs * _parts(state["rollout"], size))
        if start and not done:
            del state["rollout"]  # not to hold two
            state["rollout"] = collect(i)
        generator = torch.Generator().manual_seed(mix(seed, i))
        for part in islice(minibatches(state["rollout"], size, epochs=epochs, generator=generator), done, None):
            yield part
            start += 1


def infer(fn: Callable[..., Any], *columns: Tensor, rows: int | None = None, **named: Tensor) -> Any:
    """`fn(*columns, **named)` without gradient, `rows` rows at a time, joined again along the first axis.

    A module, or a method of one, runs in eval mode on the module's device, and is left as it was. `fn` returns a tensor
    or a tuple of tensors.
    """
    parts, outputs = split({str(i): x for i, x in enumerate(columns)} | named, rows), []
    with torch.no_grad(), evaluating(fn) as device:
        for part in parts:
            part = {name: x.to(device) if device else x for name, x in part.items()}
            positional = [part.pop(str(i)) for i in range(len(columns))]
            outputs.append(fn(*positional, **part))
    if isinstance(outputs[0], tuple):
        return tuple(torch.cat(x) for x in zip(*outputs))
    return torch.cat(outputs)


def joint_weights(masks: Sequence[Tensor], aggregate: Aggregate) -> list[Tensor]:
    """The weights of several masks [B_i, ..., T_i] as of one batch, cut apart again."""
    time = max(mask.shape[-1] for mask in masks)
    whole = torch.cat([pad(mask, (0, time - mask.shape[-1])) for mask in masks])
    parts = aggregate(whole).split([len(mask) for mask in masks])
    return [w[..., : m.shape[-1]] if w.dim() == m.dim() else w for w, m in zip(parts, masks)]


def weighted(
    batches: Sequence[Batch],
    aggregate: Aggregates,
    gather: Callable[[list[Tensor]], tuple[list[list[Tensor]], int]] = lambda masks: ([masks], 0),
) -> list[Batch]:
    """The batches of one optimizer step, each with its columns of weights.

    `aggregate` is one aggregation, which makes the column "weights" of the column "mask", or a dict of names to
    aggregations or to pairs (mask column, aggregation). `gather` returns the lists of masks of all processes for the
    list of this process, and its own place among them.
    """
    batches = [dict(batch) for batch in batches]
    table = aggregate if isinstance(aggregate, dict) else {"weights": aggregate}
    for name, entry in table.items():
        column, fn = entry if isinstance(entry, tuple) else ("mask", entry)
        missing = [sorted(batch) for batch in batches if column not in batch]
        if missing:
            raise ValueError(f"aggregate needs the column {column!r}; the batch has {missing[0]}")
        if name in batches[0]:
            raise ValueError(f"aggregate makes the column {name!r}, which the batch has already")
        gathered, own = gather([batch[column] for batch in batches])
        flat = joint_weights([mask for masks in gathered for mask in masks], fn)
        offset = sum(len(masks) for masks in gathered[:own])
        for batch, weights in zip(batches, flat[offset:]):
            batch[name] = weights
    return batches


def update(
    loss_fn: Callable[..., tuple[Tensor, Metrics]],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    *,
    aggregate: Aggregates,
    micro: int | None = None,
    micro_tokens: int | None = None,
    max_grad_norm: float | None = 1.0,
) -> Metrics:
    """One optimizer step on `batch`, exact whatever the micro-batch size.

    `loss_fn(model, **columns) -> (scalar, metrics)` gets the batch's columns and those that `aggregate` makes of the
    whole batch's mask, `micro` rows at a time and of these at most `micro_tokens` tokens (`data.token_parts`);
    gradients and metrics of the parts add up. Returns the summed metrics
    with "loss" and "grad_norm" (before clipping), as tensors on the device. Raises TypeError if the columns are not
    the loss's arguments, and if it does not return a scalar and a dict.
    """
    (batch,) = weighted([batch], aggregate)
    check_columns(loss_fn, batch)
    optimizer.zero_grad()
    totals: Metrics = {}
    for part in (part for rows in split(batch, micro) for part in split_tokens(rows, micro_tokens)):
        loss, metrics = check_loss(loss_fn(model, **part))
        loss.backward()
        add_metrics(totals, {"loss": loss, **metrics})
    norm = nn.utils.clip_grad_norm_(model.parameters(), float("inf") if max_grad_norm is None else max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return totals | {"grad_norm": norm.detach()}


def add_metrics(totals: Metrics, metrics: Mapping[str, Tensor]) -> None:
    """Add `metrics` to `totals` in place, without gradient and without leaving the device."""
    for name, value in metrics.items():
        value = value.detach()
        totals[name] = totals[name] + value if name in totals else value


def check_columns(loss_fn: Callable[..., Any], batch: Mapping[str, Any]) -> None:
    """Raise TypeError unless the batch's columns are the keyword arguments of `loss_fn`."""
    parameters = list(inspect.signature(loss_fn).parameters.values())[1:]
    names = {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    needed = {p.name for p in parameters if p.name in names and p.default is p.empty}
    missing, unknown = sorted(needed - set(batch)), sorted(set(batch) - names)
    if any(p.kind == p.VAR_KEYWORD for p in parameters):
        unknown = []
    if missing or unknown:
        raise TypeError(
            f"loss_fn's arguments after the model are the batch's columns: it takes {sorted(names)}, the batch has "
            f"{sorted(batch)}" + f"; missing: {missing}" * bool(missing) + f"; unknown: {unknown}" * bool(unknown)
        )


def check_loss(out: Any) -> tuple[Tensor, Metrics]:
    """`out` if it is (scalar tensor, dict of scalar tensors), TypeError if not."""
    if not (isinstance(out, tuple) and len(out) == 2 and isinstance(out[0], Tensor) and isinstance(out[1], Mapping)):
        raise TypeError(f"loss_fn must return (loss, metrics), a scalar tensor and a dict, not {type(out).__name__}")
    for name, value in {"the loss": out[0], **out[1]}.items():
        if not isinstance(value, Tensor) or value.dim():
            what = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise TypeError(f"loss_fn returned {name} as {what}; reduce it to a scalar tensor with weigh(x, weights)")
    return out[0], dict(out[1])


@contextmanager
def evaluating(fn: Any) -> Iterator[torch.device | None]:
    """A module in eval mode, and its device; anything else as it is."""
    fn = getattr(fn, "__self__", fn)  # of a method
    if not isinstance(fn, nn.Module):
        yield None
        return
    modes = [(module, module.training) for module in fn.modules()]
    fn.eval()
    try:
        yield next((p.device for p in fn.parameters()), None)
    finally:
        for module, mode in modes:
            module.training = mode


def _parts(batch: Batch, size: int) -> int:
    rows = _rows(batch)
    if size < 1 or rows % size:
        raise ValueError(f"size={size} does not divide the batch's {rows} rows into whole minibatches")
    return rows // size


def _rows(batch: Batch) -> int:
    sizes = {name: len(column) for name, column in batch.items()}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"the columns of a batch must have one number of rows, not {sizes}")
    return next(iter(sizes.values()))
