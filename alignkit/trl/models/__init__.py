"""Models with a value head, references, and chat formats."""

from alignkit.trl.models.modeling_base import PreTrainedModelWrapper, create_reference_model
from alignkit.trl.models.modeling_value_head import (
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
)
from alignkit.trl.models.utils import setup_chat_format

SUPPORTED_ARCHITECTURES = (AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead)

__all__ = [
    "SUPPORTED_ARCHITECTURES",
    "AutoModelForCausalLMWithValueHead",
    "AutoModelForSeq2SeqLMWithValueHead",
    "PreTrainedModelWrapper",
    "create_reference_model",
    "setup_chat_format",
]
