"""Rows of Python lists to columns: padding, truncation, and a stream that can start anywhere.

A row is a dict such as `{"ids": [5, 2, 9], "mask": [False, True, True]}`; for a preference pair each is a list of two.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alignkit.types import Batch, Rows


def collate(rows: Sequence[Mapping[str, Any]]) -> Batch:
    """Rows to columns with the rows as the first axis; the innermost lists are padded on the right (0 or False).

    Raises ValueError if rows differ in their names.
    """
    names = list(rows[0])
    for i, row in enumerate(rows):
        if set(row) != set(names):
            raise ValueError(f"row {i} has the columns {sorted(row)}, row 0 has {sorted(names)}")
    return {name: pad([row[name] for row in rows]) for name in names}


def pad(nested: Any) -> Tensor:
    """Nested lists of numbers (or tensors) to a tensor, the innermost lists filled up on the right with 0 or False.

    Only the last axis may be ragged; anything else raises ValueError.
    """
    if not isinstance(nested, list):
        return torch.as_tensor(nested)
    if not nested:
        return torch.zeros(0, dtype=torch.long)
    if isinstance(nested[0], int | float):  # bool too
        return torch.tensor(nested)
    parts = [pad(x) for x in nested]
    if parts[0].dim() == 0:
        return torch.stack(parts)
    if len({x.shape[:-1] for x in parts}) > 1:
        raise ValueError(f"only the last axis may be ragged, not {sorted({tuple(x.shape) for x in parts})}")
    time = max(x.shape[-1] for x in parts)
    dtype = reduce(torch.promote_types, [x.dtype for x in parts if x.numel()] or [parts[0].dtype])
    return torch.stack([torch.nn.functional.pad(x.to(dtype), (0, time - x.shape[-1])) for x in parts])


class Cut(NamedTuple):
    """`ids` and `mask` within the limit; `lost` is the number of True tokens that no longer fit."""

    ids: list[int]
    mask: list[bool]
    lost: int


def truncate(
    ids: list[int],
    mask: list[bool],
    *,
    max_length: int,
    keep: str,
    bos: int | None = None,
    overflow: int | None = None,
    text: bool = False,
) -> Cut:
    """Shorten a row: first its prompt (the tokens before the first True), then what remains, from its end.

    `keep="keep_end"` drops the prompt's first tokens (but not a `bos`), `"keep_start"` its last; one token of the
    prompt always stays, as nothing predicts position 0. Of a `text`, a row without a prompt, `keep` says which end
    stays. `overflow` is by default what this row has too many; give both rows of a pair the same, so that they lose the
    same tokens of their prompt.
    """
    if keep not in ("keep_end", "keep_start"):
        raise ValueError(f'keep={keep!r} must be "keep_end" or "keep_start"')
    if max_length < 2:
        raise ValueError(f"max_length={max_length} must be at least 2: one token to read and one to predict")
    head = int(ids[:1] == [bos])
    cut = max(len(ids) - max_length, 0) if overflow is None else overflow
    if text:
        start, cut = head, cut if keep == "keep_end" else 0
    else:
        prompt = mask.index(True) if True in mask else len(mask)
        cut = max(min(cut, prompt - max(head, 1)), 0)
        start = head if keep == "keep_end" else prompt - cut
    kept = (mask[:start] + mask[start + cut :])[:max_length]
    ids = (ids[:start] + ids[start + cut :])[:max_length]
    kept[:1] = [False] * len(kept[:1])
    return Cut(ids, kept, sum(mask[1:]) - sum(kept))


def shuffled(
    rows: Rows, *, batch: int, seed: int, start: int = 0, rank: int = 0, world: int = 1
) -> Iterator[list[Any]]:
    """Lists of `batch` shuffled rows for ever, the first being that of step `start`; the rows may be anything.

    Epoch after epoch in a new order each, without a break at their ends, so every row is seen equally often. List
    k depends on `seed` and k alone. With several processes each takes its share of the list, in order.
    """
    if not len(rows):
        raise ValueError("rows is empty: there is nothing to stream")
    if batch < 1 or batch % world:
        raise ValueError(f"batch={batch} must be a positive multiple of the {world} processes")
    order, epoch = None, -1
    while True:
        share = batch // world
        places = range(start * batch + rank * share, start * batch + (rank + 1) * share)
        picked = []
        for place in places:
            if order is None or place // len(rows) != epoch:
                epoch = place // len(rows)
                order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(mix(seed, epoch)))
            picked.append(rows[int(order[place % len(rows)])])
        yield picked
        start += 1


def stream(rows: Rows, *, batch: int, seed: int, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Batch]:
    """The columns of `shuffled` rows, padded: an endless stream of batches that begins with that of step `start`."""
    return map(collate, shuffled(rows, batch=batch, seed=seed, start=start, rank=rank, world=world))


def deal(sizes: Sequence[int], shares: int) -> list[list[int]]:
    """The places of `sizes` in `shares` lists of equal length and about equal sums, each in ascending order.

    The largest first, to one share after another and back again.
    """
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    turn = [*range(shares), *reversed(range(shares))]
    dealt: list[list[int]] = [[] for _ in range(shares)]
    for place, i in enumerate(order):
        dealt[turn[place % len(turn)]].append(i)
    return [sorted(share) for share in dealt]


def token_parts(batch: Batch, tokens: int, *, least: int = 1) -> list[list[int]]:
    """The rows of a batch in parts of at most `tokens` tokens, but of one row at least, in at least `least` parts.

    A row's tokens are those up to the last that counts, of both answers of a pair. Rows that follow one another with
    one prompt stay together where they can, as it is then read once; beyond that, rows of one length do.
    """
    if not {"ids", "mask"} <= set(batch):
        raise ValueError(f"tokens={tokens} needs the columns ids and mask; the batch has {sorted(batch)}")
    if tokens < 1 or least > len(batch["mask"]):
        raise ValueError(f"tokens={tokens} must be at least 1, and least={least} at most the number of rows")
    mask = batch["mask"].flatten(1, -2) if batch["mask"].dim() > 2 else batch["mask"][:, None]
    ids, here = batch["ids"].reshape(mask.shape), torch.arange(mask.shape[-1], device=mask.device)
    sizes = torch.where(mask, here + 1, 0).amax(-1).sum(-1).tolist()
    prompt = torch.where(mask, here, mask.shape[-1]).amin((1, 2))
    alike = ((ids[1:] == ids[:-1]) | (here >= prompt[1:, None, None])).all((1, 2)) & (prompt[1:] == prompt[:-1])
    runs = [[0]]
    for i, same in enumerate(alike.tolist(), 1):
        runs[-1].append(i) if same else runs.append([i])
    parts: list[list[int]] = []
    room = 0
    for run in sorted(runs, key=lambda run: -max(sizes[i] for i in run)):
        fresh = sum(sizes[i] for i in run) <= tokens  # a run that fits into one part is not cut
        for i in run:
            if not parts or room < (sum(sizes[j] for j in run) if fresh and i == run[0] else sizes[i]):
                parts.append([])
                room = tokens
            parts[-1].append(i)
            room -= sizes[i]
    while len(parts) < least:
        largest = max((part for part in parts if len(part) > 1), key=lambda part: sum(sizes[i] for i in part))
        parts.append(largest[len(largest) // 2 :])
        del largest[len(largest) // 2 :]
    return parts


def concat(batches: Sequence[Batch]) -> Batch:
    """Batches below one another; columns are padded on the right of their last axis to a common length."""
    return {name: _concat([batch[name] for batch in batches]) for name in batches[0]}


def _concat(columns: Sequence[Tensor]) -> Tensor:
    if columns[0].dim() < 2:
        return torch.cat(list(columns))
    time = max(x.shape[-1] for x in columns)
    return torch.cat([torch.nn.functional.pad(x, (0, time - x.shape[-1])) for x in columns])


def add_columns(rows: Rows, fn: Callable[[Batch], Batch], *, batch: int) -> list[dict[str, Any]]:
    """The rows with the new columns of `fn(columns)`, computed `batch` rows at a time (e.g. reference log-probs)."""
    out: list[dict[str, Any]] = []
    for i in range(0, len(rows), batch):
        part = [dict(rows[j]) for j in range(i, min(i + batch, len(rows)))]
        columns = collate(part)
        new = {name: column.cpu() for name, column in fn(columns).items() if name not in columns}
        out += [row | {name: column[j] for name, column in new.items()} for j, row in enumerate(part)]
    return out


def mix(seed: int, i: int) -> int:
    """A seed of its own for part `i` of a run of this seed."""
    return (seed * 1_000_003 + i) % 2**63


def by_step(b: Batch, k: int, *, fraction: float = 1.0, generator: torch.Generator | None = None) -> Batch:
    """Trajectories [R, T, ...] as rows of `k` denoising steps, [R T' / k, k, ...], in random order.

    Of each row T' = int(T * fraction) random steps stay; a micro-batch then need not hold all of an image's. Columns of
    one axis and those named `cond_*` belong to every step and are repeated. Raises ValueError if the others differ in R
    or T, or if `k` does not divide T'.
    """
    shapes = {name: tuple(x.shape[:2]) for name, x in b.items() if x.dim() > 1 and not name.startswith("cond_")}
    if len(set(shapes.values())) != 1:
        raise ValueError(f"the columns with steps, all of several axes but cond_*, must be [R, T, ...], not {shapes}")
    ((rows, time),) = set(shapes.values())
    kept = int(time * fraction)
    if k < 1 or not 1 <= kept <= time or kept % k:
        raise ValueError(
            f"fraction={fraction} of {time} steps are {kept}, which must be 1 to {time} and a multiple of k={k}"
        )
    order = torch.rand(rows, time, generator=generator).argsort(-1)[:, :kept]

    def cut(x: Tensor) -> Tensor:
        row = torch.arange(rows, device=x.device)[:, None]
        return x[row, order.to(x.device)].reshape(-1, k, *x.shape[2:])

    return {name: cut(x) if name in shapes else x.repeat_interleave(kept // k, 0) for name, x in b.items()}
