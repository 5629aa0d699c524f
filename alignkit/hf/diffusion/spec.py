"""How an image is denoised: the spec that a sampler and its log-probs share."""

from dataclasses import dataclass
from math import isfinite
from typing import Annotated

import torch
import tyro
from jaxtyping import Bool, Float
from torch import Tensor

from alignkit.diffusion import Normal, normal_kl, normal_logps


@dataclass(frozen=True)
class Denoising:
    """How an image is denoised, step by step. Raises ValueError for a value out of range."""

    steps: Annotated[int, tyro.conf.arg(name="denoising-steps")] = 10  # --steps are those of training
    """Denoising steps of an image."""
    eta: float = 1.0
    """Of DDIM steps, how random: 1 is DDPM, towards 0 they are deterministic."""
    guidance: float = 5.0
    """Scale of guidance, at most 1 for none; classifier-free unless the network takes the scale as an input."""
    rescale: float = 0.0
    """How much of the conditional output's std the guided one gets back."""
    flow: bool = False
    """Denoise a Stable Diffusion pipeline along a flow, by change of time and scale; others have no choice."""
    noise: float = 0.7
    """Of the steps of a flow, how random."""
    reduce: str = "mean"
    """Log-prob of a step: "sum" over the elements of the latents, or "mean" in nats per element."""
    negative: str = ""
    """Prompt from which classifier-free guidance leads away."""
    resolution: int = 0
    """Pixels of an image's side; 0 for those that the pipeline makes by itself."""

    def logps(self, x: Float[Tensor, "rows steps *shape"], normal: Normal) -> Float[Tensor, "rows steps"]:
        """Log-probs of what steps led to, reduced as `reduce` says; 0 where a step is deterministic."""
        random, normal = _random(normal)
        return torch.where(random, normal_logps(x, normal, dims=x.dim() - 2, reduce=self.reduce), 0)

    def kl(self, normal: Normal, mean: Float[Tensor, "rows steps *shape"]) -> Float[Tensor, "rows steps"]:
        """KL of steps to those of the same std around `mean`, likewise."""
        random, normal = _random(normal)
        kl = normal_kl(normal, normal._replace(mean=mean), dims=mean.dim() - 2, reduce=self.reduce)
        return torch.where(random, kl, 0)

    def share(self, fraction: float) -> int:
        """How many of the steps this fraction of them is; ValueError for none, or more than all."""
        if not 1 <= int(self.steps * fraction) <= self.steps:
            raise ValueError(
                f"fraction={fraction} of {self.steps} denoising steps must be at least one and at most all"
            )
        return int(self.steps * fraction)

    def __post_init__(self) -> None:
        limits = {
            "steps": (self.steps >= 1, "at least 1"),
            "eta": (0 < self.eta <= 1, "in (0, 1]: at 0 a step is deterministic and has no log-prob"),
            "guidance": (isfinite(self.guidance) and self.guidance >= 0, "a finite scale, at most 1 for none"),
            "rescale": (0 <= self.rescale <= 1, "in [0, 1]"),
            "noise": (isfinite(self.noise) and self.noise > 0, "positive: at 0 a step has no log-prob"),
            "reduce": (self.reduce in ("sum", "mean"), '"sum" or "mean"'),
            "resolution": (self.resolution >= 0, "a number of pixels, or 0 for the pipeline's own"),
        }
        for name, (holds, what) in limits.items():
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)!r} must be {what}")


def _random(normal: Normal) -> tuple[Bool[Tensor, "rows steps"], Normal]:
    """Which steps are random, and their moments, where std is 1 for those that are not."""
    random = normal.std > 0
    return random.flatten(2).any(-1), normal._replace(std=torch.where(random, normal.std, 1))
