"""Answers from a policy, drawn as its `sampling` says."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, StoppingCriteria
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from alignkit import data
from alignkit.hf.data import encode
from alignkit.hf.loading import without_adapter
from alignkit.hf.models import Policy
from alignkit.hf.processes import row_seeds
from alignkit.sampling import draw, filter_logits
from alignkit.train import evaluating, infer
from alignkit.types import Batch


class Answer(NamedTuple):
    """The new tokens, the end of the sequence included; their log-probs under the distribution that was sampled.

    `logps` is None if the sampler told none, `truncated` says that the answer was cut off at the limit.
    """

    ids: list[int]
    logps: list[float] | None
    truncated: bool


def sample(
    policy: Policy,
    tokenizer: Any,
    prompts: Sequence[Any],
    *,
    n: int = 1,
    greedy: bool = False,
    seed: int = 0,
    step: int = 0,
    entropy: bool = False,
) -> Batch:
    """`n` answers to each prompt, as `policy.sampling` says, in `n` consecutive rows.

    Columns: `ids` (prompt and answer, right-padded), `mask` (True on the answer, EOS included), `truncated` (cut off at
    the limit) and, if the sampler tells them, `sampler_logps`; with `entropy`, which a server does not tell, the
    `entropy` in nats of what each token was drawn from. Prompts may be strings, messages, token ids, or rows
    whose column `prompt` is one of these. An answer depends on `seed`, `step`, its row among those of all processes and
    its own log-probs, but not on the other rows; the global random state is not touched.
    """
    if entropy and policy.sampling.server:
        raise ValueError(f"entropy=True, but server={policy.sampling.server!r} tells none: measure it")
    encoded = [encode(tokenizer, prompt) for prompt in prompts]
    seeds = row_seeds(len(encoded) * n, seed=seed, step=step)
    repeated = [ids for ids in encoded for _ in range(n)]
    if not entropy:
        return columns(repeated, answers(policy, tokenizer, encoded, n=n, greedy=greedy, seeds=seeds))
    drawing = _draw(policy, tokenizer, encoded, n=n, greedy=greedy, seeds=seeds, entropy=True)
    b = columns(repeated, drawing.answers())
    b["entropy"] = torch.zeros_like(b["sampler_logps"]).masked_scatter(b["mask"], drawing.entropies().cpu())
    return b


def columns(prompts: Sequence[list[int]], drawn: Sequence[Answer]) -> Batch:
    """One row for each prompt and its answer."""
    rows = []
    for prompt, answer in zip(prompts, drawn):
        mask = [False] * len(prompt) + [True] * len(answer.ids)
        row = {"ids": prompt + answer.ids, "mask": mask, "truncated": answer.truncated}
        if answer.logps is not None:
            row["sampler_logps"] = [0.0] * len(prompt) + answer.logps
        rows.append(row)
    return data.collate(rows)


def answers(
    policy: Policy,
    tokenizer: Any,
    encoded: Sequence[list[int]],
    *,
    n: int = 1,
    greedy: bool = False,
    seeds: Sequence[int],
) -> list[Answer]:
    """`n` answers to each list of token ids, with one seed for each answer.

    Each prompt is encoded once; rows that have ended are taken out of the batch whenever they are half of it. An
    answer ends with an end-of-sequence token of the tokenizer or the model, or with the token that completes a string
    of `sampling.stop`. `greedy` takes the likeliest token instead of drawing one.
    """
    if not policy.sampling.server:
        return _draw(policy, tokenizer, encoded, n=n, greedy=greedy, seeds=seeds).answers()
    from alignkit.hf.server import server_answers

    _check(policy, tokenizer, encoded, n, seeds)
    return server_answers(policy.sampling.server, tokenizer, encoded, policy.sampling, n=n, greedy=greedy, seeds=seeds)


@torch.no_grad()
def _draw(
    policy: Policy,
    tokenizer: Any,
    encoded: Sequence[list[int]],
    *,
    n: int,
    greedy: bool,
    seeds: Sequence[int],
    entropy: bool = False,
) -> "_Drawing":
    """All answers, drawn in this process."""
    _check(policy, tokenizer, encoded, n, seeds)
    base = without_adapter(policy.lm)
    drawing, divisible = _Drawing(policy, tokenizer, _ends(tokenizer, base), greedy, seeds), _has_divisible_cache(base)
    drawing.entropy = torch.zeros_like(drawing.logps) if entropy else None
    longest = max(map(len, encoded))
    ids = torch.tensor([[0] * (longest - len(x)) + x for x in encoded], device=policy.device)
    attention = torch.tensor([[0] * (longest - len(x)) + [1] * len(x) for x in encoded], device=policy.device)
    with evaluating(policy), _generating(base, drawing.config):
        cache = _cache(base) if divisible else None
        if divisible and n > 1 and min(map(len, encoded)) > 1:  # a prompt is read once for its n answers
            options = {"attention_mask": attention[:, :-1], "past_key_values": cache, "max_new_tokens": 1}
            cache = policy.lm.generate(input_ids=ids[:, :-1], **options).past_key_values
            cache.batch_repeat_interleave(n)
        ids, attention = (x.repeat_interleave(n, 0) for x in (ids, attention))
        while True:
            out = policy.lm.generate(
                input_ids=ids,
                attention_mask=attention,
                past_key_values=cache,
                max_new_tokens=policy.sampling.max_new - drawing.drawn,
                logits_processor=[drawing],
                stopping_criteria=[_Ended(drawing, divisible)],
            )
            left = drawing.left()
            if not len(left) or drawing.drawn == policy.sampling.max_new:
                return drawing
            ids, cache = out.sequences[left], out.past_key_values
            attention = torch.nn.functional.pad(attention[left], (0, ids.shape[1] - attention.shape[1]), value=1)
            cache.batch_select_indices(left)


class _Drawing(LogitsProcessor):
    """What was drawn so far; draws the next token of each row that is left, which `generate` then finds likeliest."""

    def __init__(self, policy: Policy, tokenizer: Any, ends: list[int], greedy: bool, seeds: Sequence[int]):
        self.sampling, self.tokenizer, self.greedy, self.device = policy.sampling, tokenizer, greedy, policy.device
        shape = (len(seeds), self.sampling.max_new)
        numbers = (torch.rand(shape[1], generator=torch.Generator().manual_seed(seed)) for seed in seeds)
        self.uniform = torch.stack(list(numbers)).to(self.device)
        self.tokens = torch.zeros(shape, dtype=torch.long, device=self.device)
        self.logps = torch.zeros(shape, device=self.device)
        self.entropy: Tensor | None = None
        self.length = torch.zeros(shape[0], dtype=torch.long, device=self.device)  # 0: has not ended
        self.rows = torch.arange(shape[0], device=self.device)
        self.ends = torch.tensor(ends, device=self.device)
        self.drawn = 0
        self.config = GenerationConfig(max_new_tokens=shape[1], return_dict_in_generate=True)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logps = filter_logits(scores, **self.sampling.filters).log_softmax(-1)
        token = scores.argmax(-1) if self.greedy else draw(logps, self.uniform[self.rows, self.drawn])
        self.tokens[self.rows, self.drawn] = token
        self.logps[self.rows, self.drawn] = logps.gather(-1, token[:, None])[:, 0]
        if self.entropy is not None:
            self.entropy[self.rows, self.drawn] = torch.special.entr(logps.exp()).sum(-1)
        self.drawn += 1
        ended = torch.isin(token, self.ends) | self._stopped()
        self.length[self.rows] = torch.where(ended & (self.length[self.rows] == 0), self.drawn, self.length[self.rows])
        return scores.fill_(-torch.inf).scatter_(-1, token[:, None], 0)

    def _stopped(self) -> Tensor:
        """Whether the newest token completes a stop string; a token has at least one byte."""
        if not self.sampling.stop:
            return torch.zeros_like(self.rows, dtype=torch.bool)
        tail = max(len(x.encode()) for x in self.sampling.stop)
        newest = self.tokens[self.rows, max(self.drawn - tail, 0) : self.drawn].tolist()
        texts = self.tokenizer.batch_decode(newest, skip_special_tokens=False)
        return torch.tensor([any(x in text for x in self.sampling.stop) for text in texts], device=self.device)

    def left(self) -> Tensor:
        """The places, among the rows that were left, of those that are; the others are left out from here on."""
        places = (self.length[self.rows] == 0).nonzero()[:, 0]
        self.rows = self.rows[places]
        return places

    def lengths(self) -> Tensor:
        return torch.where(self.length > 0, self.length, self.drawn)

    def entropies(self) -> Tensor:
        """Those of all tokens of all answers, one after the other."""
        return self.entropy[torch.arange(self.entropy.shape[1], device=self.device) < self.lengths()[:, None]]

    def answers(self) -> list[Answer]:
        ended = (self.length > 0).tolist()
        rows = zip(self.tokens.tolist(), self.logps.tolist(), self.lengths().tolist(), ended)
        return [Answer(ids[:length], logps[:length], not end) for ids, logps, length, end in rows]


class _Ended(StoppingCriteria):
    """Ends the call of `generate` when its rows have ended, or half of them if they can be taken out."""

    def __init__(self, drawing: _Drawing, divisible: bool):
        self.drawing, self.divisible = drawing, divisible

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        ended = self.drawing.length[self.drawing.rows] > 0
        return ended | (2 * ended.sum() >= len(ended)) if self.divisible else ended


class _Layer(DynamicLayer):
    """Keys and values with room for the next ones, so that a token does not copy all those before it."""

    room = 128
    whole: tuple[Tensor, ...] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        start, new = self.get_seq_length(), (key_states, value_states)
        end = start + key_states.shape[-2]
        if self.whole is None or end > self.whole[0].shape[-2]:
            self.whole = tuple(x.new_empty(*x.shape[:2], end + self.room, x.shape[-1]) for x in new)
            if start:
                self.whole[0][..., :start, :], self.whole[1][..., :start, :] = self.keys, self.values
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.whole[0][..., start:end, :], self.whole[1][..., start:end, :] = new
        self.keys, self.values = (x[..., :end, :] for x in self.whole)
        return self.keys, self.values

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.whole = None

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.whole = None


def _cache(lm: Any) -> DynamicCache:
    cache = DynamicCache(config=lm.config.get_text_config(decoder=True))
    cache.layers = [_Layer() if type(x) is DynamicLayer else x for x in cache.layers]
    return cache


def _check(policy: Policy, tokenizer: Any, encoded: Sequence[list[int]], n: int, seeds: Sequence[int]) -> None:
    if not encoded or n < 1:
        raise ValueError(f"prompts has {len(encoded)} rows and n={n}: both must be at least 1")
    if len(seeds) != n * len(encoded):
        raise ValueError(f"seeds has {len(seeds)} entries, but there are n={n} answers to {len(encoded)} prompts")
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer has no eos_token, so answers could never end: set tokenizer.eos_token")
    empty = [i for i, x in enumerate(encoded) if not x]
    if empty:
        raise ValueError(f"prompt {empty[0]} has no tokens: nothing predicts the first token of its answer")
    longest, limit = max(map(len, encoded)), getattr(policy.config, "max_position_embeddings", None)
    if limit is not None and longest + policy.sampling.max_new > limit:
        raise ValueError(
            f"a prompt of {longest} tokens and max_new={policy.sampling.max_new} exceed the model's {limit} positions: "
            "lower max_new, or leave out long prompts"
        )


def _has_divisible_cache(lm: Any) -> bool:
    """Whether rows of its cache can be repeated and taken out; those of recurrent states cannot."""
    if not lm._supports_default_dynamic_cache():
        return False
    layers = DynamicCache(config=lm.config.get_text_config(decoder=True)).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def _ends(tokenizer: Any, lm: Any) -> list[int]:
    own = lm.generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, *([] if own is None else [own] if isinstance(own, int) else own)})


@contextmanager
def _generating(base: Any, config: GenerationConfig) -> Iterator[None]:
    """`config` instead of the model's own, whose penalties and filters would make samples of another distribution."""
    own, base.generation_config = base.generation_config, config
    try:
        yield
    finally:
        base.generation_config = own


