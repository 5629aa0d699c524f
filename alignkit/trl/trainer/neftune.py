"""NEFTune: uniform noise of alpha / sqrt(length * width) on the embeddings while training.

Jain et al. 2023, arXiv:2310.05914. The Trainer registers the hook for a run and removes it after one that succeeds.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.integrations.neftune import activate_neftune, neftune_post_forward_hook

__all__ = ["activate", "neftune_post_forward_hook", "removed_after"]


def activate(trainer: Any, model: Any) -> Any:
    """Add the noise outside of a run, to look at it; `trainer.neftune_hook_handle.remove()` takes it away."""
    trainer.neftune_hook_handle = activate_neftune(model, trainer.neftune_noise_alpha, trainer.accelerator)
    return model


@contextmanager
def removed_after(trainer: Any) -> Iterator[None]:
    """Leave no noise in the trainer's model, also where the run inside raises."""
    try:
        yield
    finally:
        if trainer.neftune_noise_alpha is not None and hasattr(trainer, "neftune_hook_handle"):
            trainer.neftune_hook_handle.remove()
            for module in trainer.model.modules():
                vars(module).pop("neftune_noise_alpha", None)
