"""Advantage estimators: time T is the last axis of per-token tensors, group G the last axis of rewards.

A policy gradient that averages over the members of a group (`weights.sequence_sum`) with one of the baselines below
is unbiased for the expected reward where the docstring says so, and for the other objective where it names one. The raw
reward, A = r, needs no function: unbiased, and of the largest variance.
"""

import torch
from jaxtyping import Bool, Float, Int, Real
from torch import Tensor
from torch.nn.functional import pad

from alignkit.masking import masked_mean, masked_sum, masked_var, promote, whiten

BLOCK = 16  # steps of time


def gae(
    rewards: Real[Tensor, "*batch time"],
    values: Float[Tensor, "*batch time"],
    mask: Bool[Tensor, "*batch time"],
    *,
    gamma: float | Tensor,
    lam: float | Tensor,
) -> tuple[Float[Tensor, "*batch time"], Float[Tensor, "*batch time"]]:
    """A_t = d_t + gamma lam A_t', d_t = r_t + gamma V_t' - V_t: (advantages A, returns A + V), 0 where `mask` is False.

    Generalised advantage estimation, where t' is the next True position after t: holes in the mask are stepped over,
    not decayed through, and the row ends after its last True position (V = 0 there). Schulman et al. 2016,
    arXiv:1506.02438 eq. 16. Computed as A = G - V from returns G_t = r_t + gamma ((1 - lam) V_t' + lam G_t'). `gamma`
    and `lam` may be tensors that broadcast against [..., T], and take the dtype of the rest.
    """
    rewards, values = (torch.where(mask, promote(x), 0) for x in (rewards, values))
    kind = torch.promote_types(rewards.dtype, values.dtype)
    gamma, lam = (_of_the_previous(x, mask, kind) for x in (gamma, lam))
    worth = gamma * lam * rewards + gamma * (1 - lam) * values  # to the token before, without what comes later
    later = pad(_scan(worth, _decay(worth, mask, gamma * lam))[..., 1:], (0, 1))
    advantages = torch.where(mask, rewards - values + later, 0)
    return advantages, advantages + values


def discounted_returns(
    rewards: Real[Tensor, "*batch time"], mask: Bool[Tensor, "*batch time"], *, gamma: float | Tensor
) -> Float[Tensor, "*batch time"]:
    """R_t = r_t + gamma R_t' with t' the next True position after t; 0 where `mask` is False.

    `gamma` may be a tensor that broadcasts against [..., T], such as a discount per token. Sutton & Barto 2018,
    eq. 3.9.
    """
    rewards = torch.where(mask, promote(rewards), 0)
    return torch.where(mask, _scan(rewards, _decay(rewards, mask, gamma)), 0)


def next_values(values: Real[Tensor, "*batch time"], mask: Bool[Tensor, "*batch time"]) -> Float[Tensor, "*batch time"]:
    """V_t' with t' the next True position after t; 0 where there is none and where `mask` is False."""
    time = mask.shape[-1]
    here_or_later = torch.where(mask, torch.arange(time, device=mask.device), time).flip(-1).cummin(-1).values.flip(-1)
    later = pad(here_or_later[..., 1:], (0, 1), value=time)
    return torch.where(mask, pad(promote(values), (0, 1)).gather(-1, later), 0)


# per token


def reinforce_plus_plus(
    rewards: Real[Tensor, "*batch time"],
    mask: Bool[Tensor, "*batch time"],
    *,
    gamma: float | Tensor = 1.0,
    correction: int = 1,
    eps: float = 1e-8,
) -> Float[Tensor, "*batch time"]:
    """Whitened over the batch: (R_t - mean(R)) / sqrt(var(R) + eps) with R_t = r_t + gamma R_t'.

    `rewards` hold the KL penalty and the score, as of `shaping.kl_shaped`. REINFORCE++, Hu et al. 2025,
    arXiv:2501.03262.
    """
    return whiten(discounted_returns(rewards, mask, gamma=gamma), mask, correction=correction, eps=eps)


