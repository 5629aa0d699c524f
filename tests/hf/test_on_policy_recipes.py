"""The GRPO family: every recipe runs, on LoRA and in bf16, resumes in the midst of a rollout, and learns."""

import json
import os
import runpy
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
import torch

from alignkit import hf
from alignkit.cli import _call
from alignkit.rl import PANELS, rl
from alignkit.sampling import Sampling
from alignkit.train import infer
from tests.test_layers import ROOT

FAMILY = (
    "cispo",
    "dapo",
    "dr_grpo",
    "grpo",
    "gspo",
    "on_policy_distillation",
    "online_dpo",
    "raft",
    "reinforce_pp",
    "remax",
    "rloo",
    "vapo",
)
EVEN = "def even(texts): return [sum(map(ord, text)) % 2 for text in texts]\n"
SHORT = {
    "sampling": Sampling(max_new=6),
    "rollout": 8,
    "batch": 4,
    "micro": 2,
    "steps": 2,
    "lr": 1e-2,
    "logging_steps": 1,
}


def run(recipe, **options):
    small = {**SHORT, "warmup_steps": 0}
    small |= {} if recipe in ("reinforce_pp", "remax", "online_dpo") else {"n": 4}
    small |= {"batch": 2} if recipe == "raft" else {}
    return runpy.run_path(str(ROOT / "recipes" / f"{recipe}.py"))["main"](**{**small, **options})


def logs(out):
    return [x for x in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if "loss" in x]


def parameters(out):
    return hf.causal_lm(out)[0].state_dict()


@pytest.fixture
def task(tmp_path):
    """Prompts of several lengths, and a reward that a random model gets half the time."""
    (tmp_path / "even.py").write_text(EVEN)
    rows = [{"prompt": "Film: The Last Letter\nReview:"}, {"prompt": "Hm"}, {"prompt": "The plot was"}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"dataset": str(tmp_path / "prompts.jsonl"), "reward": (f"{tmp_path}/even.py:even",)}


@pytest.mark.parametrize("recipe", FAMILY)
def test_it_trains_and_logs(recipe, tmp_path, task):
    out = tmp_path / "out"
    before = hf.causal_lm("builtin:tiny")[0].state_dict()
    options = {"teacher": "builtin:tiny#5"} if recipe == "on_policy_distillation" else {}
    run(recipe, out=str(out), **task, **options)
    rows = logs(out)
    assert len(rows) == 2
    assert all(torch.isfinite(torch.tensor(list(row.values()))).all() for row in rows)
    assert 0 <= rows[0]["reward"] <= 1 if recipe != "dapo" else rows[0]["reward"] <= 1
    if recipe != "online_dpo":
        names = {"length", "entropy", "truncated", "ratio", "approx_kl", "advantage", "zero_variance", "sampler_gap"}
        assert names <= rows[0].keys()
        assert rows[0]["ratio"] == pytest.approx(1, abs=1e-6)  # on-policy
        assert rows[0]["approx_kl"] == pytest.approx(0, abs=1e-6)
        assert rows[0]["sampler_gap"] < 1e-5
    after = parameters(out)
    assert any(not torch.equal(x, after[name]) for name, x in before.items())
    table = pq.read_table(out / "samples.parquet").to_pylist()
    assert {row["prompt"] for row in table} <= {"Film: The Last Letter\nReview:", "Hm", "The plot was"}
    assert all(len(row["answer"]) >= 0 and row["length"] <= 6 for row in table)


@pytest.mark.parametrize("recipe", FAMILY)
def test_a_resumed_run_ends_with_the_same_parameters(recipe, tmp_path, task):
    """Stopped after the first of a rollout's two steps."""
    whole, again = tmp_path / "whole", tmp_path / "again"
    options = {**task, "save_steps": 1, "save_strategy": "steps", "steps": 4}
    run(recipe, out=str(whole), **options)
    run(recipe, out=str(again), resume_from_checkpoint=str(whole / "checkpoint-1"), **options)
    a, b = parameters(whole), parameters(again)
    assert all(torch.equal(x, b[name]) for name, x in a.items())
    assert [row["loss"] for row in logs(whole)][1:] == [row["loss"] for row in logs(again)]


@pytest.mark.parametrize("options", [{"lora": 2}, {"bf16": True}], ids=str)
@pytest.mark.parametrize("recipe", ["grpo", "vapo", "online_dpo"])
def test_lora_and_bf16(recipe, tmp_path, task, options):
    out = tmp_path / "out"
    run(recipe, out=str(out), **task, **options)
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in logs(out))
    hf.causal_lm(out)


