import copy
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from alignkit.trl.core import LengthSampler
from alignkit.trl.models.modeling_value_head import (
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
)
from alignkit.trl.trainer.ppo_config import PPOConfig
from alignkit.trl.trainer.ppo_generation import generate, prepare_dataloader
from alignkit.trl.trainer.ppo_trainer import PPOTrainer
from tests.trl.conftest import GOLDEN, golden, tiny

CASES = golden("ppo_generate")["cases"]
QUERIES = [torch.tensor(q) for q in golden("ppo_generate")["queries"]]


class Wrapped(nn.Module):
    """A model as `PPOTrainer` has it, less the value head."""

    def __init__(self, model):
        super().__init__()
        self.pretrained_model = model

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        return self.pretrained_model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    def generate(self, *args, **kwargs):
        return self.pretrained_model.generate(*args, **kwargs)


def of(model, tokenizer, ref=None, **attributes):
    """What the functions read of a trainer."""
    defaults = {
        "model": Wrapped(model),
        "ref_model": ref and Wrapped(ref),
        "tokenizer": tokenizer,
        "accelerator": Accelerator(cpu=True),
        "current_device": torch.device("cpu"),
        "is_encoder_decoder": False,
        "is_peft_model": False,
        "optional_peft_ctx": nullcontext,
    }
    return SimpleNamespace(**(defaults | attributes))


def lists(rows):
    return [row.tolist() for row in rows]


@pytest.fixture(scope="module")
def models():
    return [AutoModelForCausalLM.from_pretrained(GOLDEN / name) for name in ("tiny_gpt2", "tiny_gpt2_ref")]


@pytest.fixture
def trainer(models, golden_tokenizer):
    return of(models[0], copy.deepcopy(golden_tokenizer), models[1])


@pytest.fixture
def greedy(golden_tokenizer):
    return {"do_sample": False, "max_new_tokens": 6, "pad_token_id": golden_tokenizer.pad_token_id}


@pytest.mark.parametrize("case", CASES, ids=[c.get("name") or f"{i}" for i, c in enumerate(CASES)])
def test_golden(case, trainer, greedy):
    name = case.get("name", "")
    if case.get("eos_token_id") or "42" in name or name == "length_sampler":
        trainer.tokenizer.eos_token = trainer.tokenizer.convert_ids_to_tokens(42)
    greedy["eos_token_id"] = trainer.tokenizer.eos_token_id
    if name == "eos_inside_prompt":
        (out,) = generate(trainer, [torch.tensor(case["query"])], **greedy)
        assert case["out"] == [[2, 3]]  # the release lost the rest of the prompt, and the answer
        assert out.tolist()[: len(case["query"])] == case["query"]
        assert len(out) > len(case["query"])
    elif name == "length_sampler":
        np.random.seed(case["np_seed"])  # noqa: NPY002
        sampler = LengthSampler(case["min"], case["max"])
        out = generate(trainer, QUERIES, sampler, batch_size=case["batch_size"], return_prompt=False, **greedy)
        assert lists(out) == case["out"]
    elif "ref_out" not in case:
        query = torch.tensor(case["query"]) if "query" in case else QUERIES[0]
        assert generate(trainer, query, return_prompt=False, **greedy).tolist() == case["out"]
    else:
        out, ref = generate(
            trainer,
            QUERIES,
            batch_size=case["batch_size"],
            return_prompt=case["return_prompt"],
            generate_ref_response=True,
            **greedy,
        )
        assert (lists(out), lists(ref)) == (case["out"], case["ref_out"])
        assert trainer.tokenizer.padding_side == "right"


@pytest.mark.parametrize("shape", ["gpt2", "llama", "qwen2"])
def test_padding_changes_nothing(shape, tokenizer):
    trainer = of(tiny(shape, initializer_range=0.3), tokenizer)
    prompts = [torch.arange(5, 5 + n) for n in (3, 9, 1)]
    options = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 1}
    alone = [generate(trainer, prompt, **options)[0].tolist() for prompt in prompts]
    assert len({tuple(row[-5:]) for row in alone}) > 1
    for batch_size, multiple in ((1, None), (2, None), (3, None), (8, 8)):
        together = generate(trainer, prompts, batch_size=batch_size, pad_to_multiple_of=multiple, **options)
        assert lists(together) == alone
    new = generate(trainer, prompts, return_prompt=False, **options)
    assert lists(new) == [row[len(prompt) :] for row, prompt in zip(alone, prompts)]


