"""Advantage estimators: time T is the last axis of per-token tensors, group G the last axis of rewards."""

import torch
from jaxtyping import Bool, Float, Real
from torch import Tensor
from torch.nn.functional import pad

from alignkit.masking import promote


def gae(
    rewards: Real[Tensor, "*batch time"],
    values: Float[Tensor, "*batch time"],
    mask: Bool[Tensor, "*batch time"],
    *,
    gamma: float | Tensor,
    lam: float | Tensor,
) -> tuple[Float[Tensor, "*batch time"], Float[Tensor, "*batch time"]]:
    """Generalised advantage estimation: (advantages, returns), both 0 where `mask` is False.

    A_t = d_t + gamma lam A_t' with d_t = r_t + gamma V_t' - V_t, where t' is the next True position after t: holes in
    the mask are stepped over, not decayed through, and the row ends after its last True position (V = 0 there).
    Returns are A_t + V_t. Schulman et al. 2016, arXiv:1506.02438 eq. 16. A doubling scan of log2(T) vector
    operations; `gamma` and `lam` may be tensors that broadcast against [..., T].
    """
    values = torch.where(mask, promote(values), 0)
    deltas = torch.where(mask, promote(rewards) + gamma * _next(values, mask) - values, 0)
    advantages = torch.where(mask, _scan(deltas, _decay(deltas, mask, gamma * lam)), 0)
    return advantages, advantages + values


def discounted_returns(
    rewards: Real[Tensor, "*batch time"], mask: Bool[Tensor, "*batch time"], *, gamma: float | Tensor
) -> Float[Tensor, "*batch time"]:
    """R_t = r_t + gamma R_t' with t' the next True position after t; 0 where `mask` is False.

    Sutton & Barto 2018, eq. 3.9.
    """
    rewards = torch.where(mask, promote(rewards), 0)
    return torch.where(mask, _scan(rewards, _decay(rewards, mask, gamma)), 0)


def group_center(rewards: Real[Tensor, "*batch group"]) -> Float[Tensor, "*batch group"]:
    """r_i - mean(r): Dr. GRPO, Liu et al. 2025, arXiv:2503.20783 sec. 3.2."""
    rewards = promote(rewards)
    return rewards - rewards.mean(-1, keepdim=True)


def group_normalize(
    rewards: Real[Tensor, "*batch group"], *, correction: int = 1, eps: float = 1e-4
) -> Float[Tensor, "*batch group"]:
    """(r_i - mean(r)) / (std(r) + eps): GRPO, Shao et al. 2024, arXiv:2402.03300 sec. 4.1.2.

    The paper names neither `correction` nor `eps`; peers use 1 and 1e-4 (TRL), 1 and 1e-6 (verl), 0 and 1e-6 (DDPO).
    A constant group gives 0. Raises ValueError for groups of one, which have no standard deviation.
    """
    _needs_group(rewards, "group_normalize")
    rewards = promote(rewards)
    return group_center(rewards) / (rewards.std(-1, correction=correction, keepdim=True) + eps)


def leave_one_out(rewards: Real[Tensor, "*batch group"]) -> Float[Tensor, "*batch group"]:
    """r_i - mean of the other members: RLOO, Kool et al. 2019; Ahmadian et al. 2024, arXiv:2402.14740.

    Equal to G / (G - 1) times `group_center`. Raises ValueError for groups of one, which have no others.
    """
    _needs_group(rewards, "leave_one_out")
    group = rewards.shape[-1]
    return group_center(rewards) * (group / (group - 1))


def _needs_group(rewards: Tensor, name: str) -> None:
    if rewards.shape[-1] < 2:
        raise ValueError(
            f"rewards has shape {tuple(rewards.shape)}: {name} needs at least 2 per group on the last axis"
        )


def _decay(like: Tensor, mask: Tensor, factor: float | Tensor) -> Tensor:
    """`factor` at True positions, 1 in holes, so that what comes later passes through them unchanged."""
    return torch.where(mask, torch.as_tensor(factor, dtype=like.dtype, device=like.device), 1)


def _next(values: Tensor, mask: Tensor) -> Tensor:
    """The value at the next True position after each, 0 where there is none."""
    time = mask.shape[-1]
    here_or_later = torch.where(mask, torch.arange(time, device=mask.device), time).flip(-1).cummin(-1).values.flip(-1)
    return pad(values, (0, 1)).gather(-1, pad(here_or_later[..., 1:], (0, 1), value=time))


def _scan(x: Tensor, factor: Tensor) -> Tensor:
    """y_t = x_t + factor_t y_{t+1} along the last axis, by recursive doubling."""
    time, step = x.shape[-1], 1
    while step < time:
        x = torch.cat([torch.addcmul(x[..., :-step], factor[..., :-step], x[..., step:]), x[..., -step:]], -1)
        factor = torch.cat([factor[..., :-step] * factor[..., step:], torch.zeros_like(factor[..., -step:])], -1)
        step *= 2
    return x
