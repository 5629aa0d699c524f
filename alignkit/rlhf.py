"""`alignkit demo rlhf`: SFT, a reward model, PPO against it; the true reward against KL shows what it bought."""

import json
from math import log
from pathlib import Path
from typing import Any

import torch

from alignkit import hf
from alignkit.demo import SAMPLING, Measured, fresh, interval, measure, measure_run

BEST_OF = 16


def rlhf(
    out: Path,
    *,
    run: Any,
    seed: int = 0,
    sft_steps: int = 200,
    reward_steps: int = 100,
    ppo_steps: int = 240,
    n: int = 256,
) -> dict[str, list[Measured]]:
    """SFT and a reward model on the built-in reviews, then PPO on the learned and on the true reward, from SFT.

    Measured at checkpoints and for best-of-n by the reward model: true reward, and KL to the SFT model in nats per
    answer, which for best-of-n is its upper bound log n - (n - 1) / n. Writes models, metrics, rlhf.json and rlhf.png
    under `out`; `run(recipe, **options)` runs a recipe.
    """
    fresh(out, {"sft", "reward", "ppo-learned", "ppo-true", "rlhf.json", "rlhf.png"})
    sft, reward = out / "sft", out / "reward"
    print("1/5  SFT: learning to write reviews")
    run("sft", out=str(sft), steps=sft_steps, seed=seed, save_strategy="no", logging_steps=50)
    print("2/5  Reward model: learning from preferences between reviews")
    run("reward", model=str(sft), out=str(reward), steps=reward_steps, seed=seed, save_strategy="no", logging_steps=25)
    sources = {"ppo-learned": str(reward), "ppo-true": "builtin:sentiment"}
    for number, (name, source) in enumerate(sources.items(), 3):
        print(f"{number}/5  PPO on the {name.split('-')[1]} reward")
        save = max(ppo_steps // 6, 1)
        options = {"steps": ppo_steps, "seed": seed, "save_steps": save, "logging_steps": save, "kl_coef": 0.02}
        run("ppo", model=str(sft), reward=source, out=str(out / name), **options)
    print(f"5/5  Measuring: {n} answers of each checkpoint")
    reference, tokenizer = hf.causal_lm(sft, sampling=SAMPLING)
    prompts = hf.prompts("builtin:reviews", split="test")[:n]
    start = measure(0, reference, reference, tokenizer, prompts, seed=seed)
    curves = {"best-of-n": best_of_n(reference, tokenizer, prompts, str(reward), seed=seed)}
    for name in sources:
        curves[name] = [start, *measure_run(out / name, reference, tokenizer, prompts, seed=seed)]
    (out / "rlhf.json").write_text(json.dumps({name: [x._asdict() for x in xs] for name, xs in curves.items()}))
    _plot(curves, out / "rlhf.png")
    print(_table(curves))
    print(f"\nEverything is under {out}/: {', '.join(['sft', 'reward', *sources])} (models), rlhf.json, rlhf.png")
    return curves


def best_of_n(policy: Any, tokenizer: Any, prompts: list[Any], reward: str, *, seed: int) -> list[Measured]:
    """The true reward of the answer that the reward model likes best among 1, 2, 4, ..., `BEST_OF`."""
    score, true = hf.reward_fn(reward), hf.reward_fn("builtin:sentiment")
    columns, texts = [], []
    for i in range(BEST_OF):
        b = hf.sample(policy, tokenizer, prompts, seed=seed, step=i + 1)
        ids, mask = b["ids"], b["mask"]
        columns.append((score(tokenizer, prompts, ids, mask), true(tokenizer, prompts, ids, mask)))
        texts.append(hf.decode(tokenizer, ids[:4], mask[:4]))
    learned, truth = (torch.stack(x, -1) for x in zip(*columns))  # [prompts, BEST_OF]
    measured = []
    for k in (2**j for j in range(BEST_OF.bit_length())):
        best = learned.unflatten(-1, (-1, k)).argmax(-1, keepdim=True)
        chosen = truth.unflatten(-1, (-1, k)).gather(-1, best)[..., 0].mean(-1)  # over the groups of k of a prompt
        first = [texts[best[row, 0, 0]][row] for row in range(4)]
        measured.append(Measured(k, *interval(chosen.tolist()), log(k) - (k - 1) / k, 0.0, first))
    return measured


def _table(curves: dict[str, list[Measured]]) -> str:
    lines = ["", f"{'':14}{'step or n':>10}{'true reward':>20}{'KL to SFT (nats)':>20}"]
    for name, measured in curves.items():
        for x in measured:
            reward = f"{x.reward:+.3f} ± {x.reward_interval:.3f}"
            bound = f"<= {x.kl:.3f}" if name == "best-of-n" else f"{x.kl:.3f} ± {x.kl_interval:.3f}"
            lines.append(f"{name:14}{x.step:>10}{reward:>20}{bound:>20}")
    return "\n".join(lines)


def _plot(curves: dict[str, list[Measured]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = {"best-of-n": "best of n by the reward model (KL: upper bound)"}
    labels |= {"ppo-learned": "PPO on the reward model", "ppo-true": "PPO on the true reward"}
    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for name, measured in curves.items():
        bars = {"yerr": [x.reward_interval for x in measured], "xerr": [x.kl_interval for x in measured]}
        axes.errorbar(
            [x.kl for x in measured], [x.reward for x in measured], **bars, marker="o", capsize=2, label=labels[name]
        )
    axes.set(xlabel="KL to the SFT model (nats per answer)", ylabel="true reward", title="SFT -> reward model -> PPO")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)
