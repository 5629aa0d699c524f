"""What is measured: shapes, token ids and models, drawn once and given to every side."""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import log
from pathlib import Path
from typing import Any

ON_POLICY = ("grpo", "rloo")
ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral", "gpt2", "gpt_neox", "opt")
BETA = {"dpo": 0.1, "grpo": 0.04, "rloo": 0.04}
LR, CLIP = 1e-4, 0.2


@dataclass(frozen=True)
class Shape:
    """Of the model (`mlp` 0: in Llama's proportion), of rows in tokens, and of a step in rows (pairs, answers)."""

    arch: str = "llama"
    hidden: int = 256
    layers: int = 4
    heads: int = 4
    mlp: int = 0
    vocab: int = 32_000
    prompt: int = 128
    completion: int = 128
    batch: int = 8
    group: int = 8
    ragged: bool = False

    def __post_init__(self) -> None:
        if self.arch not in ARCHITECTURES:
            raise ValueError(f"arch={self.arch!r} must be one of {', '.join(ARCHITECTURES)}")
        if self.hidden % self.heads or self.vocab < 8 or min(self.prompt, self.completion, self.batch) < 1:
            raise ValueError(f"{self}: heads must divide hidden, vocab be at least 8, and lengths and batch 1")


@dataclass(frozen=True)
class Workload:
    """A method and its shape; `precomputed` of DPO's reference, and `size` [rows, steps] of GAE."""

    kind: str
    shape: Shape = Shape()
    precomputed: bool = False
    size: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        if self.kind in ON_POLICY and self.shape.ragged:
            raise ValueError(f"ragged: prompts of {self.kind} have one length, as not all sides pad them alike")
        if self.kind in ON_POLICY and (self.shape.group < 2 or self.shape.batch % self.shape.group):
            raise ValueError(f"batch={self.shape.batch} must be a multiple of group={self.shape.group}, at least 2")

    @property
    def prompts(self) -> int:
        """Prompts of one step."""
        return self.shape.batch // self.shape.group if self.kind in ON_POLICY else self.shape.batch

    @property
    def rounding(self) -> float:
        """Relative error in float32 of a ratio of whole answers: exp of two sums, each of log V nats a token."""
        return 2 * self.shape.completion * log(self.shape.vocab) * 2**-23 if self.kind == "rloo" else 0.0

    @property
    def answers(self) -> int:
        """Completions of one prompt."""
        return {"sft": 1, "dpo": 2, "reward": 2}.get(self.kind, self.shape.group)


SMALL, RAGGED, ANSWERS = {"vocab": 512}, {"ragged": True}, {"completion": 64}
WORKLOADS = {
    "sft-fixed": Workload("sft"),
    "sft-ragged": Workload("sft", Shape(**RAGGED)),
    "sft-ragged-512": Workload("sft", Shape(**RAGGED, **SMALL)),
    "dpo-fixed": Workload("dpo"),
    "dpo-ragged": Workload("dpo", Shape(**RAGGED)),
    "dpo-precomputed": Workload("dpo", precomputed=True),
    "dpo-ragged-512": Workload("dpo", Shape(**RAGGED, **SMALL)),
    "reward-ragged-512": Workload("reward", Shape(**RAGGED, **SMALL)),
    "grpo-128": Workload("grpo", Shape(**ANSWERS)),
    "grpo-512": Workload("grpo", Shape(prompt=512, **ANSWERS)),
    "grpo-256-512": Workload("grpo", Shape(prompt=256, **ANSWERS, **SMALL)),
    "rloo-128": Workload("rloo", Shape(**ANSWERS)),
    "gae-64x128": Workload("gae", size=(64, 128)),
    "gae-512x1024": Workload("gae", size=(512, 1024)),
    "gae-64x8192": Workload("gae", size=(64, 8192)),
}
"""The last number of a name is the vocabulary if it is 512, else the prompt's length."""


def changed(workload: Workload, **fields: Any) -> Workload:
    """The workload with other fields of its shape; None leaves one as it is."""
    return replace(workload, shape=replace(workload.shape, **{k: x for k, x in fields.items() if x is not None}))


def trees(workload: Workload, steps: int, seed: int) -> Iterator[dict[str, Any]]:
    """{"prompt": ids, "completions": [ids, ...]} for every prompt of all steps; token 0 is the padding, and not drawn.

    Ragged lengths are uniform in [n / 8, n]. Of on-policy methods the completions are what the check trains on.
    """
    draw, shape = random.Random(seed), workload.shape

    def ids(longest: int) -> list[int]:
        length = draw.randint(max(longest // 8, 1), longest) if shape.ragged else longest
        return [draw.randrange(2, shape.vocab) for _ in range(length)]

    for _ in range(steps * workload.prompts):
        yield {"prompt": ids(shape.prompt), "completions": [ids(shape.completion) for _ in range(workload.answers)]}


def count(workload: Workload, tree: dict[str, Any]) -> int:
    """Tokens for tokens/s: of an on-policy method those sampled, else all of each prompt with each completion."""
    own = sum(map(len, tree["completions"]))
    return own if workload.kind in ON_POLICY else own + len(tree["prompt"]) * len(tree["completions"])


def save(workload: Workload, folder: Path, steps: int, seed: int) -> list[dict[str, Any]]:
    """Write a random model, its tokenizer, and the trees; the trees.

    The end of a sequence is a token that the model does not have, so all answers have the same length.
    """
    save_model(workload, folder, seed)
    save_tokenizer(workload.shape.vocab, folder)
    rows = list(trees(workload, steps, seed))
    (folder / "trees.json").write_text(json.dumps(rows))
    return rows


def save_model(workload: Workload, folder: Path, seed: int) -> None:
    """A random model in float32: a classifier of one label for a reward model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(seed)
    auto = AutoModelForSequenceClassification if workload.kind == "reward" else AutoModelForCausalLM
    auto.from_config(_config(workload.shape), dtype=torch.float32).save_pretrained(folder)


def save_tokenizer(vocab: int, folder: Path) -> None:
    """A tokenizer whose words are the numbers of its tokens, from 2 on; the end of a sequence is token `vocab`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<unk>": 1, **{str(i): i for i in range(2, vocab)}, "<eos>": vocab}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<eos>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)


def _config(shape: Shape) -> Any:
    from transformers import AutoConfig

    config = AutoConfig.for_model(shape.arch)
    mlp = shape.mlp or (43 * shape.hidden + 8) // 16  # 688 of 256
    fields = {
        "vocab_size": shape.vocab, "hidden_size": shape.hidden, "num_hidden_layers": shape.layers, "n_inner": mlp,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.heads, "intermediate_size": mlp,
        "ffn_dim": mlp, "head_dim": shape.hidden // shape.heads, "word_embed_proj_dim": shape.hidden,
        "max_position_embeddings": max(2048, shape.prompt + shape.completion), "tie_word_embeddings": False,
        "num_labels": 1, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None, "sliding_window": None,
    }  # fmt: skip
    own = {k: x for k, x in fields.items() if hasattr(config, k)}
    own |= {
        k: 0.0 for k, x in config.to_dict().items() if isinstance(x, float) and ("drop" in k or k.endswith("pdrop"))
    }
    own.pop("layer_types", None)
    return AutoConfig.for_model(shape.arch, **own)
