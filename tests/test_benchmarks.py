"""The benchmark's own parts, without the peers: shapes, the plain loops, the comparison and the reports."""

import json
import os
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from benchmarks import best, report, run, side
from benchmarks.__main__ import main
from benchmarks.bare import Naive
from benchmarks.best import Best
from benchmarks.gae import loop
from benchmarks.run import Options, agree
from benchmarks.workloads import WORKLOADS, Shape, Workload, changed, count, save, trees

TINY = {"hidden": 16, "layers": 1, "heads": 2, "vocab": 19, "prompt": 9, "completion": 8, "batch": 4, "group": 4}


@pytest.fixture
def model(tmp_path):
    def make(workload):
        rows = save(workload, tmp_path, 1, seed=0)
        auto = AutoModelForSequenceClassification if workload.kind == "reward" else AutoModelForCausalLM
        return auto.from_pretrained(tmp_path, dtype=torch.float32), rows

    return make


def grads(lm):
    return {name: p.grad for name, p in lm.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("name", ["sft-ragged", "dpo-ragged", "grpo-128", "reward-ragged-512"])
def test_the_best_loop_computes_what_the_naive_one_does(name, arch, model, monkeypatch):
    monkeypatch.setattr(best, "CHUNK", 40)  # two rows of 19 logits
    workload = changed(WORKLOADS[name], **TINY, arch=arch)
    lm, rows = model(workload)
    values = []
    for maths in (Naive(), Best()):
        lm.zero_grad()
        if workload.kind == "reward":
            out = maths.rewards(lm, rows)
        else:
            scores = maths.logps(lm, rows)
            assert scores.row.tolist() == values[0][2] if values else True
            out = scores.logps
        (out * torch.arange(1.0, len(out) + 1)).sum().backward()
        values.append((out.detach(), grads(lm), None if workload.kind == "reward" else scores.row.tolist()))
    torch.testing.assert_close(values[0][0], values[1][0], rtol=1e-5, atol=1e-6)
    for name, grad in values[0][1].items():
        torch.testing.assert_close(values[1][1][name], grad, rtol=1e-4, atol=1e-5)


def test_the_best_loop_draws_from_the_model(model, monkeypatch):
    """With the uniform number 0.7 the token is where the distribution function of the whole row passes it."""
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.full(shape, 0.7))
    lm, rows = model(changed(WORKLOADS["grpo-128"], **TINY))
    with torch.no_grad():
        (tree,) = Best().sample(lm, [rows[0]["prompt"]], 2, 5)
        drawn, prompt = tree["completions"], tree["prompt"]
        assert drawn[0] == drawn[1]
        below = lm(input_ids=torch.tensor([prompt + drawn[0]])).logits[0, len(prompt) - 1 : -1].softmax(-1).cumsum(-1)
    assert drawn[0] == (below <= 0.7).sum(-1).tolist()


def test_all_sides_get_the_same_rows():
    workload = changed(WORKLOADS["dpo-ragged"], prompt=64, completion=32, batch=200)
    rows = list(trees(workload, 1, seed=0))
    assert rows == list(trees(workload, 1, seed=0)) != list(trees(workload, 1, seed=1))
    lengths = [len(row["prompt"]) for row in rows]
    assert (min(lengths), max(lengths)) == (8, 64)
    assert all(len(row["completions"]) == 2 and 0 not in row["prompt"] for row in rows)
    assert count(workload, {"prompt": [2] * 3, "completions": [[2] * 4, [2] * 5]}) == 15
    assert count(WORKLOADS["grpo-128"], {"prompt": [2] * 3, "completions": [[2] * 4, [2] * 5]}) == 9


def test_another_loss_is_an_error():
    ours = {"loss": 0.7, "norm": 2.0}
    agree("dpo", {"alignkit": [ours], "trl": [ours, {"loss": 0.70005, "norm": 1.9999}]}, 1e-4)
    for other in ({"loss": 0.7001, "norm": 2.0}, {"loss": 0.7, "norm": 2.001}, {"loss": float("nan"), "norm": 2.0}):
        with pytest.raises(ValueError, match="do not compute the same on the first batch"):
            agree("dpo", {"alignkit": [ours], "trl": [ours, other]}, 1e-4)


def test_gae_of_the_loop():
    from alignkit.advantages import gae

    x = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(9) < torch.tensor([[9], [4], [1]])
    torch.testing.assert_close(loop(*x, mask), gae(*x, mask, gamma=0.99, lam=0.95)[0])


