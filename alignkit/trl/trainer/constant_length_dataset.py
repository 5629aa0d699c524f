"""Texts packed into sequences of one length."""

import inspect
import random
import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info


class ConstantLengthDataset(IterableDataset):
    """Sequences of `seq_length` tokens out of a dataset of texts: `input_ids` and equal `labels`.

    Texts, from the column `dataset_text_field` or `formatting_func(row)`, are collected until they have `seq_length *
    chars_per_token * num_of_sequences` characters, tokenised, each followed by the tokenizer's EOS (`eos_token_id` if
    it has none) unless `append_concat_token` is False, joined and cut; what remains of such a buffer is dropped.
    `shuffle` reorders the sequences of a buffer, with Python's global `random`. `infinite` starts over at the end, with
    a warning. Workers of a data loader share the rows among them. `len()` is the number of texts.
    """

    def __init__(
        self,
        tokenizer: Any,
        dataset: Any,
        dataset_text_field: str | None = None,
        formatting_func: Callable[..., Any] | None = None,
        infinite: bool = False,
        seq_length: int = 1024,
        num_of_sequences: int = 1024,
        chars_per_token: float = 3.6,
        eos_token_id: int | None = 0,
        shuffle: bool = True,
        append_concat_token: bool = True,
        add_special_tokens: bool = True,
    ):
        if formatting_func is None and dataset_text_field is None:
            raise ValueError("dataset_text_field and formatting_func are both None: give one of them")
        columns = getattr(dataset, "column_names", None) or [dataset_text_field]
        if formatting_func is None and dataset_text_field not in columns:
            raise ValueError(f"dataset_text_field={dataset_text_field!r} is not a column of the dataset: {columns}")
        if seq_length < 1 or not seq_length * chars_per_token * num_of_sequences > 0:
            raise ValueError(f"{seq_length=}, {num_of_sequences=} and {chars_per_token=} must be positive")
        if formatting_func is not None and len(inspect.signature(formatting_func).parameters) > 1:
            warnings.warn("formatting_func has more than one argument; it is called with a row only.", stacklevel=2)
        if tokenizer.eos_token_id is None:
            warnings.warn(
                f"The tokenizer has no EOS token: texts are separated by eos_token_id={eos_token_id}.", stacklevel=2
            )
        self.tokenizer = tokenizer
        self.dataset = dataset
        self.formatting_func = formatting_func or (lambda row: row[dataset_text_field])
        self.concat_token_id = eos_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        if append_concat_token and self.concat_token_id is None:
            raise ValueError("append_concat_token=True needs an EOS: the tokenizer has none and eos_token_id is None")
        self.infinite = infinite
        self.seq_length = seq_length
        self.max_buffer_size = seq_length * chars_per_token * num_of_sequences
        self.shuffle = shuffle
        self.append_concat_token = append_concat_token
        self.add_special_tokens = add_special_tokens
        self.current_size = 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for texts in self._buffers():
            sequences = self._pack(texts)
            if self.shuffle:
                random.shuffle(sequences)
            for sequence in sequences:
                self.current_size += 1
                yield {"input_ids": torch.tensor(sequence), "labels": torch.tensor(sequence)}

    def _pack(self, texts: list) -> list:  # what lists hold is not annotated: beartype would draw from `random`
        end = [self.concat_token_id] if self.append_concat_token else []
        rows = self.tokenizer(texts, add_special_tokens=self.add_special_tokens, truncation=False)["input_ids"]
        ids = [token for row in rows for token in [*row, *end]]
        size = self.seq_length
        return [ids[i : i + size] for i in range(0, len(ids) - size + 1, size)]

    def _buffers(self) -> Iterator[list[str]]:
        texts: list[str] = []
        size = 0
        for text in self._texts():
            texts.append(text)
            size += len(text)
            if size >= self.max_buffer_size:
                yield texts
                texts, size = [], 0
        if texts:
            yield texts

    def _texts(self) -> Iterator[str]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        while True:
            characters = 0
            for row in islice(self.dataset, first, None, step):
                text = self.formatting_func(row)
                if not isinstance(text, str):
                    raise ValueError(f"a text to pack is a {type(text).__name__}, but must be a str: {text!r:.200}")
                characters += len(text)
                yield text
            if not self.infinite or not characters:
                return
            warnings.warn("The dataset reached end and the iterator is reset to the start.", stacklevel=2)
