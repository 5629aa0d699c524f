import json
from pathlib import Path

import pytest
import torch

GOLDEN = Path(__file__).parent.parent / "golden"


def golden(name):
    """A file of golden values."""
    return json.loads((GOLDEN / f"{name}.json").read_text())


@pytest.fixture(scope="session")
def golden_tokenizer():
    """Word-level, with the names of the release's test tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(GOLDEN / "tokenizer")


@pytest.fixture
def tokenizer():
    """A fresh copy of the built-in byte-level tokenizer: ids 0 to 511, EOS 0, pad 1."""
    import copy

    from alignkit.hf import builtin

    return copy.deepcopy(builtin.tiny()[1])


def tiny_config(shape, vocab=512):
    """A config of two layers of width 16."""
    from transformers import GPT2Config, LlamaConfig, Qwen2Config, T5Config

    if shape == "gpt2":
        return GPT2Config(
            vocab_size=vocab, n_embd=16, n_layer=2, n_head=2, n_positions=256, bos_token_id=0, eos_token_id=0
        )
    if shape == "t5":
        return T5Config(
            vocab_size=vocab,
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=1,
            pad_token_id=1,
            eos_token_id=0,
        )
    kind = {"llama": LlamaConfig, "qwen2": Qwen2Config}[shape]
    return kind(
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )


def tiny(shape="gpt2", *, auto="AutoModelForCausalLM", seed=0, **kwargs):
    """A randomly initialised model of `tiny_config`, of any auto class of transformers."""
    import transformers

    config = tiny_config(shape)
    for name, value in kwargs.items():
        setattr(config, name, value)
    torch.manual_seed(seed)
    return getattr(transformers, auto).from_config(config).eval()
