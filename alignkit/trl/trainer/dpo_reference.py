"""What the policy is compared with: a second model, the policy without its adapter, or log-probs computed before."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from alignkit.hf.loading import turn_off_dropout as disable_dropout_in_model
from alignkit.train import evaluating
from alignkit.trl.models.modeling_base import create_reference_model

COLUMNS = ("reference_chosen_logps", "reference_rejected_logps")


@contextmanager
def null_ref_context(model: Any, policy_adapter: str | None, ref_adapter: str | None) -> Iterator[None]:
    """Within it a `PeftModel` is the reference: without an adapter, or with `ref_adapter` if that is a name."""
    with nullcontext() if ref_adapter or not hasattr(model, "disable_adapter") else model.disable_adapter():
        if ref_adapter:
            model.set_adapter(ref_adapter)
        try:
            yield
        finally:
            if ref_adapter:
                model.set_adapter(policy_adapter or "default")


def prepared(model: Any, accelerator: Any, *, fsdp: bool) -> Any:
    """A reference model in eval mode, where and as the accelerator computes."""
    model = model.eval()
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is not None and plugin.zero_stage == 3:  # a split model works through an engine alone
        import deepspeed

        return deepspeed.initialize(model=model, config=_inference(plugin.deepspeed_config))[0].eval()
    others = list(accelerator._models)
    model = accelerator.prepare_model(model, evaluation_mode=True)
    accelerator._models[:] = others  # evaluation before training prepares the policy only if nothing is there
    return model.to(accelerator.device) if fsdp else model


def _inference(config: dict[str, Any]) -> dict[str, Any]:
    """What is settled of a configuration of DeepSpeed, without what only training needs."""
    settled = {n: _inference(x) if isinstance(x, dict) else x for n, x in config.items() if x != "auto"}
    return {name: x for name, x in settled.items() if name not in ("optimizer", "scheduler")}


def reference(trainer: Any, ref_model: Any, disable_dropout: bool) -> Any:
    """The reference model: the one given, or a copy of the policy, or None where the policy itself serves."""
    if ref_model is None:
        if trainer.is_peft_model or trainer.precompute_ref_log_probs:
            return None
        ref_model = create_reference_model(trainer.model)
    if disable_dropout:
        disable_dropout_in_model(ref_model)
    return prepared(ref_model, trainer.accelerator, fsdp=trainer.is_fsdp_enabled)


def log_probs(trainer: Any, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Log-probs [B] of chosen and rejected answers under the reference, without gradient.

    Raises ValueError if the policy was the reference, and is no more what it was.
    """
    with torch.no_grad(), trainer.accelerator.autocast():
        if trainer.ref_model is not None:
            return trainer.concatenated_forward(trainer.ref_model, batch)[:2]
        if not trainer.is_peft_model and trainer.state.global_step > 0:
            raise ValueError(
                "the reference log-probs of this dataset were not precomputed, and the policy is no longer what it "
                "was: give the dataset to the constructor, or a ref_model"
            )
        with trainer.null_ref_context(), evaluating(trainer.model):
            return trainer.concatenated_forward(trainer.model, batch)[:2]


def with_log_probs(trainer: Any, dataset: Any, name: str) -> Any:
    """The dataset with the reference's log-probs in `COLUMNS`, if it has none yet; the work is shared by processes."""
    if set(COLUMNS) <= set(dataset.column_names or ()):
        return dataset
    if not hasattr(dataset, "add_column") or not hasattr(dataset, "__len__"):
        raise ValueError(f"precompute_ref_log_probs=True needs datasets of known length, but {name} is a stream")
    args, accelerator = trainer.args, trainer.accelerator
    if trainer.ref_model is None and (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):
        trainer.model.to(accelerator.device)  # where these take it only when training begins
    loader = DataLoader(
        dataset,
        batch_size=args.train_batch_size if name == "train_dataset" else args.eval_batch_size,
        collate_fn=trainer.data_collator,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
    )
    hidden = args.disable_tqdm or not accelerator.is_main_process
    parts = [
        accelerator.gather_for_metrics(trainer.compute_reference_log_probs(batch))
        for batch in tqdm(accelerator.prepare_data_loader(loader), desc=f"{name}: reference", disable=hidden)
    ]
    for column, values in zip(COLUMNS, zip(*parts)):
        dataset = dataset.add_column(column, torch.cat(values).cpu().numpy())
    return dataset
