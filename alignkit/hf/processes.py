"""The processes of a run: which this is, and rows shared among them."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

from alignkit import data, train
from alignkit.types import Batch


def process() -> PartialState:
    """This process among all: its index, their number, its device."""
    return PartialState(cpu=not torch.accelerator.is_available())


def gather(**columns: Tensor) -> Batch:
    """The rows of all processes as one batch, in the order of the processes, on each of them."""
    if process().num_processes == 1:
        return columns
    device = next(iter(columns.values())).device
    batches = gather_object([{name: x.cpu() for name, x in columns.items()}])
    return {name: x.to(device) for name, x in data.concat(batches).items()}


def share(batch: Batch) -> Batch:
    """This process's rows of a batch that all have."""
    state = process()
    rows = len(next(iter(batch.values()))) // state.num_processes
    return {name: x[rows * state.process_index :][:rows] for name, x in batch.items()}


def row_seeds(rows: int, *, seed: int, step: int) -> list[int]:
    """A seed for each row of this process in a step, by the row's place among those of all processes."""
    key, first = data.mix(seed, step), process().process_index * rows
    return [data.mix(key, first + i) for i in range(rows)]


def on_policy(
    collect: Callable[[int], Batch], state: dict[str, Any], *, size: int, epochs: int = 1, seed: int
) -> Callable[[int], Iterator[Batch]]:
    """`batches(step)` for `hf.fit`: this process's share of the minibatches of `train.rollouts`.

    `collect(i)` makes rollout i, the same on all processes; it lies in `state["rollout"]`.
    """

    def batches(step: int) -> Iterator[Batch]:
        return map(share, train.rollouts(collect, state, size=size, epochs=epochs, seed=seed, start=step))

    return batches