def test_a_job_survives_its_file(tmp_path, monkeypatch):
    """What the parent writes is what the side reads; peers that are missing are said to be."""
    written = []
    monkeypatch.setattr(run, "group", lambda command, env: written.append(side.read(command[-1])) or finish(written))

    def finish(jobs):
        jobs[-1].result.write_text(json.dumps({"first": {}}))
        return []

    workload = WORKLOADS["dpo-precomputed"]
    assert run._run(tmp_path, "trl", workload, Options(threads=1), 3) == {"first": {}}
    assert (written[0].workload, written[0].steps, written[0].threads) == (workload, 3, 1)
    assert not list(tmp_path.iterdir())


def test_a_missing_peer_is_said(monkeypatch, capsys):
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None)
    assert run.installed("dpo", Options()) == ["alignkit", "bare", "best"]
    assert run.installed("gae", Options(sides=("loop",))) == ["alignkit", "loop"]
    assert "MISSING trl: trl is not installed" in capsys.readouterr().out


def test_a_group_of_processes_ends():
    lines = run.group(["sh", "-c", "sleep 300 & echo $!; wait"], dict(os.environ))
    stat = Path(f"/proc/{next(lines).strip()}/stat")
    lines.close()
    for _ in range(500):  # it takes a moment to die
        with suppress(FileNotFoundError, ProcessLookupError):
            if stat.read_text().split(") ")[1][0] != "Z":
                time.sleep(0.01)
                continue
        break
    else:
        pytest.fail("a child is still alive")
    with pytest.raises(RuntimeError, match="status 3:\nno"):
        list(run.group(["sh", "-c", "echo no; exit 3"], dict(os.environ)))


def record(side, step, peak):
    common = {"workload": "dpo", "version": "1", "repeats": 1, "steps": 1, "threads": 1, "device": "cpu", "bf16": False}
    times = {"step_s": step, "step_min_s": step, "step_max_s": step, "time_ratio": step, "memory_ratio": 1 / peak}
    return common | times | {"side": side, "peak_mb": peak, "torch": "2", "transformers": "5", "at": "", "load": 1.0}


def test_reports(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    records = [record("alignkit", 1.0, 1.0), record("trl", 4321.0, 2.5)]
    for _ in range(2):
        report.write("results", records, note=report.conditions(records))
    report.bars("results", records)
    lines = (tmp_path / "results" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [*records, *records]
    row = (tmp_path / "results" / "results.md").read_text().splitlines()[-1]
    assert [x.strip() for x in row.split("|")[2:6]] == ["trl", "4,321", "4.32e+03 to 4.32e+03", ""]
    points = [r | {"sweep": "x", "method": "dpo", "at_value": 1, "peak_less_vocab_mb": 1.0} for r in records]
    report.curves("scaling", points)
    assert {x.name for x in report.RESULTS.glob("*.png")} == {"results.png", "scaling.png"}


def test_shapes_that_cannot_be():
    with pytest.raises(ValueError, match="arch='lama' must be one of"):
        Shape(arch="lama")
    with pytest.raises(ValueError, match="heads must divide hidden"):
        Shape(hidden=10)
    with pytest.raises(ValueError, match="batch=6 must be a multiple of group=4"):
        Workload("grpo", replace(Shape(), batch=6, group=4))
    with pytest.raises(ValueError, match="prompts of rloo have one length"):
        Workload("rloo", Shape(ragged=True))
    with pytest.raises(SystemExit, match="unknown: dqo"):
        main(["--only", "dqo"])


@pytest.mark.slow
def test_ways_to_decode(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    threads = torch.get_num_threads()
    main(["decoding", "--repeats", "1", *(word for k, x in TINY.items() for word in (f"--{k}", str(x)))])
    torch.set_num_threads(threads)
    records = [json.loads(line) for line in (tmp_path / "decoding.jsonl").read_text().splitlines()]
    assert records[0]["side"] == "alignkit"
    assert len(records) == 5
    assert all(record["step_s"] > 0 for record in records)


def test_what_was_measured_before_sides_disagree_is_kept(tmp_path, monkeypatch):
    def measure(name, *_):
        if name != "sft-fixed":
            raise ValueError("do not compute the same")
        return [record("alignkit", 1.0, 1.0)]

    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr("benchmarks.__main__.measure", measure)
    with pytest.raises(ValueError, match="do not compute the same"):
        main(["--only", "sft-fixed,dpo-fixed"])
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 1
