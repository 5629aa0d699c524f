"""Checks of the arguments of `PPOTrainer`, and what it makes of them."""

import warnings
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration
from accelerate.utils.deepspeed import DummyOptim
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedTokenizerBase

from alignkit.trl.models.modeling_base import PreTrainedModelWrapper, create_reference_model
from alignkit.trl.trainer.ppo_config import PPOConfig


def check_arguments(
    config: Any, model: Any, ref_model: Any, tokenizer: Any, dataset: Any, optimizer: Any, lr_scheduler: Any
) -> None:
    """Raise ValueError for an argument of another type than the documented one."""
    data = (torch.utils.data.Dataset, datasets.Dataset)
    table: list[tuple[str, Any, tuple[type, ...], bool]] = [
        ("config", config, (PPOConfig,), True),
        ("tokenizer", tokenizer, (PreTrainedTokenizerBase,), True),
        ("model", model, (PreTrainedModelWrapper,), True),
        ("ref_model", ref_model, (PreTrainedModelWrapper,), False),
        ("dataset", dataset, data, False),
        ("optimizer", optimizer, (torch.optim.Optimizer, DummyOptim), False),
        ("lr_scheduler", lr_scheduler, (LRScheduler,), False),
    ]
    for name, value, kinds, needed in table:
        if not isinstance(value, kinds) and (needed or value is not None):
            wanted = " or ".join([f"{kind.__module__}.{kind.__name__}" for kind in kinds] + ["None"] * (not needed))
            raise ValueError(f"{name} must be of type {wanted}, got {type(value)}")
    if config.push_to_hub_if_best_kwargs and "repo_id" not in config.push_to_hub_if_best_kwargs:
        raise ValueError("You have to specify repo_id in order to push the model to the hub!")


def make_accelerator(config: Any) -> Accelerator:
    """The accelerator of `config`, whose `accelerator_kwargs` have the last word."""
    # otherwise the last batch of the data loader would be trained on without accumulation
    plugin = GradientAccumulationPlugin(num_steps=config.gradient_accumulation_steps, sync_with_dataloader=False)
    arguments = {
        "log_with": config.log_with,
        "project_config": ProjectConfiguration(**config.project_kwargs),
        "gradient_accumulation_plugin": plugin,
        "step_scheduler_with_optimizer": False,  # the scheduler advances with `step`, whatever the number of processes
    }
    return Accelerator(**(arguments | config.accelerator_kwargs))


def make_reference(model: Any, ref_model: Any, num_shared_layers: int | None) -> Any:
    """The reference model, or None where it is the model without its adapters."""
    if num_shared_layers is not None and (ref_model is not None or model.is_peft_model):
        warnings.warn(
            "num_shared_layers is ignored, as no copy of the model is made: there is a ref_model, or the reference is "
            "the model without its adapters",
            stacklevel=3,
        )
    if model.is_peft_model:
        if ref_model is not None:
            warnings.warn(
                "ref_model is ignored: the reference of a model with adapters is itself without them", stacklevel=3
            )
        return None
    return create_reference_model(model, num_shared_layers=num_shared_layers) if ref_model is None else ref_model


def warn_without_dataset(num_processes: int) -> None:
    """Warn that the batches are the caller's affair."""
    warnings.warn(
        "No dataset is provided. Make sure to set config.batch_size to the correct value before training.", stacklevel=3
    )
    if num_processes > 1:
        warnings.warn(
            "No dataset is provided, and there are several processes: share your batches among them yourself, by "
            "`dataloader = trainer.accelerator.prepare(dataloader)`",
            stacklevel=3,
        )


def make_optimizer(model: Any, device: torch.device, lr: float) -> torch.optim.Optimizer:
    """Adam of the parameters that are trained; fused, so that a step can be called off without asking the device."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.Adam(trained, lr=lr, fused=device.type in ("cpu", "cuda", "mps", "xpu"))
