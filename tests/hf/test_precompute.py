"""What is found on disk is what would be computed: whatever changes the numbers is looked for in vain."""

import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch

from alignkit import data, hf
from alignkit.sampling import Sampling
from alignkit.train import infer
from tests.hf.test_recipes import losses, run
from tests.test_layers import ROOT

PAIRS = [
    {"prompt": "Film: The Last Letter\nReview:", "chosen": " A fine film.", "rejected": " Bad."},
    {"prompt": "Hm", "chosen": " yes", "rejected": " no, and that is all there is to say of it"},
    {"prompt": "The plot", "chosen": " was thin", "rejected": " was"},
]
OFFSET = 1.0
KILLED = """
import os, sys, datasets
from pathlib import Path
from alignkit import hf
datasets.config.HF_DATASETS_CACHE = Path(sys.argv[1])
calls = []
def fn(b):
    calls.append(b)
    if len(calls) == int(sys.argv[2]):
        os._exit(9)
    return {"n": b["ids"].sum(-1)}
policy, _ = hf.causal_lm("builtin:tiny")
rows = [{"ids": [i, 1]} for i in range(3000)]
print(sum(row["n"].item() for row in hf.precompute(rows, fn, model=policy, batch=1000)), len(calls))
"""


@pytest.fixture(autouse=True)
def folder_of_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def forwards(monkeypatch):
    """Counts the forwards of all policies."""
    counted, forward = [], hf.Policy.forward
    monkeypatch.setattr(hf.Policy, "forward", lambda *args: counted.append(1) or forward(*args))
    return counted


def made(model="builtin:tiny", *, pairs=PAIRS, batch=2, scale=1.0, max_length=64, change=None, **options):
    """Log-probs of a fresh policy, as a run would have them."""
    policy, tokenizer = hf.causal_lm(model, **options)
    if change:
        change(policy)
    rows = hf.pairs(pairs, tokenizer, max_length=max_length)

    def reference(columns):
        logps = infer(policy, columns["ids"], columns["mask"]).sum(-1)
        return columns | {"ref_logps": scale * logps + sum(OFFSET for _ in range(2))}

    return hf.precompute(rows, reference, model=policy, batch=batch)


def whole(rows):
    return data.collate([rows[i] for i in range(len(rows))])


def test_the_second_run_has_the_same_rows_without_a_forward(forwards):
    first = whole(made())
    assert len(forwards) == 2
    second = whole(made())
    assert len(forwards) == 2
    assert first.keys() == second.keys() == {"ids", "mask", "ref_logps"}
    assert all(torch.equal(x, second[name]) for name, x in first.items())
    policy, _ = hf.causal_lm("builtin:tiny")
    expected = infer(policy, first["ids"], first["mask"]).sum(-1) + 2
    torch.testing.assert_close(first["ref_logps"], expected, atol=1e-4, rtol=0)
    assert first["ref_logps"].shape == (3, 2)


@torch.no_grad()
def shift_one_weight(policy):
    next(policy.parameters())[0, 0] += 1e-3


def turn_the_rope(policy):
    policy.lm.model.rotary_emb.inv_freq[0] *= 1.5


def another_constant(policy):
    policy.lm.config.rms_norm_eps = 1e-3


@pytest.mark.parametrize(
    "options",
    [
        {"change": shift_one_weight},
        {"change": turn_the_rope},
        {"change": another_constant},
        {"model": "builtin:tiny#5"},
        {"dtype": "float64"},
        {"dtype": "bfloat16"},
        {"sampling": Sampling(temperature=0.5)},
        {"sampling": Sampling(top_p=0.5)},
        {"lora": 2},
        {"pairs": PAIRS[::-1]},
        {"pairs": [*PAIRS[:2], {**PAIRS[2], "chosen": " was fine"}]},
        {"max_length": 8},
        {"batch": 3},
        {"scale": 2.0},
    ],
    ids=lambda x: "-".join([*x, *(y.__name__ for y in x.values() if callable(y))]),
)
def test_whatever_changes_the_numbers_is_computed(forwards, options):
    made()
    forwards.clear()
    made(**options)
    assert len(forwards) == (1 if "batch" in options else 2)
    made(**options)
    assert len(forwards) == (1 if "batch" in options else 2)
    made()
    assert len(forwards) == (1 if "batch" in options else 2)


def test_a_global_value_within_a_comprehension_is_seen(forwards, monkeypatch):
    before = whole(made())["ref_logps"]
    monkeypatch.setattr(f"{__name__}.OFFSET", 3.0)
    torch.testing.assert_close(whole(made())["ref_logps"], before + 4)
    assert len(forwards) == 4


def test_mixed_precision_is_another_precision(forwards):
    plain = whole(made())
    with torch.autocast("cpu", torch.bfloat16):
        mixed = whole(made())
    assert len(forwards) == 4
    assert (plain["ref_logps"] - mixed["ref_logps"]).abs().max() > 1e-3


def test_the_adapter_decides(forwards):
    """Its scale stands neither in the weights nor in what the module prints."""

    def used(policy):
        for name, x in policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.ones_(x)

    def twice(policy):
        used(policy)
        for module in policy.modules():
            if isinstance(getattr(module, "scaling", None), dict):
                module.scaling = {name: 2 * x for name, x in module.scaling.items()}

    a, b = (whole(made(lora=2, change=change))["ref_logps"] for change in (used, twice))
    assert len(forwards) == 4
    assert not torch.allclose(a, b)


