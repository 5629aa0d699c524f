"""Prompts in, answers out: the data loader of `PPOTrainer`, and its `generate`."""

import inspect
import warnings
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers.trainer_utils import has_length

from alignkit.train import evaluating
from alignkit.trl.trainer.checks import check_padding


def prepare_dataloader(trainer: Any, dataset: Any, data_collator: Callable[..., Any] | None = None) -> DataLoader:
    """Shuffled batches of exactly `config.batch_size` rows; the rest of an epoch is dropped.

    A `datasets.Dataset` first loses the columns that are neither arguments of the model's forward nor "label", "query"
    or "response", unless `config.remove_unused_columns` is False. Raises ValueError if none would be left, and for a
    dataset without rows; warns of one of less than a batch.
    """
    if isinstance(dataset, Dataset) and trainer.config.remove_unused_columns:
        forward = trainer.accelerator.unwrap_model(trainer.model).forward
        known = {*inspect.signature(forward).parameters, "label", "query", "response"}
        unused = [name for name in dataset.column_names if name not in known]
        if len(unused) == len(dataset.column_names):
            raise ValueError(f"dataset has only columns that nothing uses, {unused}: pass remove_unused_columns=False")
        dataset = dataset.remove_columns(unused)
    size = trainer.config.batch_size
    if has_length(dataset) and not len(dataset):
        raise ValueError("dataset is empty: there must be at least config.batch_size rows")
    if has_length(dataset) and len(dataset) < size:
        warnings.warn(f"dataset has {len(dataset)} rows: no batch of config.batch_size={size}", stacklevel=3)
    return DataLoader(dataset, batch_size=size, collate_fn=data_collator, shuffle=True, drop_last=True)


def generate(
    trainer: Any,
    query_tensor: Any,
    length_sampler: Callable[[], int] | None = None,
    batch_size: int = 4,
    return_prompt: bool = True,
    generate_ref_response: bool = False,
    **generation_kwargs: Any,
) -> Any:
    """Answers of the policy to a list of prompts [T], as a list of tensors; or to one prompt [T], as a tensor [1, L].

    Of a list, `batch_size` prompts are answered at a time, padded on the left (to a multiple of `pad_to_multiple_of`);
    padding is removed again, and what follows the first end-of-sequence token of an answer (unless `remove_padding`
    is False). `length_sampler()` gives the `max_new_tokens` of each batch. Without `return_prompt` only the new tokens
    are returned; an encoder-decoder returns its whole decoder sequence in any case. With `generate_ref_response` the
    result is (answers, answers of the reference), the reference of an adapter being the model without it.

    The model answers in eval mode, so that dropout does not change the policy that is sampled from. Raises ValueError
    for prompts of another shape, an empty list, a `batch_size` below 1, and a tokenizer without a pad token.
    """
    one = isinstance(query_tensor, Tensor)
    batches = [_checked("query_tensor", query_tensor)] if one else _batches(trainer.tokenizer, query_tensor, batch_size)
    answer = _answer_one if one else _answer_batch
    sampled = [{"max_new_tokens": int(length_sampler())} if length_sampler else {} for _ in batches]

    def run(model: Any) -> Any:
        model = trainer.accelerator.unwrap_model(model)
        with evaluating(model):
            parts = [
                answer(trainer, model, batch, return_prompt=return_prompt, **(generation_kwargs | limit))
                for batch, limit in zip(batches, sampled)
            ]
        return parts[0] if one else list(chain.from_iterable(parts))

    answers = run(trainer.model)
    if not generate_ref_response:
        return answers
    with trainer.optional_peft_ctx():
        return answers, run(trainer.model if trainer.is_peft_model else trainer.ref_model)


def _batches(tokenizer: Any, prompts: Any, batch_size: int) -> list[list[Tensor]]:
    if not isinstance(prompts, list):
        raise TypeError(f"query_tensor must be a tensor or a list of tensors, not a {type(prompts).__name__}")
    if not prompts:
        raise ValueError("query_tensor is an empty list: give at least one prompt")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    check_padding(tokenizer)
    prompts = [_checked(f"query_tensor[{i}]", prompt) for i, prompt in enumerate(prompts)]
    return [prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size)]


def _checked(name: str, prompt: Any) -> Tensor:
    if not isinstance(prompt, Tensor) or prompt.dim() != 1 or not len(prompt):
        got = f"of shape {tuple(prompt.shape)}" if isinstance(prompt, Tensor) else f"a {type(prompt).__name__}"
        raise ValueError(f"{name} is {got}: query_tensor must be a tensor of shape (seq_len) or a list of such tensors")
    return prompt


def _answer_one(trainer: Any, model: Any, prompt: Tensor, *, return_prompt: bool, **kwargs: Any) -> Tensor:
    ids = prompt[None].to(trainer.current_device)
    out = model.generate(**({"input_ids": ids, "attention_mask": torch.ones_like(ids)} | kwargs))
    return out if return_prompt or trainer.is_encoder_decoder else out[:, len(prompt) :]


def _answer_batch(
    trainer: Any,
    model: Any,
    prompts: list[Tensor],
    *,
    return_prompt: bool,
    remove_padding: bool = True,
    pad_to_multiple_of: int | None = None,
    **kwargs: Any,
) -> list[Tensor]:
    seq2seq = trainer.is_encoder_decoder
    inputs = trainer.tokenizer.pad(
        {"input_ids": prompts, "attention_mask": [torch.ones_like(x) for x in prompts]},
        padding_side=None if seq2seq else "left",
        pad_to_multiple_of=pad_to_multiple_of,
        return_tensors="pt",
    ).to(trainer.current_device)
    out = model.generate(**inputs, **kwargs)
    start = 1 if seq2seq else inputs["input_ids"].shape[1]  # of the answers: a decoder begins with one given token
    ends = [out.shape[1]] * len(out)
    if remove_padding:
        ends = _ends(out, start, _stop_tokens(model, trainer.tokenizer, kwargs, out.device))
    answers = []
    for i, (row, end) in enumerate(zip(out, ends)):
        given = start if seq2seq else len(prompts[i * len(prompts) // len(out)])  # several answers to a prompt: in turn
        answers.append(row[start - given * (return_prompt or seq2seq) : end])
    return answers


def _ends(ids: Tensor, start: int, stops: Tensor) -> list[int]:
    """Of each row, the index behind the first of `stops` at or after `start`, or the row's length."""
    stopped = torch.isin(ids[:, start:], stops)
    return torch.where(stopped.any(1), start + stopped.int().argmax(1) + 1, ids.shape[1]).tolist()


def _stop_tokens(model: Any, tokenizer: Any, kwargs: dict[str, Any], device: torch.device) -> Tensor:
    """The tokenizer's EOS, and the tokens at which `model.generate(**kwargs)` ends an answer and begins to pad it."""
    config = kwargs.get("generation_config") or getattr(model.pretrained_model, "generation_config", None)
    stops = (tokenizer.eos_token_id, kwargs.get("eos_token_id", getattr(config, "eos_token_id", None)))
    return torch.cat([torch.as_tensor([] if x is None else x).long().flatten().to(device) for x in stops])
