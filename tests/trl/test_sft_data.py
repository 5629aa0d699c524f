"""Datasets of texts for supervised fine-tuning: formats, tokens, packing, what passes through, and the errors."""

import copy
import random
from itertools import chain
from uuid import uuid4

import pytest
import torch
from datasets import Dataset, IterableDataset

from alignkit.trl.trainer.constant_length_dataset import ConstantLengthDataset
from alignkit.trl.trainer.sft_data import TextOptions, length_of, prepare, tokenizer_of
from tests.trl.conftest import GOLDEN, golden

CASES = {case["name"]: case for case in golden("sft_dataset")["cases"]}
TEXTS = CASES["non_packed_text"]["texts"]
INSTRUCTIONS = [
    {"prompt": "the cat ?", "completion": "good ."},
    {"prompt": "what is the dog ?", "completion": "very bad ."},
]
CHAT = [{"role": "user", "content": "yes"}]


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)


def texts():
    return Dataset.from_dict({"text": TEXTS})


def prepared(tokenizer, dataset, *, packing=False, seed=None, **options):
    defaults = {
        "dataset_text_field": None,
        "formatting_func": None,
        "max_seq_length": 8,
        "num_of_sequences": 1024,
        "chars_per_token": 3.6,
        "dataset_num_proc": None,
        "dataset_batch_size": 1000,
        "remove_unused_columns": True,
    }
    return prepare(dataset, tokenizer, TextOptions(**defaults | options), packing=packing, seed=seed)


def ids(tokenizer, dataset, **options):
    return [list(row["input_ids"]) for row in prepared(tokenizer, dataset, **options)]


@pytest.mark.parametrize("name", ["non_packed_text", "non_packed_text_no_special"])
def test_golden_tokens(golden_tokenizer, name):
    special = {"add_special_tokens": CASES[name].get("add_special_tokens")}
    data = prepared(golden_tokenizer, texts(), dataset_text_field="text", **special)
    assert data.to_dict() == CASES[name]["out"]


@pytest.mark.parametrize("packing", [False, True])
def test_golden_formats(golden_tokenizer, packing, monkeypatch):
    """The texts of conversations and instructions, whose special tokens are not added twice."""
    # to hash a local function that is wrapped by the type checks of these tests takes seconds
    monkeypatch.setattr("datasets.fingerprint.Hasher.hash", classmethod(lambda *_: uuid4().hex))
    for rows, case in (
        (INSTRUCTIONS, CASES["instruction"]),
        ([{"conversations": CHAT}], CASES["conversations"]),
        ([{"messages": CHAT}], CASES["conversations"]),
        ([{"messages": CHAT, "more": 1}], CASES["conversations"]),
    ):
        expected = golden_tokenizer(case["batched"], add_special_tokens=False)["input_ids"]
        data = Dataset.from_list(rows)
        length = 64 if not packing else sum(map(len, expected))
        seen = ids(golden_tokenizer, data, max_seq_length=length, packing=packing, append_concat_token=False)
        assert seen == ([list(chain(*expected))] if packing else expected)
        assert all(golden_tokenizer.bos_token_id not in row for row in seen)
        added = ids(golden_tokenizer, data, max_seq_length=64, add_special_tokens=True)
        assert [row[0] for row in added] == [golden_tokenizer.bos_token_id] * len(expected)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(
    "rows",
    [[{"prompt": "a", "completion": "b", "more": 1}], [{"text": "a"}], [{"messages": "a"}]],
    ids=["extra_column_instruction", "text_only", "messages of text"],
)
def test_no_text_to_be_found(golden_tokenizer, rows, packing):
    message = (
        "packing=True needs a `dataset_text_field`"
        if packing
        else (
            "You passed `packing=False` to the SFTTrainer, but you didn't pass a `dataset_text_field` or "
            "`formatting_func` argument."
        )
    )
    with pytest.raises(ValueError, match=message):
        prepared(golden_tokenizer, Dataset.from_list(rows), packing=packing)


