"""Datasets of texts, formatted and tokenised for `SFTTrainer`."""

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import AutoTokenizer

from alignkit.trl.extras.dataset_formatting import get_formatting_func_from_dataset
from alignkit.trl.trainer.checks import check_tokens, one_tokenizer
from alignkit.trl.trainer.constant_length_dataset import ConstantLengthDataset

PACKED = Features({name: List(Value("int64")) for name in ("input_ids", "labels")})


class TextOptions(NamedTuple):
    """How `prepare` reads texts; the names are those of `SFTTrainer`'s arguments."""

    dataset_text_field: str | None
    formatting_func: Callable[..., Any] | None
    max_seq_length: int
    num_of_sequences: int
    chars_per_token: float
    dataset_num_proc: int | None
    dataset_batch_size: int | None
    remove_unused_columns: bool
    append_concat_token: bool = True
    add_special_tokens: bool | None = None


def tokenizer_of(model: Any, tokenizer: Any, processing_class: Any) -> Any:
    """The tokenizer given under either name, or that of the model's folder, padded with EOS if with nothing.

    Raises ValueError for two different ones and where there is none; warns if it pads on the left.
    """
    tokenizer = one_tokenizer(tokenizer, processing_class)
    if tokenizer is None:
        name = getattr(getattr(model, "config", None), "_name_or_path", "")
        if not name:
            raise ValueError("tokenizer is None, and there is no model that tells where it was loaded from: give one")
        tokenizer = AutoTokenizer.from_pretrained(name)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.padding_side != "right":
        warnings.warn(
            "The tokenizer's padding_side is not 'right', which may overflow in half precision: consider setting "
            "`tokenizer.padding_side = 'right'`.",
            stacklevel=4,
        )
    return tokenizer


def length_of(length: int | None, tokenizer: Any) -> int:
    """`max_seq_length`, by default the tokenizer's, at most 1024, with a warning."""
    if length is None:
        length = min(tokenizer.model_max_length, 1024)
        warnings.warn(f"You gave no `max_seq_length`: it is {length}.", stacklevel=4)
    check_tokens("max_seq_length", length)
    return length


