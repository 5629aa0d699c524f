"""How answers are drawn: the spec that a sampler and its log-probs share, and the functions behind it.

A policy with temperature and filters is another distribution than its bare model: importance ratios and KL are those of
what was sampled only if the log-probs go through the same temperature and filters. So a policy carries one `Sampling`,
from which `hf.sample` draws and under which `policy(ids, mask)` scores.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from alignkit.masking import promote

BLOCK = 128


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn, token by token. Raises ValueError for a number out of range."""

    max_new: int = 64
    """Tokens of an answer, at most."""
    temperature: float = 1.0
    """By which logits are divided."""
    top_k: int = 0
    """Only this many likeliest tokens; 0 for all."""
    top_p: float = 1.0
    """Only the likeliest tokens that together have at least this probability."""
    min_p: float = 0.0
    """Only tokens with at least this share of the likeliest one's probability."""
    stop: tuple[str, ...] = ()
    """Strings that end an answer once they stand in it."""
    server: str = ""
    """URL of an OpenAI-compatible server that samples; empty: this process does."""

    def __post_init__(self) -> None:
        limits = {
            "max_new": (self.max_new >= 1, "at least 1"),
            "temperature": (self.temperature > 0, "positive; for the likeliest answer sample with greedy=True"),
            "top_k": (self.top_k >= 0, "at least 1, or 0 for all tokens"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "min_p": (0 <= self.min_p <= 1, "in [0, 1]"),
            "stop": (not isinstance(self.stop, str) and all(self.stop), "a tuple of strings, none of them empty"),
        }
        for name, (holds, what) in limits.items():
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)!r} must be {what}")

    @property
    def filters(self) -> dict[str, Any]:
        """The keywords of `filter_logits`."""
        return {name: getattr(self, name) for name in ("temperature", "top_k", "top_p", "min_p")}

    @property
    def is_filtered(self) -> bool:
        """Whether some tokens cannot be drawn."""
        return self.filters | {"temperature": 1.0} != Sampling().filters

    @property
    def is_plain(self) -> bool:
        """Whether what is sampled is the model's own distribution."""
        return self.filters == Sampling().filters


def filter_logits(
    logits: Float[Tensor, "*batch vocab"],
    *,
    temperature: float | Tensor = 1.0,
    top_k: int = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
) -> Float[Tensor, "*batch vocab"]:
    """logits / temperature where a token may be drawn, -inf elsewhere: `log_softmax` of it is what is sampled.

    In this order, each among the tokens that the one before left: the `top_k` likeliest; the fewest likeliest whose
    probability is at least `top_p` (nucleus sampling, Holtzman et al. 2020, arXiv:1904.09751); those with at least
    `min_p` times the probability of the likeliest (Nguyen et al. 2024, arXiv:2407.01082). Ties with the last one stay,
    so equal tokens are treated equally, and the likeliest always stays.

    Elsewhere: the same order in transformers; vLLM applies min_p first, to all tokens.
    """
    logits = promote(logits) / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = _at_least(logits, logits.topk(top_k).values[..., -1:])
    if isinstance(top_p, Tensor) or top_p < 1:
        ordered = logits.sort(-1, descending=True).values
        probs = ordered.softmax(-1)
        inside = probs.cumsum(-1) - probs < top_p  # what comes before the token is not enough
        logits = _at_least(logits, torch.where(inside, ordered, torch.inf).amin(-1, keepdim=True))
    if isinstance(min_p, Tensor) or min_p > 0:
        logits = _at_least(logits, logits.amax(-1, keepdim=True) + torch.as_tensor(min_p).log().to(logits))
    return logits


def draw(logits: Float[Tensor, "*batch vocab"], uniform: Float[Tensor, "*batch"]) -> Int[Tensor, "*batch"]:
    """`invert` of the softmax of `logits`."""
    return invert(promote(logits).softmax(-1), uniform)


def invert(probs: Float[Tensor, "*batch vocab"], uniform: Float[Tensor, "*batch"]) -> Int[Tensor, "*batch"]:
    """The token at which the sum of `probs` passes `uniform`, numbers in [0, 1), of their whole: one sample per row.

    Inversion sampling: a row's sample depends on nothing but its own probabilities and number, whatever else is in the
    batch. What is cumulated in float64 are the sums of blocks of the vocabulary, and then the tokens of one block.
    """
    probs = promote(probs)
    kind = torch.float32 if probs.device.type == "mps" else torch.float64
    short = -probs.shape[-1] % BLOCK
    blocks = (pad(probs, (0, short)) if short else probs).unflatten(-1, (-1, BLOCK))
    sums = blocks.sum(-1).to(kind).cumsum(-1)
    block, rest = _pass(sums, uniform[..., None].to(kind) * sums[..., -1:])
    tokens = blocks.gather(-2, block[..., None].expand(*block.shape, BLOCK))[..., 0, :]
    token, _ = _pass(tokens.to(kind).cumsum(-1), rest)
    return (block * BLOCK + token)[..., 0]


def _pass(cumulative: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The first place where `cumulative` is above `target`, and what of `target` is left of it there."""
    last = (cumulative < cumulative[..., -1:]).sum(-1, keepdim=True)  # rounding goes no further
    place = torch.minimum((cumulative <= target).sum(-1, keepdim=True), last)
    return place, target - pad(cumulative, (1, 0)).gather(-1, place)


def _at_least(logits: Tensor, bound: Tensor) -> Tensor:
    return torch.where(logits >= bound, logits, -torch.inf)
