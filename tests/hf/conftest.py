import json

import pytest
import torch


@pytest.fixture(scope="session")
def tokenizer():
    from alignkit.hf import builtin

    return builtin.tiny()[1]


@pytest.fixture(scope="session")
def bos_tokenizer(tokenizer):
    """Like Llama's: a BOS in front of every text, and none in the chat template."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    bos = "<|im_start|>"
    backend.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=tokenizer.eos_token, chat_template=tokenizer.chat_template
    )


def tiny_config(shape, vocab):
    from transformers import GPT2Config, Qwen2Config

    if shape == "gpt2":
        return GPT2Config(
            vocab_size=vocab, n_embd=16, n_layer=2, n_head=2, n_positions=256, attn_pdrop=0.1, bos_token_id=None
        )
    return Qwen2Config(
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )


@pytest.fixture(scope="session", params=["qwen2", "gpt2"])
def folder(request, tokenizer, tmp_path_factory):
    """A model folder as `save_pretrained` writes it."""
    from transformers import AutoModelForCausalLM

    path = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(request.param, len(tokenizer)))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def jsonl(tmp_path):
    def write(rows, name="data.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write
