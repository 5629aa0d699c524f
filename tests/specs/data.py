from itertools import islice
from typing import Any

import torch

from alignkit import data
from alignkit.testing.strategies import Source
from tests.specs.base import row


def _list_rows(s: Source) -> dict[str, Any]:
    return {"rows": [{"ids": s.integer(0, 9, n).tolist(), "mask": s.mask(n).tolist()} for n in (3, 1, 4)]}


row("data.pad", data.pad, lambda s: {"nested": [[[1, 2], [3]], [[4], []]]})
row("data.collate", data.collate, _list_rows)
row(
    "data.truncate",
    lambda ids, mask: data.truncate(ids, mask, max_length=3, keep="keep_end", bos=1),
    lambda s: {"ids": [1, *s.integer(2, 9, s.time).tolist()], "mask": [False, *s.mask(s.time).tolist()]},
)
row("data.stream", lambda rows: list(islice(data.stream(rows, batch=2, seed=1), 3)), _list_rows)
row("data.add_columns", lambda rows: data.add_columns(rows, lambda b: {"n": b["mask"].sum(-1)}, batch=2), _list_rows)
row("data.shuffled", lambda rows: list(islice(data.shuffled(rows, batch=2, seed=1), 3)), _list_rows)
row(
    "data.concat", lambda a, b: data.concat([a, b]), lambda s: {"a": {"x": s.real(2, 3)}, "b": {"x": s.real(1, s.time)}}
)
row("data.deal", lambda sizes: data.deal(sizes, 2), lambda s: {"sizes": s.integer(0, 9, 4).tolist()})
row(
    "data.token_parts",
    lambda batch: data.token_parts(batch, 5),
    lambda s: {"batch": {"ids": s.integer(0, 9, 3, s.time), "mask": s.mask(3, s.time)}},
)
row("data.mix", lambda seed: data.mix(seed, 3), lambda s: {"seed": 7})
row(
    "data.by_step",
    lambda x, y: data.by_step({"x": x, "y": y, "cond_z": x}, 2, generator=torch.Generator().manual_seed(0)),
    lambda s: {"x": s.real(3, 4, s.time), "y": s.real(3)},
)
