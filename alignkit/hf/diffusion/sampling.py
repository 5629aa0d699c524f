"""Images from a denoiser, drawn as its `denoising` says."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from alignkit.diffusion import Normal
from alignkit.hf.diffusion.models import Denoiser
from alignkit.hf.processes import process, row_seeds
from alignkit.train import evaluating, split
from alignkit.types import Batch


@torch.no_grad()
def denoise(
    policy: Denoiser,
    prompts: Sequence[Any],
    *,
    n: int = 1,
    rows: int | None = None,
    seed: int = 0,
    step: int = 0,
    bar: bool | None = False,
) -> Batch:
    """`n` images of each prompt, in consecutive rows, with the steps that led to them; `rows` images at a time.

    Columns: `latents` and `next_latents` [R, T, C, H, W], before and after each step; `timesteps` [R, T]; `mask`
    [R, T], False where a step is deterministic; `sampler_logps` [R, T]; `images` [R, 3, H, W] in [0, 1]; and those of
    `policy.encode`. Prompts are strings, or rows whose column `prompt` is one. An image depends on `seed`, `step` and
    its row among those of all processes, but not on the other rows; the global random state is not touched. `bar` shows
    progress on the main process, None only if that writes to a terminal.
    """
    if n < 1 or not len(prompts):
        raise ValueError(f"n={n} and the number of prompts, {len(prompts)}, must be at least 1")
    total = len(prompts) * n
    seeds = torch.tensor(row_seeds(total, seed=seed, step=step))
    with evaluating(policy):
        cond = {name: x.repeat_interleave(n, 0) for name, x in policy.encode(prompts).items()}
        parts = list(split(cond | {"seeds": seeds}, rows))
        hidden = not process().is_main_process or (None if bar is None else not bar)
        steps = len(parts) * len(policy.family.times)
        with tqdm(desc=f"{total} images", total=steps, disable=hidden, leave=False) as progress:
            parts = [_denoise(policy, progress, **part) for part in parts]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _denoise(policy: Denoiser, progress: Any, seeds: Tensor, **cond: Tensor) -> Batch:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]

    def noise() -> Tensor:  # on the CPU, so that every device draws the same
        drawn = [torch.randn(1, *policy.family.shape, generator=generator) for generator in generators]
        return torch.stack(drawn).to(policy.family.device)

    x, steps = noise(), []
    for time in policy.family.times:
        times = time.expand(len(x), 1)
        mean, std = policy.moments(x, times, **cond)
        new = mean + std * noise()
        logps = policy.denoising.logps(new, Normal(mean, std))
        steps.append((x, new, times, std.flatten(2).any(-1), logps))
        x = new
        progress.update()
    names = ("latents", "next_latents", "timesteps", "mask", "sampler_logps")
    columns = {name: torch.cat(column, 1) for name, column in zip(names, zip(*steps))}
    return columns | {"images": policy.decode(x[:, 0]), **cond}
