"""RLOO: REINFORCE with the other answers' mean for a baseline (Ahmadian et al. 2024, arXiv:2402.14740 sec. 3.3).

L = -E A sum_t log pi, A = R - mean of the others' R, R = r - beta sum_t log(pi / ref)
"""

from alignkit import cli, hf
from alignkit.advantages import leave_one_out
from alignkit.importance import truncated
from alignkit.kl import k1
from alignkit.losses.policy import reinforce
from alignkit.masking import masked_sum
from alignkit.monitors import policy_metrics
from alignkit.sampling import Sampling
from alignkit.weights import row_mean, sequence_sum, token_mean, weigh

CAP = 2.0  # of the ratio of the policy to a sampler that computes otherwise


def main(
    model: str = "builtin:tiny",  # folder, hub id or builtin:tiny
    dataset: str = "builtin:arithmetic",  # of prompts: file, hub id or builtin:...
    reward: tuple[str, ...] = ("builtin:arithmetic",),  # builtin:..., file.py:function, folder of a reward model
    sampling: Sampling = Sampling(max_new=64),
    n: int = 8,  # answers to each prompt
    beta: float = 0.04,  # how strongly the reference holds the policy
    rollout: int = 128,  # answers sampled at a time
    batch: int = 128,  # answers of one optimizer step
    micro: int = 64,  # answers of one forward pass
    steps: int = 100,
    lr: float = 1e-4,
    lora: int = 0,  # rank of an adapter; 0 trains all weights
    seed: int = 0,
    out: str = "runs/rloo",
    **training,
):
    args = hf.arguments(out, rollout=rollout, batch=batch, micro=micro, lr=lr, steps=steps, seed=seed, **training)
    policy, tok = hf.causal_lm(model, sampling=sampling, lora=lora, seed=seed)
    score, prompts, state = hf.reward_fn(reward), hf.prompts(dataset), {}
    ref = hf.frozen(policy)

    def collect(i):
        b = hf.rollout(policy, tok, prompts, score, n=n, size=rollout, rows=micro, seed=seed, step=i, ref=ref)
        kl = masked_sum(k1(b["old_logps"], b["ref_logps"]), b["mask"], dim=-1)
        return b | {"advantages": leave_one_out((b["rewards"] - beta * kl).view(-1, n)).view(-1, 1)}

    def loss_fn(policy, ids, mask, old_logps, advantages, weights, tokens, rows, **seen):
        logps = policy(ids, mask)
        loss = reinforce(logps, advantages)
        loss = loss * truncated(old_logps - seen["sampler_logps"], cap=CAP)
        return weigh(loss, weights), policy_metrics(logps, old_logps, advantages, mask, tokens, rows, **seen)

    batches = hf.on_policy(collect, state, size=batch, seed=seed)
    aggregate = {"weights": sequence_sum, "tokens": token_mean, "rows": row_mean}
    hf.fit(loss_fn, policy, batches, aggregate=aggregate, args=args, tokenizer=tok, state=state)
    hf.save(policy, tok, out)


if __name__ == "__main__":
    cli.run(main)
