"""Every recipe, from files to a folder that loads, on two shapes of models."""

import json
import runpy
import statistics
import subprocess
import sys

import pytest
import torch

from alignkit import hf
from tests.hf.test_data import BAD, GOOD, PAIRS, USER
from tests.test_layers import ROOT

TEXTS = {
    "text": {"text": "The plot was superb."},
    "text chat": {"text": [USER, GOOD]},
    "messages": {"messages": [USER, GOOD, USER, BAD]},
    "prompt, completion": {"prompt": "Review:", "completion": " The plot was superb."},
    "prompt, completion chat": {"prompt": [USER], "completion": [GOOD]},
}
SHORT = {"steps": 3, "batch": 4, "micro": 2, "lr": 1e-2, "logging_steps": 1, "max_length": 128}


def run(recipe, **options):
    return runpy.run_path(str(ROOT / "recipes" / f"{recipe}.py"))["main"](**{**SHORT, **options})


def losses(out):
    return [x["loss"] for x in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if "loss" in x]


@pytest.fixture
def reviews(jsonl):
    return str(jsonl(hf.reviews(16)))


@pytest.mark.parametrize("lora", [0, 2])
@pytest.mark.parametrize("name", TEXTS)
def test_sft(folder, tmp_path, jsonl, name, lora):
    out = tmp_path / "out"
    run("sft", model=str(folder), dataset=str(jsonl([TEXTS[name]] * 3)), lora=lora, out=str(out))
    assert losses(out)[-1] < losses(out)[0]
    hf.causal_lm(out)


@pytest.mark.parametrize("lora", [0, 2])
@pytest.mark.parametrize("name", PAIRS)
def test_dpo(folder, tmp_path, jsonl, name, lora):
    out = tmp_path / "out"
    run("dpo", model=str(folder), dataset=str(jsonl([PAIRS[name]] * 3)), lora=lora, out=str(out), warmup_steps=0)
    assert losses(out)[0] == pytest.approx(0.693147, abs=1e-5)  # log 2, as the policy is its reference
    assert losses(out)[-1] < losses(out)[0]
    hf.causal_lm(out)


@pytest.mark.parametrize("precision", [{"dtype": "bfloat16"}, {"bf16": True}])
@pytest.mark.parametrize("lora", [0, 2])
@pytest.mark.parametrize("recipe", ["sft", "dpo"])
def test_bf16(folder, tmp_path, reviews, recipe, lora, precision):
    out = tmp_path / "out"
    run(recipe, model=str(folder), dataset=reviews, lora=lora, out=str(out), **precision)
    assert all(0 < x < 10 for x in losses(out))
    if recipe == "dpo":  # the reference computes in the same precision
        assert losses(out)[0] == pytest.approx(0.693147, abs=1e-5)
    hf.causal_lm(out)


@pytest.mark.parametrize("loss", ["dpo", "ipo", "hinge"])
def test_dpo_with_each_loss_and_a_reference_computed_before(folder, tmp_path, reviews, loss):
    seen = []
    for precompute in (False, True):
        out = tmp_path / str(precompute)
        run("dpo", model=str(folder), dataset=reviews, loss=loss, precompute=precompute, out=str(out), micro=4)
        seen.append(losses(out))
    assert seen[0] == pytest.approx(seen[1], rel=1e-4)
    assert len(seen[0]) == 3


def test_the_reference_of_every_kind_is_the_same(tmp_path, reviews):
    """A copy and precomputed log-probs, without dropout: the same numbers."""
    seen = []
    for precompute in (False, True):
        out = tmp_path / str(precompute)
        run("dpo", precompute=precompute, out=str(out), dataset=reviews, lr=1e-3)
        seen.append(losses(out))
    assert seen[0] == pytest.approx(seen[1], abs=1e-5)


def test_micro_batches_change_nothing(tmp_path, reviews):
    models = []
    for micro in (1, 4):
        run("sft", micro=micro, dataset=reviews, out=str(tmp_path / str(micro)), optim="sgd")
        models.append(hf.causal_lm(tmp_path / str(micro))[0].state_dict())
    for name, x in models[0].items():
        torch.testing.assert_close(x, models[1][name], atol=1e-6, rtol=0)


@pytest.mark.slow
def test_two_processes_change_nothing(tmp_path):
    models = []
    options = ["--steps", "3", "--batch", "8", "--micro", "2", "--optim", "sgd", "--lr", "0.1", "--logging-steps", "1"]
    for launcher in ([sys.executable], [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]):
        out = tmp_path / str(len(launcher))
        recipe = [str(ROOT / "recipes" / "dpo.py"), *options, "--out", str(out)]
        subprocess.run([*launcher, *recipe], check=True, env=_environment())
        models.append((hf.causal_lm(out)[0].state_dict(), losses(out)))
    assert models[0][1] == pytest.approx(models[1][1], abs=1e-5)
    for name, x in models[0][0].items():
        torch.testing.assert_close(x, models[1][0][name], atol=1e-6, rtol=0)


@pytest.mark.slow
def test_the_true_reward_rises_on_three_seeds(tmp_path):
    """Calibrated on nothing but the sign: the lower end after DPO is above the upper end before, by 0.2."""
    from alignkit.cli import _call
    from alignkit.demo import demo

    gains = []
    for seed in range(3):
        measured = demo(tmp_path / str(seed), run=_call, seed=seed)
        before, after = measured[0], measured[-1]
        gains.append(after.reward - after.reward_interval - before.reward - before.reward_interval)
        assert 0 < after.kl < 10
        assert (tmp_path / str(seed) / "demo.png").stat().st_size > 10_000
    assert min(gains) > 0.2, gains
    assert statistics.stdev(gains) < 0.3


def _environment():
    import os

    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
