"""The one floor that imports transformers, datasets, peft and accelerate: models, data, sampling, the training loop."""

from alignkit.hf.arguments import arguments
from alignkit.hf.arithmetic import arithmetic, correct
from alignkit.hf.builtin import reviews, sentiment
from alignkit.hf.data import pairs, prompts, shuffled, stream, text
from alignkit.hf.environments import Environment
from alignkit.hf.files import load
from alignkit.hf.fit import fit
from alignkit.hf.models import ActorCritic, Policy, causal_lm, frozen, save
from alignkit.hf.precompute import precompute
from alignkit.hf.processes import gather, on_policy, process, share
from alignkit.hf.rewards import reward_fn
from alignkit.hf.rollouts import rollout
from alignkit.hf.sampling import check_ratio_is_one, decode, sample
from alignkit.hf.scorers import Scorer, reward_model

__all__ = [
    "ActorCritic",
    "Environment",
    "Policy",
    "Scorer",
    "arguments",
    "arithmetic",
    "causal_lm",
    "check_ratio_is_one",
    "correct",
    "decode",
    "fit",
    "frozen",
    "gather",
    "load",
    "on_policy",
    "pairs",
    "precompute",
    "process",
    "prompts",
    "reviews",
    "reward_fn",
    "reward_model",
    "rollout",
    "sample",
    "save",
    "sentiment",
    "share",
    "shuffled",
    "stream",
    "text",
]
