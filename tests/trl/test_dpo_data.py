import re
import warnings
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import AutoTokenizer

from alignkit.trl.trainer.dpo_collator import DPODataCollatorWithPadding, concatenated_inputs, pad_to_length
from alignkit.trl.trainer.dpo_data import build_tokenized_answer, tokenized
from alignkit.trl.trainer.dpo_trainer import DPOTrainer
from tests.trl.conftest import GOLDEN, golden, tiny

COLLATED = {case["name"]: case for case in golden("dpo_collator")["cases"]}
ROW = {"prompt": "question : what is the cat ?", "chosen": " the cat is good .", "rejected": " the dog is bad ."}


@pytest.fixture(scope="module")
def tokenizers():
    return {name: AutoTokenizer.from_pretrained(GOLDEN / name) for name in ("tokenizer", "tokenizer_bpe")}


def tokenize(tokenizer, row, model=None, **options):
    """`DPOTrainer.tokenize_row` of a trainer that has nothing but the options of tokenisation."""
    defaults = {"max_length": 512, "max_prompt_length": 128, "max_target_length": 128, "truncation_mode": "keep_end"}
    fixed = {"tokenizer": tokenizer, "label_pad_token_id": -100, "is_encoder_decoder": False}
    return DPOTrainer.tokenize_row(SimpleNamespace(**(defaults | fixed | options)), row, model)


@pytest.mark.parametrize("case", golden("dpo_tokenize_row")["cases"], ids=lambda c: str(c.get("row", c.get("fn"))))
def test_tokens_are_those_of_the_release(tokenizers, case):
    tokenizer = tokenizers[case["tokenizer"]]
    if case.get("fn"):
        made = build_tokenized_answer(tokenizer, case["prompt"], case["answer"])
        assert {name: made[name] for name in case["out"]} == case["out"]
        return
    if "raises" in case:
        with pytest.raises(ValueError, match=re.escape(case["raises"][1])):
            tokenize(tokenizer, case["row"], **case["args"])
        return
    expected = dict(case["out"])
    if "[BOS]" in case["row"]["prompt"]:  # the release doubles a BOS and an EOS that are there already
        doubled = {"chosen": expected["chosen_input_ids"], "rejected": expected["rejected_input_ids"]}
        assert (doubled["chosen"][:2], doubled["chosen"][-2:]) == ([2, 2], [3, 3])
        for name, x in expected.items():
            x = x[1:]
            expected[name] = x[:-1] if name.startswith("chosen") else x
    assert tokenize(tokenizer, case["row"], **case["args"]) == expected


def test_a_tokenizer_without_bos_or_eos_adds_none(tokenizers):
    class Without:
        bos_token_id = eos_token_id = None

        def __call__(self, text, **options):
            return tokenizers["tokenizer"](text, **options)

    made = tokenize(Without(), ROW)
    assert made["prompt_input_ids"] == [9, 7, 53, 54, 11, 13, 63]
    assert made["chosen_labels"] == [-100] * 7 + [11, 13, 54, 30, 60]


@pytest.mark.parametrize("max_prompt_length", [6, 8])
def test_a_prompt_that_leaves_no_room_is_an_error_where_an_answer_must_be_cut(tokenizers, max_prompt_length):
    limits = {"max_length": 6, "max_prompt_length": max_prompt_length}
    with pytest.raises(ValueError, match=f"max_prompt_length={max_prompt_length} .* less than max_length=6"):
        tokenize(tokenizers["tokenizer"], ROW, **limits)
    short = {"prompt": "yes", "chosen": " one", "rejected": " two"}
    assert tokenize(tokenizers["tokenizer"], short, **limits)["chosen_input_ids"] == [2, 49, 39, 3]


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("max_length", range(4, 24))
def test_no_row_is_too_long_and_each_has_an_answer(tokenizers, mode, max_length):
    made = tokenize(
        tokenizers["tokenizer"], ROW, max_length=max_length, max_prompt_length=max_length // 2, truncation_mode=mode
    )
    for side in ("chosen", "rejected"):
        ids, labels = made[f"{side}_input_ids"], made[f"{side}_labels"]
        assert len(ids) == len(labels) == len(made[f"{side}_attention_mask"]) <= max_length
        prompt = len(made["prompt_input_ids"])
        assert labels[:prompt] == [-100] * prompt
        assert labels[prompt:] == ids[prompt:] != []
        assert ids[:prompt] == made["prompt_input_ids"]


