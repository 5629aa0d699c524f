"""Iterative SFT: sample n answers per prompt, imitate the best, repeat (RAFT: Dong et al. 2023, arXiv:2304.06767).

L = -E mean_t log pi(y_t | x, y_<t), y = argmax_{i <= n} r(x, y_i), y_i ~ pi of the newest weights
"""

import torch

from alignkit import cli, hf
from alignkit.losses.supervised import nll
from alignkit.sampling import Sampling
from alignkit.weights import row_mean, token_mean, weigh


def main(
    model: str = "builtin:tiny",  # folder, hub id or builtin:tiny
    dataset: str = "builtin:reviews",  # of prompts: file, hub id or builtin:reviews
    reward: str = "builtin:sentiment",  # folder of a reward model, file.py:function or builtin:sentiment
    n: int = 4,  # answers to each prompt, of which the best is kept
    sampling: Sampling = Sampling(max_new=64),
    rollout: int = 32,  # prompts of a round
    epochs: int = 1,  # passes over their best answers
    batch: int = 32,  # answers of one optimizer step
    micro: int = 32,  # answers of one forward pass
    steps: int = 30,
    lr: float = 5e-4,
    lora: int = 0,  # rank of an adapter; 0 trains all weights
    seed: int = 0,
    out: str = "runs/iterative_sft",
    **training,
):
    args = hf.arguments(out, rollout=rollout, batch=batch, micro=micro, lr=lr, steps=steps, seed=seed, **training)
    policy, tok = hf.causal_lm(model, sampling=sampling, lora=lora, seed=seed)
    score, prompts = hf.reward_fn(reward), hf.prompts(dataset)
    state = {}

    def collect(i):
        x = next(hf.shuffled(prompts, batch=rollout, seed=seed, start=i))
        b = hf.sample(policy, tok, x, n=n, seed=seed, step=i)
        scores = score(tok, x, b["ids"], b["mask"]).view(-1, n)  # [prompts, n]
        top = scores.max(-1)
        best = top.indices + n * torch.arange(len(scores), device=scores.device)
        return hf.gather(ids=b["ids"][best], mask=b["mask"][best], best=top.values, score=scores.mean(-1))

    def loss_fn(policy, ids, mask, best, score, weights, rows):
        loss = weigh(nll(policy(ids, mask)), weights)
        return loss, {"score": weigh(score, rows), "best": weigh(best, rows)}

    batches = hf.on_policy(collect, state, size=batch, epochs=epochs, seed=seed)
    aggregate = {"weights": token_mean, "rows": row_mean}
    hf.fit(loss_fn, policy, batches, aggregate=aggregate, args=args, tokenizer=tok, state=state)
    hf.save(policy, tok, out)


if __name__ == "__main__":
    cli.run(main)
