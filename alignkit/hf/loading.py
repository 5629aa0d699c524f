"""Models and tokenizers from folders, hub ids, or built in; adapters put on or merged."""

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

from alignkit.hf import builtin
from alignkit.hf.processes import process

Finish = Callable[[Any, Any], Any]


def open_model(
    model: str | Path,
    *,
    dtype: str,
    lora: int | PeftConfig | None,
    dropout: bool,
    seed: int,
    task_type: str = "CAUSAL_LM",
    finish: Finish | None = None,
) -> tuple[Any, Any]:
    """A Hugging Face model on this process's device and its tokenizer; the arguments are those of `causal_lm`.

    `finish(lm, tokenizer)` makes something else of the causal language model, or classifier, that was read; adapters
    for `task_type` come after it.
    """
    kind = checked(dtype, lora)
    with quiet_peft(), nullcontext() if sys.stderr.isatty() else without_bars():
        lm, tokenizer = _load(str(model), kind, seed, finish)
        if isinstance(lora, int) and lora > 0:
            lora = LoraConfig(r=lora, lora_alpha=2 * lora, target_modules="all-linear", task_type=task_type)
        if lora:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                lm = get_peft_model(lm, lora)
    if not dropout:
        turn_off_dropout(lm)
    return lm.to(process().device), tokenizer


def checked(dtype: str, lora: int | PeftConfig | None) -> torch.dtype:
    """The dtype of that name; ValueError for one that is none of floating point, or a negative rank."""
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise ValueError(f"dtype={dtype!r} is not a floating-point dtype of torch; use e.g. float32 or bfloat16")
    if isinstance(lora, int) and lora < 0:
        raise ValueError(f"lora={lora} must be a rank, or 0 for none")
    return kind


def turn_off_dropout(model: nn.Module) -> None:
    """Set every rate of dropout to 0, those that a layer reads from an attribute included."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def is_no_place(name: str) -> bool:
    """Whether a name is that of a folder that does not exist, rather than a hub id."""
    folder = Path(name)
    looks_local = folder.is_absolute() or name.count("/") > 1 or name.startswith((".", "~", "runs/"))
    return looks_local and not folder.is_dir()


def without_adapter(lm: Any) -> Any:
    """The model that an adapter is wrapped around, or the model itself."""
    return lm.get_base_model() if isinstance(lm, PeftModel) else lm


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Adapters put on without the warning that peft reads an old name of the model's."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        yield


@contextmanager
def without_bars() -> Iterator[None]:
    """Loading and saving without progress bars of their own."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def errors_only() -> Iterator[None]:
    """The logger of transformers says nothing that is less than an error."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _load(name: str, dtype: torch.dtype, seed: int, finish: Finish | None) -> tuple[Any, Any]:
    if name.startswith("builtin:"):
        lm, tokenizer = builtin.tiny(name, dtype, seed)
        return finish(lm, tokenizer) if finish else lm, tokenizer
    folder = Path(name)
    if is_no_place(name):
        raise ValueError(f"model={name!r} is neither a folder that exists, nor a hub id, nor 'builtin:tiny'")
    adapter = folder / "adapter_config.json"
    try:
        if adapter.exists():
            config = json.loads(adapter.read_text())
            scores = config["task_type"] == "SEQ_CLS"
            base, tokenizer = _load(config["base_model_name_or_path"], dtype, seed, finish if scores else None)
            lm = PeftModel.from_pretrained(base, name).merge_and_unload().requires_grad_(True)
        else:
            scores = "ForSequenceClassification" in str(AutoConfig.from_pretrained(name).architectures)
            auto = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
            lm = auto.from_pretrained(name, dtype=dtype)
        if not adapter.exists() or (folder / "tokenizer_config.json").exists():
            tokenizer = AutoTokenizer.from_pretrained(name)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"model={name!r} is no folder that holds a model, nor a hub id within reach: {reason}"
        ) from error
    if scores and not finish:
        raise ValueError(f"model={name!r} is a reward model, but must be a causal language model")
    return finish(lm, tokenizer) if finish else lm, tokenizer
