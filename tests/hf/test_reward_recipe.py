"""The reward recipe, from files to a folder that transformers loads, and beside the class API."""

import json
import math
import runpy

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

from alignkit import hf
from alignkit.hf.scorers import reward_model
from alignkit.train import infer
from tests.hf.test_data import PAIRS
from tests.test_layers import ROOT

SHORT = {"steps": 3, "batch": 4, "micro": 2, "lr": 1e-2, "logging_steps": 1, "max_length": 128}


def run(**options):
    return runpy.run_path(str(ROOT / "recipes" / "reward.py"))["main"](**{**SHORT, **options})


def logs(out):
    return [x for x in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if "loss" in x]


@pytest.fixture(autouse=True)
def _quiet():
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(level)


@pytest.fixture
def reviews(jsonl):
    return str(jsonl(hf.reviews(16)))


@pytest.mark.parametrize("lora", [0, 2])
@pytest.mark.parametrize("name", PAIRS)
def test_from_every_format(folder, tmp_path, jsonl, name, lora):
    out = tmp_path / "out"
    run(model=str(folder), dataset=str(jsonl([PAIRS[name]] * 4)), lora=lora, out=str(out), steps=4)
    first, last = logs(out)[0], logs(out)[-1]
    assert last["loss"] < first["loss"]
    assert last["margin"] > first["margin"]
    assert last["margin"] == pytest.approx(last["chosen"] - last["rejected"], abs=1e-5)
    reward_model(out)


@pytest.mark.parametrize("precision", [{"dtype": "bfloat16"}, {"bf16": True}])
def test_bf16(folder, tmp_path, reviews, precision):
    out = tmp_path / "out"
    run(model=str(folder), dataset=reviews, out=str(out), **precision)
    assert all(0 < x["loss"] < 10 for x in logs(out))


def test_micro_batches_change_nothing(tmp_path, reviews):
    models = []
    for micro in (1, 4):
        run(micro=micro, dataset=reviews, out=str(tmp_path / str(micro)), optim="sgd", center=0.1, steps=2)
        models.append(reward_model(tmp_path / str(micro))[0].state_dict())
    for name, x in models[0].items():
        torch.testing.assert_close(x, models[1][name], atol=1e-6, rtol=0)


def test_the_loss_of_a_pair(folder, tmp_path, reviews):
    """With a margin and a centre; the numbers of a batch of one are those of its pair."""
    out = tmp_path / "out"
    run(model=str(folder), dataset=reviews, out=str(out), batch=1, micro=1, steps=1, center=0.3, margin=2.0)
    (log,) = logs(out)
    preferred = math.log1p(math.exp(2.0 - log["chosen"] + log["rejected"]))
    assert log["loss"] == pytest.approx(preferred + 0.3 * (log["chosen"] + log["rejected"]) ** 2, rel=1e-5)
    assert log["accuracy"] == (log["chosen"] > log["rejected"])


def test_it_learns_what_reviewers_prefer(tmp_path, jsonl):
    """On reviews it has not seen, far above chance after 20 steps; the best possible is about 0.87."""
    out = tmp_path / "out"
    options = {"batch": 32, "micro": 32, "steps": 20, "lr": 1e-3, "logging_steps": 20}
    run(dataset=str(jsonl(hf.reviews(640))), out=str(out), **options)
    scorer, tok = reward_model(out)
    rows = hf.pairs(hf.reviews(96, seed=1), tok, max_length=128)
    batch = next(hf.stream(rows, batch=96, seed=0))
    rewards = infer(scorer, batch["ids"], batch["mask"], rows=32)
    assert (rewards[:, 0] > rewards[:, 1]).float().mean() > 0.7


def test_resuming_changes_nothing(folder, tmp_path, reviews):
    """A checkpoint is a plain folder with the head in it."""
    once, twice = tmp_path / "once", tmp_path / "twice"
    run(model=str(folder), dataset=reviews, out=str(once), steps=4, save_steps=2)
    run(
        model=str(folder),
        dataset=reviews,
        out=str(twice),
        steps=4,
        save_steps=2,
        resume_from_checkpoint=str(once / "checkpoint-2"),
    )
    loaded = AutoModelForSequenceClassification.from_pretrained(once / "checkpoint-2")
    assert loaded.config.num_labels == 1
    expected = AutoModelForSequenceClassification.from_pretrained(once).state_dict()
    for name, x in AutoModelForSequenceClassification.from_pretrained(twice).state_dict().items():
        torch.testing.assert_close(x, expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
@pytest.mark.usefixtures("norms_in_float64")
def test_the_class_api_ends_with_the_same_parameters(folder, tmp_path, reviews, optim):
    """Two forwards, padding and HF's own scoring there, one forward and the scorer here; float64."""
    from alignkit.trl.trainer.reward_config import RewardConfig
    from alignkit.trl.trainer.reward_trainer import RewardTrainer

    scorer, tok = reward_model(folder, dtype="float64", seed=1)
    hf.save(scorer, tok, tmp_path / "start")
    shared = {"lr_scheduler_type": "constant", "optim": optim, "weight_decay": 0.0, "warmup_steps": 0}
    out = tmp_path / "recipe"
    run(model=str(tmp_path / "start"), dataset=reviews, dtype="float64", batch=16, micro=16, out=str(out), **shared)

    rows = hf.pairs(reviews, tok, max_length=128)
    sides = ("chosen", "rejected")
    columns = {f"input_ids_{side}": [pair[i] for pair in rows["ids"]] for i, side in enumerate(sides)}
    columns |= {f"attention_mask_{side}": [[1] * len(x) for x in columns[f"input_ids_{side}"]] for side in sides}
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "start", dtype=torch.float64)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    args = RewardConfig(
        str(tmp_path / "shell"),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        max_steps=3,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        remove_unused_columns=False,
        max_length=128,
        **shared,
    )
    RewardTrainer(
        model, args, train_dataset=Dataset.from_dict(columns), tokenizer=AutoTokenizer.from_pretrained(folder)
    ).train()

    expected = AutoModelForSequenceClassification.from_pretrained(out, dtype=torch.float64).state_dict()
    start = AutoModelForSequenceClassification.from_pretrained(tmp_path / "start", dtype=torch.float64).state_dict()
    for name, x in model.state_dict().items():
        torch.testing.assert_close(x, expected[name], rtol=0, atol=1e-10 if optim == "sgd" else 1e-6)
    assert any((x - start[name]).abs().max() > 1e-3 for name, x in expected.items())
