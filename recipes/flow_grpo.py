"""Flow-GRPO: GRPO on a flow made random (Liu et al. 2025, arXiv:2505.05470).

L = -E [min(ratio A, clip(ratio, 1 - eps, 1 + eps) A) - beta KL(p || p_ref)], A = (r - mean r) / std r of a prompt
"""

import torch

from alignkit import cli, hf
from alignkit.advantages import group_normalize
from alignkit.data import by_step, mix
from alignkit.hf import diffusion
from alignkit.losses.policy import clip_fraction, clipped_surrogate
from alignkit.weights import row_mean, token_mean, weigh

CLIP = {"low": 1e-4, "high": 1e-4}  # of a ratio per element, as log-probs are means


def main(
    model: str = "builtin:shapes",  # folder or hub id of a diffusers pipeline, or builtin:shapes
    dataset: str = "builtin:shapes",  # of prompts: file, hub id or builtin:...
    reward: tuple[str, ...] = ("builtin:colour",),  # builtin:..., file.py:function
    denoising: diffusion.Denoising = diffusion.Denoising(flow=True, guidance=1.0),
    n: int = 8,  # images of each prompt
    beta: float = 0.04,  # how strongly the reference holds the policy
    rollout: int = 64,  # images sampled at a time
    fraction: float = 1.0,  # of the denoising steps of an image that are trained, drawn at random
    batch: int = 320,  # rows (denoising steps) of one optimizer step
    micro: int = 64,  # rows of one forward pass
    steps: int = 200,
    lr: float = 3e-4,
    lora: int = 0,  # rank of an adapter; 0 trains the whole network
    seed: int = 0,
    out: str = "runs/flow_grpo",
    **training,
):
    size = rollout * denoising.share(fraction)
    args = hf.arguments(out, rollout=size, batch=batch, micro=micro, lr=lr, steps=steps, seed=seed, **training)
    policy = diffusion.pipeline(model, denoising=denoising, lora=lora, seed=seed)
    ref, score, prompts, state = diffusion.frozen(policy), diffusion.image_reward(reward), hf.prompts(dataset), {}

    def collect(i):
        b = diffusion.rollout(policy, prompts, score, state, n=n, size=rollout, rows=micro, seed=seed, step=i, ref=ref)
        b["advantages"] = group_normalize(b["rewards"].view(-1, n)).flatten()
        return by_step(b, 1, fraction=fraction, generator=torch.Generator().manual_seed(mix(seed, i)))

    def loss_fn(policy, latents, next_latents, timesteps, old_logps, ref_mean, advantages, weights, rows, **seen):
        new = policy(latents, None, timesteps, **{k: x for k, x in seen.items() if k.startswith("cond_")})
        seen = {"reward": weigh(seen["rewards"], rows)}
        logps, kl = denoising.logps(next_latents, new), denoising.kl(new, ref_mean)
        loss, clipped = (f(logps, old_logps, advantages[:, None], **CLIP) for f in (clipped_surrogate, clip_fraction))
        return weigh(loss + beta * kl, weights), seen | {"kl": weigh(kl, weights), "clipped": weigh(clipped, weights)}

    batches = hf.on_policy(collect, state, size=batch, seed=seed)
    hf.fit(loss_fn, policy, batches, aggregate={"weights": token_mean, "rows": row_mean}, args=args, state=state)
    diffusion.save(policy, out)


if __name__ == "__main__":
    cli.run(main)
