"""Dr. GRPO: GRPO done right (Liu et al. 2025, arXiv:2503.20783 sec. 3.2): no standard deviation, no length, no KL.

L = -E sum_t min(ratio A, clip(ratio, 1 - eps, 1 + eps) A) / max_new, A = r - mean r in a group
"""

from functools import partial

from alignkit import cli, hf
from alignkit.advantages import group_center
from alignkit.importance import truncated
from alignkit.losses.policy import clip_fraction, clipped_surrogate
from alignkit.monitors import policy_metrics
from alignkit.sampling import Sampling
from alignkit.weights import constant_length, row_mean, token_mean, weigh

CLIP, CAP = {"low": 0.2, "high": 0.2}, 2.0  # CAP: of the ratio of the policy to a sampler that computes otherwise


def main(
    model: str = "builtin:tiny",  # folder, hub id or builtin:tiny
    dataset: str = "builtin:arithmetic",  # of prompts: file, hub id or builtin:...
    reward: tuple[str, ...] = ("builtin:arithmetic",),  # builtin:..., file.py:function, folder of a reward model
    sampling: Sampling = Sampling(max_new=64),
    n: int = 8,  # answers to each prompt
    rollout: int = 128,  # answers sampled at a time
    epochs: int = 1,  # passes over them
    batch: int = 128,  # answers of one optimizer step
    micro: int = 64,  # answers of one forward pass
    steps: int = 100,
    lr: float = 1e-4,
    lora: int = 0,  # rank of an adapter; 0 trains all weights
    seed: int = 0,
    out: str = "runs/dr_grpo",
    **training,
):
    args = hf.arguments(out, rollout=rollout, batch=batch, micro=micro, lr=lr, steps=steps, seed=seed, **training)
    policy, tok = hf.causal_lm(model, sampling=sampling, lora=lora, seed=seed)
    score, prompts, state = hf.reward_fn(reward), hf.prompts(dataset), {}

    def collect(i):
        b = hf.rollout(policy, tok, prompts, score, n=n, size=rollout, rows=micro, seed=seed, step=i)
        return b | {"advantages": group_center(b["rewards"].view(-1, n)).view(-1, 1)}

    def loss_fn(policy, ids, mask, old_logps, advantages, weights, tokens, rows, **seen):
        logps = policy(ids, mask)
        loss = clipped_surrogate(logps, old_logps, advantages, **CLIP)
        loss = loss * truncated(old_logps - seen["sampler_logps"], cap=CAP)
        seen["clipped"] = clip_fraction(logps, old_logps, advantages, **CLIP)
        return weigh(loss, weights), policy_metrics(logps, old_logps, advantages, mask, tokens, rows, **seen)

    batches = hf.on_policy(collect, state, size=batch, epochs=epochs, seed=seed)
    aggregate = {"weights": partial(constant_length, length=sampling.max_new), "tokens": token_mean, "rows": row_mean}
    hf.fit(loss_fn, policy, batches, aggregate=aggregate, args=args, tokenizer=tok, state=state)
    hf.save(policy, tok, out)


if __name__ == "__main__":
    cli.run(main)
