"""On-policy distillation: a teacher judges each token of the student's own answers (Lu & Thinking Machines 2025).

L = -E mean_tokens ratio A, A = log teacher - log pi. https://thinkingmachines.ai/blog/on-policy-distillation
"""

from alignkit import cli, hf
from alignkit.advantages import on_policy_distillation
from alignkit.importance import truncated
from alignkit.losses.policy import surrogate
from alignkit.monitors import policy_metrics
from alignkit.sampling import Sampling
from alignkit.weights import row_mean, token_mean, weigh

CAP = 2.0  # of the ratio of the policy to a sampler that computes otherwise


def main(
    model: str = "builtin:tiny",  # folder, hub id or builtin:tiny
    teacher: str = "builtin:tiny",  # with the tokenizer of the model
    dataset: str = "builtin:arithmetic",  # of prompts: file, hub id or builtin:...
    reward: tuple[str, ...] = ("builtin:arithmetic",),  # only watched
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
    out: str = "runs/on_policy_distillation",
    **training,
):
    args = hf.arguments(out, rollout=rollout, batch=batch, micro=micro, lr=lr, steps=steps, seed=seed, **training)
    policy, tok = hf.causal_lm(model, sampling=sampling, lora=lora, seed=seed)
    score, prompts, state = hf.reward_fn(reward), hf.prompts(dataset), {}
    ref = hf.frozen(hf.causal_lm(teacher, sampling=sampling)[0])

    def collect(i):
        b = hf.rollout(policy, tok, prompts, score, n=n, size=rollout, rows=micro, seed=seed, step=i, ref=ref)
        return b | {"advantages": on_policy_distillation(b["old_logps"], b["ref_logps"])}

    def loss_fn(policy, ids, mask, old_logps, advantages, weights, tokens, rows, **seen):
        logps = policy(ids, mask)
        loss = surrogate(logps, old_logps, advantages)
        loss = loss * truncated(old_logps - seen["sampler_logps"], cap=CAP)
        return weigh(loss, weights), policy_metrics(logps, old_logps, advantages, mask, tokens, rows, **seen)

    batches = hf.on_policy(collect, state, size=batch, epochs=epochs, seed=seed)
    aggregate = {"weights": token_mean, "tokens": token_mean, "rows": row_mean}
    hf.fit(loss_fn, policy, batches, aggregate=aggregate, args=args, tokenizer=tok, state=state)
    hf.save(policy, tok, out)


if __name__ == "__main__":
    cli.run(main)
