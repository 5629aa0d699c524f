from torch import Tensor

from alignkit import heads
from alignkit.heads import Head
from alignkit.losses.distillation import reverse_kl
from alignkit.testing.strategies import DIM, VOCAB, Source
from tests.specs.base import row


def _head(s: Source) -> dict[str, Tensor]:
    return {"hidden": s.tokens(DIM), "weight": s.real(VOCAB, DIM), "bias": s.real(VOCAB), "mask": s.mask()}


LAWS = "padding garbage rows alone vmap dtype gradcheck"
COMMON = {"per_token": True, "fixed": ("weight", "bias"), "diff": ("hidden", "weight", "bias"), "exact": False}

row(
    "heads.head_logps",
    lambda hidden, weight, bias, ids, mask: heads.head_logps(hidden, Head(weight, bias), ids, mask, chunk=3),
    lambda s: _head(s) | {"ids": s.ids()},
    LAWS,
    tokens={"hidden": 1, "ids": 0},
    **COMMON,
)
row(
    "heads.head_entropy",
    lambda hidden, weight, bias, mask: heads.head_entropy(hidden, Head(weight, bias, 2.0, 3.0), mask, chunk=3),
    _head,
    LAWS,
    tokens={"hidden": 1},
    **COMMON,
)
# below, the time axis is moved to where the laws expect it
row(
    "heads.head_candidate_logps",
    lambda hidden, weight, bias, candidates, mask: (
        heads.head_candidate_logps(hidden, Head(weight, bias), candidates, mask, chunk=3).mT
    ),
    lambda s: _head(s) | {"candidates": s.integer(0, VOCAB, *s.lead, s.time, 2)},
    LAWS,
    tokens={"hidden": 1, "candidates": 0},
    **COMMON,
)
row(
    "heads.head_top_candidates",
    lambda hidden, weight, bias, mask: heads.head_top_candidates(hidden, Head(weight, bias), mask, k=2, chunk=3).mT,
    _head,
    "padding garbage rows alone vmap",
    tokens={"hidden": 1},
    per_token=True,
    fixed=("weight", "bias"),
)
row(
    "heads.head_divergence",
    lambda hidden, weight, bias, teacher, mask: heads.head_divergence(
        hidden, Head(weight, bias), teacher, Head(-weight), mask, divergence=reverse_kl, chunk=3
    ),
    lambda s: _head(s) | {"teacher": s.tokens(DIM)},
    LAWS,
    tokens={"hidden": 1, "teacher": 1},
    **COMMON,
)


def _rows(s: Source) -> dict[str, Tensor]:
    n = max(s.time, 1)
    return {"x": s.real(n, DIM), "weight": s.real(VOCAB, DIM), "targets": s.integer(0, VOCAB, n)}


row(
    "heads.row_logps",
    lambda x, weight, targets: heads.row_logps(x, Head(weight, None, 2.0), targets, chunk=3),
    _rows,
    "gradcheck",
    diff=("x", "weight"),
)
row(
    "heads.row_measures",
    lambda x, weight, targets: heads.row_measures(x, Head(weight), targets, chunk=3),
    _rows,
    "gradcheck",
    diff=("x", "weight"),
)