def decode(tokenizer: Any, ids: Int[Tensor, "batch time"], mask: Bool[Tensor, "batch time"]) -> list[str]:
    """The text of each row's True tokens, without special tokens."""
    return [tokenizer.decode(row[keep].tolist(), skip_special_tokens=True) for row, keep in zip(ids, mask)]


def check_ratio_is_one(
    policy: Policy,
    tokenizer: Any,
    prompts: Sequence[Any],
    *,
    n: int = 4,
    seed: int = 0,
    tolerance: float = 1e-3,
) -> float:
    """The largest |log pi(token) - log sampler(token)| over `n` answers to each prompt, which is 0 up to rounding.

    Raises ValueError, with the token, where it is above `tolerance`: then the first importance ratio of a policy
    gradient is not 1, as when a sampler has a temperature or filters that `policy.sampling` does not know of, or
    computes in another precision.
    """
    b = sample(policy, tokenizer, prompts, n=n, seed=seed)
    if "sampler_logps" not in b:
        raise ValueError(f"server={policy.sampling.server!r} tells no log-probs of its samples to compare with")
    gaps = (infer(policy, b["ids"], b["mask"]) - b["sampler_logps"]).abs()
    largest, place = gaps.flatten().max(0)
    if largest > tolerance:
        row, time = divmod(place.item(), gaps.shape[-1])
        token = tokenizer.decode(b["ids"][row, time].tolist())
        raise ValueError(
            f"the log-prob of {token!r}, token {time} of the answer {row % n} to prompt {row // n}, is off by "
            f"{largest:.3g}, more than {tolerance:g}: the policy does not score what was sampled"
        )
    return largest.item()
