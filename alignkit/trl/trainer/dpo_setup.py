"""What `DPOTrainer` makes of its arguments."""

import warnings
from numbers import Real
from typing import Any, NamedTuple

from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from alignkit.trl.trainer.checks import check_tokens, one_tokenizer
from alignkit.trl.trainer.dpo_collator import DPODataCollatorWithPadding
from alignkit.trl.trainer.dpo_losses import known
from alignkit.trl.trainer.dpo_reference import disable_dropout_in_model
from alignkit.trl.trainer.peft_setup import load, wrap


def models(
    model: Any,
    ref_model: Any,
    init_kwargs: tuple[dict[str, Any] | None, dict[str, Any] | None],
    peft_config: Any,
    is_encoder_decoder: bool | None,
) -> tuple[Any, Any]:
    """`model` and `ref_model`, loaded where they are names; ValueError where arguments do not go together."""
    if not isinstance(ref_model, str | None) and model is ref_model:
        raise ValueError("model and ref_model are one object, which would be compared with itself: leave ref_model out")
    if ref_model is not None and peft_config is not None:
        raise ValueError(
            "ref_model and peft_config were given, but with an adapter the reference is the model without it"
        )
    auto = AutoModelForSeq2SeqLM if is_encoder_decoder else AutoModelForCausalLM
    loaded = []
    for name, given, kwargs in zip(("model", "ref_model"), (model, ref_model), init_kwargs):
        if isinstance(given, str):
            warnings.warn(f"You passed {name}={given!r}: an {auto.__name__} is loaded for you.", stacklevel=3)
            given = load(given, kwargs, auto, name)
        elif kwargs is not None:
            raise ValueError(f"{name}_init_kwargs need the name of a model, but {name} is a {type(given).__name__}")
        if not isinstance(given, nn.Module | None):
            raise TypeError(f"{name} must be a model or its name, but is a {type(given).__name__}")
        loaded.append(given)
    return loaded[0], loaded[1]


def policy(model: Any, args: Any, peft_config: Any, disable_dropout: bool, adapter: str | None) -> Any:
    """The model to train: with a new adapter (one it had is merged), or with that of its adapters made active."""
    if peft_config is not None:
        merged = model.merge_and_unload() if isinstance(model, PeftModel) else model
        model = wrap(merged, peft_config, args)
    elif args.gradient_checkpointing and hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
    if adapter and isinstance(model, PeftModel):
        model.set_adapter(adapter)
    if disable_dropout:
        disable_dropout_in_model(model)
    return model


def check(trainer: Any, ref_model: Any) -> None:
    """Raise ValueError where adapters are named that are not there, or log-probs cannot be precomputed."""
    names = (trainer.model_adapter_name, trainer.ref_adapter_name)
    if any(names) and not trainer.is_peft_model:
        raise ValueError(f"model_adapter_name and ref_adapter_name are {names}, but the model has no adapters")
    if names[1] and ref_model is not None:
        raise ValueError(f"ref_model and ref_adapter_name={names[1]!r} were given, but there is one reference")
    if names[1] and names[1] == (names[0] or "default"):
        raise ValueError(f"ref_adapter_name={names[1]!r} is the adapter that is trained")
    if trainer.precompute_ref_log_probs and is_deepspeed_zero3_enabled():
        raise ValueError("You cannot use precompute_ref_log_probs=True with DeepSpeed ZeRO-3: set it to False.")


class Limits(NamedTuple):
    """The longest sequences, in tokens: prompt and answer together, prompts, and an encoder-decoder's answers."""

    max_length: int
    max_prompt_length: int
    max_target_length: int | None


def limits(
    max_length: int | None, max_prompt_length: int | None, max_target_length: int | None, is_encoder_decoder: bool
) -> Limits:
    """The limits, with a warning and a default for each that is None; ValueError for one that is not positive."""
    given = {"max_length": max_length, "max_prompt_length": max_prompt_length, "max_target_length": max_target_length}
    defaults = {"max_length": 512, "max_prompt_length": 128}
    for name, default in (defaults | ({"max_target_length": 128} if is_encoder_decoder else {})).items():
        if given[name] is None:
            warnings.warn(f"`{name}` is not set: it is {default}, but you should set it yourself.", stacklevel=3)
            given[name] = default
    for name, length in given.items():
        check_tokens(name, length)
    return Limits(**given)


def tokenizer_of(tokenizer: Any, processing_class: Any) -> Any:
    """The one of both that was given."""
    tokenizer = one_tokenizer(tokenizer, processing_class)
    if tokenizer is None:
        raise ValueError("tokenizer must be specified to tokenize a DPO dataset.")
    return tokenizer


def encoder_decoder(model: Any, is_encoder_decoder: bool | None) -> bool:
    """Whether the model is an encoder and a decoder; ValueError if neither it nor the argument tells."""
    if model is None and is_encoder_decoder is None:
        raise ValueError("When no model is provided, you need to pass the parameter is_encoder_decoder.")
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", is_encoder_decoder))


def check_options(beta: Any, label_smoothing: float, loss_type: str, truncation_mode: str) -> None:
    """Raise ValueError for values that there are not, and warn of a smoothing without effect."""
    if not (isinstance(beta, Real) and beta > 0):
        raise ValueError(f"beta={beta!r} must be a number above 0")
    if truncation_mode not in ("keep_start", "keep_end"):
        raise ValueError(f"Unknown truncation mode: {truncation_mode}. truncation_mode is keep_start or keep_end")
    if not 0 <= label_smoothing <= 0.5:
        raise ValueError(f"label_smoothing={label_smoothing} must be between 0 and 0.5")
    if known(loss_type) != "sigmoid" and label_smoothing > 0:
        warnings.warn(f"loss_type={loss_type!r} does not support label smoothing: it is ignored.", stacklevel=3)


def collator(trainer: Any, args: Any) -> DPODataCollatorWithPadding:
    """The default collator, for which `args` must keep all columns."""
    if args.remove_unused_columns:
        args.remove_unused_columns = False
        warnings.warn("`remove_unused_columns=False` is set for you, as the collator needs them.", stacklevel=3)
    return DPODataCollatorWithPadding(trainer.padding_value, trainer.label_pad_token_id, trainer.is_encoder_decoder)
