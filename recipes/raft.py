"""RAFT: reward-ranked finetuning, imitation of each prompt's best answer (Dong et al. 2023, arXiv:2304.06767).

L = -E mean_tokens log pi(y), y = argmax r among n answers of the newest weights
"""

import torch

from alignkit import cli, hf
from alignkit.losses.policy import reinforce
from alignkit.monitors import policy_metrics
from alignkit.sampling import Sampling
from alignkit.weights import row_mean, token_mean, weigh


def main(
    model: str = "builtin:tiny",  # folder, hub id or builtin:tiny
    dataset: str = "builtin:arithmetic",  # of prompts: file, hub id or builtin:...
    reward: tuple[str, ...] = ("builtin:arithmetic",),  # builtin:..., file.py:function, folder of a reward model
    sampling: Sampling = Sampling(max_new=64),
    n: int = 8,  # answers to each prompt
    rollout: int = 128,  # answers sampled at a time
    epochs: int = 1,  # passes over them
    batch: int = 16,  # answers of one optimizer step
    micro: int = 16,  # answers of one forward pass
    steps: int = 100,
    lr: float = 1e-4,
    lora: int = 0,  # rank of an adapter; 0 trains all weights
    seed: int = 0,
    out: str = "runs/raft",
    **training,
):
    args = hf.arguments(out, rollout=rollout // n, batch=batch, micro=micro, lr=lr, steps=steps, seed=seed, **training)
    policy, tok = hf.causal_lm(model, sampling=sampling, lora=lora, seed=seed)
    score, prompts, state = hf.reward_fn(reward), hf.prompts(dataset), {}

    def collect(i):
        b = hf.rollout(policy, tok, prompts, score, n=n, size=rollout, rows=micro, seed=seed, step=i)
        scores = b["rewards"].view(-1, n)
        best = scores.argmax(-1) + n * torch.arange(len(scores), device=scores.device)
        chosen = {name: x[best] for name, x in b.items()} | {"mean_reward": scores.mean(-1)}
        return chosen | {"advantages": torch.ones_like(scores[:, :1])}

    def loss_fn(policy, ids, mask, old_logps, advantages, weights, tokens, rows, **seen):
        logps = policy(ids, mask)
        loss = reinforce(logps, advantages)
        return weigh(loss, weights), policy_metrics(logps, old_logps, advantages, mask, tokens, rows, **seen)

    batches = hf.on_policy(collect, state, size=batch, epochs=epochs, seed=seed)
    aggregate = {"weights": token_mean, "tokens": token_mean, "rows": row_mean}
    hf.fit(loss_fn, policy, batches, aggregate=aggregate, args=args, tokenizer=tok, state=state)
    hf.save(policy, tok, out)


if __name__ == "__main__":
    cli.run(main)
