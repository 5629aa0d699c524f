"""Labels of answers: the golden batches, conversations of any order, and the errors."""

import copy
import warnings

import pytest
import torch

from alignkit.trl.trainer.completion_collator import DataCollatorForCompletionOnlyLM, TextCollator
from tests.trl.conftest import golden

CASES = golden("completion_only_collator")["cases"]
CHAT = {"response_template": "assistant :", "instruction_template": "user :"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
@pytest.mark.parametrize("templates", ["texts", "ids"])
def test_golden(golden_tokenizer, case, templates):
    args = dict(case["args"])
    if templates == "ids":
        for name in args.keys() - {"ignore_index"}:
            args[name] = golden_tokenizer.encode(args[name], add_special_tokens=False)
    collator = DataCollatorForCompletionOnlyLM(**args, tokenizer=golden_tokenizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        batch = collator([golden_tokenizer(text, add_special_tokens=False) for text in case["texts"]])
    assert batch["input_ids"].tolist() == case["input_ids"]
    assert batch["labels"].tolist() == case["labels"]
    if templates == "texts":
        assert [str(w.message) for w in caught] == case["warnings"]
    assert len(caught) == len(case["warnings"])
    assert (batch["attention_mask"] == (batch["input_ids"] != golden_tokenizer.pad_token_id)).all()


def answers(tokenizer, *texts, **options):
    """The text of the tokens that are trained on, row by row."""
    collator = DataCollatorForCompletionOnlyLM(**CHAT | options, tokenizer=tokenizer)
    batch = collator([tokenizer(text, add_special_tokens=False) for text in texts])
    return [tokenizer.decode(ids[labels != -100]) for ids, labels in zip(batch["input_ids"], batch["labels"])]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("user : yes user : why assistant : no user : a assistant : sad", "no sad"),
        ("user : yes assistant : no assistant : sad user : why", "no sad"),
        ("user : yes assistant : no assistant : sad user : why assistant : good", "no sad good"),
        ("user : yes assistant : no user : why user : why", "no"),
        ("assistant : no user : why", "no"),
        ("the dog ran user : yes assistant : no", "no"),
        ("user : yes assistant :", ""),
        ("user : yes assistant : user : why assistant : no", "no"),
        ("a user yes assistant : no user : why assistant : sad", "no sad"),  # a first question of another form
    ],
)
@pytest.mark.parametrize("side", ["right", "left"])
def test_turns_in_any_order(golden_tokenizer, text, expected, side):
    tokenizer = copy.deepcopy(golden_tokenizer)
    tokenizer.padding_side = side
    longer = "user : " + "the " * 20 + "assistant : good cat"
    assert answers(tokenizer, text, longer) == [expected, "good cat"]


def test_padding_with_eos_warns_and_still_finds_templates_with_eos(golden_tokenizer):
    tokenizer = copy.deepcopy(golden_tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    with pytest.warns(UserWarning, match="pad_token_id and eos_token_id are identical"):
        assert answers(
            tokenizer, "user : yes [EOS] assistant : no user : why", response_template="[EOS] assistant :"
        ) == ["no"]
    DataCollatorForCompletionOnlyLM("assistant :", tokenizer=tokenizer)  # without turns there is no warning


def test_rows_of_ids_and_rows_with_more_columns(golden_tokenizer):
    collator = DataCollatorForCompletionOnlyLM("assistant :", tokenizer=golden_tokenizer)
    row = golden_tokenizer("user : yes assistant : no", add_special_tokens=False)
    expected = [[-100] * 5 + [50]]
    assert collator([row["input_ids"]])["labels"].tolist() == expected
    batch = collator([{**row, "text": "a column of text", "labels": [1] * 6}])
    assert batch["labels"].tolist() == expected
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    arrays = collator([row], return_tensors="np")
    assert arrays["labels"].tolist() == expected


def test_bad_arguments(golden_tokenizer):
    with pytest.raises(ValueError, match="mlm is True"):
        DataCollatorForCompletionOnlyLM("assistant :", tokenizer=golden_tokenizer, mlm=True)
    with pytest.raises(ValueError, match="response_template='' has no tokens"):
        DataCollatorForCompletionOnlyLM("", tokenizer=golden_tokenizer)
    with pytest.raises(ValueError, match=r"instruction_template=\[\] has no tokens"):
        DataCollatorForCompletionOnlyLM("a", [], tokenizer=golden_tokenizer)


@pytest.mark.parametrize("side", ["right", "left"])
def test_text_collator(golden_tokenizer, side):
    tokenizer = copy.deepcopy(golden_tokenizer)
    tokenizer.padding_side = side
    collator = TextCollator(tokenizer, mlm=False)
    rows = [{"input_ids": [11, 13, 16], "text": "a"}, {"input_ids": [11, 14], "text": "b"}]
    batch = collator(rows)
    pads = slice(2, 3) if side == "right" else slice(0, 1)
    assert batch["labels"][1, pads].tolist() == [-100]
    assert batch["attention_mask"][1, pads].tolist() == [0]
    assert sorted(batch["labels"].flatten().tolist()) == sorted([11, 13, 16, 11, 14, -100])
    assert "text" not in batch
    labelled = collator([row | {"labels": [-100, *row["input_ids"][1:]]} for row in rows])
    expected = [[-100, 13, 16], [-100, 14, -100] if side == "right" else [-100, -100, 14]]
    assert labelled["labels"].tolist() == expected
    assert labelled["input_ids"].tolist() == batch["input_ids"].tolist()
    tensors = collator([{"input_ids": torch.tensor([11, 0]), "labels": torch.tensor([11, 0])}])
    assert tensors["labels"].tolist() == [[11, 0]]  # the padding token may be a label
