"""What of a Stable Diffusion pipeline is not trained: how it reads prompts, steps, and makes images of latents.

Latents are those of its VAE, [rows, C, H, W], and times those of its scheduler.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from alignkit.diffusion import Normal, add_noise, ddim_step, predicted_original, threshold
from alignkit.hf.diffusion.spec import Denoising
from alignkit.hf.processes import process
from alignkit.masking import promote
from alignkit.types import Batch

try:
    import diffusers
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("diffusion models need diffusers: pip install 'alignkit[diffusion]'") from error


class StableDiffusion:
    """A UNet and DDIM steps.

    A pipeline without a VAE denoises pixels, in [-1, 1]; of k x k pixels a latent is made if it has 3 k^2 channels.
    """

    trained = "unet"
    names = ("cond_prompt",)
    guides_itself = False

    def __init__(self, pipe: Any, denoising: Denoising):
        self.pipe, self.denoising, self.device = pipe, denoising, process().device
        self.config = getattr(pipe, self.trained).config
        self.shape = (self._channels(), *self._sides())
        self._schedule()
        guides = denoising.guidance > 1 and not self.guides_itself
        if not guides and (denoising.negative or denoising.rescale):
            raise ValueError(
                f"negative={denoising.negative!r} and rescale={denoising.rescale} belong to classifier-free guidance: "
                "give a guidance above 1, to a network that does not take it as an input"
            )
        self.negative = self.encode([denoising.negative]) if guides else {}

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Batch:
        """What the network reads of each prompt, as columns."""
        return dict(zip(self.names, self._encode(prompts)))

    def output(self, net: nn.Module, x: Tensor, times: Tensor, cond_prompt: Tensor) -> Tensor:
        """The network's output, without classifier-free guidance."""
        return net(x.to(net.dtype), times, encoder_hidden_states=cond_prompt, return_dict=False)[0]

    def step(self, x: Tensor, output: Tensor, times: Tensor) -> Normal:
        """Mean and std of the latents one step on; std is 0 from time 0 to itself, and where alpha becomes 1."""
        before = times - self._stride
        alpha_prev = torch.where(before < 0, self._last, self._alphas[before.clamp(min=0)])
        alpha, alpha_prev = (x[:, None, None, None] for x in (self._alphas[times], alpha_prev))
        options = {"eta": self.denoising.eta, "prediction": self._prediction, "clip": self._clip}
        return ddim_step(x, output, alpha, alpha_prev, **options)

    def original(self, x: Tensor, output: Tensor, times: Tensor) -> Tensor:
        """The latents of an image as the output predicts them."""
        alpha = self._alphas[times][:, None, None, None]
        original = predicted_original(x, output, alpha, prediction=self._prediction)
        return self._clip(original) if self._clip else original

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Images in [0, 1]."""
        return self.images(x)

    def images(self, x: Tensor) -> Tensor:
        """As `decode`, with gradient."""
        vae = self.pipe.vae
        if vae is None:
            x = nn.functional.pixel_shuffle(x, self._scale())
        else:
            x = x / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0)
            x = vae.decode(x.to(vae.dtype), return_dict=False)[0]
        return (promote(x) / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        """The latents of images in [0, 1], the mean of the VAE's posterior."""
        vae, x = self.pipe.vae, 2 * images - 1
        if vae is None:
            return nn.functional.pixel_unshuffle(x, self._scale())
        x = vae.encode(x.to(vae.dtype)).latent_dist.mode().float()
        return (x - (vae.config.get("shift_factor") or 0)) * vae.config.scaling_factor

    def random_times(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Times to train at: any of the scheduler's training, equally likely; on the generator's device."""
        return torch.randint(len(self._alphas), tuple(shape), generator=generator, device=generator.device)

    def noised(self, original: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """What the network reads of `original` [..., C, H, W] at times [...], be they of the schedule or not."""
        return add_noise(original, noise, self._alphas[times][..., None, None, None])

    def target(self, original: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """What the network should make of `noised`: the noise, the original or v."""
        if self._prediction == "v_prediction":  # sqrt(alpha) noise - sqrt(1 - alpha) original
            return add_noise(noise, -original, self._alphas[times][..., None, None, None])
        return noise if self._prediction == "epsilon" else original

    def pixels(self) -> tuple[int, int]:
        """Height and width of images."""
        height, width = (self._scale() * side for side in self.shape[1:])
        return height, width

    def _scale(self) -> int:
        """Pixels of a latent's side."""
        if self.pipe.vae is not None:
            return int(self.pipe.vae_scale_factor)
        side = math.isqrt(self._channels() // 3)
        if not side or 3 * side**2 != self._channels():
            raise ValueError(f"without a VAE its latents are pixels: 3 k^2 channels, and not {self._channels()}")
        return side

    def _channels(self) -> int:
        if self.config.time_cond_proj_dim is not None or self.config.addition_embed_type is not None:
            raise ValueError("its UNet reads more than prompts, as those of SDXL and LCM do; this is not supported")
        return int(self.config.in_channels)

    def _patch(self) -> int:
        """Latents that make a patch's side."""
        return 1

    def _sides(self) -> tuple[int, int]:
        """Height and width of latents."""
        pixels, scale = self.denoising.resolution, self._scale()
        if pixels % (scale * self._patch()):
            raise ValueError(f"resolution={pixels} must be a multiple of {scale * self._patch()} pixels")
        size = pixels // scale or self._size()
        return (size, size) if isinstance(size, int) else tuple(size)

    def _size(self) -> Any:
        return self.config.sample_size

    def _encode(self, prompts: list[str]) -> Sequence[Tensor]:
        return self.pipe.encode_prompt(prompts, self.device, 1, False)[:1]

    def _schedule(self) -> None:
        given = self.pipe.scheduler
        if not hasattr(given, "alphas_cumprod"):
            raise ValueError(f"DDIM steps need a scheduler with alphas_cumprod, and {type(given).__name__} has none")
        options = {name: given.config.get(name, False) for name in ("clip_sample", "set_alpha_to_one")}
        scheduler = diffusers.DDIMScheduler.from_config(given.config, **options)
        scheduler.set_timesteps(self.denoising.steps)
        if len(scheduler.timesteps) != self.denoising.steps:  # by rounding, if spaced from the end
            raise ValueError(f"steps={self.denoising.steps} of denoising do not divide its schedule: take others")
        config = scheduler.config
        self.times, self._alphas = scheduler.timesteps.to(self.device), scheduler.alphas_cumprod.to(self.device)
        self._last = scheduler.final_alpha_cumprod.to(self.device)
        self._stride, self._prediction = config.num_train_timesteps // self.denoising.steps, config.prediction_type
        if self._prediction not in ("epsilon", "sample", "v_prediction"):
            raise ValueError(f"the scheduler's prediction_type {self._prediction!r} is none that DDIM steps know")
        if self._prediction == "epsilon" and not self._alphas[self.times].all():
            raise ValueError("the scheduler starts without signal (rescale_betas_zero_snr), so noise tells no image")
        self._clip = None
        if config.thresholding:
            self._clip = partial(threshold, ratio=config.dynamic_thresholding_ratio, maximum=config.sample_max_value)
        elif config.clip_sample:
            self._clip = partial(torch.clamp, min=-config.clip_sample_range, max=config.clip_sample_range)
