"""VAPO: value-based augmented PPO (Yue et al. 2025, arXiv:2504.05118), here with one body for policy and critic.

L = -E min(ratio A, clip(ratio, 1 - low, 1 + high) A) + c E (V - r)^2 / 2 - mu E_{r > 0} log pi, E over tokens, A by GAE
"""

from alignkit import cli, hf
from alignkit.advantages import gae
from alignkit.importance import truncated
from alignkit.losses.policy import clipped_surrogate
from alignkit.monitors import policy_metrics
from alignkit.sampling import Sampling
from alignkit.shaping import terminal_reward
from alignkit.weights import row_mean, token_mean, weigh

CLIP, CAP, C, MU, ALPHA = {"low": 0.2, "high": 0.28}, 2.0, 0.5, 0.1, 0.05  # lambda = 1 - 1 / (ALPHA length)


def main(
    model: str = "builtin:tiny",  # folder, hub id or builtin:tiny
    dataset: str = "builtin:arithmetic",  # of prompts: file, hub id or builtin:...
    reward: tuple[str, ...] = ("builtin:arithmetic",),  # builtin:..., file.py:function, folder of a reward model
    sampling: Sampling = Sampling(max_new=64),
    n: int = 8,  # answers to each prompt
    pretrain: int = 10,  # rollouts without policy gradient
    rollout: int = 128,  # answers sampled at a time
    batch: int = 128,  # answers of one optimizer step
    micro: int = 64,  # answers of one forward pass
    steps: int = 100,
    lr: float = 1e-4,
    lora: int = 0,  # rank of an adapter; 0 trains all weights
    seed: int = 0,
    out: str = "runs/vapo",
    **training,
):
    args = hf.arguments(out, rollout=rollout, batch=batch, micro=micro, lr=lr, steps=steps, seed=seed, **training)
    policy, tok = hf.causal_lm(model, value_head=True, sampling=sampling, lora=lora, seed=seed)
    score, prompts, state = hf.reward_fn(reward), hf.prompts(dataset), {}

    def collect(i):
        b = hf.rollout(policy, tok, prompts, score, n=n, size=rollout, rows=micro, seed=seed, step=i)
        lam = (1 - 1 / (ALPHA * b["mask"].sum(-1, keepdim=True))).clamp(min=0)
        advantages, _ = gae(terminal_reward(b["rewards"], b["mask"]), b["values"], b["mask"], gamma=1.0, lam=lam)
        return b | {"advantages": advantages * (i >= pretrain), "right": b["mask"] & (b["rewards"] > 0)[:, None]}

    def loss_fn(policy, ids, mask, old_logps, advantages, right, weights, right_weights, rows, **seen):
        logps, values = policy(ids, mask)
        loss = clipped_surrogate(logps, old_logps, advantages, **CLIP)
        loss = loss * truncated(old_logps - seen["sampler_logps"], cap=CAP)
        loss = loss + C * (values - seen["rewards"][:, None]) ** 2 / 2  # the return by lambda = 1
        metrics = policy_metrics(logps, old_logps, advantages, mask, weights, rows, **seen)
        return weigh(loss, weights) - MU * weigh(logps, right_weights), metrics

    batches = hf.on_policy(collect, state, size=batch, seed=seed)
    aggregate = {"weights": token_mean, "right_weights": ("right", token_mean), "rows": row_mean}
    hf.fit(loss_fn, policy, batches, aggregate=aggregate, args=args, tokenizer=tok, state=state)
    hf.save(policy, tok, out)


if __name__ == "__main__":
    cli.run(main)
