"""Best of n and iterative SFT: what the recipes write, that they resume, and that they agree with the class API."""

import json
import math
import runpy
import statistics

import pytest
import torch
from transformers import TrainingArguments

from alignkit import hf
from alignkit.sampling import Sampling
from alignkit.trl.trainer.iterative_sft_trainer import IterativeSFTTrainer
from tests.test_layers import ROOT

SHORT = {
    "n": 3,
    "sampling": Sampling(max_new=6),
    "rollout": 8,
    "batch": 4,
    "micro": 2,
    "steps": 4,
    "lr": 1e-2,
    "logging_steps": 1,
}


def run(recipe, **options):
    options = (SHORT if recipe == "iterative_sft" else {}) | options
    return runpy.run_path(str(ROOT / "recipes" / f"{recipe}.py"))["main"](**options)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def logged(out, name):
    return [row[name] for row in rows(out / "metrics.jsonl") if name in row]


def same(a, b, atol=0.0):
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y, atol=atol, rtol=0)


def number(text):
    return sum(map(ord, text)) % 17


@pytest.fixture
def reward(tmp_path):
    path = tmp_path / "reward.py"
    path.write_text("def reward(texts):\n    return [sum(map(ord, text)) % 17 for text in texts]\n")
    return f"{path}:reward"


@pytest.mark.parametrize("lora", [0, 2])
def test_iterative_sft(folder, tmp_path, reward, lora):
    out = tmp_path / "out"
    run("iterative_sft", model=str(folder), reward=reward, lora=lora, out=str(out))
    score, best = logged(out, "score"), logged(out, "best")
    assert len(score) == 4
    assert all(0 <= a < b <= 16 for a, b in zip(score, best))
    hf.causal_lm(out)


def test_the_best_answers_of_the_newest_weights_are_imitated(folder, tmp_path, monkeypatch):
    """Every round asks for n answers per prompt, and the step is on the best of each."""
    seen, learnt = [], []

    def sample(policy, tokenizer, prompts, *, n, seed, step):
        seen.append(([row["prompt"] for row in prompts], n, next(policy.parameters()).sum().item(), step))
        ids = torch.tensor([[5, 6, 7 + i % 3] for i in range(n * len(prompts))])
        return {"ids": ids, "mask": torch.tensor([[False, True, True]]).expand(ids.shape)}

    def reward_fn(name):
        return lambda tokenizer, prompts, ids, mask: torch.where(ids[:, 2] == 8, 2.0, 1.0)

    def fit(loss_fn, policy, batches, **options):
        def caught(step):
            for batch in batches(step):
                learnt.append(batch)
                yield batch

        return real(loss_fn, policy, caught, **options)

    real = hf.fit
    for name, fake in {"sample": sample, "reward_fn": reward_fn, "fit": fit}.items():
        monkeypatch.setattr(hf, name, fake)
    run("iterative_sft", model=str(folder), epochs=2, out=str(tmp_path / "out"))
    assert len(seen) == 1  # two passes over eight answers are four steps of four
    prompts, n, _, step = seen[0]
    assert (n, step) == (3, 0)
    assert len(set(prompts)) > 1
    assert len(learnt) == 4
    for batch in learnt:
        assert batch["ids"].tolist() == [[5, 6, 8]] * 4
        assert batch["best"].tolist() == [2.0] * 4
        assert batch["score"].tolist() == pytest.approx([4 / 3] * 4)
    run("iterative_sft", model=str(folder), rollout=4, out=str(tmp_path / "next"))
    assert [step for *_, step in seen[1:]] == [0, 1, 2, 3]
    assert len({weights for *_, weights, _ in seen[1:]}) == 4


@pytest.mark.parametrize("at", [1, 2])
def test_iterative_sft_resumes_to_the_same_parameters(tmp_path, reward, at):
    """In the midst of a round, which has two steps, and after it."""
    whole, again = tmp_path / "whole", tmp_path / "again"
    run("iterative_sft", reward=reward, save_steps=1, out=str(whole))
    checkpoint = str(whole / f"checkpoint-{at}")
    run("iterative_sft", reward=reward, out=str(again), resume_from_checkpoint=checkpoint)
    assert logged(again, "best") == logged(whole, "best")[at:]
    same(hf.causal_lm(whole)[0], hf.causal_lm(again)[0])