def test_golden_errors(golden_tokenizer):
    kind, message = CASES["formatting_func_not_list"]["raises"]
    with pytest.raises(ValueError, match=message) as caught:
        prepared(golden_tokenizer, texts(), formatting_func=lambda rows: rows["text"][0])
    assert (type(caught.value).__name__, str(caught.value)) == (kind, message)
    kind, message = CASES["packing_too_small"]["raises"]
    with pytest.raises(ValueError, match=message) as caught:
        prepared(golden_tokenizer, texts(), dataset_text_field="text", packing=True, max_seq_length=500)
    assert (type(caught.value).__name__, str(caught.value)) == (kind, message)


def test_a_formatting_function_gets_a_batch_or_when_packing_one_row(golden_tokenizer):
    seen = []

    def batched(rows):
        seen.append(len(rows["prompt"]))
        return [f"{p} {c}" for p, c in zip(rows["prompt"], rows["completion"])]

    expected = golden_tokenizer(["the cat ? good .", "what is the dog ? very bad ."])["input_ids"]
    data = Dataset.from_list(INSTRUCTIONS)
    assert ids(golden_tokenizer, data, formatting_func=batched, max_seq_length=64) == expected
    assert sum(seen) == 2
    (joined,) = ids(
        golden_tokenizer,
        data,
        formatting_func=lambda row: f"{row['prompt']} {row['completion']}",
        packing=True,
        max_seq_length=len(expected[0]) + len(expected[1]) + 2,
    )
    assert joined == [*expected[0], 3, *expected[1], 3]
    with pytest.raises(ValueError, match="a text to pack is a list"):
        prepared(golden_tokenizer, data, formatting_func=batched, packing=True)


def test_one_source_of_texts_wins_with_a_warning(golden_tokenizer):
    both = {"dataset_text_field": "text", "formatting_func": lambda rows: ["yes"] * len(rows["text"])}
    with pytest.warns(UserWarning, match="dataset_text_field is used, formatting_func is not"):
        assert ids(golden_tokenizer, texts(), **both) == CASES["non_packed_text"]["out"]["input_ids"]
    both["formatting_func"] = lambda row: "yes"
    with pytest.warns(UserWarning, match="formatting_func is used, dataset_text_field is not"):
        assert ids(golden_tokenizer, texts(), **both, packing=True, max_seq_length=3) == [[2, 49, 3]] * 7


@pytest.mark.parametrize("size", [2, 0, -1, None])
def test_batches_and_processes_change_nothing(golden_tokenizer, size):
    seen = []

    def func(rows):
        seen.append(len(rows["text"]))
        return rows["text"]

    data = prepared(golden_tokenizer, texts(), formatting_func=func, dataset_batch_size=size)
    assert data.to_dict() == CASES["non_packed_text"]["out"]
    assert max(seen) == (2 if size == 2 else 7)


def test_several_processes(golden_tokenizer):
    data = prepared(golden_tokenizer, texts(), dataset_text_field="text", dataset_num_proc=2)
    assert data.to_dict() == CASES["non_packed_text"]["out"]


def test_kept_columns_warn(golden_tokenizer):
    rows = texts().add_column("more", list(range(7)))
    with pytest.warns(UserWarning, match=r"remove_unused_columns=False keeps the columns \['text', 'more'\]"):
        data = prepared(golden_tokenizer, rows, dataset_text_field="text", remove_unused_columns=False)
    assert set(data.column_names) == {"text", "more", "input_ids", "attention_mask"}
    assert prepared(golden_tokenizer, rows, dataset_text_field="text").column_names == ["input_ids", "attention_mask"]


def test_packing_is_that_of_constant_length_datasets(golden_tokenizer):
    cases = {case["name"]: case["chunks"] for case in golden("constant_length_dataset")["cases"]}
    plain = {"dataset_text_field": "text", "packing": True}
    assert ids(golden_tokenizer, texts(), **plain) == cases["plain"]
    assert ids(golden_tokenizer, texts(), **plain, append_concat_token=False) == cases["no_concat_token"]
    neither = {"append_concat_token": False, "add_special_tokens": False}
    assert ids(golden_tokenizer, texts(), **plain, **neither) == cases["neither"]
    small = {"num_of_sequences": 1, "chars_per_token": 2.0}
    assert ids(golden_tokenizer, texts(), **plain, **small) == cases["small_buffer"]
    data = prepared(golden_tokenizer, texts(), **plain)
    assert data["labels"] == data["input_ids"]


