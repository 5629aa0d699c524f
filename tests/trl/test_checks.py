"""What is wrong with an argument is said at once, and by its name."""

import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from alignkit.trl import (
    AutoModelForCausalLMWithValueHead,
    BestOfNSampler,
    ConstantLengthDataset,
    DPOTrainer,
    PPOConfig,
    PPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTTrainer,
)
from alignkit.trl.trainer.checks import MAPPED, check_arguments, check_datasets, check_padding, check_tokens
from alignkit.trl.trainer.completion_collator import TextCollator
from alignkit.trl.trainer.dpo_setup import check_options
from alignkit.trl.trainer.peft_setup import load
from alignkit.trl.trainer.reward_collator import RewardDataCollatorWithPadding

MODEL, WORDS = "tests/golden/tiny_gpt2", "tests/golden/tokenizer"
TEXTS = Dataset.from_dict({"text": ["the cat sat", "the dog ran"]})


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL)


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(WORDS)


@pytest.fixture
def args(tmp_path):
    return TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("args", {"max_steps": 1}, "args must be TrainingArguments, but is a dict"),
        ("model", "a/b", "model must be a model, as from_pretrained returns it, but is a str"),
        ("tokenizer", "a/b", "tokenizer='a/b' is a name: give what AutoTokenizer.from_pretrained makes of it"),
        ("data_collator", 3, "data_collator must be a function of a list of rows, but is a int"),
    ],
)
def test_kinds_of_arguments(argument, value, message):
    right = {"model": torch.nn.Linear(1, 1), "args": None, "tokenizer": object(), "data_collator": list}
    check_arguments(**right)
    with pytest.raises(TypeError, match=message):
        check_arguments(**(right | {argument: value}))
    check_arguments(**(right | {"model": "a/b"}), names=True)
    with pytest.raises(TypeError, match="model must be a model or its name, but is a int"):
        check_arguments(**(right | {"model": 3}), names=True)


def test_datasets():
    empty = TEXTS.select([])
    check_datasets(TEXTS, {"a": TEXTS, "b": TEXTS.to_iterable_dataset()}, MAPPED)
    check_datasets([{"text": "a"}], None)
    check_datasets(None, DatasetDict(a=TEXTS))
    for wrong in ((empty, None), (TEXTS, empty), (TEXTS, {"a": TEXTS, "b": empty}), ([], None)):
        with pytest.raises(ValueError, match=r"(train_dataset|eval_dataset(\['b'\])?) is empty"):
            check_datasets(*wrong)
    with pytest.raises(TypeError, match=r"train_dataset is a DatasetDict of \['train', 'test'\]: give one of these"):
        check_datasets(DatasetDict(train=TEXTS, test=TEXTS), None)
    with pytest.raises(TypeError, match="train_dataset is a list, but must be a dataset"):
        check_datasets([{"text": "a"}], None, MAPPED)


def test_numbers_of_tokens_and_padding(tokenizer):
    for right in (None, 1, 512):
        check_tokens("max_length", right)
    with pytest.raises(ValueError, match="max_length=0 must be at least 1 token"):
        check_tokens("max_length", 0)
    for wrong in ("12", 12.5):
        with pytest.raises(TypeError, match=f"max_length={wrong!r} must be an integer"):
            check_tokens("max_length", wrong)
    check_padding(tokenizer)
    row = {f"{name}_{side}": [1] for name in ("input_ids", "attention_mask") for side in ("chosen", "rejected")}
    tokenizer.pad_token = None
    for collate, rows in (
        (TextCollator(tokenizer, mlm=False), [{"input_ids": [1]}]),
        (RewardDataCollatorWithPadding(tokenizer), [row]),
    ):
        with pytest.raises(ValueError, match=r"tokenizer has no pad token.*: set tokenizer.pad_token"):
            collate(rows)