def monte_carlo(
    rewards: Real[Tensor, "*batch group time"], mask: Bool[Tensor, "*batch group time"], *, gamma: float | Tensor
) -> Float[Tensor, "*batch group time"]:
    """R_t - mean of R over all tokens of the group, R_t = r_t + gamma R_t'; 0 where `mask` is False.

    Elsewhere: `MCAdvantage` (torchrl) divides by the standard deviation as well.
    """
    returns = discounted_returns(rewards, mask, gamma=gamma)
    baseline = masked_mean(returns.flatten(-2), mask.flatten(-2), -1)
    return torch.where(mask, returns - baseline[..., None, None], 0)


def optimal_token_baseline(
    rewards: Real[Tensor, "*batch group time"],
    energy: Float[Tensor, "*batch group time"],
    mask: Bool[Tensor, "*batch group time"],
) -> Float[Tensor, "*batch group time"]:
    """R_t - sum_i(W_ti R_ti) / sum_i(W_ti): rewards to go against one baseline per token position of the group.

    W_t is the sum of `energy` up to t, the squared norms of the gradients of the log-probs so far, or
    `logit_gradient_proxy`. Positions count True tokens, so holes do not shift them; where a single member is left
    the baseline is 0. Li et al. 2026, "The Optimal Token Baseline", arXiv:2602.07078.

    Elsewhere: `optimal_token_baseline` (verl), there with the option `handle_zero_tail`, and for several turns
    `tir_optimal_token_baseline`.
    """
    order = torch.argsort((~mask).to(torch.uint8), dim=-1, stable=True)
    counted = mask.gather(-1, order)
    returns = discounted_returns(rewards, mask, gamma=1.0).gather(-1, order)
    weight = promote(energy).gather(-1, order).cumsum(-1)
    weight = torch.where(counted & (counted.sum(-2, keepdim=True) > 1), weight, 0)
    advantages = torch.where(counted, returns - _weighted_mean(returns, weight, -2), 0)
    return advantages.gather(-1, order.argsort(-1))


