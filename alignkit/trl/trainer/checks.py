"""Checks of the arguments that the Trainer-based classes share."""

from numbers import Integral
from typing import Any

import datasets
import torch
from transformers import TrainingArguments
from transformers.trainer_utils import has_length

MAPPED = (torch.utils.data.Dataset, datasets.Dataset)


def check_arguments(model: Any, args: Any, tokenizer: Any, data_collator: Any, *, names: bool = False) -> None:
    """Raise TypeError for an argument of another kind; with `names` the model may be the name of one."""
    if args is not None and not isinstance(args, TrainingArguments):
        raise TypeError(f"args must be TrainingArguments, but is a {type(args).__name__}")
    if not isinstance(model, torch.nn.Module | (str if names else None) | None):
        wanted = "a model or its name" if names else "a model, as from_pretrained returns it"
        raise TypeError(f"model must be {wanted}, but is a {type(model).__name__}")
    if isinstance(tokenizer, str):
        raise TypeError(f"tokenizer={tokenizer!r} is a name: give what AutoTokenizer.from_pretrained makes of it")
    if data_collator is not None and not callable(data_collator):
        raise TypeError(f"data_collator must be a function of a list of rows, but is a {type(data_collator).__name__}")


def one_tokenizer(tokenizer: Any, processing_class: Any) -> Any:
    """The tokenizer given under either name, or None. Raises ValueError for two different ones."""
    if tokenizer is not None and processing_class is not None and tokenizer is not processing_class:
        raise ValueError("tokenizer and processing_class are two names of one argument: give one of them")
    return processing_class if tokenizer is None else tokenizer


def check_datasets(train: Any, evaluation: Any, kinds: tuple[type, ...] = (object,)) -> None:
    """Raise ValueError for a dataset without rows, TypeError for one of another kind, such as all splits at once."""
    named = {"train_dataset": train}
    if type(evaluation) is dict:
        named |= {f"eval_dataset[{name!r}]": dataset for name, dataset in evaluation.items()}
    else:
        named["eval_dataset"] = evaluation
    for name, dataset in named.items():
        if dataset is None:
            continue
        if isinstance(dataset, dict) and name != "eval_dataset":
            raise TypeError(f"{name} is a {type(dataset).__name__} of {list(dataset)}: give one of these")
        if not isinstance(dataset, (dict, *kinds)):
            raise TypeError(f"{name} is a {type(dataset).__name__}, but must be a dataset of datasets or of torch")
        if has_length(dataset) and not len(dataset):
            raise ValueError(f"{name} is empty: there must be at least one row")


def check_tokens(name: str, length: Any) -> None:
    """Raise TypeError unless `length` is an integer or None, ValueError if it is below 1."""
    if not isinstance(length, Integral | None):
        raise TypeError(f"{name}={length!r} must be an integer, a number of tokens")
    if length is not None and length < 1:
        raise ValueError(f"{name}={length} must be at least 1 token")


def check_padding(tokenizer: Any) -> None:
    """Raise ValueError if a tokenizer cannot pad."""
    if getattr(tokenizer, "pad_token_id", 0) is None:
        raise ValueError(
            "tokenizer has no pad token, which batches need: set tokenizer.pad_token, such as to tokenizer.eos_token"
        )