@pytest.mark.parametrize("recipe", ["grpo", "dapo", "rloo"])
def test_micro_batches_change_nothing(recipe, tmp_path, task):
    runs = []
    for micro in (1, 4):
        out = tmp_path / str(micro)
        run(recipe, micro=micro, out=str(out), optim="sgd", **task)
        runs.append((parameters(out), logs(out)))
    for name, x in runs[0][0].items():
        torch.testing.assert_close(x, runs[1][0][name], atol=2e-6, rtol=0)
    for a, b in zip(runs[0][1], runs[1][1]):
        assert {k: a[k] for k in ("reward", "length", "entropy")} == pytest.approx(
            {k: b[k] for k in ("reward", "length", "entropy")}, rel=1e-5
        )


@pytest.mark.parametrize(
    ("options", "reused"),
    [
        ({}, True),
        ({"lora": 2}, True),
        ({"sampling": Sampling(max_new=6, temperature=0.7)}, True),
        ({"sampling": Sampling(max_new=6, top_p=0.8)}, False),
        ({"sampling": Sampling(max_new=6, top_k=3)}, False),
        ({"sampling": Sampling(max_new=6, min_p=0.1)}, False),
        ({"dtype": "bfloat16"}, False),
        ({"dtype": "float64"}, False),
        ({"value_head": True}, False),
        ({"autocast": True}, False),
        ({"precision": "tf32"}, False),
        ({"rope": "dynamic"}, False),
        ({"play": True}, False),
    ],
    ids=str,
)
def test_the_policy_reads_again_only_what_its_sampler_tells_otherwise(monkeypatch, request, task, options, reused):
    """The columns are those that a second forward would make, up to rounding."""
    special = {name: options.get(name) for name in ("autocast", "precision", "rope", "play")}
    plain = {name: x for name, x in options.items() if name not in special}
    policy, tok = hf.causal_lm("builtin:tiny", **{"sampling": Sampling(max_new=6), **plain})
    if special["precision"]:
        request.addfinalizer(lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "none"))
        torch.backends.mkldnn.matmul.fp32_precision = "tf32"
    if special["rope"]:
        monkeypatch.setitem(policy.config.rope_parameters, "rope_type", "dynamic")
    score = hf.reward_fn(task["reward"])
    if special["play"]:
        score = hf.Environment(lambda messages: ("", 1.0, True), "once")
    reads, measure = [], type(policy).measure
    monkeypatch.setattr(type(policy), "measure", lambda *args: reads.append(1) or measure(*args))
    with torch.autocast("cpu", torch.bfloat16, enabled=bool(special["autocast"])):
        b = hf.rollout(policy, tok, hf.prompts(task["dataset"]), score, n=4, size=8, rows=8, seed=0, step=0)
        assert reads == [] if reused else [1]
        names = {"ids", "mask", "truncated", "sampler_logps", "rewards", "old_logps", "entropy", "zero_variance"}
        assert names <= b.keys()
        logps, entropy = infer(policy.measure, b["ids"], b["mask"])[:2]
    torch.testing.assert_close(b["old_logps"], logps, atol=1e-5 if reused else 0, rtol=0)
    torch.testing.assert_close(b["entropy"], entropy, atol=1e-5 if reused else 0, rtol=0)
    assert torch.equal(b["old_logps"], b["sampler_logps"]) == reused


def test_top_p_and_temperature_keep_the_first_ratio_at_one(tmp_path, task):
    out = tmp_path / "out"
    run("grpo", out=str(out), steps=1, **task | {"sampling": Sampling(max_new=6, temperature=0.7, top_p=0.8)})
    assert logs(out)[0]["ratio"] == pytest.approx(1, abs=1e-6)
    assert logs(out)[0]["sampler_gap"] < 1e-5


def test_dapo_keeps_only_groups_that_differ_and_gives_up_where_there_are_none(tmp_path, task):
    out = tmp_path / "out"
    run("dapo", out=str(out), **task)
    assert all(row["zero_variance"] == 0 for row in logs(out))
    (tmp_path / "one.py").write_text("def one(texts): return [1.0] * len(texts)\n")
    with pytest.raises(ValueError, match="dynamic_sampling kept 0 of 128 answers, but a rollout needs 8"):
        run("dapo", out=str(tmp_path / "none"), **task | {"reward": (f"{tmp_path}/one.py:one",)})


