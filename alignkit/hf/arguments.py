"""The training arguments of a recipe: made, checked, and what they say of a checkpoint."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from alignkit.hf.callbacks import METRICS
from alignkit.hf.processes import process

UNUSED = {
    "label_smoothing_factor": "smoothing is an argument of the loss, e.g. supervised.smoothed_nll(..., smoothing=)",
    "auto_find_batch_size": "choose per_device_train_batch_size yourself; the gradient does not depend on it",
    "label_names": "the loss's arguments name its columns",
    "train_sampling_strategy": "the stream of batches decides the order",
    "dataloader_num_workers": "the stream of batches loads its own rows",
    "dataloader_prefetch_factor": "the stream of batches loads its own rows",
    "dataloader_persistent_workers": "the stream of batches loads its own rows",
    "dataloader_drop_last": "the stream of batches decides what is in a batch",
    "data_seed": "the stream of batches has a seed of its own",
    "eval_accumulation_steps": "evaluation keeps no predictions",
    "bf16_full_eval": "evaluation runs in the precision of training",
    "fp16_full_eval": "evaluation runs in the precision of training",
    "average_tokens_across_devices": "weights are always those of the whole step on all processes",
}
"""Training arguments that could not act here, and what to do instead."""


@dataclass
class Arguments(TrainingArguments):
    """`TrainingArguments` of transformers, and what alignkit adds to them."""

    micro_tokens: int | None = field(
        default=None, metadata={"help": "Tokens of one forward pass at most, in parts of a micro-batch's rows."}
    )


def arguments(
    out: str, *, batch: int, micro: int, lr: float, steps: int, seed: int, rollout: int | None = None, **fields: Any
) -> Arguments:
    """`TrainingArguments` for steps of `batch` rows in micro-batches of `micro` on each process.

    `fields` are any others by name, and win over the defaults chosen here. Raises ValueError if one of them is set by
    an argument of this function, if `batch` is not a multiple of `micro` times the number of processes, or `rollout`,
    the rows that an on-policy stream samples at a time, not one of `batch`.
    """
    world = process().num_processes
    for name, value in {"steps": steps, "lr": lr}.items():
        if value <= 0:
            raise ValueError(f"{name}={value} must be positive")
    if seed < 0:
        raise ValueError(f"seed={seed} must not be negative")
    if "num_train_epochs" in fields:
        raise ValueError("num_train_epochs has no effect here: steps is the number of steps")
    if batch < 1 or micro < 1 or batch % (micro * world):
        raise ValueError(f"batch={batch} must be a positive multiple of micro={micro} times {world} processes")
    if rollout is not None and (rollout < 1 or rollout % batch):
        raise ValueError(f"rollout={rollout} must be a positive multiple of batch={batch}")
    defaults = {
        "report_to": "none",
        "logging_steps": min(10, steps),
        "logging_nan_inf_filter": False,
        "save_steps": max(steps // 4, 1),
        "lr_scheduler_type": "linear",
        "warmup_steps": steps // 10,
        "dataloader_pin_memory": False,
        "ddp_find_unused_parameters": False,
        "use_cpu": process().device.type == "cpu",
        "disable_tqdm": not sys.stderr.isatty(),
    }
    own = {
        "output_dir": ("out", out),
        "per_device_train_batch_size": ("micro", micro),
        "gradient_accumulation_steps": ("batch and micro", batch // (micro * world)),
        "learning_rate": ("lr", lr),
        "max_steps": ("steps", steps),
        "seed": ("seed", seed),
    }
    for name in own.keys() & fields.keys():
        raise ValueError(f"{name} is set by {own[name][0]} here; leave it out")
    args = Arguments(**{name: value for name, (_, value) in own.items()}, **(defaults | fields))
    to_resume(args)  # refuse a folder before anything is loaded
    return args


def check(args: TrainingArguments) -> None:
    """Raise ValueError for a training argument that could not act on a stream of batches."""
    refuse(args, UNUSED)
    tokens = getattr(args, "micro_tokens", None)
    if tokens is not None and tokens < 1:
        raise ValueError(f"micro_tokens={tokens} must be at least 1")
    if tokens is not None and (args.deepspeed or getattr(args, "deepspeed_plugin", None)):
        raise ValueError(f"micro_tokens={tokens} cannot act with deepspeed, which counts micro-batches itself")
    if args.max_steps > 0 and args.num_train_epochs != type(args).__dataclass_fields__["num_train_epochs"].default:
        raise ValueError(f"num_train_epochs has no effect beside max_steps={args.max_steps}; give the number of steps")


def refuse(args: TrainingArguments, unused: Mapping[str, str]) -> None:
    """Raise ValueError, with the reason, for a training argument of `unused` that is not at its default."""
    for name, why in unused.items():
        if getattr(args, name, None) not in (type(args).__dataclass_fields__[name].default, None):
            raise ValueError(f"the training argument {name} has no effect here: {why}")


def to_resume(args: TrainingArguments) -> str | None:
    """The checkpoint to resume, if any; otherwise the output folder must not hold another run."""
    out, wanted = Path(args.output_dir), args.resume_from_checkpoint
    if wanted and str(wanted).lower() != "false":
        found = get_last_checkpoint(str(out)) if str(wanted).lower() in ("last", "true") and out.is_dir() else wanted
        if found is None or not (Path(found) / "trainer_state.json").is_file():
            where = out if str(wanted).lower() in ("last", "true") else wanted
            raise ValueError(f"resume_from_checkpoint={wanted!r}: there is no checkpoint in {where}")
        return str(found)
    exists = (
        process().is_main_process
        and out.is_dir()
        and ((out / METRICS).exists() or get_last_checkpoint(str(out)) is not None)
    )
    if broadcast_object_list([exists])[0]:
        raise ValueError(
            f"{out} holds a run already: continue it with --resume-from-checkpoint last, "
            "choose another folder with --out, or delete it"
        )
    return None
