"""Columns that a model makes of rows, such as reference log-probs: computed once, and kept on disk."""

import hashlib
import marshal
import sys
import uuid
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from enum import Enum
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset, config
from torch import Tensor, nn
from transformers import TrainingArguments

from alignkit import data
from alignkit.hf.files import bars_in_terminals_only
from alignkit.hf.processes import process
from alignkit.masking import promote
from alignkit.types import Batch, Rows

PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, Path)
HOOKS = {name for name in vars(nn.Module()) if "hooks" in name}  # of modules; those that change a result are refused
LIBRARIES = frozenset({"torch", "transformers", "peft", "datasets", "alignkit"})
"""Whose versions or code are part of a key."""


def precompute(
    rows: Rows,
    fn: Callable[[Batch], Batch],
    *,
    model: nn.Module,
    batch: int,
    args: TrainingArguments | None = None,
) -> Dataset:
    """The rows with the new columns of `fn(columns)`, computed `batch` rows at a time without gradient.

    `args` are those of the run, for its mixed precision; by default what is in force.

    They are kept in the cache of `datasets` and found there by what decides them: the rows; the bytes of the model's
    parameters and buffers, its config, sampling and adapters; the code of `fn` and the values it reaches; `batch`; the
    precision in force, the kind of device, the versions of the libraries and the code of this package. Where one of
    these cannot be told for sure, nothing is found. A new column as long as the rows' `ids` is cut to each row's.
    The main process computes, the others wait for it and read. Raises ValueError if there are no rows, or none of the
    columns is new.
    """
    if batch < 1:
        raise ValueError(f"batch={batch} must be at least 1")
    if not len(rows):
        raise ValueError("rows is empty: there is nothing to compute")
    table = rows if isinstance(rows, Dataset) else Dataset.from_list([rows[i] for i in range(len(rows))])

    def compute(columns: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        part = [dict(zip(columns, values)) for values in zip(*columns.values())]
        given = data.collate(part)
        with torch.no_grad(), mixed:
            new = {name: x.cpu() for name, x in fn(given).items() if name not in given}
        return {name: _cut(x, given, part) for name, x in new.items()}

    device = process().device.type
    dtype = torch.bfloat16 if args and args.bf16 else torch.float16 if args and args.fp16 else None
    mixed = torch.autocast(device, dtype) if dtype else nullcontext()
    with mixed:
        (key,) = broadcast_object_list([_key(table._fingerprint, fn, model, batch)])
    folder = Path(config.HF_DATASETS_CACHE)
    folder.mkdir(parents=True, exist_ok=True)
    bars_in_terminals_only()
    with process().main_process_first():
        made = table.map(
            compute,
            batched=True,
            batch_size=batch,
            desc="precomputing",
            new_fingerprint=key,
            cache_file_name=None if table.cache_files else str(folder / f"precomputed-{key}.arrow"),
        )
    new = set(made.column_names) - set(table.column_names)
    if not new:
        raise ValueError(f"fn makes no new column, only some of {table.column_names}")
    return made.with_transform(partial(_tensors, dtypes=_dtypes(made, new)))


def _cut(column: Tensor, given: Batch, part: list[dict[str, Any]]) -> list[Any]:
    """The rows of a column, without what only pads them to the length of others."""
    column = promote(column) if column.is_floating_point() else column  # arrow has no bfloat16
    if "ids" not in given or column.shape != given["ids"].shape:
        return list(column.numpy())
    return [x[..., : data.pad(row["ids"]).shape[-1]].numpy() for x, row in zip(column, part)]


def _dtypes(table: Dataset, names: set[str]) -> dict[str, torch.dtype]:
    found = {}
    for name in names:
        feature = table.features[name]
        while hasattr(feature, "feature"):
            feature = feature.feature
        found[name] = getattr(torch, feature.dtype)
    return found


def _tensors(columns: Mapping[str, list[Any]], dtypes: dict[str, torch.dtype]) -> dict[str, list[Any]]:
    """The new columns in the precision in which they were computed."""
    return {
        name: [torch.tensor(x, dtype=dtypes[name]) for x in column] if name in dtypes else column
        for name, column in columns.items()
    }


class _Unknown(Exception):
    """Something of which one cannot tell whether it is what it was."""


def _key(rows: str, fn: Callable[..., Any], model: nn.Module, batch: int) -> str:
    device = process().device.type
    precision = [x.fp32_precision for x in (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)]
    precision += [torch.is_autocast_enabled(device), torch.get_autocast_dtype(device), torch.get_default_dtype()]
    versions = [sys.version, *map(version, ("torch", "transformers", "peft", "datasets"))]
    code = [x.read_bytes() for x in sorted(Path(data.__file__).parent.rglob("*.py"))]
    digest = hashlib.sha256(repr([rows, batch, device, precision, versions, code]).encode())
    try:
        _add(digest, [model, fn], {})
    except _Unknown:
        digest.update(uuid.uuid4().bytes)
    return digest.hexdigest()[:32]


def _add(digest: Any, x: Any, seen: dict[int, tuple[int, Any]]) -> None:
    """Add what decides the results of x, by content; `seen` are those that were added, in their order."""
    if isinstance(x, Tensor):
        digest.update(f"{x.dtype}{tuple(x.shape)}:".encode())
        digest.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(x, PLAIN):
        value = repr(x).encode()
        digest.update(f"{type(x).__qualname__}{len(value)}:".encode() + value)
    elif id(x) in seen:
        digest.update(f"seen{seen[id(x)][0]}:".encode())
    else:
        seen[id(x)] = len(seen), x  # held, so that no other object gets its id
        parts = _parts(x)
        digest.update(f"{type(x).__module__}.{type(x).__qualname__}{len(parts)}:".encode())
        for part in parts:
            _add(digest, part, seen)


def _parts(x: Any) -> list[Any]:
    """What x is made of; raises _Unknown for what cannot be told."""
    if isinstance(x, nn.Module):
        if x._forward_hooks or x._forward_pre_hooks or not _is_known(type(x)):
            raise _Unknown(type(x))
        return [_state(x)]
    if isinstance(x, Mapping):
        return [y for item in x.items() for y in item]
    if isinstance(x, list | tuple):
        return list(x)
    if isinstance(x, set | frozenset):
        return sorted(x, key=repr)
    if isinstance(x, Enum):
        return [x.name]
    if isinstance(x, partial):
        return [x.func, x.args, x.keywords]
    if isinstance(x, MethodType):
        return [x.__func__, x.__self__]
    if isinstance(x, ModuleType | type | FunctionType | BuiltinFunctionType) and _is_known(x):
        return [getattr(x, "__module__", None), getattr(x, "__qualname__", x.__name__)]
    if isinstance(x, FunctionType):
        return _of_function(x)
    if _is_known(type(x), LIBRARIES) and hasattr(x, "__dict__"):  # such as a config
        return [_state(x)]
    raise _Unknown(type(x))


def _state(x: Any) -> dict[str, Any]:
    """The attributes of an object but for what decides nothing: where weights came from, and how to generate."""
    names = [name for name in vars(x) if name not in HOOKS and not name.endswith("name_or_path")]
    return {name: vars(x)[name] for name in names if name not in ("generation_config", "_original_object_hash")}


def _is_known(x: Any, libraries: Collection[str] = LIBRARIES | sys.stdlib_module_names) -> bool:
    """Whether the code of x, which is no closure, is that of Python or a library whose version is part of the key."""
    root = (getattr(x, "__module__", None) or x.__name__).split(".")[0]
    return root in libraries and "<locals>" not in getattr(x, "__qualname__", "")


def _of_function(fn: FunctionType) -> list[Any]:
    """Its code, its defaults, and the values of the names that it or a function within it looks up."""
    names: set[str] = set()
    left = [fn.__code__]
    while left:
        code = left.pop()
        names |= set(code.co_names)
        left += [x for x in code.co_consts if isinstance(x, CodeType)]
    try:
        inside = [cell.cell_contents for cell in fn.__closure__ or ()]
    except ValueError as error:  # not yet defined
        raise _Unknown from error
    outside = {name: fn.__globals__[name] for name in sorted(names) if name in fn.__globals__}
    return [marshal.dumps(fn.__code__, 2), fn.__defaults__, fn.__kwdefaults__, inside, outside]