@pytest.mark.parametrize(
    "recipe", ["grpo", *(pytest.param(x, marks=pytest.mark.slow) for x in ("remax", "reinforce_pp"))]
)
def test_a_reward_that_is_easy_to_raise_rises(recipe, tmp_path):
    (tmp_path / "vowels.py").write_text("def vowels(texts): return [sum(c in 'aeiou' for c in t) for t in texts]\n")
    out, options = tmp_path / "out", {"sampling": Sampling(max_new=8), "rollout": 32, "batch": 32, "micro": 32}
    options |= {"steps": 10, "beta": 0.0, "dataset": "builtin:reviews", "reward": (f"{tmp_path}/vowels.py:vowels",)}
    run(recipe, out=str(out), **options)
    rewards = [row["reward"] for row in logs(out)]
    assert rewards[-1] > rewards[0] + 1.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0 must be positive"),
        ({"lr": -1.0}, r"lr=-1\.0 must be positive"),
        ({"seed": -1}, "seed=-1 must not be negative"),
        ({"epochs": 0}, "epochs=0 must be at least 1"),
        ({"num_train_epochs": 3}, "num_train_epochs has no effect here"),
        ({"resume_from_checkpoint": "last"}, "there is no checkpoint in .*out"),
        ({"reward": ("vowels",)}, "reward='vowels' is unknown: give one of builtin:sentiment"),
        ({"reward": ("even.py",)}, "'even.py' names no function of a file"),
        ({"rollout": 6}, "rollout=6 must be a positive multiple of batch=4"),
        ({"n": 3}, "rollout=8 must be a positive multiple of n=3 times 1 processes"),
        ({"reward": ()}, "reward is empty"),
        ({"sampling": Sampling(max_new=2000)}, "exceed the model's 1024 positions"),
        ({"dataset": "builtin:nothing"}, "built-in datasets are builtin:reviews"),
    ],
    ids=str,
)
def test_wrong_arguments(tmp_path, task, options, message):
    with pytest.raises(ValueError, match=message):
        run("grpo", out=str(tmp_path / "out"), **{**task, **options})


@pytest.mark.slow
@pytest.mark.parametrize("recipe", FAMILY)
def test_two_processes_change_nothing(recipe, tmp_path, task):
    """Answers depend on the seed, the step and their row alone; what each process saves of the rollout is the whole."""
    one, two = tmp_path / "one", tmp_path / "two"
    options = {
        "optim": "sgd",
        "lr": 0.1,
        "micro": 1,
        "batch": 2 if recipe in ("raft", "online_dpo") else 4,
        "save_steps": 2,
    }
    run(recipe, out=str(one), **options, **task)
    words = [str(ROOT / "recipes" / f"{recipe}.py"), "--out", str(two), "--reward", *task["reward"]]
    small = {"max_new": 6, "rollout": 8, "steps": 2, "logging_steps": 1, "warmup_steps": 0, "dataset": task["dataset"]}
    small |= options | ({} if recipe in ("reinforce_pp", "remax", "online_dpo") else {"n": 4})
    for name, value in small.items():
        words += ["--" + name.replace("_", "-"), str(value)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--"]  # else it reads our --n
    subprocess.run([*launcher, *words], check=True, env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    for name, x in parameters(one).items():
        torch.testing.assert_close(x, parameters(two)[name], atol=2e-6, rtol=0)
    assert logs(one)[0]["reward"] == pytest.approx(logs(two)[0]["reward"], abs=1e-6)
    states = [torch.load(two / "checkpoint-2" / f"stream_{rank}.pt", weights_only=False) for rank in (0, 1)]
    for name, x in states[0]["rollout"].items():
        assert torch.equal(x, states[1]["rollout"][name]), name


def test_the_demo_writes_its_curves(tmp_path):
    curves = rl(tmp_path, run=_call, seeds=1, sft_steps=2, grpo_steps=2, n=8)
    assert json.loads((tmp_path / "rl.json").read_text()) == json.loads(json.dumps(curves))
    assert curves[0].keys() == PANELS.keys()
    assert [step for step, _ in curves[0]["accuracy"]] == [0, 1, 2]
    assert (tmp_path / "rl.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="at least one"):
        rl(tmp_path, run=_call, seeds=0)


@pytest.mark.slow
def test_accuracy_rises_on_three_seeds(tmp_path):
    """Not tuned to these seeds: what each gains is several times its interval of about 0.05."""
    curves = rl(tmp_path, run=_call)
    for curve in curves:
        (_, before), *_, (_, after) = curve["accuracy"]
        assert after > before + 0.2
        assert max(value for _, value in curve["clipped"]) > 0
