"""Best of n: no training, the best of n sampled answers by a reward (Stiennon et al. 2020, arXiv:2009.01325 fig. 9).

E max_{i <= k} r(x, y_i) for k = 1, 2, 4, ... n, at KL(best of k || pi) <= log k - (k - 1) / k (an upper bound: Beirami
et al. 2024, arXiv:2401.01879).
"""

import json
from math import log
from pathlib import Path

import torch
from accelerate.utils import gather_object

from alignkit import cli, hf
from alignkit.objectives import max_at_k
from alignkit.sampling import Sampling


def main(
    model: str = "builtin:tiny",  # folder, hub id or builtin:tiny
    dataset: str = "builtin:reviews",  # of prompts: file, hub id or builtin:reviews
    split: str = "test",  # of the dataset
    reward: str = "builtin:sentiment",  # folder of a reward model, file.py:function or builtin:sentiment
    n: int = 16,  # answers to each prompt
    limit: int = 256,  # prompts, from the first on
    sampling: Sampling = Sampling(max_new=64),
    rows: int = 256,  # answers sampled at a time
    dtype: str = "float32",  # of the weights
    seed: int = 0,
    out: str = "runs/best_of_n",
):
    if n < 1 or rows < n:
        raise ValueError(f"n={n} must be at least 1, and rows={rows} at least n")
    policy, tok = hf.causal_lm(model, dtype=dtype, sampling=sampling, seed=seed)
    score, prompts = hf.reward_fn(reward), hf.prompts(dataset, split=split)[:limit]
    chosen, every = [], []
    with hf.process().split_between_processes(prompts) as mine:
        for start in range(0, len(mine), rows // n):
            x = mine[start : start + rows // n]
            b = hf.sample(policy, tok, x, n=n, seed=seed, step=start)
            ids, mask = b["ids"], b["mask"]
            scores = score(tok, x, ids, mask).view(-1, n)  # [prompts, n]
            best = scores.argmax(-1).cpu() + n * torch.arange(len(scores))
            for row, answer, s in zip(x, hf.decode(tok, ids[best], mask[best]), scores.tolist()):
                chosen.append({"prompt": row["prompt"], "answer": answer, "score": max(s), "mean_score": sum(s) / n})
            every += scores.tolist()
    chosen, rewards = gather_object(chosen), torch.tensor(gather_object(every))
    if hf.process().is_main_process:
        Path(out).mkdir(parents=True, exist_ok=True)
        (Path(out) / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
        print(f"{'best of':>8}{'reward':>10}{'KL at most':>12}")
        for k in sorted({2**i for i in range(n.bit_length())} | {n}):
            print(f"{k:8}{max_at_k(rewards, k=k).mean() / k:+10.3f}{log(k) - (k - 1) / k:12.3f}")  # unbiased


if __name__ == "__main__":
    cli.run(main)