def test_packing_shuffles_rows_before_and_by_the_seed_alone(golden_tokenizer):
    plain = {"dataset_text_field": "text", "packing": True}
    seen = []
    for seed in (3, 3, 4):
        random.seed(len(seen))
        seen.append(ids(golden_tokenizer, texts(), **plain, seed=seed))
    assert seen[0] == seen[1] != seen[2]
    ordered = ids(golden_tokenizer, texts(), **plain)
    assert sorted(seen[0]) != sorted(ordered)  # other texts meet in a sequence, not the same in another order


def test_what_passes_through(golden_tokenizer):
    tokens = Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[-100, 2]]})
    constant = ConstantLengthDataset(golden_tokenizer, texts(), dataset_text_field="text")

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, i):
            return {"input_ids": [1, 2]}

    for data in (tokens, tokens.to_iterable_dataset(), constant, Rows()):
        assert prepared(golden_tokenizer, data) is data
    assert prepared(golden_tokenizer, constant, packing=True) is constant
    with pytest.warns(UserWarning, match="tokenized already"):
        assert prepared(golden_tokenizer, tokens, packing=True) is tokens
    both = tokens.add_column("text", ["the dog ran"])
    assert ids(golden_tokenizer, both, dataset_text_field="text") == [[2, 11, 14, 17]]  # asked for, so made of texts


@pytest.mark.parametrize("named", [True, False])
def test_streams_of_texts(golden_tokenizer, named):
    def rows():
        yield from texts()

    stream = texts().to_iterable_dataset() if named else IterableDataset.from_generator(rows)
    assert ids(golden_tokenizer, stream, dataset_text_field="text") == CASES["non_packed_text"]["out"]["input_ids"]
    chunks = prepared(golden_tokenizer, stream, dataset_text_field="text", packing=True)
    expected = golden("constant_length_dataset")["cases"][0]["chunks"]
    assert [chunk["input_ids"].tolist() for chunk in chunks] == expected


def test_bad_arguments(golden_tokenizer):
    for packing in (False, True):
        with pytest.raises(ValueError, match=r"dataset_text_field='txt' is not a column.*\['text'\]"):
            prepared(golden_tokenizer, texts(), dataset_text_field="txt", packing=packing)
    with pytest.raises(TypeError, match="unknown"):
        prepared(golden_tokenizer, texts(), unknown=1)


def test_lengths(golden_tokenizer):
    tokenizer = copy.deepcopy(golden_tokenizer)
    assert length_of(7, tokenizer) == 7
    for limit, expected in ((64, 64), (int(1e30), 1024)):
        tokenizer.model_max_length = limit
        with pytest.warns(UserWarning, match=f"`max_seq_length`: it is {expected}"):
            assert length_of(None, tokenizer) == expected
    with pytest.raises(ValueError, match="max_seq_length=0 must be at least 1"):
        length_of(0, tokenizer)


def test_tokenizers(golden_tokenizer, tmp_path):
    other = copy.deepcopy(golden_tokenizer)
    assert tokenizer_of(None, None, golden_tokenizer) is golden_tokenizer
    assert tokenizer_of(None, golden_tokenizer, golden_tokenizer) is golden_tokenizer
    with pytest.raises(ValueError, match="tokenizer and processing_class are two names"):
        tokenizer_of(None, golden_tokenizer, other)
    with pytest.raises(ValueError, match="tokenizer is None"):
        tokenizer_of(None, None, None)
    other.padding_side = "left"
    with pytest.warns(UserWarning, match="padding_side is not 'right'"):
        assert tokenizer_of(None, other, None) is other
    other.padding_side, other.pad_token = "right", None
    other.save_pretrained(tmp_path)
    for folder, pad in ((GOLDEN / "tokenizer", "[PAD]"), (tmp_path, "[EOS]")):
        model = torch.nn.Module()
        model.config = type("Config", (), {"_name_or_path": str(folder)})
        assert tokenizer_of(model, None, None).pad_token == pad
