"""Online DPO: on the newest weights' own answers, which a reward or judge orders (Guo et al. 2024, arXiv:2402.04792).

L = -E log sigmoid(beta [log pi(y_w|x) / ref(y_w|x) - log pi(y_l|x) / ref(y_l|x)]), y_w the better of two answers
"""

import torch

from alignkit import cli, hf
from alignkit.losses.preference import dpo
from alignkit.monitors import weigh_each
from alignkit.sampling import Sampling
from alignkit.weights import row_mean, weigh


def main(
    model: str = "builtin:tiny",  # folder, hub id or builtin:tiny
    dataset: str = "builtin:reviews",  # of prompts: file, hub id or builtin:...
    reward: tuple[str, ...] = ("builtin:sentiment",),  # builtin:..., file.py:function, folder of a reward model
    sampling: Sampling = Sampling(max_new=64),
    beta: float = 0.1,  # how strongly the reference holds the policy
    rollout: int = 64,  # pairs of answers sampled at a time
    epochs: int = 1,  # passes over them
    batch: int = 64,  # pairs of one optimizer step
    micro: int = 32,  # pairs of one forward pass
    steps: int = 100,
    lr: float = 1e-4,
    lora: int = 0,  # rank of an adapter; 0 trains all weights
    seed: int = 0,
    out: str = "runs/online_dpo",
    **training,
):
    args = hf.arguments(out, rollout=rollout, batch=batch, micro=micro, lr=lr, steps=steps, seed=seed, **training)
    policy, tok = hf.causal_lm(model, sampling=sampling, lora=lora, seed=seed)
    score, prompts, state = hf.reward_fn(reward), hf.prompts(dataset), {}
    ref = hf.frozen(policy)

    def collect(i):
        b = hf.rollout(policy, tok, prompts, score, n=2, size=2 * rollout, rows=micro, seed=seed, step=i, ref=ref)
        pairs = {name: column.unflatten(0, (-1, 2)) for name, column in b.items()}  # [rollout, 2, ...]
        order = pairs["rewards"].argsort(dim=-1, descending=True, stable=True)  # the better answer first
        return {name: column[torch.arange(rollout)[:, None], order] for name, column in pairs.items()}

    def loss_fn(policy, ids, mask, ref_logps, rewards, truncated, weights, **_):
        log_ratio = (policy(ids, mask) - ref_logps).sum(-1)  # [B, 2]
        margin = log_ratio[:, 0] - log_ratio[:, 1]  # [B]
        differ = rewards[:, 0] > rewards[:, 1]  # a tie teaches nothing
        signals = {"reward": rewards.mean(-1), "margin": margin, "ties": ~differ, "truncated": truncated.any(-1)}
        return weigh(torch.where(differ, dpo(margin, beta=beta), 0), weights), weigh_each(signals, weights)

    batches = hf.on_policy(collect, state, size=batch, epochs=epochs, seed=seed)
    hf.fit(loss_fn, policy, batches, aggregate=row_mean, args=args, tokenizer=tok, state=state)
    hf.save(policy, tok, out)


if __name__ == "__main__":
    cli.run(main)
