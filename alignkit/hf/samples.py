"""Answers to read while a policy learns: a few in the terminal, all of them in a Parquet file."""

import io
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.compute
from pyarrow import parquet
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor
from tqdm.auto import tqdm
from transformers import TrainerCallback

from alignkit.masking import lengths, masked_mean
from alignkit.types import Batch

SAMPLES = "samples.parquet"
KEYS = ("step", "row", "prompt", "answer", "length")
SHOWN = {"prompt": 120, "answer": 240}
"""Characters of a text in the terminal; the file has all."""


class Samples(TrainerCallback):
    """Every `every` steps, and after the last, the answers of the rollout in `state["rollout"]`, each rollout once.

    `rows` of them, the first, go to the terminal as a table, all of them to `samples.parquet` in `args.output_dir`:
    step, row, prompt, answer, its length in tokens, and every column of the rollout that has one number for each answer
    (or, for pairs, each row); advantages per token as their mean over the answer. `every=None` makes five tables of a
    run, 0 none; `args.logging_first_step` adds the first step. A resumed run first drops the rows after its checkpoint.

    Raises ValueError for a file that is no such table or that another run has left, and for a column of the rollout
    that has the name of one of the file's own.
    """

    def __init__(self, tokenizer: Any, state: dict[str, Any], *, every: int | None = None, rows: int = 4):
        if (every or 0) < 0 or rows < 0:
            raise ValueError(f"every={every} steps and rows={rows} must each be at least 1, or 0 for none")
        self.tokenizer, self.state, self.every, self.rows = tokenizer, state, every, rows

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Drop what a resumed run will write again."""
        file = Path(args.output_dir) / SAMPLES
        if not state.is_world_process_zero or not file.exists():
            return
        if not state.global_step:
            raise ValueError(f"{file} is there already, but this run begins: move it away, or choose another folder")
        _write(_read(file).filter(pyarrow.compute.field("step") <= state.global_step), file)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write and show the rollout if it is time."""
        rollout = self.state.get("rollout", {})
        if not (state.is_world_process_zero and "ids" in rollout and self._due(args, state)):
            return
        if self.state.get("samples") is rollout["ids"]:  # saved with the rollout, so a resumed run knows it too
            return
        self.state["samples"] = rollout["ids"]
        file, new = Path(args.output_dir) / SAMPLES, pyarrow.table(_columns(self.tokenizer, rollout, state.global_step))
        old = [_read(file)] if file.exists() else []
        _write(pyarrow.concat_tables([*old, new], promote_options="permissive"), file)
        if self.rows:
            _show(new[: self.rows].to_pylist(), f"step {state.global_step}/{state.max_steps}, {len(new)} answers")

    def _due(self, args: Any, state: Any) -> bool:
        step, last = state.global_step, state.max_steps
        every = math.ceil(last / 5) if self.every is None else self.every
        return every > 0 and (step % every == 0 or step == last or (step == 1 and args.logging_first_step))


def _columns(tokenizer: Any, rollout: Batch, step: int) -> dict[str, Sequence[Any]]:
    """The answers of a rollout as columns of the file."""
    ids, mask, read = rollout["ids"], rollout["mask"], _reader(tokenizer)
    lead = ids.shape[:-1]
    texts = [_texts(read, *row) for row in zip(ids.flatten(0, -2).tolist(), mask.flatten(0, -2).tolist())]
    rows = [i for i in range(lead[0]) for _ in range(lead[1:].numel())]
    own = dict(zip(KEYS, ([step] * len(rows), rows, *zip(*texts), lengths(mask).flatten().tolist())))
    numbers = {name: x for name, x in rollout.items() if name not in ("ids", "mask")}
    if "advantages" in numbers and numbers["advantages"].shape == ids.shape:
        numbers["advantages"] = masked_mean(numbers["advantages"], mask, -1)
    per_row = {name: x for name, column in numbers.items() if (x := _per_row(column, lead)) is not None}
    for name in own.keys() & per_row.keys():
        raise ValueError(f"the rollout's column {name!r} has the name of a column of {SAMPLES}: rename it")
    return own | per_row


def _show(rows: Sequence[dict[str, Any]], title: str) -> None:
    """Print rows of the file as a table, above a progress bar if there is one; a prompt stands at its first answer."""
    table = Table("prompt", "answer", "", title=title, title_justify="left", show_lines=True, expand=True)
    for column, name in zip(table.columns, SHOWN):
        column.ratio, column.overflow = SHOWN[name], "fold"
    for before, row in zip([{}, *rows], rows):
        texts = [_short(row[name], limit) for name, limit in SHOWN.items()]
        if before.get("prompt") == row["prompt"]:
            texts[0] = ""
        numbers = [_number(name, x) for name, x in row.items() if name not in ("step", "row", *SHOWN)]
        table.add_row(*map(Text, texts), Text("\n".join(filter(None, numbers))))  # a Text is no markup
    terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if terminal else 120
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, force_jupyter=False)
    console.print(table)
    encoding = sys.stdout.encoding or "utf-8"
    tqdm.write(console.file.getvalue().encode(encoding, "replace").decode(encoding), file=sys.stdout, end="")


def _number(name: str, x: Any) -> str:
    if isinstance(x, bool):
        return name if x else ""
    return f"{name} {x:.3g}" if isinstance(x, float) else f"{name} {x}"


def _short(text: str, limit: int) -> str:
    """On one line, without control characters, the middle left out if it is longer than `limit`."""
    text = " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", text).split())
    return text if len(text) <= limit else f"{text[: limit // 2]} … {text[-limit // 2 :]}"


def _texts(read: Callable[[list[int]], str], ids: list[int], mask: list[bool]) -> tuple[str, str]:
    """Prompt and answer; between the turns of an answer stands what does not count."""
    if True not in mask:  # nothing counts; padding is 0
        return read(ids[: max((t + 1 for t, x in enumerate(ids) if x), default=0)]), ""
    start, end = mask.index(True), len(mask) - mask[::-1].index(True)
    return read(ids[:start]), read(ids[start:end])


def _reader(tokenizer: Any) -> Callable[[list[int]], str]:
    """Ids to text, with a line break for special tokens in the midst of it: the roles of a chat template stay apart."""
    special = {*tokenizer.all_special_ids, *(i for i, x in tokenizer.added_tokens_decoder.items() if x.special)}

    def read(ids: list[int]) -> str:
        runs = [list(run) for hidden, run in groupby(ids, special.__contains__) if not hidden]
        return "\n".join(tokenizer.decode(run) for run in runs)

    return read


def _per_row(x: Tensor, lead: Sequence[int]) -> list[Any] | None:
    """One number for each row, also from a column that is constant over the time or over the pair; None if not so."""
    if x.shape == (*lead, 1):
        x = x[..., 0]
    if x.dim() == 0 or x.shape != lead[: x.dim()]:
        return None
    return x.reshape(*x.shape, *[1] * (len(lead) - x.dim())).expand(lead).flatten().tolist()


def _read(file: Path) -> pyarrow.Table:
    try:
        with parquet.ParquetFile(file) as content:
            table = content.read()
        missing = set(KEYS) - set(table.column_names)
        problem = f"it lacks the columns {sorted(missing)}" if missing else ""
    except (pyarrow.ArrowException, OSError) as error:
        problem = str(error)
    if problem:
        raise ValueError(f"{file} is no table of samples: {problem}. Move it away to go on")
    return table


def _write(table: pyarrow.Table, file: Path) -> None:
    """Whole or not at all, as a run may be killed at any moment."""
    part = file.with_suffix(".part")
    parquet.write_table(table, part)
    os.replace(part, file)
