"""Answers from a policy, drawn as its `sampling` says."""

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from alignkit import data
from alignkit.hf.data import encode
from alignkit.hf.loading import without_adapter
from alignkit.hf.models import Policy
from alignkit.hf.processes import row_seeds
from alignkit.sampling import filter_logits, invert
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
    """All answers, drawn in this process: each prompt is read once, then the newest token of every row."""
    _check(policy, tokenizer, encoded, n, seeds)
    drawing, reader = _Drawing(policy, tokenizer, greedy, seeds, entropy), _reader(policy.lm)
    longest = max(map(len, encoded))
    ids = torch.tensor([[0] * (longest - len(x)) + x for x in encoded], device=policy.device)
    real = torch.tensor([[0] * (longest - len(x)) + [1] * len(x) for x in encoded], device=policy.device)
    rows = torch.arange(len(encoded), device=policy.device).repeat_interleave(n)
    with evaluating(policy):
        logits = reader(ids, real)[rows]
        if n > 1:
            reader.take(rows)
        while True:
            tokens, left = drawing(logits), drawing.left()
            if not len(left) or drawing.drawn == policy.sampling.max_new:
                return drawing
            if len(left) < len(tokens):
                reader.take(left)
                tokens = tokens[left]
            logits = reader(tokens[:, None], torch.ones_like(tokens)[:, None])


class _Rereader:
    """The logits [rows, V] behind the newest tokens, for which all before them are read again."""

    def __init__(self, lm: Any):
        self.lm = lm
        self.ids = self.real = torch.zeros(0, 0, dtype=torch.long, device=lm.device)

    def __call__(self, ids: Tensor, real: Tensor) -> Tensor:
        """`real` is 0 for what pads rows on the left."""
        if self.ids.numel():
            ids, real = torch.cat([self.ids, ids], 1), torch.cat([self.real, real], 1)
        self.ids, self.real = ids, real
        time, lengths = ids.shape[1], real.sum(-1)
        moved = (torch.arange(time, device=ids.device) - lengths[:, None]) % time  # padded on the right
        logits: Tensor = self.lm(input_ids=ids.gather(1, moved), use_cache=False).logits[:, -time:]
        return logits[torch.arange(len(logits), device=ids.device), lengths - 1]

    def take(self, rows: Tensor) -> None:
        """Go on with these, which may be fewer or more."""
        self.ids, self.real = self.ids[rows], self.real[rows]


class _Reader(_Rereader):
    """The same with a cache of what was read."""

    def __init__(self, lm: Any, base: Any):
        super().__init__(lm)
        known = inspect.signature(base.forward).parameters
        self.cache, self.takes_positions = _cache(base), "position_ids" in known
        self.is_recurrent = "cache_params" in known  # then padding matters only where it is read
        self.options = {"cache_params" if self.is_recurrent else "past_key_values": self.cache, "use_cache": True}
        if "logits_to_keep" in known:
            self.options["logits_to_keep"] = 1
        self.padded = False

    def __call__(self, ids: Tensor, real: Tensor) -> Tensor:
        if not self.real.numel():
            self.real, self.padded = real, not real.all()
        else:
            self.real, self.padded = torch.cat([self.real, real], 1), self.padded and not self.is_recurrent
        options = {"attention_mask": self.real if self.padded else None}
        if self.takes_positions:
            options["position_ids"] = (self.real.cumsum(-1) - 1).clamp_(min=0)[:, -ids.shape[1] :]
        logits: Tensor = self.lm(input_ids=ids, **options, **self.options).logits
        return logits[:, -1]

    def take(self, rows: Tensor) -> None:
        self.cache.reorder_cache(rows)
        self.real = self.real[rows]


def _reader(lm: Any) -> _Rereader:
    """The one for the model: virtual tokens, and caches of a model's own kind, do not go with a cache of rows."""
    base = without_adapter(lm)
    virtual = isinstance(lm, PeftModel) and lm.active_peft_config.is_prompt_learning
    return _Rereader(lm) if virtual or not base._supports_default_dynamic_cache() else _Reader(lm, base)


class _Drawing:
    """What was drawn so far; draws the next token of each row that is left."""

    def __init__(self, policy: Policy, tokenizer: Any, greedy: bool, seeds: Sequence[int], entropy: bool):
        self.sampling, self.tokenizer, self.greedy, self.device = policy.sampling, tokenizer, greedy, policy.device
        shape = (len(seeds), self.sampling.max_new)
        numbers = (torch.rand(shape[1], generator=torch.Generator().manual_seed(seed)) for seed in seeds)
        self.uniform = torch.stack(list(numbers)).to(self.device)
        self.tokens = torch.zeros(shape, dtype=torch.long, device=self.device)
        self.logps = torch.zeros(shape, device=self.device)
        self.entropy = torch.zeros(shape, device=self.device) if entropy else None
        self.length = torch.zeros(shape[0], dtype=torch.long, device=self.device)  # 0: has not ended
        self.rows = torch.arange(shape[0], device=self.device)
        self.ends = torch.tensor(_ends(tokenizer, without_adapter(policy.lm)), device=self.device)
        self.drawn = 0

    def __call__(self, logits: Tensor) -> Tensor:
        logps = filter_logits(logits, **self.sampling.filters).log_softmax(-1)
        probs = logps.exp()
        token = logits.argmax(-1) if self.greedy else invert(probs, self.uniform[self.rows, self.drawn])
        self.tokens[self.rows, self.drawn] = token
        self.logps[self.rows, self.drawn] = logps.gather(-1, token[:, None])[:, 0].to(self.logps)
        if self.entropy is not None:
            finite = logps.clamp_(min=torch.finfo(logps.dtype).min)
            self.entropy[self.rows, self.drawn] = -torch.linalg.vecdot(probs, finite).to(self.entropy)
        self.drawn += 1
        ended = torch.isin(token, self.ends) | self._stopped()
        self.length[self.rows] = torch.where(ended & (self.length[self.rows] == 0), self.drawn, self.length[self.rows])
        return token

    def _stopped(self) -> Tensor:
        """Whether the newest token completes a stop string; a token has at least one byte."""
        if not self.sampling.stop:
            return torch.zeros_like(self.rows, dtype=torch.bool)
        tail = max(len(x.encode()) for x in self.sampling.stop)
        newest = self.tokens[self.rows, max(self.drawn - tail, 0) : self.drawn].tolist()
        texts = self.tokenizer.batch_decode(newest, skip_special_tokens=False)
        return torch.tensor([any(x in text for x in self.sampling.stop) for text in texts], device=self.device)

    def left(self) -> Tensor:
        """The places of the rows to go on with: once half of them have ended, those that have not.

        An accelerator is asked at every eighth token, as it has to be waited for.
        """
        places = torch.arange(len(self.rows), device=self.device)
        if self.device.type == "cpu" or self.drawn % 8 == 0:
            going = (self.length[self.rows] == 0).nonzero()[:, 0]
            if 2 * len(going) <= len(places):
                self.rows, places = self.rows[going], going
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

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
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


def _ends(tokenizer: Any, lm: Any) -> list[int]:
    own = lm.generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, *([] if own is None else [own] if isinstance(own, int) else own)})


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
