"""Diffusion models as policies: `denoiser(latents, next_latents, timesteps, **cond) -> logps`."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Real
from peft import PeftModel
from torch import Tensor, nn

from alignkit.diffusion import Normal, guided
from alignkit.hf.diffusion.unet import StableDiffusion
from alignkit.hf.loading import without_bars
from alignkit.hf.processes import process, row_seeds
from alignkit.losses.diffusion import denoising_error
from alignkit.types import Batch


class Denoiser(nn.Module):
    """A denoising network whose call is the log-probs of steps: `denoiser(latents, next_latents, timesteps, **cond)`.

    `denoiser.net` is the network of diffusers (a `PeftModel` if it has an adapter), the one thing that is trained and
    saved in checkpoints. `denoiser.pipe` is the pipeline it belongs to, whose other models are frozen and no part of
    this module, and `denoiser.denoising` the spec of its steps.
    """

    inside = "net"

    def __init__(self, net: Any, family: StableDiffusion):
        super().__init__()
        self.net, self.family = net, family
        self.pipe, self.denoising = family.pipe, family.denoising

    def forward(
        self,
        latents: Float[Tensor, "rows steps *shape"],
        next_latents: Float[Tensor, "rows steps *shape"] | None,
        timesteps: Real[Tensor, "rows steps"],
        **cond: Tensor,
    ) -> Float[Tensor, "rows steps"] | Normal:
        """Log-prob of each step from `latents` to `next_latents`, 0 where the step is deterministic.

        With None as `next_latents` the `moments`, so that they too can be had of a module that wraps this one. `cond`
        are the columns of `encode`, one row of which belongs to all steps of its row.
        """
        normal = self.moments(latents, timesteps, **cond)
        return normal if next_latents is None else self.denoising.logps(next_latents, normal)

    def moments(
        self, latents: Float[Tensor, "rows steps *shape"], timesteps: Real[Tensor, "rows steps"], **cond: Tensor
    ) -> Normal:
        """Mean and std of what each step leads to, under guidance."""
        flat = self._flat(latents, timesteps, cond)
        normal = self.family.step(flat[0], self._guided(*flat), flat[1])
        return Normal(*(x.unflatten(0, timesteps.shape) for x in normal))

    def predict(
        self, latents: Float[Tensor, "rows steps *shape"], timesteps: Real[Tensor, "rows steps"], **cond: Tensor
    ) -> Float[Tensor, "rows steps *shape"]:
        """The network's output as it is, without classifier-free guidance: what training on images compares."""
        x, times, cond = self._flat(latents, timesteps, cond)
        return self.family.output(self.net, x, times, **cond).unflatten(0, timesteps.shape)

    def encode(self, prompts: Sequence[Any]) -> Batch:
        """What the network reads of prompts (strings, or rows with a column `prompt`): columns `cond_*`."""
        return self.family.encode(texts(prompts))

    def decode(self, latents: Float[Tensor, "rows *shape"]) -> Float[Tensor, "rows 3 height width"]:
        """The images of latents, in [0, 1]."""
        return self.family.decode(latents)

    def activation_checkpointing_enable(self, *, every_n_layers: int = 1, offload: bool = False, **_: Any) -> None:
        """As the Trainer asks for it; the network of diffusers decides which blocks it recomputes, and how."""
        if every_n_layers != 1 or offload:
            raise ValueError("a network of diffusers recomputes every block: leave out every_n_layers and offload")
        self.net.enable_gradient_checkpointing()

    gradient_checkpointing_enable = activation_checkpointing_enable  # its name before

    def _guided(self, x: Tensor, times: Tensor, cond: Batch) -> Tensor:
        if not self.family.negative:
            return self.family.output(self.net, x, times, **cond)
        both = {k: torch.cat([c, self.family.negative[k].expand_as(c)]) for k, c in cond.items()}
        output = self.family.output(self.net, x.repeat(2, 1, 1, 1), times.repeat(2), **both)
        return guided(*output.chunk(2), scale=self.denoising.guidance, rescale=self.denoising.rescale)

    def _flat(self, latents: Tensor, timesteps: Tensor, cond: Batch) -> tuple[Tensor, Tensor, Batch]:
        """One row for each step."""
        if set(cond) != set(self.family.names):
            raise TypeError(f"a {type(self.family).__name__} reads {self.family.names}, not {tuple(cond)}")
        steps = timesteps.shape[1]
        return latents.flatten(0, 1), timesteps.flatten(), {k: c.repeat_interleave(steps, 0) for k, c in cond.items()}


