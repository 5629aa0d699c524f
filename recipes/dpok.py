"""DPOK: policy gradient, regularised towards the pretrained model (Fan et al. 2023, arXiv:2305.16381).

L = E [-alpha (r - b) log p(x_t-1 | x_t) + beta KL(p || p_ref)], b the mean reward of the prompt's other images
"""

import torch

from alignkit import cli, hf
from alignkit.advantages import leave_one_out
from alignkit.data import by_step, mix
from alignkit.hf import diffusion
from alignkit.losses.policy import clipped_surrogate
from alignkit.weights import row_mean, token_mean, weigh

CLIP = {"low": 1e-4, "high": 1e-4}  # of p / p_old, whose gradient where they are equal is that of log p


def main(
    model: str = "builtin:shapes",  # folder or hub id of a diffusers pipeline, or builtin:shapes
    dataset: str = "builtin:shapes",  # of prompts: file, hub id or builtin:...
    reward: tuple[str, ...] = ("builtin:colour",),  # builtin:..., file.py:function
    denoising: diffusion.Denoising = diffusion.Denoising(guidance=1.0),
    n: int = 8,  # images of each prompt
    alpha: float = 10.0,  # weight of the reward
    beta: float = 0.01,  # how strongly the pretrained model holds the policy
    rollout: int = 64,  # images sampled at a time
    batch: int = 320,  # rows (denoising steps) of one optimizer step
    micro: int = 64,  # rows of one forward pass
    steps: int = 200,
    lr: float = 3e-4,
    lora: int = 0,  # rank of an adapter; 0 trains the whole network
    seed: int = 0,
    out: str = "runs/dpok",
    **training,
):
    size = rollout * denoising.steps
    args = hf.arguments(out, rollout=size, batch=batch, micro=micro, lr=lr, steps=steps, seed=seed, **training)
    policy = diffusion.pipeline(model, denoising=denoising, lora=lora, seed=seed)
    ref, score, prompts, state = diffusion.frozen(policy), diffusion.image_reward(reward), hf.prompts(dataset), {}

    def collect(i):
        b = diffusion.rollout(policy, prompts, score, state, n=n, size=rollout, rows=micro, seed=seed, step=i, ref=ref)
        b["advantages"] = leave_one_out(b["rewards"].view(-1, n)).flatten()
        return by_step(b, 1, generator=torch.Generator().manual_seed(mix(seed, i)))

    def loss_fn(policy, latents, next_latents, timesteps, old_logps, ref_mean, advantages, weights, rows, **seen):
        new = policy(latents, None, timesteps, **{k: x for k, x in seen.items() if k.startswith("cond_")})
        logps, kl = denoising.logps(next_latents, new), denoising.kl(new, ref_mean)
        loss = alpha * clipped_surrogate(logps, old_logps, advantages[:, None], **CLIP) + beta * kl
        return weigh(loss, weights), {"reward": weigh(seen["rewards"], rows), "kl": weigh(kl, weights)}

    batches = hf.on_policy(collect, state, size=batch, seed=seed)
    hf.fit(loss_fn, policy, batches, aggregate={"weights": token_mean, "rows": row_mean}, args=args, state=state)
    diffusion.save(policy, out)


if __name__ == "__main__":
    cli.run(main)
