"""The processes of a run: which this is, and rows shared among them."""

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

from alignkit import data
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