class Regressor(Denoiser):
    """A denoiser whose call is its error on noisy latents: `regressor(original, noise, timesteps, **cond)`.

    `Regressor(policy.net, policy.family)` shares the network of `policy`.
    """

    def forward(
        self,
        original: Float[Tensor, "rows k *shape"],
        noise: Float[Tensor, "rows #k *shape"],
        timesteps: Real[Tensor, "rows #k"],
        **cond: Tensor,
    ) -> Float[Tensor, "rows k"]:
        """`denoising_error` of `predict`, without classifier-free guidance, at any times of training.

        The k samples of a row share its prompt, and noise and time if these are [rows, 1, ...]: so do the two images
        of a pair.
        """
        noise, timesteps = noise.expand_as(original), timesteps.expand(original.shape[:2])
        x, target = (make(original, noise, timesteps) for make in (self.family.noised, self.family.target))
        return denoising_error(self.predict(x, timesteps, **cond), target, dims=original.dim() - 2)

    def draw(self, rows: int, *, seed: int, step: int) -> Batch:
        """`noise` [rows, 1, C, H, W] and `timesteps` [rows, 1] to train at in a step, and a `mask` [rows, 1] of True.

        A row depends on `seed`, `step` and its place among the rows of all processes.
        """
        drawn = []
        for own in row_seeds(rows, seed=seed, step=step):
            generator = torch.Generator().manual_seed(own)  # on the CPU: every device draws the same
            times = self.family.random_times((1,), generator)
            drawn.append((torch.randn(1, *self.family.shape, generator=generator), times))
        noise, times = (torch.stack(column).to(self.family.device) for column in zip(*drawn))
        return {"noise": noise, "timesteps": times, "mask": torch.ones_like(times, dtype=torch.bool)}


class AdapterOff(nn.Module):
    """A network with its adapter disabled: that of a reference without a copy of the weights."""

    def __init__(self, net: PeftModel):
        super().__init__()
        self.net = net

    @property
    def dtype(self) -> torch.dtype:
        """As the network's."""
        return self.net.dtype

    def forward(self, *args: Any, **options: Any) -> Any:
        """The base model's output."""
        with self.net.disable_adapter():
            return self.net(*args, **options)


Kind = TypeVar("Kind", bound=Denoiser)


def frozen(denoiser: Kind) -> Kind:
    """What the denoiser is compared with, of its own class.

    It is its base model, if it has an adapter, otherwise a copy as it is now.
    """
    if isinstance(denoiser.net, PeftModel):
        return type(denoiser)(AdapterOff(denoiser.net), denoiser.family)
    return type(denoiser)(copy.deepcopy(denoiser.net), denoiser.family).requires_grad_(False).eval()


def save(denoiser: Denoiser, folder: str | Path) -> None:
    """Write the whole pipeline as a folder of diffusers, or the adapter alone, as a folder of peft that names its base.

    `pipeline(folder)` reads either. The main process writes, the others wait for it.
    """
    if process().is_main_process:
        with without_bars():
            (denoiser.net if isinstance(denoiser.net, PeftModel) else denoiser.pipe).save_pretrained(folder)
    process().wait_for_everyone()


def texts(prompts: Sequence[Any]) -> list[str]:
    """The strings of prompts that are strings, or rows with a column `prompt`; ValueError for any other."""
    found = [prompt.get("prompt") if isinstance(prompt, Mapping) else prompt for prompt in prompts]
    for prompt, text in zip(prompts, found):
        if not isinstance(text, str):
            raise ValueError(f"a prompt must be a string, or a row whose column 'prompt' is one, not {prompt!r:.200}")
    return found
