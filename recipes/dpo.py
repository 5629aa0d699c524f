"""DPO (Rafailov et al. 2023, arXiv:2305.18290 eq. 7), or IPO or the hinge loss on the same margin.

L = -E log sigmoid(beta [log pi(y_w|x) / ref(y_w|x) - log pi(y_l|x) / ref(y_l|x)])
"""

from typing import Literal

from alignkit import cli, hf
from alignkit.losses.preference import dpo, hinge, ipo
from alignkit.train import infer
from alignkit.weights import row_mean, weigh

LOSSES = {"dpo": dpo, "ipo": ipo, "hinge": hinge}


def main(
    model: str = "builtin:tiny",  # folder, hub id or builtin:tiny
    dataset: str = "builtin:reviews",  # file, hub id or builtin:reviews
    loss: Literal[*LOSSES] = "dpo",
    beta: float = 0.1,  # how strongly the reference holds the policy
    precompute: bool = False,  # reference log-probs once, kept on disk, without a second model
    max_length: int = 512,  # tokens of prompt and answer together
    keep: Literal["keep_end", "keep_start"] = "keep_end",  # of a prompt that is too long
    batch: int = 32,  # pairs of one optimizer step
    micro: int = 32,  # pairs of one forward pass
    steps: int = 100,
    lr: float = 1e-4,
    lora: int = 0,  # rank of an adapter; 0 trains all weights
    dtype: str = "float32",  # of the weights
    seed: int = 0,
    out: str = "runs/dpo",
    **training,
):
    args = hf.arguments(out, batch=batch, micro=micro, lr=lr, steps=steps, seed=seed, **training)
    policy, tok = hf.causal_lm(model, dtype=dtype, lora=lora, seed=seed)
    ref = policy if precompute else hf.frozen(policy)
    rows = hf.pairs(dataset, tok, max_length=max_length, keep=keep)  # ids, mask [2, T]: chosen, rejected

    def with_reference(b):
        return b | {"ref_logps": infer(ref, b["ids"], b["mask"], rows=micro).sum(-1)}  # [B, 2]

    rows = hf.precompute(rows, with_reference, model=ref, batch=micro, args=args) if precompute else rows

    def batches(step):
        stream = hf.stream(rows, batch=batch, seed=seed, start=step)
        return stream if precompute else map(with_reference, stream)

    def loss_fn(policy, ids, mask, ref_logps, weights):
        log_ratio = policy(ids, mask).sum(-1) - ref_logps  # [B, 2]
        margin = log_ratio[:, 0] - log_ratio[:, 1]  # [B]
        losses = LOSSES[loss](margin, beta=beta)  # [B]
        return weigh(losses, weights), {"accuracy": weigh(margin > 0, weights), "margin": weigh(margin, weights)}

    hf.fit(loss_fn, policy, batches, aggregate=row_mean, args=args, tokenizer=tok)
    hf.save(policy, tok, out)


if __name__ == "__main__":
    cli.run(main)