def test_each_trainer_checks_its_arguments(model, tokenizer, args, tmp_path):
    config = RewardConfig(str(tmp_path), use_cpu=True, report_to="none", max_length=0)
    for kind, options in ((SFTTrainer, {"dataset_text_field": "text", "max_seq_length": 4}), (DPOTrainer, {})):
        with pytest.raises(TypeError, match="tokenizer='words' is a name"):
            kind(model, args=args, train_dataset=TEXTS, tokenizer="words", **options)
        with pytest.raises(ValueError, match="train_dataset is empty"):
            kind(model, args=args, train_dataset=TEXTS.select([]), tokenizer=tokenizer, **options)
    with pytest.raises(TypeError, match="model must be a model"):
        RewardTrainer("a/b", config, train_dataset=TEXTS, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="max_length=0 must be"):
        RewardTrainer(model, config, train_dataset=TEXTS, tokenizer=tokenizer)


def test_texts_of_another_kind(model, tokenizer, args):
    options = {"args": args, "tokenizer": tokenizer, "max_seq_length": 4}
    numbers = Dataset.from_dict({"text": [1, 2]})
    with pytest.raises(ValueError, match="dataset_text_field='text' must give strings, but there is a int: 1"):
        SFTTrainer(model, train_dataset=numbers, dataset_text_field="text", **options)
    with pytest.raises(ValueError, match="formatting_func must give strings, but there is a NoneType"):
        SFTTrainer(model, train_dataset=numbers, formatting_func=lambda rows: ["a", None], **options)
    with pytest.raises(ValueError, match=r"dataset_kwargs may hold .*, not 'append'"):
        SFTTrainer(model, train_dataset=TEXTS, dataset_text_field="text", dataset_kwargs={"append": 1}, **options)
    with pytest.raises(ValueError, match=r"dataset_text_field='body' is not a column of the dataset: \['text'\]"):
        ConstantLengthDataset(tokenizer, TEXTS, "body")


def test_names_that_cannot_be_loaded(tmp_path):
    with pytest.raises(OSError, match=r"ref_model='.*nothing' is no folder that can be loaded"):
        load(str(tmp_path / "nothing"), argument="ref_model")
    with pytest.raises(OSError, match=r"pretrained_model_name_or_path='.*nothing' is no folder"):
        AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path / "nothing"))


def test_options_of_dpo(model, tokenizer, args):
    check_options(0.1, 0.0, "sigmoid", "keep_end")
    for wrong in (0, -1.0, "a", None):
        with pytest.raises(ValueError, match=f"beta={wrong!r} must be a number above 0"):
            check_options(wrong, 0.0, "sigmoid", "keep_end")
    with pytest.raises(ValueError, match="Unknown truncation mode: middle"):
        check_options(0.1, 0.0, "sigmoid", "middle")
    rows = Dataset.from_dict({"prompt": ["the cat"], "chosen": ["sat"], "rejected": ["ran"]})
    args.remove_unused_columns = False
    with pytest.warns(UserWarning, match="loaded for you") as seen:
        DPOTrainer(MODEL, MODEL, args=args, train_dataset=rows, tokenizer=tokenizer, max_length=8, max_prompt_length=4)
    assert sum("loaded for you" in str(w.message) for w in seen) == 2  # equal names are two models


@pytest.mark.filterwarnings("ignore:No dataset:UserWarning")
def test_ppo(tokenizer):
    value_head = AutoModelForCausalLMWithValueHead.from_pretrained(MODEL)
    config = PPOConfig(batch_size=2, mini_batch_size=1)
    with pytest.raises(ValueError, match=r"optimizer must be of type torch.optim"):
        PPOTrainer(config, value_head, tokenizer=tokenizer, optimizer="adam")
    empty = Dataset.from_dict({"input_ids": [[1]]}).select([])
    with pytest.raises(ValueError, match="dataset is empty"):
        PPOTrainer(config, value_head, tokenizer=tokenizer, dataset=empty)
    with pytest.raises(TypeError, match="tokenized_query must be token ids, but is text: 'the cat'"):
        BestOfNSampler(value_head, tokenizer, len, lambda: 3).generate("the cat")
    trainer = PPOTrainer(config, value_head, tokenizer=tokenizer)
    tokenizer.pad_token = None
    ids = [torch.tensor([11, 13]), torch.tensor([11])]
    with pytest.raises(ValueError, match="tokenizer has no pad token"):
        trainer.step(ids, ids, [torch.tensor(1.0)] * 2)
