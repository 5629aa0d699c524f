"""The one floor that imports transformers, datasets, peft and accelerate: models, data, sampling, the training loop."""

from alignkit.hf.builtin import reviews, sentiment
from alignkit.hf.data import pairs, prompts, stream, text
from alignkit.hf.files import load
from alignkit.hf.fit import arguments, fit
from alignkit.hf.models import Policy, causal_lm, frozen, save
from alignkit.hf.sampling import decode, sample

__all__ = [
    "Policy",
    "arguments",
    "causal_lm",
    "decode",
    "fit",
    "frozen",
    "load",
    "pairs",
    "prompts",
    "reviews",
    "sample",
    "save",
    "sentiment",
    "stream",
    "text",
]
