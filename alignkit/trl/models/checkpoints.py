"""What `from_pretrained` reads: base models, adapters and value heads of folders and of the hub."""

import json
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.utils import load_peft_weights
from safetensors import safe_open
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.utils import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from alignkit.hf.loading import quiet_peft
from alignkit.hf.processes import process

FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


@contextmanager
def reading(argument: str, name: str) -> Iterator[None]:
    """Name the argument in the OSError of what cannot be read."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{argument}={name!r} is no folder that can be loaded, nor an id of the hub: {error}") from error


def load(auto: Any, name: str, is_trainable: bool, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Tensor]]:
    """The model of a folder or hub id, and the `v_head.*` of its checkpoint.

    An adapter (to train: `is_trainable`) is put on the base model that it names. float32 unless `dtype` says otherwise.
    """
    for bits in ("load_in_8bit", "load_in_4bit"):
        if kwargs.pop(bits, False):
            kwargs["quantization_config"] = BitsAndBytesConfig(**{bits: True})
    quantized = kwargs.get("quantization_config") is not None
    if quantized and "device_map" not in kwargs:
        warnings.warn("device_map is not given: the quantized model is put on the current device", stacklevel=3)
        kwargs["device_map"] = {"": process().device}
    kwargs.setdefault("dtype", kwargs.pop("torch_dtype", None) or ("auto" if quantized else torch.float32))
    token = kwargs.get("token")
    adapter = find_adapter_config_file(name, token=token)
    if adapter is None:
        hub = {key: kwargs[key] for key in ("token", "revision", "cache_dir", "subfolder") if key in kwargs}
        return auto.from_pretrained(name, *args, **kwargs), saved_head(name, FILES, **hub)
    base = PeftConfig.from_pretrained(str(Path(adapter).parent)).base_model_name_or_path
    lm = auto.from_pretrained(base, *args, **kwargs)
    with quiet_peft():
        lm = PeftModel.from_pretrained(lm, name, is_trainable=is_trainable, token=token)
    return lm, saved_head(name, FILES, token=token)


def with_adapter(lm: Any, config: PeftConfig | None, kbit_kwargs: dict[str, Any]) -> Any:
    """The model with a new adapter to train, in float32; a model that has one keeps it."""
    if config is None:
        return lm
    if isinstance(lm, PeftModel):
        warnings.warn("peft_config is ignored: the model has an adapter", stacklevel=3)
        return lm
    if getattr(lm, "is_loaded_in_8bit", False) or getattr(lm, "is_loaded_in_4bit", False):
        lm = prepare_model_for_kbit_training(lm, **kbit_kwargs)
    with quiet_peft():
        return get_peft_model(lm, config)


def saved_head(name: str, files: Iterable[str], **hub: Any) -> dict[str, Tensor]:
    """The `v_head.*` in the first of these files that there is."""
    for reason in ("missing_entries", "gated_repo", "connection_errors"):
        hub[f"_raise_exceptions_for_{reason}"] = False
    path = next(filter(None, (cached_file(name, file, **hub) for file in files)), None)
    if path is None:
        return {}
    if path.endswith(".index.json"):
        places = json.loads(Path(path).read_text())["weight_map"]
        shards = {shard for key, shard in places.items() if "v_head." in key}
        return {key: x for shard in shards for key, x in saved_head(name, [shard], **hub).items()}
    if path.endswith(".safetensors"):
        with safe_open(path, "pt") as tensors:
            return {key: tensors.get_tensor(key) for key in tensors.keys() if "v_head." in key}  # noqa: SIM118
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    return {key: x for key, x in tensors.items() if "v_head." in key}


def score_head(adapter: str, names: Iterable[str], **hub: Any) -> nn.Linear:
    """The head, of one of these names, that was saved with the adapter of a reward model; frozen."""
    weights = load_peft_weights(adapter, device="cpu", **hub)
    found = {key.rpartition(".")[2]: x for key, x in weights.items() if set(names) & set(key.split("."))}
    if "weight" not in found:
        raise ValueError(f"reward_adapter={adapter!r} has no head of the name {' or '.join(names)}")
    labels, width = found["weight"].shape
    head = nn.Linear(width, labels, bias="bias" in found)
    head.load_state_dict(found)
    return head.requires_grad_(False)
