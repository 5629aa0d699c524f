"""What `IterativeSFTTrainer` and its `step` are given: checks, rows of ids, attention and labels, their collation."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignkit.hf.arguments import refuse
from alignkit.trl.trainer.checks import one_tokenizer
from alignkit.types import Batch

IGNORED = -100
"""The label of a token that does not count."""


UNUSED = {
    "load_best_model_at_end": "the caller decides when training ends",
    "auto_find_batch_size": "choose per_device_train_batch_size yourself",
    "dataloader_drop_last": "a step uses all the rows it is given",
}
"""Training arguments that could not act here, and what holds instead."""


def checked(model: Any, args: Any, tokenizer: Any, processing_class: Any, optimizers: Any) -> Any:
    """The tokenizer, if it and the others are what they must be."""
    tokenizer = one_tokenizer(tokenizer, processing_class)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(
            "tokenizer must be a PreTrainedTokenizerBase like a PreTrainedTokenizer or a PreTrainedTokenizerFast, "
            f"got {type(tokenizer)}"
        )
    if not isinstance(model, PreTrainedModel | PeftModel):
        raise ValueError(f"model must be a PreTrainedModel, got {type(model)}")
    if not model.can_generate():
        warnings.warn(f"{type(model)} cannot `.generate()`; make sure that this is intended", stacklevel=3)
    refuse(args, UNUSED)
    if optimizers[1] is None and args.max_steps <= 0:
        raise ValueError(
            "When no scheduler is provided, you need to set the total number of training steps to perform `max_steps`"
        )
    return tokenizer


def step_rows(
    input_ids: Any,
    attention_mask: Any,
    labels: Any,
    texts: Any,
    texts_labels: Any,
    *,
    tokenizer: Any,
    max_length: int | None,
    truncation_mode: str,
    causal: bool,
) -> list[dict[str, Tensor]]:
    """The arguments of `step` as rows, cut to `max_length`; ValueError if they are not what they must be."""
    if input_ids is None and texts is None:
        raise ValueError("Step should include `input_ids` or `texts` as keyword arguments.")
    if labels is None and texts_labels is None and not causal:
        raise ValueError(
            "No 'labels' or 'text_labels' are provided. When using an encoder-decoder architecture, 'labels' or "
            "'text_labels' must be passed."
        )
    if labels is not None and texts_labels is not None:
        raise ValueError("labels and texts_labels are two forms of one argument: give one of them")
    if texts is not None:
        if input_ids is not None or attention_mask is not None:
            warnings.warn(
                "Both 'input_ids' and 'texts' are provided. 'input_ids' will be overwritten using inputs provided by "
                "the 'texts' keyword argument.",
                stacklevel=3,
            )
        input_ids, attention_mask = tokenized(tokenizer, "'text'", max_length, text=texts), None
    if texts_labels is not None:
        labels = tokenized(tokenizer, "'text_labels'", max_length, text_target=texts_labels)
    columns = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    columns = {name: column for name, column in columns.items() if column is not None}
    for name, column in columns.items():
        check_list(name, column, Tensor)
        columns[name] = [truncate(x, max_length, truncation_mode) for x in column]
    if len({len(column) for column in columns.values()}) > 1:
        sizes = {name: len(column) for name, column in columns.items()}
        raise ValueError(f"the lists must have one number of elements, not {sizes}")
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


def tokenized(tokenizer: Any, name: str, max_length: int | None, **strings: Any) -> list[Tensor]:
    """The ids of a list of strings, given as `text` or as `text_target`."""
    ((column, values),) = strings.items()
    check_list(name, values, str)
    encoded = tokenizer(**{column: list(values)}, max_length=max_length, truncation=True)
    return [torch.tensor(ids) for ids in encoded["input_ids"]]


def check_list(name: str, values: Any, kind: type) -> None:
    """Raise ValueError unless `values` is a list, not empty, of strings or of tensors [time]."""
    what = "strings" if kind is str else "tensors"
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise ValueError(f"{name} must be a list of {what} - got {type(values)}")
    if not len(values):
        raise ValueError(f"{name} must have at least one element - got an empty list")
    for value in values:
        if not isinstance(value, kind):
            raise ValueError(f"Elements in {name} must be {what} - got {type(value)}")
        if kind is Tensor and value.dim() != 1:
            raise ValueError(f"Elements in {name} must have the shape [time] - got {tuple(value.shape)}")


def truncate(x: Tensor, max_length: int | None, mode: str) -> Tensor:
    """The last `max_length` tokens ("keep_end") or the first ("keep_start"); all if it is None."""
    if mode not in ("keep_end", "keep_start"):
        raise ValueError(f"Unknown truncation mode: {mode}")
    if max_length is None:
        return x
    return x[:max_length] if mode == "keep_start" else x[max(len(x) - max_length, 0) :]


class Padding(NamedTuple):
    """The collator if none is given: pads on the right whatever the tokenizer does, so that positions are right."""

    tokenizer: Any

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """Rows to columns."""
        values = {"input_ids": self.tokenizer.pad_token_id or 0}
        columns = {name: [torch.as_tensor(row[name]) for row in rows] for name in rows[0]}
        return {name: pad_sequence(column, True, values.get(name, 0)) for name, column in columns.items()}


class Labelled(NamedTuple):
    """A collator's columns and labels: those of the rows, else those that it makes, else the ids.

    Labels of a causal model are as long as its ids, padded as they are with `IGNORED`, and count where there is
    attention. Those of an encoder-decoder count unless they are padding.
    """

    collator: Callable[[list[dict[str, Any]]], Mapping[str, Any]]
    tokenizer: Any
    causal: bool

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """Rows to columns."""
        rows = [{"attention_mask": [1] * len(row["input_ids"]), **row} for row in rows]
        for row in rows:
            lengths = {name: len(x) for name, x in row.items() if name != "labels" or self.causal}
            if len(set(lengths.values())) > 1:
                raise ValueError(f"the columns of a row must have one number of tokens, not {lengths}")
        labels = [torch.as_tensor(row.pop("labels")) for row in rows if "labels" in row]
        batch = dict(self.collator(rows))
        if labels:
            batch["labels"] = pad_sequence(labels, True, IGNORED, self._side).long()
        if self.causal:
            labels, attention = batch.get("labels", batch["input_ids"]), batch["attention_mask"]
            room = attention.shape[-1] - labels.shape[-1]
            labels = pad(labels, (room, 0) if self._side == "left" else (0, room), value=IGNORED)
            batch["labels"] = torch.where(attention.bool(), labels, IGNORED)
        elif "labels" in batch and self.tokenizer.pad_token_id != self.tokenizer.eos_token_id:
            batch["labels"] = torch.where(batch["labels"] == self.tokenizer.pad_token_id, IGNORED, batch["labels"])
        return batch

    @property
    def _side(self) -> str:
        right = not self.causal or isinstance(self.collator, Padding)
        return "right" if right else self.tokenizer.padding_side
