"""Images with gradient: noise goes in, and rewards of what comes out are differentiated through the denoising steps."""

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from alignkit.diffusion import unrolled
from alignkit.hf.diffusion.models import Denoiser
from alignkit.hf.processes import row_seeds
from alignkit.types import Batch


class Unrolled(Denoiser):
    """A denoiser whose call is the images that it draws, with gradient: `unrolled(before, noise, **cond)`.

    `Unrolled(policy.net, policy.family)` shares the network of `policy`.
    """

    def forward(
        self,
        before: Float[Tensor, "rows constant channels height width"],
        noise: Float[Tensor, "rows truncation channels height width"],
        **cond: Tensor,
    ) -> Float[Tensor, "rows 3 *pixels"]:
        """Images in [0, 1] of the columns of `draw`: `diffusion.unrolled`, differentiated in the steps of `noise`.

        `before` is what an image starts from and the noise of earlier steps. If all are fewer than those of
        `denoising`, the last step predicts the image (ReFL). Each step is computed anew in the backward pass, unless it
        is the only one. Gradients pass through the VAE; a pixel beyond [0, 1] has none. Raises ValueError for more
        steps than those of `denoising`, or none.
        """
        start, *noises = torch.cat([before, noise], 1).unbind(1)
        steps, truncation = len(noises), noise.shape[1]
        stops = steps < len(self.family.times)
        if not 1 <= truncation <= steps <= len(self.family.times):
            raise ValueError(
                f"before has {before.shape[1]} samples of noise and noise {truncation}: each must have at least 1, "
                f"both at most {len(self.family.times) + 1}, as there are {len(self.family.times)} steps"
            )

        def step(x: Tensor, i: int) -> Tensor:
            taken = partial(self._step, time=self.family.times[i], **cond)
            noise = None if stops and i == steps - 1 else noises[i]
            out: Tensor = taken(x, noise) if truncation == 1 else checkpoint(taken, x, noise, use_reentrant=False)
            return out

        return self.family.images(unrolled(step, start, steps, truncation=truncation))

    def draw(self, rows: int, *, steps: int, truncation: int, seed: int, step: int) -> Batch:
        """`before` and `noise` of `rows` images with so many steps, and a `mask` of them [rows, 1], True.

        They are what `denoise` draws for this `seed` and `step`: a row depends on its place among those of all
        processes alone, and `truncation` says where they are cut in two. Raises ValueError unless it is 1 to
        `steps`.
        """
        if not 1 <= truncation <= steps:
            raise ValueError(f"truncation={truncation} must be at least 1, and at most steps={steps}")
        parts = []
        for own in row_seeds(rows, seed=seed, step=step):
            generator = torch.Generator().manual_seed(own)
            drawn = [torch.randn(1, *self.family.shape, generator=generator) for _ in range(steps + 1)]
            parts.append(torch.cat(drawn))
        drawn = torch.stack(parts).to(self.family.device)
        before, noise = drawn.split([steps + 1 - truncation, truncation], 1)
        return {"before": before, "noise": noise, "mask": torch.ones(rows, 1, dtype=torch.bool, device=drawn.device)}

    def _step(self, x: Tensor, noise: Tensor | None, *, time: Tensor, **cond: Tensor) -> Tensor:
        """The latents one step on, or without noise those of the image that is predicted."""
        x, times, cond = self._flat(x[:, None], time.expand(len(x), 1), cond)
        output = self._guided(x, times, cond)
        if noise is None:
            return self.family.original(x, output, times)
        mean, std = self.family.step(x, output, times)
        return mean + std * noise
