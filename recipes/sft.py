"""Supervised fine-tuning: maximise log pi(completion | prompt).

L = -E mean_t log pi(y_t | x, y_<t)   (Ouyang et al. 2022, arXiv:2203.02155 sec. 3.5)
"""

from typing import Literal

from alignkit import cli, hf
from alignkit.losses.supervised import nll
from alignkit.weights import sequence_mean, token_mean, weigh

AGGREGATES = {"token_mean": token_mean, "sequence_mean": sequence_mean}


def main(
    model: str = "builtin:tiny",  # folder, hub id or builtin:tiny
    dataset: str = "builtin:reviews",  # file, hub id or builtin:reviews
    aggregate: Literal[*AGGREGATES] = "token_mean",
    max_length: int = 512,  # tokens
    keep: Literal["keep_end", "keep_start"] = "keep_end",  # of a prompt that is too long
    batch: int = 32,  # rows of one optimizer step
    micro: int = 32,  # rows of one forward pass
    steps: int = 300,
    lr: float = 2e-3,
    lora: int = 0,  # rank of an adapter; 0 trains all weights
    dtype: str = "float32",  # of the weights
    seed: int = 0,
    out: str = "runs/sft",
    **training,
):
    args = hf.arguments(out, batch=batch, micro=micro, lr=lr, steps=steps, seed=seed, **training)
    policy, tok = hf.causal_lm(model, dtype=dtype, lora=lora, seed=seed)
    rows = hf.text(dataset, tok, max_length=max_length, keep=keep)  # ids, mask [T]

    def batches(step):
        return hf.stream(rows, batch=batch, seed=seed, start=step)

    def loss_fn(policy, ids, mask, weights):
        return weigh(nll(policy(ids, mask)), weights), {}

    hf.fit(loss_fn, policy, batches, aggregate=AGGREGATES[aggregate], args=args, tokenizer=tok)
    hf.save(policy, tok, out)


if __name__ == "__main__":
    cli.run(main)
