"""Answers from a policy."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import GenerationConfig

from alignkit import data
from alignkit.hf.data import encode
from alignkit.hf.loading import without_adapter
from alignkit.hf.models import Policy
from alignkit.hf.processes import process
from alignkit.train import evaluating


@torch.no_grad()
def sample(
    policy: Policy,
    tokenizer: Any,
    prompts: Sequence[Any],
    *,
    max_new: int,
    temperature: float = 1.0,
    seed: int = 0,
    step: int = 0,
) -> tuple[Int[Tensor, "batch time"], Bool[Tensor, "batch time"]]:
    """One answer to each prompt: `ids` (prompt and answer, right-padded) and `mask` (True on the answer, EOS included).

    `temperature=0` is greedy. Random numbers depend on `seed`, `step` and the process; the global random state is left
    as it was.
    """
    if not prompts:
        raise ValueError("prompts is empty: give at least one")
    if max_new < 1 or temperature < 0:
        raise ValueError(f"max_new={max_new} must be at least 1 and temperature={temperature} at least 0")
    encoded = [encode(tokenizer, prompt) for prompt in prompts]
    longest = max(len(x) for x in encoded)
    ids = torch.tensor([[0] * (longest - len(x)) + x for x in encoded], device=policy.device)
    attention = torch.tensor([[0] * (longest - len(x)) + [1] * len(x) for x in encoded], device=policy.device)
    config = GenerationConfig(
        max_new_tokens=max_new, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id
    )
    if temperature:
        config.update(do_sample=True, temperature=temperature, top_k=0)
    with evaluating(policy), _generating(policy, config), torch.random.fork_rng():
        torch.manual_seed(data.mix(data.mix(seed, step), process().process_index))
        out = policy.lm.generate(input_ids=ids, attention_mask=attention)
    rows = []
    for prompt, answer in zip(encoded, out[:, longest:].tolist()):
        end = answer.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in answer else len(answer)
        rows.append({"ids": prompt + answer[:end], "mask": [False] * len(prompt) + [True] * end})
    batch = data.collate(rows)
    return batch["ids"], batch["mask"]


@contextmanager
def _generating(policy: Policy, config: GenerationConfig) -> Iterator[None]:
    """`config` instead of the model's own, whose penalties and filters would make samples of another distribution."""
    base = without_adapter(policy.lm)
    own, base.generation_config = base.generation_config, config
    try:
        yield
    finally:
        base.generation_config = own


def decode(tokenizer: Any, ids: Int[Tensor, "batch time"], mask: Bool[Tensor, "batch time"]) -> list[str]:
    """The text of each row's True tokens, without special tokens."""
    return [tokenizer.decode(row[keep].tolist(), skip_special_tokens=True) for row, keep in zip(ids, mask)]