def test_answers_that_change_more_of_the_prompt_than_its_last_token_are_refused():
    class Merging:
        """Turns two letters into one token, counted from the end of the text."""

        bos_token_id, eos_token_id = 1, 2

        def __call__(self, text, **options):
            parity = len(text) % 2
            pairs = [text[:parity]] * parity + [text[i : i + 2] for i in range(parity, len(text), 2)]
            return {"input_ids": [100 + 31 * ord(x[0]) + ord(x[-1]) for x in pairs]}

    with pytest.raises(ValueError, match="might only differ on the last token"):
        tokenize(Merging(), {"prompt": "abcdef", "chosen": "g", "rejected": "hi"})


def test_a_text_with_fewer_tokens_than_its_prompt_is_refused():
    class Shrinking:
        def __call__(self, text, **options):
            return {"input_ids": [0] * (10 - len(text))}

    with pytest.raises(ValueError, match="should have the same length"):
        build_tokenized_answer(Shrinking(), "a", "b")


def test_an_encoder_decoder_has_labels_and_the_models_ids_for_the_decoder(tokenizers):
    options = {"is_encoder_decoder": True, "max_target_length": 5, "max_prompt_length": 7}
    model = tiny("t5", auto="AutoModelForSeq2SeqLM", vocab_size=64)
    made = tokenize(tokenizers["tokenizer"], ROW, model, **options)
    assert made["chosen_labels"] == [2, 11, 13, 54, 30]
    assert made["chosen_decoder_input_ids"] == [1, 2, 11, 13, 54]
    assert made["rejected_decoder_input_ids"] == [1, 2, 11, 14, 54]
    assert "chosen_decoder_input_ids" not in tokenize(tokenizers["tokenizer"], ROW, **options)
    with pytest.raises(ValueError, match="chosen should be an str but got <class 'list'>"):
        tokenize(tokenizers["tokenizer"], ROW | {"chosen": ["a"]}, **options)


def rows_of(tokenizer, **columns):
    return Dataset.from_dict({name: [ROW[name]] * 3 for name in ROW} | columns), lambda row: tokenize(tokenizer, row)


def test_a_dataset_keeps_its_columns_and_is_tokenized_once(tokenizers):
    dataset, fn = rows_of(tokenizers["tokenizer"], source=["a", "b", "c"])
    made = tokenized(dataset, fn, "train_dataset")
    assert made["source"][:] == ["a", "b", "c"]
    assert made[1]["chosen_labels"] == tokenize(tokenizers["tokenizer"], ROW)["chosen_labels"]
    assert tokenized(made, fn, "train_dataset") is made


def test_a_stream_is_tokenized_as_it_comes(tokenizers):
    dataset, fn = rows_of(tokenizers["tokenizer"])
    stream = tokenized(dataset.to_iterable_dataset(), fn, "train_dataset")
    assert isinstance(stream, IterableDataset)
    assert next(iter(stream))["chosen_labels"] == tokenize(tokenizers["tokenizer"], ROW)["chosen_labels"]


def test_errors_name_the_dataset_and_the_row(tokenizers):
    dataset, fn = rows_of(tokenizers["tokenizer"], chosen=[" a", None, " b"])
    with pytest.raises(ValueError, match=r"^eval_dataset, row 1: chosen should be an str but got <class 'NoneType'>"):
        tokenized(dataset, fn, "eval_dataset")
    with pytest.raises(ValueError, match=r"train_dataset has the columns .* missing=\['rejected'\]"):
        tokenized(dataset.remove_columns("rejected"), fn, "train_dataset")
    with pytest.raises(TypeError, match="train_dataset is a list, but must be a dataset"):
        tokenized([ROW], fn, "train_dataset")


@pytest.mark.parametrize("name", ["collator", "no_pad_token"])
def test_the_collator_is_that_of_the_release(name):
    case = COLLATED[name]
    features = COLLATED["collator"]["features"]
    if "raises" in case:
        with pytest.raises(ValueError, match=re.escape(case["raises"][1])):
            DPODataCollatorWithPadding(pad_token_id=None)(features)
        return
    batch = DPODataCollatorWithPadding(pad_token_id=case["pad_token_id"])(features)
    assert set(batch) == set(case["batch"])
    for column, expected in case["batch"].items():
        if column.endswith("_logps"):
            assert batch[column].dtype == torch.float32
        assert (batch[column].tolist() if torch.is_tensor(batch[column]) else batch[column]) == expected, column


