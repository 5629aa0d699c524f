"""Packed sequences: the golden chunks, the ends of buffers and of datasets, and the errors."""

import copy
import random
import warnings
from functools import partial
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from alignkit.trl.trainer import constant_length_dataset
from alignkit.trl.trainer.constant_length_dataset import ConstantLengthDataset
from tests.trl.conftest import golden

GOLDEN = golden("constant_length_dataset")
ROWS = [{"text": text} for text in GOLDEN["texts"]]


def ids(chunks):
    return [chunk["input_ids"].tolist() for chunk in chunks]


def packed(tokenizer, rows=ROWS, **options):
    return ConstantLengthDataset(
        tokenizer, rows, **{"dataset_text_field": "text", "seq_length": 8, "shuffle": False} | options
    )


@pytest.mark.parametrize("rows", [ROWS, Dataset.from_list(ROWS)], ids=["list", "Dataset"])
@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])
def test_golden(golden_tokenizer, case, rows):
    data = ConstantLengthDataset(golden_tokenizer, rows, **case["args"])
    random.seed(case["random_seed"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        chunks = list(islice(data, case["take"]))
    assert ids(chunks) == case["chunks"]
    assert len(data) == case["len"]
    assert data.max_buffer_size == pytest.approx(case["max_buffer_size"])
    assert data.current_size == case["current_size"]
    assert [str(w.message) for w in caught] == case["warnings"]
    for chunk in chunks:
        assert chunk["input_ids"].dtype == torch.int64
        torch.testing.assert_close(chunk["labels"], chunk["input_ids"])


def test_an_eos_of_id_0_ends_texts(golden_tokenizer):
    tokenizer = copy.deepcopy(golden_tokenizer)
    tokenizer.eos_token = "[PAD]"
    assert tokenizer.eos_token_id == 0
    assert ids(packed(tokenizer, [{"text": "the dog ran"}], seq_length=5, eos_token_id=7)) == [[2, 11, 14, 17, 0]]


def test_without_an_eos_the_one_given_ends_texts(golden_tokenizer):
    tokenizer = copy.deepcopy(golden_tokenizer)
    tokenizer.eos_token = None
    with pytest.warns(UserWarning, match="no EOS token.*eos_token_id=7"):
        data = packed(tokenizer, [{"text": "the dog ran"}], seq_length=5, eos_token_id=7)
    assert ids(data) == [[2, 11, 14, 17, 7]]
    with pytest.warns(UserWarning, match="no EOS"), pytest.raises(ValueError, match="eos_token_id is None"):
        packed(tokenizer, eos_token_id=None)


def test_a_dataset_that_ends_with_a_full_buffer(golden_tokenizer):
    data = packed(golden_tokenizer, ROWS[:2], num_of_sequences=1, chars_per_token=1, seq_length=11)
    assert data.max_buffer_size == len(ROWS[1]["text"])
    assert len(ids(data)) == 0  # two buffers of less than 11 tokens each, and no empty third
    assert ids(packed(golden_tokenizer, [])) == []


def test_characters_per_token_set_the_texts_of_a_buffer(golden_tokenizer):
    """Remainders are dropped once per buffer, so that fewer and larger buffers lose less."""
    rows = [{"text": "the cat sat on the mat"}] * 8  # 22 characters, 8 tokens with BOS and EOS
    sizes = {}
    for chars in (22 / 5, 44 / 5, 8 * 22 / 5):
        data = packed(golden_tokenizer, rows, seq_length=5, num_of_sequences=1, chars_per_token=chars)
        sizes[chars] = len(ids(data))
    assert list(sizes.values()) == [8, 4 * 3, 64 // 5]


def test_infinite_data_ends_where_there_is_nothing(golden_tokenizer):
    assert ids(packed(golden_tokenizer, [], infinite=True)) == []
    assert ids(packed(golden_tokenizer, [{"text": ""}], infinite=True)) == []


def test_workers_share_the_rows(golden_tokenizer, monkeypatch):
    rows = [{"text": "the cat sat on the mat"}] * 3 + [{"text": "yes no yes no yes no"}] * 3
    seen = []
    for worker in (0, 1):
        info = SimpleNamespace(id=worker, num_workers=2)
        monkeypatch.setattr(constant_length_dataset, "get_worker_info", lambda info=info: info)
        seen += ids(packed(golden_tokenizer, rows))
    monkeypatch.undo()
    assert sorted(seen) == sorted(ids(packed(golden_tokenizer, rows)))
    assert len(seen) == 6


def test_formatting_functions(golden_tokenizer):
    questions = [{"q": "the cat", "a": "sat"}, {"q": "the dog", "a": "ran"}] * 3

    def join(row, sep=" "):
        return row["q"] + sep + row["a"]

    expected = ids(packed(golden_tokenizer, [{"text": join(row)} for row in questions]))
    assert len(expected) == 3
    for func in (lambda row: join(row), type("Callable", (), {"__call__": lambda self, row: join(row)})()):
        assert ids(packed(golden_tokenizer, questions, formatting_func=func)) == expected
    for func in (join, partial(join, sep=" ")):
        with pytest.warns(UserWarning, match="more than one argument"):
            data = packed(golden_tokenizer, questions, formatting_func=func)
        assert ids(data) == expected


def test_bad_arguments(golden_tokenizer):
    with pytest.raises(ValueError, match="dataset_text_field and formatting_func are both None"):
        ConstantLengthDataset(golden_tokenizer, ROWS)
    for name in ("seq_length", "num_of_sequences", "chars_per_token"):
        with pytest.raises(ValueError, match=rf"{name}=0.*positive"):
            packed(golden_tokenizer, **{name: 0})
    with pytest.raises(ValueError, match=r"a text to pack is a list.*\['the cat sat"):
        ids(packed(golden_tokenizer, formatting_func=lambda row: [row["text"]]))
