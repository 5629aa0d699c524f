"""The last layer of a Hugging Face language model as a `heads.Head`, where its logits are no more than that."""

from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from transformers.utils import logging

from alignkit.heads import Head
from alignkit.hf.loading import without_adapter
from alignkit.train import evaluating

logger = logging.get_logger(__name__)


def last_layer(lm: Any) -> Head | None:
    """The head that makes the logits of the last hidden state; None if they are more than one.

    A linear layer, tied or not, with a plain LoRA adapter or none, whose logits may be scaled (Cohere, Granite) or
    capped (Gemma). Whether it is exact is tried on a few tokens, once for each model.
    """
    base = without_adapter(lm)
    if "_alignkit_head" not in vars(lm):  # not of the model within an adapter
        lm._alignkit_head = _is_exact(lm, base)
    return _head(base) if vars(lm)["_alignkit_head"] else None


def _head(base: Any) -> Head | None:
    layer, config = base.get_output_embeddings(), base.config.get_text_config(decoder=True)
    weight, bias = _weight(layer)
    if weight is None:
        return None
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    return Head(weight, bias, scale, getattr(config, "final_logit_softcapping", None))


def _weight(layer: Any) -> tuple[Any, Any]:
    """Weight and bias of a linear layer, with its adapters' share."""
    if type(layer) is nn.Linear:
        return layer.weight, layer.bias
    if type(layer) is not LoraLinear or type(layer.base_layer) is not nn.Linear or layer.merged:
        return None, None
    active = [] if layer.disable_adapters else [name for name in layer.active_adapters if name in layer.lora_A]
    weight, bias = layer.base_layer.weight, layer.base_layer.bias
    for name in active:
        drops = getattr(layer.lora_dropout[name], "p", 0) > 0
        mixed = layer.lora_A[name].weight.dtype != weight.dtype
        if drops or mixed or layer.lora_variant.get(name) or layer.lora_bias.get(name):
            return None, None
        weight = weight + layer.get_delta_weight(name)
    return weight, bias


@torch.no_grad()
def _is_exact(lm: Any, base: Any) -> bool:
    """Whether logits of a few tokens are those of the head; of a mere linear layer to the last bit."""
    head = _head(base)
    if head is None or base.base_model is base.get_output_embeddings():
        return _told(base)
    ids = torch.arange(4, device=head.weight.device)[None] % head.weight.shape[0]
    with evaluating(lm):
        logits = lm(input_ids=ids, use_cache=False).logits
        own = head.logits(base.base_model(input_ids=ids, use_cache=False)[0])
    if own.shape != logits.shape:
        return _told(base)
    plain = head.scale == 1 and head.softcap is None and type(base.get_output_embeddings()) is nn.Linear
    gap = (own - logits).abs().max()
    return bool(gap == 0 if plain else gap <= 10 * torch.finfo(logits.dtype).eps * logits.abs().max()) or _told(base)


def _told(base: Any) -> bool:
    logger.warning_once(f"{type(base).__name__} does more to its logits than a head that is known: computed in full")
    return False
