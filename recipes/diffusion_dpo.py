"""Diffusion-DPO (Wallace et al. 2023, arXiv:2311.12908), or IPO or the hinge loss on the same margin.

L = -E log sigmoid(beta margin), margin = [(ref error - error)(x_w) - (ref error - error)(x_l)] / 2 of denoising
"""

from typing import Literal

from alignkit import cli, hf
from alignkit.hf import diffusion
from alignkit.losses.diffusion import diffusion_dpo_margin
from alignkit.losses.preference import dpo, hinge, ipo
from alignkit.train import infer
from alignkit.weights import row_mean, weigh

LOSSES = {"dpo": dpo, "ipo": ipo, "hinge": hinge}


def main(
    model: str = "builtin:shapes",  # folder or hub id of a diffusers pipeline, or builtin:shapes
    dataset: str = "builtin:shape-pairs",  # of prompt, chosen, rejected: file, hub id or builtin:...
    denoising: diffusion.Denoising = diffusion.Denoising(),
    loss: Literal[*LOSSES] = "dpo",
    beta: float = 2000.0,  # how strongly the reference holds the policy
    batch: int = 32,  # pairs of one optimizer step
    micro: int = 32,  # pairs of one forward pass
    steps: int = 100,
    lr: float = 1e-4,
    lora: int = 0,  # rank of an adapter; 0 trains the whole network
    dtype: str = "float32",  # of the weights
    seed: int = 0,
    out: str = "runs/diffusion_dpo",
    **training,
):
    args = hf.arguments(out, batch=batch, micro=micro, lr=lr, steps=steps, seed=seed, **training)
    policy = diffusion.pipeline(model, denoising=denoising, lora=lora, dtype=dtype, seed=seed)
    policy = diffusion.Regressor(policy.net, policy.family)
    ref, rows = diffusion.frozen(policy), diffusion.image_pairs(dataset, policy)

    def batches(step):
        for i, b in enumerate(hf.stream(rows, batch=batch, seed=seed, start=step), step):
            b |= policy.draw(len(b["original"]), seed=seed, step=i)  # one noise and time for both images
            yield {"mask": b.pop("mask"), "ref_errors": infer(ref, rows=micro, **b), **b}

    def loss_fn(policy, original, noise, timesteps, mask, ref_errors, weights, **cond):
        errors = policy(original, noise, timesteps, **cond)  # [B, 2]
        margin = diffusion_dpo_margin(errors, ref_errors)  # [B]
        losses = LOSSES[loss](margin, beta=beta)
        seen = {"accuracy": weigh(margin > 0, weights), "margin": weigh(margin, weights)}
        return weigh(losses, weights), seen | {"error": weigh(errors[:, 0], weights)}

    hf.fit(loss_fn, policy, batches, aggregate=row_mean, args=args)
    diffusion.save(policy, out)


if __name__ == "__main__":
    cli.run(main)