def test_the_same_weights_in_another_folder_are_found(forwards, tmp_path):
    policy, tokenizer = hf.causal_lm("builtin:tiny")
    rows = hf.pairs(PAIRS, tokenizer, max_length=64)
    for name in ("a", "b"):
        hf.save(policy, tokenizer, tmp_path / name)
        model, _ = hf.causal_lm(tmp_path / name)
        forwards.clear()
        hf.precompute(rows, lambda b, m=model: {"x": infer(m, b["ids"], b["mask"])}, model=model, batch=3)
        assert len(forwards) == (name == "a")


def test_what_cannot_be_told_is_never_found(forwards):
    class Opaque:
        factor = 1.0

    opaque = Opaque()
    policy, tokenizer = hf.causal_lm("builtin:tiny")
    rows = hf.pairs(PAIRS, tokenizer, max_length=64)
    hooked, _ = hf.causal_lm("builtin:tiny")
    hooked.lm.lm_head.register_forward_hook(lambda module, args, out: out + 1)

    def of_an_object(columns):
        return {"ref_logps": opaque.factor * infer(policy, columns["ids"], columns["mask"]).sum(-1)}

    def of_a_hook(columns):
        return {"ref_logps": infer(hooked, columns["ids"], columns["mask"]).sum(-1)}

    for fn, model in ((of_an_object, policy), (of_a_hook, hooked)):
        forwards.clear()
        for _ in range(2):
            hf.precompute(rows, fn, model=model, batch=3)
        assert len(forwards) == 2


def test_plain_lists_and_columns_of_all_kinds():
    """A column as long as the ids loses what only padded it; precision and kind stay."""
    policy, _ = hf.causal_lm("builtin:tiny")
    rows = [{"ids": list(range(1, n + 1)), "mask": torch.ones(n, dtype=torch.bool), "x": 0.5} for n in (3, 1, 5)]

    def fn(b):
        half = b["ids"].sum(-1) / 4
        return {
            "token": b["ids"].double() / 3,
            "short": half.bfloat16(),
            "count": b["mask"].sum(-1),
            "flag": half > 1,
            "pair": torch.stack([half, -half], -1),
        }

    for _ in range(2):
        out = hf.precompute(rows, fn, model=policy, batch=2)
        assert [len(row["token"]) for row in (out[0], out[1], out[2])] == [3, 1, 5]
        b = next(hf.stream(out, batch=3, seed=0))
        expected = fn(b)
        assert all(torch.equal(b[name], x) for name, x in expected.items() if name != "short")
        assert b["token"].dtype == torch.float64
        assert b["count"].dtype == torch.int64
        assert b["flag"].dtype == torch.bool
        assert b["pair"].dtype == b["short"].dtype == b["x"].dtype == torch.float32
        assert torch.equal(b["short"], expected["short"].float())


def test_a_run_that_was_killed_leaves_nothing_to_find(folder_of_cache):
    def start(at):
        command = [sys.executable, "-c", KILLED, str(folder_of_cache), str(at)]
        return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)

    assert start(3).returncode == 9
    assert not list(folder_of_cache.glob("*.arrow"))
    assert start(4).stdout.split() == ["4501500", "3"]
    assert start(4).stdout.split() == ["4501500", "0"]


def test_wrong_arguments():
    policy, _ = hf.causal_lm("builtin:tiny")
    with pytest.raises(ValueError, match="rows is empty"):
        hf.precompute([], lambda b: b, model=policy, batch=2)
    with pytest.raises(ValueError, match="batch=0 must be at least 1"):
        hf.precompute([{"ids": [1]}], lambda b: b, model=policy, batch=0)
    with pytest.raises(ValueError, match="makes no new column"):
        hf.precompute([{"ids": [1]}], lambda b: b, model=policy, batch=1)


@pytest.mark.parametrize("lora", [0, 2])
def test_the_recipe_ends_with_the_same_parameters(tmp_path, jsonl, forwards, lora):
    options = {"dataset": str(jsonl(hf.reviews(16))), "lora": lora, "optim": "sgd", "lr": 0.1}
    ends, counts = [], []
    for i, precompute in enumerate((False, True, True)):
        forwards.clear()
        run("dpo", **options, precompute=precompute, out=str(tmp_path / str(i)))
        counts.append(len(forwards))
        ends.append((hf.causal_lm(tmp_path / str(i))[0].state_dict(), losses(tmp_path / str(i))))
    assert ends[1][1] == ends[2][1]
    assert ends[0][1] == pytest.approx(ends[1][1], abs=1e-6)
    for name, x in ends[0][0].items():
        torch.testing.assert_close(x, ends[1][0][name], atol=1e-6, rtol=0)
        assert torch.equal(ends[1][0][name], ends[2][0][name])
    assert counts[1] - counts[2] == 8  # 16 pairs, two at a time


@pytest.mark.slow
def test_the_main_process_computes_for_all(tmp_path, jsonl):
    source = str(jsonl(hf.reviews(16)))
    words = ["--dataset", source, "--steps", "2", "--batch", "4", "--micro", "2", "--optim", "sgd", "--lr", "0.1"]
    words += ["--logging-steps", "1", "--precompute"]
    ends = []
    for i, launcher in enumerate(([], ["-m", "torch.distributed.run", "--nproc_per_node", "2"])):
        out = tmp_path / str(i)
        recipe = [str(ROOT / "recipes" / "dpo.py"), *words, "--out", str(out)]
        caches = {"HF_DATASETS_CACHE": str(tmp_path / f"cache{i}")}
        subprocess.run([sys.executable, *launcher, *recipe], check=True, env=environment() | caches)
        assert len(list(Path(tmp_path / f"cache{i}").rglob("precomputed-*.arrow"))) <= 1
        ends.append(hf.causal_lm(out)[0].state_dict())
    for name, x in ends[0].items():
        torch.testing.assert_close(x, ends[1][name], atol=1e-6, rtol=0)


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
