"""State machines as values: `init() -> state`, `update(state, ...) -> state`; the caller holds the state.

No `update` changes its input, and none reads a tensor on the host.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Real, Shaped
from torch import Tensor

from alignkit.masking import promote
from alignkit.types import Stateful


class KLState(NamedTuple):
    """`coef`: the weight of the KL penalty."""

    coef: float | Tensor


def constant_kl(*, coef: float) -> Stateful:
    """A KL coefficient that stays: `update(state, kl, n)` returns `state`."""
    return Stateful(lambda: KLState(coef), lambda state, kl, n: state)


def adaptive_kl(*, coef: float = 0.2, target: float = 6.0, horizon: float = 10_000) -> Stateful:
    """A KL coefficient steered towards `target` nats per sequence.

    `update(state, kl, n)`: coef *= 1 + clip(kl / target - 1, -0.2, 0.2) n / horizon, with `kl` the mean KL of the
    `n` sequences just seen. Ziegler et al. 2019, arXiv:1909.08593 sec. 2.2 (K_beta = 0.1 there is n / horizon).
    """
    if target <= 0 or horizon <= 0:
        raise ValueError(f"target={target} and horizon={horizon} must be positive")

    def update(state: KLState, kl: float | Tensor, n: int) -> KLState:
        error = torch.as_tensor(kl / target - 1, dtype=torch.float64).clamp(-0.2, 0.2)
        return KLState(state.coef * (1 + error * n / horizon))

    return Stateful(lambda: KLState(torch.tensor(coef, dtype=torch.float64)), update)


class Moments(NamedTuple):
    """Number, mean and sum of squared deviations of everything seen; 0-d float64 tensors."""

    n: Tensor
    mean: Tensor
    m2: Tensor

    def std(self, *, correction: int = 1) -> Tensor:
        """Standard deviation; 1 while `n <= correction`, when there is none and scaling must do nothing."""
        var = self.m2 / (self.n - correction).clamp(min=1)
        return torch.where(self.n > correction, var.sqrt(), 1)


def running_moments() -> Stateful:
    """Mean and variance of a stream: `update(state, x)` merges a batch of any shape.

    Chan et al. 1979, "Updating formulae and a pairwise algorithm for computing sample variances".
    """

    def init() -> Moments:
        return Moments(*torch.zeros(3, dtype=torch.float64).unbind())

    def update(state: Moments, x: Real[Tensor, "*shape"]) -> Moments:
        x = x.to(torch.float64)
        n = torch.tensor(float(x.numel()), dtype=torch.float64, device=x.device)
        mean = x.sum() / n.clamp(min=1)
        return merge_moments(state, Moments(n, mean, ((x - mean) ** 2).sum()))

    return Stateful(init, update)


def merge_moments(a: Moments, b: Moments) -> Moments:
    """The moments of two streams together, as if one had seen both (e.g. of two processes)."""
    n = a.n + b.n
    share = b.n / n.clamp(min=1)
    gap = b.mean - a.mean
    return Moments(n, a.mean + gap * share, a.m2 + b.m2 + gap**2 * a.n * share)


def ema(*, decay: float) -> Stateful:
    """Exponential moving average of named tensors, such as a model's parameters (a moving reference).

    `init(params)` copies; `update(state, params)`: state <- decay state + (1 - decay) params. Raises ValueError
    unless 0 <= decay <= 1. TR-DPO's soft update, Gorbatovski et al. 2024, arXiv:2404.09656 (alpha = 1 - decay).
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"decay={decay} must lie in [0, 1]")

    def init(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: x.detach().clone() for name, x in params.items()}

    def update(state: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: decay * x + (1 - decay) * params[name].detach() for name, x in state.items()}

    return Stateful(init, update)


PromptStats: TypeAlias = dict[str, Tensor]
"""Prompt -> its most recent rewards, oldest first."""


def prompt_stats(*, buffer: int) -> Stateful:
    """The last `buffer` rewards of every prompt: `update(state, prompts, rewards)` appends one reward per prompt.

    DDPO's per-prompt normalisation, Black et al. 2024, arXiv:2305.13301 app. D.3; the buffer is that of the authors'
    ddpo-pytorch. See `prompt_normalize`.
    """
    if buffer < 1:
        raise ValueError(f"buffer={buffer} must keep at least 1 reward per prompt")

    def update(state: PromptStats, prompts: Sequence[str], rewards: Real[Tensor, "n"]) -> PromptStats:
        _same_length(prompts, rewards)
        state, rewards = dict(state), promote(rewards)
        for prompt in dict.fromkeys(prompts):
            new = rewards[[p == prompt for p in prompts]]
            state[prompt] = torch.cat([state.get(prompt, new[:0]), new])[-buffer:]
        return state

    return Stateful(dict, update)


def prompt_normalize(
    rewards: Real[Tensor, "n"],
    prompts: Sequence[str],
    state: PromptStats,
    *,
    min_count: int,
    correction: int = 0,
    eps: float = 1e-6,
) -> Float[Tensor, "n"]:
    """(r - mean) / (std + eps) with the statistics of each reward's own prompt.

    A prompt with fewer than `min_count` rewards in `state` takes the statistics of this whole batch. Update the
    state with the batch first. Black et al. 2024, arXiv:2305.13301 app. D.3; the fallback is that of the authors'
    ddpo-pytorch.
    """
    _same_length(prompts, rewards)
    rewards = promote(rewards)
    seen = [state.get(p, rewards[:0]) for p in prompts]
    stats = [_mean_std(x if len(x) >= min_count else rewards, correction) for x in seen]
    mean, std = torch.stack([m for m, _ in stats]), torch.stack([s for _, s in stats])
    return (rewards - mean) / (std + eps)


def _mean_std(x: Shaped[Tensor, "n"], correction: int) -> tuple[Tensor, Tensor]:
    return x.mean(), x.std(correction=correction)


def _same_length(prompts: Sequence[str], rewards: Tensor) -> None:
    if len(prompts) != len(rewards):
        raise ValueError(f"prompts has {len(prompts)} entries and rewards {len(rewards)}: give one reward per prompt")