class Scripted(nn.Module):
    """Answers with given tokens, and remembers what it was asked."""

    def __init__(self, *answers, eos_token_id=3, start=None):
        super().__init__()
        self.dropout = nn.Dropout()
        self.answers = torch.tensor(answers)
        self.generation_config = SimpleNamespace(eos_token_id=eos_token_id)
        self.start = start
        self.seen = []

    @property
    def device(self):
        return torch.device("cpu")

    def generate(self, input_ids, attention_mask, **kwargs):
        self.seen.append((input_ids, attention_mask, kwargs, self.training))
        answers = self.answers[: max(len(input_ids), len(self.answers))]
        if self.start is not None:
            return torch.cat([torch.full((len(answers), 1), self.start), answers], 1)
        return torch.cat([input_ids.repeat_interleave(len(answers) // len(input_ids), 0), answers], 1)


def test_what_the_model_is_asked(golden_tokenizer):
    model = Scripted([9, 8], [7, 6])
    trainer = of(model, golden_tokenizer)
    trainer.model.train()
    prompts = [torch.tensor([2, 4, 5]), torch.tensor([2])]
    assert lists(generate(trainer, prompts, top_k=0, pad_to_multiple_of=4)) == [[2, 4, 5, 9, 8], [2, 7, 6]]
    ids, attention, kwargs, training = model.seen[0]
    assert ids.tolist() == [[0, 2, 4, 5], [0, 0, 0, 2]]
    assert attention.tolist() == [[0, 1, 1, 1], [0, 0, 0, 1]]
    assert kwargs == {"top_k": 0}
    assert not training  # the tokens are those of the policy whose log-probs are taken, without dropout
    assert trainer.model.training
    assert model.dropout.training
    assert golden_tokenizer.padding_side == "right"


def test_a_prompt_alone_is_not_padding(golden_tokenizer):
    """Tokens of a prompt that look like padding are tokens."""
    model = Scripted([9, 8])
    generate(of(model, golden_tokenizer), torch.tensor([0, 4, 0]))
    assert model.seen[0][1].tolist() == [[1, 1, 1]]


@pytest.mark.parametrize("remove_padding", [True, False])
def test_an_answer_ends_at_its_first_eos(golden_tokenizer, remove_padding):
    trainer = of(Scripted([9, 3, 0], [3, 0, 0], [9, 8, 7]), golden_tokenizer)
    prompts = [torch.tensor([2, 3, 4]), torch.tensor([3]), torch.tensor([3, 2])]
    answers = [[9, 3], [3], [9, 8, 7]] if remove_padding else [[9, 3, 0], [3, 0, 0], [9, 8, 7]]
    out = generate(trainer, prompts, remove_padding=remove_padding)
    assert lists(out) == [prompt.tolist() + answer for prompt, answer in zip(prompts, answers)]
    assert lists(generate(trainer, prompts, return_prompt=False, remove_padding=remove_padding)) == answers


@pytest.mark.parametrize(
    ("own", "kwargs", "answer"),
    [
        (3, {}, [9, 5, 8]),
        ([3, 5], {}, [9, 5]),
        (3, {"eos_token_id": 5}, [9, 5]),
        (3, {"eos_token_id": torch.tensor([9])}, [9]),
        (5, {"eos_token_id": -1}, [9, 5, 8]),
        (3, {"generation_config": SimpleNamespace(eos_token_id=9)}, [9]),
        (None, {}, [9, 5, 8]),
    ],
)
def test_an_answer_also_ends_where_the_model_stopped(golden_tokenizer, own, kwargs, answer):
    """What follows is padding."""
    trainer = of(Scripted([9, 5, 8], eos_token_id=own), golden_tokenizer)
    assert lists(generate(trainer, [torch.tensor([5, 9])], return_prompt=False, **kwargs)) == [answer]


def test_without_any_eos(golden_tokenizer):
    tokenizer = copy.deepcopy(golden_tokenizer)
    tokenizer.eos_token = None
    trainer = of(Scripted([9, 3, 8], eos_token_id=None), tokenizer)
    assert lists(generate(trainer, [torch.tensor([2])])) == [[2, 9, 3, 8]]


def test_one_length_per_batch_for_the_reference_too(golden_tokenizer):
    model, ref = Scripted([9], [8]), Scripted([7], [6])
    trainer = of(model, golden_tokenizer, ref)
    lengths = iter([np.int64(4), 2])
    prompts = [torch.tensor([2])] * 4
    generate(trainer, prompts, lambda: next(lengths), batch_size=2, generate_ref_response=True, max_new_tokens=9)
    for scripted in (model, ref):
        assert [kwargs for _, _, kwargs, _ in scripted.seen] == [{"max_new_tokens": 4}, {"max_new_tokens": 2}]
    generate(trainer, prompts[0], lambda: 3)
    assert model.seen[-1][2] == {"max_new_tokens": 3}


@pytest.mark.parametrize("many", [True, False])
def test_the_reference_answers_too(trainer, greedy, many):
    prompt = QUERIES[0]
    asked = [prompt] if many else prompt
    swapped = SimpleNamespace(**(vars(trainer) | {"model": trainer.ref_model}))
    out, ref = generate(trainer, asked, generate_ref_response=True, return_prompt=False, **greedy)
    assert lists(out) == lists(generate(trainer, asked, return_prompt=False, **greedy))
    assert lists(ref) == lists(generate(swapped, asked, return_prompt=False, **greedy))
    assert lists(out) != lists(ref)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft reads the old name
@pytest.mark.parametrize("many", [True, False])
def test_the_reference_of_an_adapter_is_the_model_without_it(trainer, models, greedy, many):
    adapted = get_peft_model(copy.deepcopy(models[0]), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    asked = QUERIES if many else QUERIES[0]
    base = generate(trainer, asked, **greedy)
    trainer.model, trainer.ref_model = Wrapped(adapted), None
    trainer.is_peft_model, trainer.optional_peft_ctx = True, adapted.disable_adapter
    out, ref = generate(trainer, asked, generate_ref_response=True, **greedy)
    assert lists(ref) == lists(base)
    assert lists(out) != lists(base)


@pytest.mark.parametrize("return_prompt", [True, False])
def test_encoder_decoder(tokenizer, return_prompt):
    """The prompt is never part of the answer, which begins with the token that starts the decoder."""
    trainer = of(tiny("t5", auto="AutoModelForSeq2SeqLM", initializer_factor=3.0), tokenizer, is_encoder_decoder=True)
    prompts = [torch.arange(5, 5 + n) for n in (3, 9, 1)]
    options = {"do_sample": False, "max_new_tokens": 5, "return_prompt": return_prompt}
    alone = [generate(trainer, prompt, **options)[0].tolist() for prompt in prompts]
    assert {row[0] for row in alone} == {1}
    assert len({tuple(row) for row in alone}) > 1
    assert lists(generate(trainer, prompts, batch_size=2, **options)) == alone


def test_an_encoder_decoder_may_start_with_eos(golden_tokenizer):
    """As BART does; the tokenizer keeps its padding side."""
    model = Scripted([9, 3, 0], [8, 7, 6], start=3)
    trainer = of(model, golden_tokenizer, is_encoder_decoder=True)
    assert lists(generate(trainer, [torch.tensor([2, 4]), torch.tensor([2])])) == [[3, 9, 3], [3, 8, 7, 6]]
    assert model.seen[0][0].tolist() == [[2, 4], [2, 0]]


def test_several_answers_to_a_prompt(golden_tokenizer):
    trainer = of(Scripted([9, 3], [8, 8], [7, 7], [3, 0]), golden_tokenizer)
    out = generate(trainer, [torch.tensor([2, 4]), torch.tensor([2])], num_return_sequences=2)
    assert lists(out) == [[2, 4, 9, 3], [2, 4, 8, 8], [2, 7, 7], [2, 3]]


def test_bfloat16_and_sampling(tokenizer):
    trainer = of(tiny("llama").bfloat16(), tokenizer)
    prompts = [torch.arange(5, 5 + n) for n in (3, 9)]
    out = generate(trainer, prompts, do_sample=True, top_k=0.0, top_p=1.0, min_length=-1, max_new_tokens=4)
    for prompt, row in zip(prompts, out):
        assert row[: len(prompt)].tolist() == prompt.tolist()
        assert len(prompt) < len(row) <= len(prompt) + 4


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (torch.ones(1, 3), r"query_tensor is of shape \(1, 3\): query_tensor must be a tensor of shape \(seq_len\) or"),
        (torch.tensor(3), r"query_tensor is of shape \(\)"),
        (torch.tensor([]), r"query_tensor is of shape \(0,\)"),
        ([torch.ones(2), torch.ones(1, 2)], r"query_tensor\[1\] is of shape \(1, 2\)"),
        ([[2, 4]], r"query_tensor\[0\] is a list"),
        ([], "query_tensor is an empty list"),
    ],
)
def test_prompts_of_another_shape(trainer, query, message):
    with pytest.raises(ValueError, match=message):
        generate(trainer, query)


def test_other_bad_input(trainer):
    with pytest.raises(TypeError, match="query_tensor must be a tensor or a list of tensors, not a str"):
        generate(trainer, "Hello")
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        generate(trainer, QUERIES, batch_size=0)
    with pytest.raises(ValueError, match="temprature"):
        generate(trainer, QUERIES, temprature=2)
    trainer.tokenizer.pad_token = None
    with pytest.raises(ValueError, match=r"tokenizer has no pad token.* set tokenizer.pad_token"):
        generate(trainer, QUERIES)


def test_an_error_leaves_everything_as_it_was(golden_tokenizer):
    model = Scripted([9], [8])
    trainer = of(model, golden_tokenizer)
    trainer.model.train()
    model.generate = lambda **kwargs: 1 / 0
    with pytest.raises(ZeroDivisionError):
        generate(trainer, [torch.tensor([2])])
    assert golden_tokenizer.padding_side == "right"
    assert model.dropout.training


# the data loader


def rows(n=7):
    return Dataset.from_dict(
        {
            "query": [str(i) for i in range(n)],
            "input_ids": [[i, i] for i in range(n)],
            "label": list(range(n)),
            "text": ["unused"] * n,
        }
    ).with_format("torch")


def collator(data):
    return {key: [d[key] for d in data] for key in data[0]}


def loader(trainer, dataset, collate=None, **config):
    trainer.config = SimpleNamespace(**({"batch_size": 3, "remove_unused_columns": True} | config))
    return prepare_dataloader(trainer, dataset, collate)


def test_batches_are_whole_and_shuffled(trainer):
    batches = loader(trainer, rows(), collator)
    seen = [[int(x) for batch in batches for x in batch["label"]] for _ in range(3)]
    assert len(batches) == 2
    assert all(len(set(epoch)) == 6 for epoch in seen)
    assert seen[0] != seen[1] or seen[1] != seen[2]
    assert next(iter(loader(trainer, rows())))["input_ids"].shape == (3, 2)  # the default collator


def test_less_than_a_batch_is_none(trainer):
    with pytest.warns(UserWarning, match="dataset has 2 rows: no batch of config.batch_size=3"):
        assert len(loader(trainer, rows().select(range(2)), collator)) == 0


def test_columns_that_nothing_uses(trainer):
    def columns(**config):
        return set(next(iter(loader(trainer, rows(), collator, **config))))

    assert columns() == {"query", "input_ids", "label"}
    assert columns(remove_unused_columns=False) == {"query", "input_ids", "label", "text"}
    with pytest.raises(ValueError, match=r"dataset has only columns that nothing uses, \['text'\]"):
        loader(trainer, rows().select_columns(["text"]))


def test_a_torch_dataset_keeps_what_it_has(trainer):
    batch = next(iter(loader(trainer, [{"text": "a", "ids": 1}] * 4, collator)))
    assert set(batch) == {"text", "ids"}


# within the trainer


def ppo(model, tokenizer, ref=None, **kwargs):
    config = PPOConfig(batch_size=2, mini_batch_size=1)
    return PPOTrainer(config, model, ref, tokenizer, **kwargs)


@pytest.mark.parametrize("shape", ["gpt2", "llama", "qwen2"])
def test_a_trainer_generates(shape, tokenizer):
    def model(seed):
        return AutoModelForCausalLMWithValueHead.from_pretrained(tiny(shape, seed=seed, initializer_range=0.3))

    trainer = ppo(model(0), tokenizer, model(1), dataset=rows(), data_collator=collator)
    assert set(next(iter(trainer.dataloader))) == {"query", "input_ids", "label"}
    options = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": 1}
    prompts = [torch.arange(5, 5 + n) for n in (3, 9)]
    out, ref = trainer.generate(prompts, batch_size=2, generate_ref_response=True, return_prompt=False, **options)
    for seed, answers in enumerate((out, ref)):
        alone = of(tiny(shape, seed=seed, initializer_range=0.3), tokenizer)
        assert lists(answers) == [generate(alone, p, return_prompt=False, **options)[0].tolist() for p in prompts]
    assert lists(out) != lists(ref)


@pytest.mark.filterwarnings("ignore:No dataset:UserWarning")
def test_a_trainer_with_an_adapter_generates(trainer, greedy):
    lora = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(GOLDEN / "tiny_gpt2", peft_config=lora)
    base = generate(trainer, QUERIES, **greedy)
    out, ref = ppo(model, trainer.tokenizer).generate(QUERIES, generate_ref_response=True, **greedy)
    assert lists(ref) == lists(base)
    assert lists(out) != lists(base)


@pytest.mark.filterwarnings("ignore:No dataset:UserWarning")
def test_a_trainer_of_an_encoder_decoder_generates(tokenizer):
    model = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(tiny("t5", auto="AutoModelForSeq2SeqLM"))
    trainer = ppo(model, tokenizer)
    prompts = [torch.arange(5, 5 + n) for n in (3, 9)]
    out, ref = trainer.generate(prompts, generate_ref_response=True, max_new_tokens=4, do_sample=False)
    assert lists(out) == lists(ref)
    assert all(row[0] == 1 for row in lists(out))