def logit_gradient_proxy(
    logps: Float[Tensor, "*shape"], sum_squares: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """1 - 2 exp(logps) + sum_squares: the squared norm of the gradient of a token's log-prob in the logits.

    `sum_squares` is the sum over the vocabulary of p_v^2, the exp of `logps.log_sum_sq_probs`; without gradient. Li et
    al. 2026, arXiv:2602.07078.
    """
    return (1 - 2 * promote(logps).exp() + promote(sum_squares)).detach()


def on_policy_distillation(
    logps: Float[Tensor, "*shape"], teacher_logps: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """-(log pi - log teacher): minus the k1 estimate of the reverse KL, per token of the student's own samples.

    Without gradient, as advantages are. Lu and Thinking Machines Lab 2025,
    https://thinkingmachines.ai/blog/on-policy-distillation.
    """
    return (promote(teacher_logps) - promote(logps)).detach()


def entropy_shaped(
    advantages: Real[Tensor, "*shape"],
    entropy: Float[Tensor, "*shape"],
    *,
    alpha: float | Tensor,
    kappa: float | Tensor = 2.0,
) -> Float[Tensor, "*shape"]:
    """A + min(alpha H, |A| / kappa), H without gradient: the bonus never turns the sign of A for kappa > 1.

    `entropy` is that of the policy at each token. Cheng et al. 2025, arXiv:2506.14758.
    """
    advantages = promote(advantages)
    return advantages + torch.minimum(alpha * promote(entropy).detach(), advantages.abs() / kappa)


def turn_level(
    advantages: Real[Tensor, "*batch turns"], turns: Int[Tensor, "*batch time"], mask: Bool[Tensor, "*batch time"]
) -> Float[Tensor, "*batch time"]:
    """A_t = advantages[turns_t]: every token takes the advantage of its turn; 0 where `mask` is False.

    The advantages of turns come from any estimator here with turns for time, such as `gae` with a reward and a value
    per turn, or `group_normalize` with the members of the group last. Zeng et al. 2025, arXiv:2505.11821.
    """
    return torch.where(mask, promote(advantages).gather(-1, torch.where(mask, turns, 0)), 0)


# per member of a group


def group_center(rewards: Real[Tensor, "*batch group"]) -> Float[Tensor, "*batch group"]:
    """r_i - mean(r): Dr. GRPO, Liu et al. 2025, arXiv:2503.20783 sec. 3.2.

    Elsewhere: hierarchical GRPO (prime-rl) is this on the attempts at each proposed problem, [..., problems,
    attempts], and on the proposals of each task, [..., problems].
    """
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


def group_mean_batch_std(
    rewards: Real[Tensor, "*batch group"], *, correction: int = 1, eps: float = 1e-4
) -> Float[Tensor, "*batch group"]:
    """(r_i - mean(r)) / (std(batch) + eps): the mean of the group, the standard deviation of all rewards.

    Lite PPO, Liu et al. 2025, "Tricks or Traps?", arXiv:2508.08221. Raises ValueError for groups of one.

    Elsewhere: `scale_rewards="batch"` (TRL).
    """
    _needs_group(rewards, "group_mean_batch_std")
    rewards = promote(rewards)
    return group_center(rewards) / (rewards.std(correction=correction) + eps)


def reinforce_plus_plus_baseline(
    rewards: Real[Tensor, "*batch group"],
    mask: Bool[Tensor, "*batch group time"],
    *,
    correction: int = 1,
    eps: float = 1e-8,
) -> Float[Tensor, "*batch group time"]:
    """r_i - mean(r) at every token of member i, then whitened over all tokens of the batch.

    So long answers count more in the batch's mean and variance, as in OpenRLHF, verl and NeMo-RL. REINFORCE++ with a
    baseline, Hu et al. 2025, arXiv:2501.03262.
    """
    return whiten(group_center(rewards)[..., None].expand(mask.shape), mask, correction=correction, eps=eps)


def leave_one_out(rewards: Real[Tensor, "*batch group"]) -> Float[Tensor, "*batch group"]:
    """r_i - mean of the other members: RLOO, Kool et al. 2019; Ahmadian et al. 2024, arXiv:2402.14740.

    Equal to G / (G - 1) times `group_center`. Unbiased. Raises ValueError for groups of one, which have no others.
    """
    _needs_group(rewards, "leave_one_out")
    group = rewards.shape[-1]
    return group_center(rewards) * (group / (group - 1))


def leave_one_out_normalize(
    rewards: Real[Tensor, "*batch group"], *, correction: int = 1, eps: float = 1e-6
) -> Float[Tensor, "*batch group"]:
    """(r_i - mean of the others) / (std of the others + eps), undivided where that std is at most eps.

    The deviations are taken from one of the others, so equal rewards have a standard deviation of exactly 0 and the
    result is at most |r_i - mean| / (2 eps) in size. Raises ValueError for groups of fewer than `correction` + 2.

    Elsewhere: `normalize_rewards` with `use_leave_one_out_baseline` (NeMo-RL), undivided only where std is exactly 0.
    """
    group = rewards.shape[-1]
    _needs_group(rewards, "leave_one_out_normalize", correction + 2)
    index = torch.arange(group, device=rewards.device)
    others = (index[:, None] + index[1:]) % group
    relative = promote(rewards)[..., others] - promote(rewards)[..., others[:, :1]]
    var = relative.var(-1, correction=correction)
    std = torch.where(var > eps**2, torch.where(var > eps**2, var, 1).sqrt() + eps, 1)
    return leave_one_out(rewards) / std


def remax(rewards: Real[Tensor, "*shape"], greedy_rewards: Real[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """r - r(greedy): the baseline is the reward of the greedy answer to the same prompt.

    Unbiased. ReMax, Li et al. 2024, arXiv:2310.10505.
    """
    return promote(rewards) - promote(greedy_rewards)


def role_conditioned(
    rewards: Real[Tensor, "*batch"], roles: Int[Tensor, "*batch"], baselines: Float[Tensor, "roles"]
) -> Float[Tensor, "*batch"]:
    """r - baselines[role]: RAE, with a moving average of each role's rewards for its baseline.

    Keep the averages with `controllers.ema_baseline`: unbiased if subtracted before these rewards update them, while
    SPIRAL, Liu et al. 2025, arXiv:2506.24119, subtracts them after.
    """
    return promote(rewards) - promote(baselines)[roles]


def opo(rewards: Real[Tensor, "*batch group"], lengths: Real[Tensor, "*batch group"]) -> Float[Tensor, "*batch group"]:
    """r_i - sum_j(l_j r_j) / sum_j(l_j): the baseline of least variance if gradients' squared norms go as lengths.

    Hao et al. 2025, arXiv:2505.23585. As the baseline holds r_i itself the gradient is biased, unlike that of
    `opo_leave_one_out`; a group of empty answers has the baseline 0.

    Elsewhere: `opo` (verl).
    """
    return promote(rewards) - _weighted_mean(promote(rewards), promote(lengths), -1)


def opo_leave_one_out(
    rewards: Real[Tensor, "*batch group"], lengths: Real[Tensor, "*batch group"]
) -> Float[Tensor, "*batch group"]:
    """r_i - sum_{j != i}(l_j r_j) / sum_{j != i}(l_j): `opo` with the baseline of the other members, unbiased.

    Raises ValueError for groups of one, which have no others.
    """
    _needs_group(rewards, "opo_leave_one_out")
    itself = torch.eye(rewards.shape[-1], dtype=torch.bool, device=rewards.device)
    weight = torch.where(itself, 0, promote(lengths)[..., None, :])
    return promote(rewards) - _weighted_mean(promote(rewards)[..., None, :], weight, -1)[..., 0]


def group_center_by(
    rewards: Real[Tensor, "*batch n"], ids: Int[Tensor, "*batch n"], mask: Bool[Tensor, "*batch n"]
) -> Float[Tensor, "*batch n"]:
    """r_i - mean of r_j with ids_j = ids_i: `group_center` of ragged or nested groups; 0 where `mask` is False.

    All pairs are compared, so memory grows with n^2.
    """
    rewards, same = _same_group(rewards, ids, mask)
    return torch.where(mask, rewards.diagonal(0, -2, -1) - masked_mean(rewards, same, -1), 0)


def group_normalize_by(
    rewards: Real[Tensor, "*batch n"],
    ids: Int[Tensor, "*batch n"],
    mask: Bool[Tensor, "*batch n"],
    *,
    correction: int = 1,
    eps: float = 1e-4,
) -> Float[Tensor, "*batch n"]:
    """(r_i - mean) / (std + eps) over the r_j with ids_j = ids_i; 0 where `mask` is False or a group has one member."""
    var = masked_var(*_same_group(rewards, ids, mask), -1, correction=correction)
    std = torch.where(var > 0, torch.where(var > 0, var, 1).sqrt(), 0)
    return group_center_by(rewards, ids, mask) / (std + eps)


def gigpo(
    rewards: Real[Tensor, "*batch group step"],
    anchors: Int[Tensor, "*batch group step"],
    mask: Bool[Tensor, "*batch group step"],
    *,
    gamma: float | Tensor,
    omega: float | Tensor = 1.0,
    correction: int = 1,
    eps: float = 1e-4,
) -> Float[Tensor, "*batch group step"]:
    """A(episode) + omega A(step): GRPO on episodes, plus GRPO among all steps taken in the same state.

    A(episode) normalises the sum of a member's rewards in its group; A(step) the discounted return from each step on,
    among the steps of the group with the same id of the state in `anchors`. Feng et al. 2025, arXiv:2505.10978.

    Elsewhere: `gigpo` (ROLL, next to step-reinforce).
    """
    episode = group_normalize(masked_sum(rewards, mask, -1), correction=correction, eps=eps)
    returns = discounted_returns(rewards, mask, gamma=gamma)
    flat = (x.flatten(-2) for x in (returns, anchors, mask))
    step = group_normalize_by(*flat, correction=correction, eps=eps).unflatten(-1, mask.shape[-2:])
    return torch.where(mask, episode[..., None] + omega * step, 0)


def gdpo(
    rewards: Real[Tensor, "*batch kinds group"],
    *,
    weights: float | Tensor = 1.0,
    correction: int = 1,
    eps: float = 1e-4,
) -> Float[Tensor, "*batch group"]:
    """A / (std(batch of A) + eps) with A_i = sum_k w_k (r_ki - mean(r_k)) / (std(r_k) + eps) over kinds of reward k.

    `weights` are one per kind. Liu et al. 2026, arXiv:2601.05242.

    Elsewhere: `multi_objective_aggregation="normalize_then_sum"` (TRL).
    """
    z = group_normalize(rewards, correction=correction, eps=eps)
    total = (torch.as_tensor(weights, dtype=z.dtype, device=z.device)[..., None] * z).sum(-2)
    return group_mean_batch_std(total, correction=correction, eps=eps)


def _needs_group(rewards: Tensor, name: str, least: int = 2) -> None:
    if rewards.shape[-1] < least:
        raise ValueError(
            f"rewards has shape {tuple(rewards.shape)}: {name} needs at least {least} per group on the last axis"
        )


def _weighted_mean(x: Tensor, weight: Tensor, dim: int) -> Tensor:
    """Mean of x with weights, 0 where they sum to 0; the axis stays, with size 1."""
    total = weight.sum(dim, keepdim=True)
    return (weight * x).sum(dim, keepdim=True) / torch.where(total > 0, total, 1)


def _same_group(rewards: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """For each i the rewards of all j, [..., n, n], and which of them count and have the id of i."""
    same = (ids[..., :, None] == ids[..., None, :]) & mask[..., :, None] & mask[..., None, :]
    return promote(rewards)[..., None, :].expand(same.shape), same


def _of_the_previous(x: float | Tensor, mask: Tensor, dtype: torch.dtype) -> float | Tensor:
    """At each True position x of the True position before it; what is constant along time stays as it is."""
    if not isinstance(x, Tensor):
        return x
    x = x.to(mask.device, dtype)
    if not x.dim() or x.shape[-1] == 1:
        return x
    return next_values(x.expand(torch.broadcast_shapes(x.shape, mask.shape)).flip(-1), mask.flip(-1)).flip(-1)


def _decay(like: Tensor, mask: Tensor, factor: float | Tensor) -> Tensor:
    """`factor` at True positions, 1 in holes, so that what comes later passes through them unchanged."""
    return torch.where(mask, factor.to(like) if isinstance(factor, Tensor) else factor, like.new_ones(()))


def _scan(x: Tensor, factor: Tensor) -> Tensor:
    """y_t = x_t + factor_t y_{t+1} along the last axis.

    Long rows are cut into blocks of time, which all go backwards together: once for their first elements, which a scan
    over the blocks then joins, and once more from there.
    """
    x, factor = torch.broadcast_tensors(x, factor)
    if x.shape[-1] <= 8 * BLOCK:
        return _doubling_scan(x, factor)
    blocks = (*x.shape[:-1], -(-x.shape[-1] // BLOCK))
    xs, factors = (_steps(z, blocks) for z in (x, factor))
    y, product = xs[0], factors[0]
    for here, decay in zip(xs[1:], factors[1:]):
        y, product = torch.addcmul(here, decay, y), product * decay
    first = _scan(y.reshape(blocks), product.reshape(blocks))
    y, ys = pad(first[..., 1:], (0, 1)).flatten(), []
    for here, decay in zip(xs, factors):
        y = torch.addcmul(here, decay, y)
        ys.append(y)
    return torch.stack(ys[::-1]).T.reshape(*x.shape[:-1], -(-x.shape[-1] // BLOCK) * BLOCK)[..., : x.shape[-1]]


def _steps(x: Tensor, blocks: tuple[int, ...]) -> tuple[Tensor, ...]:
    """The elements of all blocks of the last axis, one step at a time and the last of each block first."""
    padded = pad(x, (0, blocks[-1] * BLOCK - x.shape[-1])).reshape(*blocks, BLOCK)
    return padded.flatten(0, -2).T.contiguous().unbind()[::-1]


def _doubling_scan(x: Tensor, factor: Tensor) -> Tensor:
    """The same with vector operations alone: y_t from the sum over the next 1, 2, 4, ... elements."""
    time, step = x.shape[-1], 1
    while step < time:
        x = torch.cat([torch.addcmul(x[..., :-step], factor[..., : time - step], x[..., step:]), x[..., -step:]], -1)
        factor = factor[..., :-step] * factor[..., step:]
        step *= 2
    return x
