"""Best-of-n sampling."""

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import GenerationConfig

from alignkit.trl.core import LengthSampler, set_seed
from alignkit.trl.extras import BestOfNSampler
from alignkit.trl.models import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead
from tests.trl.conftest import tiny

SAMPLING = GenerationConfig(min_length=-1, top_k=0.0, top_p=1.0, do_sample=True, pad_token_id=1)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLMWithValueHead.from_pretrained(tiny("gpt2"))


@pytest.fixture
def queries(tokenizer):
    return [tokenizer.encode("hello world"), tokenizer.encode("goodbye")]


def sampler(model, tokenizer, scores=lambda texts: [float(len(text)) for text in texts], lengths=lambda: 5, **kwargs):
    kwargs = {"generation_config": SAMPLING} | kwargs
    return BestOfNSampler(model, tokenizer, scores, length_sampler=lengths, **kwargs)


def test_kinds_of_queries(model, tokenizer, queries):
    best = sampler(model, tokenizer, lengths=LengthSampler(2, 6), seed=0)
    tensors = [torch.tensor(query) for query in queries]
    single = [queries[0], tensors[0]]
    batches = [queries, tensors, [tensor[None] for tensor in tensors], torch.stack([tensors[0]] * 2)]
    for query in single + batches:
        texts = best.generate(query)
        assert len(texts) == (1 if query in single[:1] or query is single[1] else 2)
        assert all(len(candidates) == 1 for candidates in texts)
        assert texts[0][0].startswith("hello world")


@pytest.mark.parametrize(("samples", "candidates"), [(4, 2), (10, 3), (6, 4), (1, 1), (3, 3)])
def test_numbers_of_samples_and_candidates(model, tokenizer, queries, samples, candidates):
    seen = []

    def scores(texts):
        seen.append(texts)
        return torch.rand(len(texts))

    best = sampler(model, tokenizer, scores, sample_size=samples, n_candidates=candidates)
    texts = best.generate(queries)
    assert [len(found) for found in texts] == [candidates] * 2
    assert [len(found) for found in seen] == [samples] * 2
    assert all(isinstance(text, str) for found in seen for text in found)


def test_best_first(model, tokenizer, queries):
    scored = {}

    def scores(texts):
        out = [float(sum(map(ord, text)) % 101) for text in texts]
        scored.update(zip(texts, out))
        return out

    (found,) = sampler(model, tokenizer, scores, sample_size=8, n_candidates=3, seed=1).generate(queries[0])
    assert [scored[text] for text in found] == sorted(scored.values(), reverse=True)[:3]
    assert len(set(scored)) > 3


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, lambda x: [torch.tensor(score) for score in x]])
def test_scores_of_any_kind(model, tokenizer, queries, kind):
    (found,) = sampler(model, tokenizer, lambda texts: kind([0.5, 2, 1, 1.5]), n_candidates=4).generate(queries[0])
    assert len(found) == 4


def test_one_length_per_query(model, tokenizer, queries):
    drawn = iter([2, 7])
    seen = []
    best = sampler(model, tokenizer, lambda texts: seen.append(texts) or [1.0] * len(texts), lambda: next(drawn))
    best.generate(queries, min_new_tokens=2, eos_token_id=None, skip_special_tokens=False)
    new = [{len(tokenizer.encode(text)) for text in texts} for texts in seen]
    assert max(new[0]) <= len(queries[0]) + 2
    assert max(new[1]) > len(queries[1]) + 2
    assert list(drawn) == []


def test_generation_arguments_override_the_config(model, tokenizer, queries):
    seen = []
    best = sampler(model, tokenizer, lambda texts: seen.append(texts) or [1.0] * len(texts))
    best.generate(queries[0], do_sample=False)
    assert len(set(seen[0])) == 1
    best.generate(queries[0])
    assert len(set(seen[1])) > 1
    assert best.gen_config is SAMPLING
    assert SAMPLING.do_sample
    assert SAMPLING.max_new_tokens is None


def test_without_a_config_it_is_the_models(model, tokenizer, queries):
    (found,) = sampler(model, tokenizer, generation_config=None).generate(queries[0])
    out = model.generate(torch.tensor([queries[0]]), attention_mask=torch.ones(1, len(queries[0])), max_new_tokens=5)
    assert found == [tokenizer.decode(out[0], skip_special_tokens=True)]


def test_pad_tokens_of_a_query_are_read(model, tokenizer, monkeypatch):
    masks, lm = [], model.pretrained_model
    generate = lm.generate
    monkeypatch.setattr(lm, "generate", lambda *args, **kw: masks.append(kw["attention_mask"]) or generate(*args, **kw))
    best = sampler(model, tokenizer, sample_size=2)
    best.generate(torch.tensor([1, 1, 40, 1, 41]))
    best.generate(torch.tensor([40, 41]), attention_mask=torch.tensor([[0, 1]] * 2))
    assert [mask.tolist() for mask in masks] == [[[1] * 5] * 2, [[0, 1]] * 2]


def test_special_tokens(model, tokenizer):
    query = torch.tensor([1, 40, 41])
    best = sampler(model, tokenizer, seed=0)
    assert tokenizer.pad_token in best.generate(query, skip_special_tokens=False)[0][0]
    assert tokenizer.pad_token not in best.generate(query)[0][0]


def test_seed(model, tokenizer, queries):
    runs = [sampler(model, tokenizer, seed=seed).generate(queries, device="cpu") for seed in (3, 3, 4)]
    assert runs[0] == runs[1] != runs[2]
    set_seed(3)
    assert sampler(model, tokenizer).generate(queries) == runs[0]


def test_dropout_is_off_while_sampling(tokenizer, queries):
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny("gpt2")).train()
    seen = []
    best = sampler(model, tokenizer, lambda texts: seen.append(texts) or [1.0] * len(texts), sample_size=6)
    best.generate(queries[0], do_sample=False)
    assert len(set(seen[0])) == 1
    assert model.training


@pytest.mark.parametrize("shape", ["llama", "qwen2", "t5", "lora"])
def test_kinds_of_models(tokenizer, queries, shape):
    if shape == "t5":
        model = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(tiny("t5", auto="AutoModelForSeq2SeqLM"))
    elif shape == "lora":
        config = LoraConfig(r=2, task_type="CAUSAL_LM")
        model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny("gpt2"), peft_config=config)
    else:
        model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny(shape))
    found = sampler(model, tokenizer, sample_size=2).generate(queries)
    assert [len(texts) for texts in found] == [1, 1]
    assert found[0][0].startswith("hello world") == (shape != "t5")


def test_refusals(model, tokenizer, queries):
    with pytest.raises(ValueError, match="tokenizer must be a PreTrainedTokenizerBase, but is a str"):
        sampler(model, "tokenizer")
    with pytest.raises(ValueError, match=r"model must be an AutoModelFor.* or .* but is a GPT2LMHeadModel"):
        sampler(tiny("gpt2"), tokenizer)
    with pytest.raises(ValueError, match="n_candidates=5 must be at least 1 and at most sample_size=4"):
        sampler(model, tokenizer, n_candidates=5)
    with pytest.raises(ValueError, match="returned 1 scores for 4 texts"):
        sampler(model, tokenizer, lambda texts: [1.0]).generate(queries)
    for bad in ([], [[]], [torch.ones(2, 2).long()]):
        with pytest.raises(ValueError, match="tokenized_query must be a query of at least one id or a list of such"):
            sampler(model, tokenizer).generate(bad)
