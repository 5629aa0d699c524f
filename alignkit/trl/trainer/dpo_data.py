"""Rows of `prompt`, `chosen` and `rejected` texts to token ids."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

Tokens = dict[str, list[int]]
ANSWERS = ("chosen", "rejected")


def row_tokenizer(trainer: Any) -> Callable[..., Tokens]:
    """How the trainer tokenises a row, without the trainer, which other processes could not be sent."""
    options = {"tokenizer": trainer.tokenizer, "max_prompt_length": trainer.max_prompt_length}
    if trainer.is_encoder_decoder:
        return partial(tokenize_encoder_decoder, max_target_length=trainer.max_target_length, **options)
    names = ("max_length", "truncation_mode", "label_pad_token_id")
    return partial(tokenize_row, **options, **{name: getattr(trainer, name) for name in names})


def tokenized(dataset: Any, tokenize: Callable[..., dict[str, Any]], name: str, num_proc: int | None = None) -> Any:
    """The dataset with the columns that `tokenize` makes of a row; one that has them already is returned as it is.

    Raises TypeError if it is not a dataset that can be mapped, and ValueError with the number of a row that is wrong.
    """
    if not hasattr(dataset, "map"):
        raise TypeError(f"{name} is a {type(dataset).__name__}, but must be a dataset of the library datasets")
    columns = dataset.column_names or list(next(iter(dataset), {}))
    if {"chosen_labels", "rejected_labels"} <= set(columns):
        return dataset
    missing = [column for column in ("prompt", *ANSWERS) if column not in columns]
    if missing:
        raise ValueError(f"{name} has the columns {columns}, but must have prompt, chosen and rejected too: {missing=}")
    options = {"desc": f"Tokenizing {name}", "num_proc": num_proc} if hasattr(dataset, "__len__") else {}
    return dataset.map(_named, with_indices=True, fn_kwargs={"tokenize": tokenize, "name": name}, **options)


def _named(row: Mapping[str, Any], index: int, *, tokenize: Callable[..., Any], name: str) -> dict[str, Any]:
    try:
        return tokenize(row)
    except ValueError as error:
        raise ValueError(f"{name}, row {index}: {error}") from error


def tokenize_row(
    row: Mapping[str, Any],
    tokenizer: Any,
    *,
    max_length: int,
    max_prompt_length: int,
    truncation_mode: str,
    label_pad_token_id: int,
) -> Tokens:
    """Prompt and answers of one row as `{chosen,rejected}_{input_ids,attention_mask,labels}` and `prompt_*`.

    The prompt begins with a BOS and answers end with an EOS, if the tokenizer has them and they are not there yet.
    Where prompt and longer answer exceed `max_length`, `max_prompt_length` tokens of the prompt are kept, the first
    ("keep_start") or the last ("keep_end"); if that is not enough, the first tokens of the answers. Raises ValueError
    if a column is not a string, if the answers change more than the prompt's last token, and if limits make no sense.
    """
    texts = {name: _string(row, name) for name in ("prompt", *ANSWERS)}
    both = {name: build_tokenized_answer(tokenizer, texts["prompt"], texts[name]) for name in ANSWERS}
    prompts = {name: both[name]["prompt_input_ids"] for name in ANSWERS}
    answers = {name: both[name]["input_ids"] for name in ANSWERS}
    chosen, rejected = prompts.values()
    if sum(a != b for a, b in zip(chosen, rejected)) > 1 or abs(len(chosen) - len(rejected)) > 1:
        raise ValueError(
            "Chosen and rejected prompt_input_ids might only differ on the last token due to tokenizer merge ops."
        )
    alone = tokenizer(texts["prompt"], add_special_tokens=False)["input_ids"]
    prompts["prompt"] = alone[: min(len(chosen), len(rejected))]  # to generate from, without a token that may merge
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    prompts = {n: x if bos is None or x[:1] == [bos] else [bos, *x] for n, x in prompts.items()}
    answers = {n: x if eos is None or x[-1:] == [eos] else [*x, eos] for n, x in answers.items()}

    _truncate(prompts, answers, max_length, max_prompt_length, truncation_mode)
    tokens: Tokens = {}
    for name in ANSWERS:
        ids = prompts[name] + answers[name]
        labels = [label_pad_token_id] * len(prompts[name]) + answers[name]
        tokens |= {f"{name}_input_ids": ids, f"{name}_attention_mask": [1] * len(ids), f"{name}_labels": labels}
    prompt = prompts["prompt"]
    return tokens | {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}


def build_tokenized_answer(tokenizer: Any, prompt: str, answer: str) -> Tokens:
    """The tokens of prompt + answer, cut where the answer begins.

    Text is tokenised as a whole, as tokens may merge across the boundary; where the prompt's last token did so, it is
    the answer's. Raises ValueError if the whole has fewer tokens than the prompt alone.
    """
    full = tokenizer(prompt + answer, add_special_tokens=False)["input_ids"]
    alone = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if len(full) < len(alone):
        raise ValueError("Prompt input ids and answer input ids should have the same length.")
    start = len(alone) if full[: len(alone)] == alone else len(alone) - 1
    return {
        "prompt_input_ids": full[:start],
        "prompt_attention_mask": [1] * start,
        "input_ids": full[start:],
        "attention_mask": [1] * (len(full) - start),
    }


def tokenize_encoder_decoder(
    row: Mapping[str, Any], tokenizer: Any, *, max_prompt_length: int, max_target_length: int, model: Any = None
) -> Tokens:
    """Prompt and answers of one row for an encoder and a decoder: `prompt_*` and `{chosen,rejected}_labels`.

    Each is cut to its length, with the special tokens of the tokenizer. With a `model` that can tell them, there are
    `{chosen,rejected}_decoder_input_ids` too.
    """
    encode = {"truncation": True, "add_special_tokens": True}
    tokens: Tokens = {
        f"{name}_labels": tokenizer(_string(row, name), max_length=max_target_length, **encode)["input_ids"]
        for name in ANSWERS
    }
    prompt = tokenizer(_string(row, "prompt"), max_length=max_prompt_length, **encode)
    tokens |= {f"prompt_{name}": prompt[name] for name in ("input_ids", "attention_mask")}
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        for name in ANSWERS:
            labels = torch.tensor([tokens[f"{name}_labels"]])
            ids = model.prepare_decoder_input_ids_from_labels(labels=labels)
            tokens[f"{name}_decoder_input_ids"] = ids[0].tolist()
    return tokens


def _string(row: Mapping[str, Any], name: str) -> str:
    if not isinstance(row[name], str):
        raise ValueError(f"{name} should be an str but got {type(row[name])}")
    return row[name]


def _truncate(prompts: Tokens, answers: Tokens, max_length: int, max_prompt_length: int, mode: str) -> None:
    longer = max(map(len, answers.values()))

    def too_long(name: str) -> bool:
        return len(prompts[name]) + longer > max_length

    for name in filter(too_long, prompts):
        if mode not in ("keep_start", "keep_end"):
            raise ValueError(f"Unknown truncation mode: {mode}")
        start = 0 if mode == "keep_start" else max(len(prompts[name]) - max_prompt_length, 0)
        prompts[name] = prompts[name][start : start + max_prompt_length]
    for name in filter(too_long, ANSWERS):
        if max_prompt_length >= max_length:
            raise ValueError(
                f"max_prompt_length={max_prompt_length} leaves no room for an answer where one must be truncated: it "
                f"must be less than max_length={max_length}"
            )
        answers[name] = answers[name][: max_length - max_prompt_length]