def checked_kwargs(dataset_kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """The `dataset_kwargs`. Raises ValueError for one that there is not."""
    known = ("append_concat_token", "add_special_tokens")
    for name in dataset_kwargs or {}:
        if name not in known:
            raise ValueError(f"dataset_kwargs may hold {' and '.join(known)}, not {name!r}")
    return dataset_kwargs or {}


def prepare_all(
    train: Any, evaluation: Any, tokenizer: Any, options: TextOptions, packings: dict[str, bool], args: Any
) -> tuple[Any, Any]:
    """The datasets to train on and to evaluate on, the latter one or several by name."""
    if train is not None:
        train = prepare(train, tokenizer, options, packing=packings["train"], seed=args.seed)
    if packings["train"] and args.max_steps > 0:
        warnings.warn("packing=True with `max_steps`: the dataset is repeated until they are reached.", stacklevel=4)
    if isinstance(train, ConstantLengthDataset):
        train = copy.copy(train)  # which may be what is evaluated on, too
        train.infinite = args.max_steps > 0

    def prepare_eval(dataset: Any) -> Any:
        return prepare(dataset, tokenizer, options, packing=packings["eval"])

    if isinstance(evaluation, dict):
        return train, {name: prepare_eval(dataset) for name, dataset in evaluation.items()}
    return train, None if evaluation is None else prepare_eval(evaluation)


def prepare(dataset: Any, tokenizer: Any, options: TextOptions, *, packing: bool, seed: int | None = None) -> Any:
    """The rows of `dataset` tokenised, or packed into rows of `max_seq_length` tokens.

    A dataset of torch, and one with a column `input_ids` for which no texts are asked, is returned as it is. Texts
    come from `dataset_text_field`, or `formatting_func`, or the conversations that the columns hold; the latter spell
    their special tokens out, so that none are added unless `add_special_tokens` says so. Before packing, rows are
    shuffled with `seed`, if any. Raises ValueError where there is no text, or not enough to pack.
    """
    streamed = isinstance(dataset, IterableDataset)
    if not streamed and isinstance(dataset, torch.utils.data.Dataset):
        return dataset
    field, func, special = options.dataset_text_field, options.formatting_func, options.add_special_tokens
    columns = dataset.column_names or list(next(iter(dataset), {}))
    if field is None and func is None:
        if "input_ids" in columns:
            if packing:
                warnings.warn("The dataset is tokenized already: it is used as it is, not packed.", stacklevel=4)
            return dataset
        func = get_formatting_func_from_dataset(dataset, tokenizer)
        special = False if special is None else special
        if func is None:
            raise ValueError(_no_text(packing, columns))
    elif field is not None and func is not None:
        used, unused = ("formatting_func", "dataset_text_field")[:: 1 if packing else -1]
        warnings.warn(f"Both are given: {used} is used, {unused} is not ({packing=}).", stacklevel=4)
    if field is not None and (func is None or not packing):
        if field not in columns:
            raise ValueError(f"dataset_text_field={field!r} is not a column of the dataset, which has {columns}")
        func = None
    options = options._replace(formatting_func=func, add_special_tokens=special is not False)
    if packing:
        return _packed(dataset if seed is None else dataset.shuffle(seed=seed), tokenizer, options)
    return _tokenized(dataset, tokenizer, options, columns)


def _tokenized(dataset: Any, tokenizer: Any, options: TextOptions, columns: list[str]) -> Any:
    extra = [name for name in columns if name not in ("input_ids", "attention_mask", "labels")]
    if extra and not options.remove_unused_columns:
        warnings.warn(
            f"remove_unused_columns=False keeps the columns {extra}: the default collator leaves them out, and one of "
            "your own must not hand them to the model.",
            stacklevel=5,
        )
    workers = {} if isinstance(dataset, IterableDataset) else {"num_proc": options.dataset_num_proc}
    return dataset.map(
        partial(_tokens, tokenizer=tokenizer, options=options),
        batched=True,
        batch_size=options.dataset_batch_size,
        remove_columns=columns if options.remove_unused_columns else None,
        **workers,
    )


def _tokens(rows: Any, tokenizer: Any, options: TextOptions) -> dict[str, Any]:
    func, special = options.formatting_func, options.add_special_tokens
    texts = list(rows[options.dataset_text_field]) if func is None else func(rows)
    if not isinstance(texts, list):
        raise ValueError(
            "The `formatting_func` should return a list of processed strings since it can lead to silent bugs."
        )
    for text in texts:
        if not isinstance(text, str):
            source = f"dataset_text_field={options.dataset_text_field!r}" if func is None else "formatting_func"
            raise ValueError(f"{source} must give strings, but there is a {type(text).__name__}: {text!r:.200}")
    encoded = tokenizer(texts, add_special_tokens=special, truncation=True, max_length=options.max_seq_length)
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def _packed(dataset: Any, tokenizer: Any, options: TextOptions) -> Any:
    sequences = ConstantLengthDataset(
        tokenizer,
        dataset,
        dataset_text_field=options.dataset_text_field,
        formatting_func=options.formatting_func,
        seq_length=options.max_seq_length,
        num_of_sequences=options.num_of_sequences,
        chars_per_token=options.chars_per_token,
        eos_token_id=tokenizer.eos_token_id,
        shuffle=False,
        append_concat_token=options.append_concat_token,
        add_special_tokens=bool(options.add_special_tokens),
    )
    if isinstance(dataset, IterableDataset):
        return sequences
    if next(iter(sequences), None) is None:
        raise ValueError(
            "Error occurred while packing the dataset. Make sure that your dataset has enough samples to at least "
            "yield one packed sequence."
        )
    return Dataset.from_generator(sequences.__iter__, features=PACKED)


def _no_text(packing: bool, columns: list[str]) -> str:
    if packing:
        return f"packing=True needs a `dataset_text_field` or a `formatting_func`; the dataset's columns are {columns}"
    return (
        "You passed `packing=False` to the SFTTrainer, but you didn't pass a `dataset_text_field` or `formatting_func` "
        "argument."
    )
