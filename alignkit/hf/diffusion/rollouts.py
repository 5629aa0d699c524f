"""A rollout: images of the next prompts with their rewards and steps, the same columns on all processes."""

from collections.abc import Sequence
from typing import Any

import torch

from alignkit.hf.data import shuffled
from alignkit.hf.diffusion.models import Denoiser, texts
from alignkit.hf.diffusion.sampling import denoise
from alignkit.hf.processes import gather, process
from alignkit.monitors import zero_variance
from alignkit.train import evaluating, split
from alignkit.types import Batch


def rollout(
    policy: Denoiser,
    prompts: Sequence[Any],
    score: Any,
    state: dict[str, Any] | None = None,
    *,
    n: int,
    size: int,
    rows: int,
    seed: int,
    step: int,
    ref: Denoiser | None = None,
    bar: bool | None = None,
) -> Batch:
    """`size` images, `n` of each of the prompts of this `step`, in the order of their prompts; `rows` at a time.

    Columns: those of `denoise`, whose log-probs are `old_logps` here; `rewards` [size], from `score`
    (`diffusion.image_reward`); `prompt` [size], its place among the prompts; `zero_variance` [size], whether all images
    of the prompt have one reward; `ref_mean` [size, T, ...] and `ref_logps` [size, T] of a `ref`. With the
    `state` of `hf.fit`, which draws them, `images` are no column but go there, with prompts and rewards. `bar` shows
    progress, None only on a terminal.
    """
    world = process().num_processes
    if n < 1 or size < 1 or size % (n * world):
        raise ValueError(f"rollout={size} must be a positive multiple of n={n} times {world} processes")
    places = next(shuffled(range(len(prompts)), batch=size // n, seed=seed, start=step))
    chosen = [prompts[place] for place in places]
    b = denoise(policy, chosen, n=n, rows=rows, seed=seed, step=step, bar=bar)
    b["old_logps"] = b.pop("sampler_logps")
    b["rewards"] = score(b["images"], chosen)
    b["prompt"] = torch.tensor(places, device=b["rewards"].device).repeat_interleave(n)
    b = gather(**b, **(_compared(ref, b, rows) if ref else {}))
    if state is not None:
        state["images"] = b.pop("images"), texts([prompts[place] for place in b["prompt"].tolist()]), b["rewards"]
    return b | {"zero_variance": zero_variance(b["rewards"].view(-1, n)).flatten()}


@torch.no_grad()
def _compared(ref: Denoiser, b: Batch, rows: int) -> Batch:
    """The moments and log-probs of the steps under the reference, step by step as they were sampled."""
    parts = []
    with evaluating(ref):
        for part in split({name: x for name, x in b.items() if name in COLUMNS or name.startswith("cond_")}, rows):
            steps = [part.pop(name).split(1, dim=1) for name in COLUMNS]
            moments = [ref.moments(x, times, **part) for x, _, times in zip(*steps)]
            logps = [ref.denoising.logps(new, normal) for new, normal in zip(steps[1], moments)]
            parts.append((torch.cat([normal.mean for normal in moments], 1), torch.cat(logps, 1)))
    return {name: torch.cat(column) for name, column in zip(("ref_mean", "ref_logps"), zip(*parts))}


COLUMNS = ("latents", "next_latents", "timesteps")
