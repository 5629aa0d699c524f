"""The vocabulary: what a batch, a loss and a state machine are, and the names of the columns."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

from torch import Tensor

Batch: TypeAlias = dict[str, Tensor]
Metrics: TypeAlias = dict[str, Tensor]
Aggregate: TypeAlias = Callable[[Tensor], Tensor]
"""A mask [B, ..., T] to weights of the same first axis: [B, ..., T], [B, ...] or [B]."""
Aggregates: TypeAlias = Aggregate | dict[str, Aggregate | tuple[str, Aggregate]]
"""One aggregation of the column "mask" into the column "weights"; or columns by name, each an aggregation of "mask"
or a pair (mask column, aggregation): `{"weights": token_mean, "demo_weights": ("demo_mask", row_mean)}`."""


class LossFn(Protocol):
    """`loss_fn(model, **batch) -> (scalar, metrics)`; the batch's columns are its keyword arguments."""

    def __call__(self, model: Any, /, **batch: Tensor) -> tuple[Tensor, Metrics]:
        """Weigh un-reduced losses and metrics with the columns that `aggregate` made."""


@runtime_checkable
class Rows(Protocol):
    """Rows by number, such as a list of dicts or a `datasets.Dataset`; each maps column names to numbers or lists."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class Stateful(NamedTuple):
    """A state machine: `init() -> state` and a pure `update(state, ...) -> state`; the caller holds the state."""

    init: Callable[..., Any]
    update: Callable[..., Any]


COLUMNS = {
    "ids": "int [..., T]: token ids, right-padded",
    "mask": "bool [..., T]: True = this token counts; False at position 0, which nothing predicts",
    "weights": "float, mask's leading axes: what one element contributes to the loss; from `aggregate`",
    "logps": "float [..., T]: log p(ids[t] | ids[:t])",
    "old_logps": "float [..., T]: the same under the policy that sampled",
    "ref_logps": "float [..., T] or [...]: the same under the reference",
    "values": "float [..., T]: V(ids[:t])",
    "rewards": "float [..., T] per token, or [..., G] per member of a group",
    "advantages": "float [..., T]",
    "returns": "float [..., T]",
}