def test_a_step_of_the_trainer_is_that_of_the_recipe(tmp_path, monkeypatch):
    """One seed, the same data, full batches, a constant learning rate: equal parameters."""
    texts = ["Film: A\nReview: superb.", "Film: B\nReview: dull, and painful.", "Film: C\nReview: so", "Film: D\n!"]
    policy, tokenizer = hf.causal_lm("builtin:tiny", seed=3)
    encoded = [tokenizer(text)["input_ids"] for text in texts]
    ids, mask = torch.zeros(4, 32, dtype=torch.long), torch.zeros(4, 32, dtype=torch.bool)
    for row, (counts, tokens) in enumerate(zip(mask, encoded)):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        counts[2 : len(tokens)] = True
    monkeypatch.setattr(hf, "sample", lambda *_, **__: {"ids": ids, "mask": mask})
    same_for_both = {
        "max_grad_norm": 0.5,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "optim": "sgd",
        "save_strategy": "no",
    }
    run("iterative_sft", n=1, rollout=4, micro=4, steps=3, lr=0.1, seed=3, out=str(tmp_path / "out"), **same_for_both)

    args = TrainingArguments(
        str(tmp_path / "shell"),
        per_device_train_batch_size=4,
        max_steps=3,
        learning_rate=0.1,
        seed=3,
        use_cpu=True,
        report_to="none",
        **same_for_both,
    )
    before = policy.lm.lm_head.weight.detach().clone()
    with pytest.warns(UserWarning, match="No data collator"):
        trainer = IterativeSFTTrainer(policy.lm, args, tokenizer)
    labels = [torch.where(counts, tokens, -100)[: len(x)] for tokens, counts, x in zip(ids, mask, encoded)]
    losses = [trainer.step(input_ids=list(map(torch.tensor, encoded)), labels=labels)["loss"] for _ in range(3)]
    assert (policy.lm.lm_head.weight - before).abs().max() > 1e-3
    assert losses == pytest.approx(logged(tmp_path / "out", "loss"), abs=1e-5)
    same(policy.lm, hf.causal_lm(tmp_path / "out")[0].lm, atol=1e-6)


def test_best_of_n(folder, tmp_path, reward, capsys):
    out = tmp_path / "out"
    options = {"model": str(folder), "reward": reward, "n": 6, "limit": 5, "sampling": Sampling(max_new=6), "rows": 12}
    run("best_of_n", out=str(out), **options)
    answers = rows(out / "answers.jsonl")
    assert [row["prompt"] for row in answers] == [
        row["prompt"] for row in hf.prompts("builtin:reviews", split="test")[:5]
    ]
    for row in answers:
        assert row["score"] == number(row["answer"])
        assert row["score"] >= row["mean_score"]
    table = [list(map(float, line.split())) for line in capsys.readouterr().out.splitlines()[-4:]]
    assert [row[0] for row in table] == [1, 2, 4, 6]
    assert [row[2] for row in table] == pytest.approx([math.log(k) - (k - 1) / k for k in (1, 2, 4, 6)], abs=1e-3)
    assert table[0][1] == pytest.approx(statistics.fmean(row["mean_score"] for row in answers), abs=1e-3)
    assert table[3][1] == pytest.approx(statistics.fmean(row["score"] for row in answers), abs=1e-3)
    assert table[0][1] < table[1][1] < table[2][1] < table[3][1]


def test_best_of_one_is_a_sample(folder, tmp_path, reward):
    out = tmp_path / "out"
    run("best_of_n", model=str(folder), reward=reward, n=1, limit=3, sampling=Sampling(max_new=6), out=str(out))
    assert all(row["score"] == row["mean_score"] == number(row["answer"]) for row in rows(out / "answers.jsonl"))


@pytest.mark.parametrize("bad", [{"n": 0}, {"n": 8, "rows": 4}])
def test_best_of_n_refuses_what_it_cannot_do(tmp_path, bad):
    with pytest.raises(ValueError, match=f"n={bad['n']}"):
        run("best_of_n", out=str(tmp_path), **bad)


@pytest.mark.slow
def test_the_true_reward_rises(tmp_path):
    """From the reviews as they are to good ones, as counted by the rounds themselves."""
    run("sft", steps=200, batch=32, micro=32, lr=2e-3, out=str(tmp_path / "sft"), save_strategy="no")
    settings = {"model": str(tmp_path / "sft"), "sampling": Sampling(), "rollout": 32, "batch": 32, "micro": 32}
    run("iterative_sft", **settings, n=4, steps=30, lr=5e-4, out=str(tmp_path / "out"), save_strategy="no")
    score = logged(tmp_path / "out", "score")
    assert statistics.fmean(score[-5:]) > statistics.fmean(score[:3]) + 0.4
