"""A reward model from comparisons (Ouyang et al. 2022, arXiv:2203.02155 eq. 1; Stiennon et al. 2020, arXiv:2009.01325).

L = -E log sigmoid(r(x, y_w) - r(x, y_l)) + centering E (r(x, y_w) + r(x, y_l))^2   (Eisenstein et al. 2023, 2312.09244)
"""

from typing import Literal

from alignkit import cli, hf
from alignkit.losses.reward import bradley_terry, centering
from alignkit.weights import row_mean, weigh


def main(
    model: str = "builtin:tiny",  # folder, hub id or builtin:tiny; of a policy or of a reward model
    dataset: str = "builtin:reviews",  # file, hub id or builtin:reviews
    center: float = 0.0,  # holds rewards around 0, e.g. 0.01
    margin: float = 0.0,  # by which the chosen answer should win
    max_length: int = 512,  # tokens of prompt and answer together
    keep: Literal["keep_end", "keep_start"] = "keep_end",  # of a prompt that is too long
    batch: int = 32,  # pairs of one optimizer step
    micro: int = 32,  # pairs of one forward pass
    steps: int = 100,
    lr: float = 1e-3,
    lora: int = 0,  # rank of an adapter; 0 trains all weights
    dtype: str = "float32",  # of the weights
    seed: int = 0,
    out: str = "runs/reward",
    **training,
):
    args = hf.arguments(out, batch=batch, micro=micro, lr=lr, steps=steps, seed=seed, **training)
    scorer, tok = hf.reward_model(model, dtype=dtype, lora=lora, seed=seed)
    rows = hf.pairs(dataset, tok, max_length=max_length, keep=keep)  # ids, mask [2, T]: chosen, rejected

    def batches(step):
        return hf.stream(rows, batch=batch, seed=seed, start=step)

    def loss_fn(scorer, ids, mask, weights):
        chosen, rejected = scorer(ids, mask).unbind(-1)  # [B]
        losses = bradley_terry(chosen, rejected, margin=margin) + center * centering(chosen, rejected)
        metrics = {"accuracy": chosen > rejected, "margin": chosen - rejected, "chosen": chosen, "rejected": rejected}
        return weigh(losses, weights), {name: weigh(x, weights) for name, x in metrics.items()}

    hf.fit(loss_fn, scorer, batches, aggregate=row_mean, args=args, tokenizer=tok)
    hf.save(scorer, tok, out)


if __name__ == "__main__":
    cli.run(main)
