"""`alignkit demo`: a small model learns to write film reviews, then to please, and the true reward shows it."""

import importlib.util
import json
import shutil
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from alignkit import hf
from alignkit.sampling import Sampling
from alignkit.train import infer

SAMPLING = Sampling(max_new=64)


class Measured(NamedTuple):
    """What `n` sampled answers say of a policy; the intervals are 95 % (1.96 standard errors)."""

    step: int
    reward: float
    reward_interval: float
    kl: float
    kl_interval: float
    samples: list[str]


def demo(
    out: Path, *, run: Any, seed: int = 0, sft_steps: int = 200, dpo_steps: int = 100, n: int = 256
) -> list[Measured]:
    """SFT on the built-in reviews, DPO from it; writes checkpoints, metrics, demo.json and demo.png under `out`.

    `run(recipe, **options)` runs a recipe; an earlier demo's files in `out` are replaced. Rewards are true ones: the
    sentiment of `n` answers to films of the test split. KL is in nats per answer, to the model after SFT.
    """
    fresh(out, {"sft", "dpo", "demo.json", "demo.png"})
    print("1/3  SFT: learning to write reviews")
    run("sft", out=str(out / "sft"), steps=sft_steps, seed=seed, save_strategy="no", logging_steps=50)
    print("2/3  DPO: learning from preferences between reviews")
    sft, dpo = out / "sft", out / "dpo"
    run("dpo", model=str(sft), out=str(dpo), steps=dpo_steps, seed=seed, save_steps=max(dpo_steps // 4, 1))
    print(f"3/3  Measuring: {n} answers of each checkpoint")
    reference, tokenizer = hf.causal_lm(sft, sampling=SAMPLING)
    prompts = hf.prompts("builtin:reviews", split="test")[:n]
    measured = [
        measure(0, reference, reference, tokenizer, prompts, seed=seed),
        *measure_run(dpo, reference, tokenizer, prompts, seed=seed),
    ]
    (out / "demo.json").write_text(json.dumps([x._asdict() for x in measured], indent=1))
    _plot(measured, out / "demo.png")
    print(_table(measured, prompts))
    print(f"\nEverything is under {out}/: sft/ and dpo/ (models, checkpoints, metrics.jsonl), demo.json, demo.png")
    return measured


def fresh(out: Path, own: set[str]) -> None:
    """Remove what an earlier demo wrote to `out`, the files and folders `own`; refuse a folder that holds others."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("the demo draws with matplotlib: pip install 'alignkit[plot]'")
    others = {path.name for path in out.glob("*")} - own
    if others:
        raise ValueError(f"{out} holds {', '.join(sorted(others))}, which no demo wrote; choose another --out")
    shutil.rmtree(out, ignore_errors=True)


def measure(step: int, policy: Any, reference: Any, tokenizer: Any, prompts: list[Any], *, seed: int) -> Measured:
    """Sample one answer to each prompt; mean true reward, and mean log(pi / reference) of the answers."""
    b = hf.sample(policy, tokenizer, prompts, seed=seed)
    ids, mask = b["ids"], b["mask"]
    texts = hf.decode(tokenizer, ids, mask)
    log_ratio = infer(policy, ids, mask, rows=64).sum(-1) - infer(reference, ids, mask, rows=64).sum(-1)
    return Measured(step, *interval([hf.sentiment(x) for x in texts]), *interval(log_ratio.tolist()), texts[:4])


def measure_run(folder: Path, reference: Any, tokenizer: Any, prompts: list[Any], *, seed: int) -> list[Measured]:
    """Every checkpoint of a run, in their order."""
    steps = sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))
    policies = ((step, hf.causal_lm(folder / f"checkpoint-{step}", sampling=SAMPLING)[0]) for step in steps)
    return [measure(step, policy, reference, tokenizer, prompts, seed=seed) for step, policy in policies]


def interval(x: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval."""
    return statistics.fmean(x), 1.96 * statistics.stdev(x) / len(x) ** 0.5


def _table(measured: list[Measured], prompts: list[Any]) -> str:
    before, after = measured[0], measured[-1]
    rows = [
        ("", "after SFT", f"after DPO, step {after.step}"),
        ("true reward (-1 to 1)", _pm(before.reward, before.reward_interval), _pm(after.reward, after.reward_interval)),
        ("KL to SFT (nats)", "0", _pm(after.kl, after.kl_interval)),
    ]
    lines = ["", *(f"{a:24}{b:20}{c}" for a, b, c in rows)]
    for prompt, old, new in zip(prompts, before.samples, after.samples):
        lines += ["", prompt["prompt"].split("\n")[0], f"  after SFT: {old.strip()}", f"  after DPO: {new.strip()}"]
    return "\n".join(lines)


def _pm(mean: float, interval: float) -> str:
    return f"{mean:+.3f} ± {interval:.3f}"


def _plot(measured: list[Measured], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for axes, title, color, series in (
        (left, "true reward", "tab:blue", [(x.reward, x.reward_interval) for x in measured]),
        (right, "KL to the SFT model (nats)", "tab:orange", [(x.kl, x.kl_interval) for x in measured]),
    ):
        mean, interval = zip(*series)
        axes.errorbar([x.step for x in measured], mean, yerr=interval, marker="o", capsize=3, color=color)
        axes.set(title=title, xlabel="DPO step")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)