def test_prompts_are_padded_on_the_left_and_answers_with_the_pad_token():
    row = {"prompt_input_ids": [5], "prompt_attention_mask": [1], "chosen_input_ids": [5], "chosen_labels": [5]}
    longer = {name: [*x, 1] for name, x in row.items()}
    batch = DPODataCollatorWithPadding(pad_token_id=7, label_pad_token_id=-3)([row, longer])
    assert batch["prompt_input_ids"].tolist() == [[7, 5], [5, 1]]
    assert batch["prompt_attention_mask"].tolist() == [[0, 1], [1, 1]]
    assert batch["chosen_input_ids"].tolist() == [[5, 7], [5, 1]]
    assert batch["chosen_labels"].tolist() == [[5, -3], [5, 1]]


def test_an_encoder_decoder_is_padded_on_the_right_everywhere():
    row = {"prompt_input_ids": [5], "prompt_attention_mask": [1], "chosen_decoder_input_ids": [5], "chosen_labels": [5]}
    longer = {name: [*x, 1] for name, x in row.items()}
    batch = DPODataCollatorWithPadding(pad_token_id=7, is_encoder_decoder=True)([row, longer])
    assert batch["prompt_input_ids"].tolist() == [[5, 7], [5, 1]]
    assert batch["chosen_decoder_input_ids"].tolist() == batch["chosen_labels"].tolist() == [[5, -100], [5, 1]]
    with pytest.raises(ValueError, match="Unexpected key in batch 'odd_input_ids'"):
        DPODataCollatorWithPadding(is_encoder_decoder=True)([{"odd_input_ids": [1]}])


@pytest.mark.parametrize("case", [c for c in golden("dpo_collator")["cases"] if c["name"] == "concatenated_inputs"])
def test_concatenated_inputs_are_those_of_the_release(case):
    batch = DPODataCollatorWithPadding()(COLLATED["collator"]["features"])
    before = {name: x.clone() for name, x in batch.items() if torch.is_tensor(x)}
    made = concatenated_inputs(batch, padding_value=case["padding_value"])
    assert {name: x.tolist() for name, x in made.items()} == case["out"]
    assert all(torch.equal(x, batch[name]) for name, x in before.items())


def test_concatenated_inputs_of_an_encoder_decoder_repeat_the_prompt():
    out = {name: torch.tensor(x) for name, x in COLLATED["encdec_concatenated_inputs"]["out"].items()}
    rejected = out["concatenated_labels"][2:]
    batch = {
        "prompt_input_ids": out["concatenated_input_ids"][:2],
        "prompt_attention_mask": out["concatenated_attention_mask"][:2],
        "chosen_labels": out["concatenated_labels"][:2],
        "rejected_labels": rejected[:, : (rejected != -100).any(0).sum()],
        "reference_chosen_logps": torch.zeros(2),
    }
    made = DPOTrainer.concatenated_inputs(batch, is_encoder_decoder=True)
    assert set(made) == set(out)
    for name, x in out.items():
        torch.testing.assert_close(made[name], x)


def test_padding_to_a_length_along_any_axis():
    x = torch.arange(4).reshape(2, 2)
    assert pad_to_length(x, 3, 9).tolist() == [[0, 1, 9], [2, 3, 9]]
    assert pad_to_length(x, 3, 9, dim=0).tolist() == [[0, 1], [2, 3], [9, 9]]
    assert pad_to_length(x, 1, 9) is x


def test_tokenizing_in_several_processes_is_the_same(tokenizers):
    dataset, _ = rows_of(tokenizers["tokenizer"])
    from alignkit.trl.trainer.dpo_data import row_tokenizer

    fn = row_tokenizer(
        SimpleNamespace(
            tokenizer=tokenizers["tokenizer"],
            max_length=10,
            max_prompt_length=4,
            truncation_mode="keep_start",
            label_pad_token_id=-100,
            is_encoder_decoder=False,
        )
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forking with threads
        several = tokenized(dataset, fn, "train_dataset", 2)
    assert several.to_list() == tokenized(dataset, fn, "train_dataset").to_list()
