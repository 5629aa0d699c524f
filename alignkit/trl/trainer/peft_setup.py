"""A model from its name, and the adapter to train on it."""

import warnings
from collections.abc import Mapping
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM

from alignkit.hf.loading import quiet_peft
from alignkit.trl.models.checkpoints import reading


def load(
    name: str,
    init_kwargs: Mapping[str, Any] | None = None,
    auto: Any = AutoModelForCausalLM,
    argument: str = "model",
) -> Any:
    """`auto.from_pretrained(name)` with `init_kwargs`, which may have the names of transformers 4.37.

    These are `torch_dtype`, a dtype or its name, and `use_flash_attention_2`. Without a dtype weights are float32.
    """
    kwargs = dict(init_kwargs or {})
    dtype = kwargs.pop("torch_dtype", None)
    kwargs["dtype"] = kwargs.get("dtype") or dtype or "float32"
    if kwargs.pop("use_flash_attention_2", False):
        kwargs.setdefault("attn_implementation", "flash_attention_2")
    with reading(argument, name):
        return auto.from_pretrained(name, **kwargs)


def wrap(model: Any, peft_config: Any, args: Any = None) -> Any:
    """`model` with a new adapter whose weights are float32, or `model` itself if `peft_config` is None.

    A quantised model is prepared for training first. Where `args` ask for gradient checkpointing, the embeddings'
    output requires grad, without which frozen weights below the adapter would cut the graph; the Trainer switches
    checkpointing itself on. A model that is a `PeftModel` already keeps the adapter it has, with a warning. Raises
    ValueError if `peft_config` is not a `PeftConfig`.
    """
    if peft_config is None:
        return model
    if not isinstance(peft_config, PeftConfig):
        raise ValueError(f"peft_config is a {type(peft_config).__name__}, but must be a peft.PeftConfig")
    if isinstance(model, PeftModel):
        warnings.warn("The model is a PeftModel already: it keeps its adapter, peft_config is not used.", stacklevel=3)
        return model
    if any(getattr(model, name, False) for name in ("is_loaded_in_8bit", "is_loaded_in_4bit", "is_quantized")):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if getattr(args, "gradient_checkpointing", False):
        _require_input_grads(model)
    with quiet_peft():
        return get_peft_model(model, peft_config)


def _require_input_grads(model: Any) -> None:
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
    else:
        model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_(True))
