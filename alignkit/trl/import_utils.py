"""Which optional libraries and devices there are."""

from importlib.util import find_spec

import torch
from accelerate.utils import is_npu_available, is_xpu_available

__all__ = [
    "is_bitsandbytes_available",
    "is_diffusers_available",
    "is_npu_available",
    "is_peft_available",
    "is_rich_available",
    "is_torchvision_available",
    "is_unsloth_available",
    "is_wandb_available",
    "is_xpu_available",
]


def is_bitsandbytes_available() -> bool:
    """Whether bitsandbytes is installed and there is a CUDA device for it."""
    return find_spec("bitsandbytes") is not None and torch.cuda.is_available()


def is_diffusers_available() -> bool:
    """Whether diffusers is installed."""
    return find_spec("diffusers") is not None


def is_peft_available() -> bool:
    """Whether peft is installed."""
    return find_spec("peft") is not None


def is_rich_available() -> bool:
    """Whether rich is installed."""
    return find_spec("rich") is not None


def is_torchvision_available() -> bool:
    """Whether torchvision is installed."""
    return find_spec("torchvision") is not None


def is_unsloth_available() -> bool:
    """Whether unsloth is installed."""
    return find_spec("unsloth") is not None


def is_wandb_available() -> bool:
    """Whether wandb is installed."""
    return find_spec("wandb") is not None
