"""Multi-step returns, on and off policy: time T is the last axis, and holes in the mask are stepped over.

Below t' is the next True position after t, and the row ends after its last one: V and Q are 0 there. What a row that
was cut off is still worth goes into its last reward, as gamma V of the state after it. `gamma` and `lam` may be tensors
that broadcast against [..., T]. Ratios are constants: no gradient reaches `logps`, so the advantages may multiply
log-probs in a loss. All results are 0 where `mask` is False.
"""

import torch
from jaxtyping import Bool, Float, Real
from torch import Tensor

from alignkit.advantages import discounted_returns, gae, next_values
from alignkit.masking import finite_exp, lengths, promote


def td_errors(
    rewards: Real[Tensor, "*batch time"],
    values: Float[Tensor, "*batch time"],
    mask: Bool[Tensor, "*batch time"],
    *,
    gamma: float | Tensor,
) -> Float[Tensor, "*batch time"]:
    """r_t + gamma V_t' - V_t: TD(0), Sutton & Barto 2018, eq. 6.5."""
    return torch.where(mask, promote(rewards) + gamma * next_values(values, mask) - promote(values), 0)


def n_step_returns(
    rewards: Real[Tensor, "*batch time"],
    values: Float[Tensor, "*batch time"],
    mask: Bool[Tensor, "*batch time"],
    *,
    gamma: float | Tensor,
    n: int,
) -> Float[Tensor, "*batch time"]:
    """r_t + gamma r_t' + ... + gamma^n V, V at the n-th True position after t: G = V, then n times r + gamma G'.

    Sutton & Barto 2018, eq. 7.1. Raises ValueError for `n` below 1.
    """
    if n < 1:
        raise ValueError(f"n={n} must be at least 1 step")
    returns = values
    for _ in range(min(n, mask.shape[-1])):
        returns = torch.where(mask, promote(rewards) + gamma * next_values(returns, mask), 0)
    return returns


def lambda_returns(
    rewards: Real[Tensor, "*batch time"],
    values: Float[Tensor, "*batch time"],
    mask: Bool[Tensor, "*batch time"],
    *,
    gamma: float | Tensor,
    lam: float | Tensor,
) -> Float[Tensor, "*batch time"]:
    """G_t = r_t + gamma ((1 - lam) V_t' + lam G_t'): the targets of TD(lam), Sutton & Barto 2018, eq. 12.2.

    lam = 0 is TD(0), lam = 1 TD(1), the Monte Carlo returns.
    """
    bootstrapped = promote(rewards) + gamma * (1 - lam) * next_values(values, mask)
    return discounted_returns(bootstrapped, mask, gamma=gamma * lam)


def decoupled_gae(
    rewards: Real[Tensor, "*batch time"],
    values: Float[Tensor, "*batch time"],
    mask: Bool[Tensor, "*batch time"],
    *,
    gamma: float | Tensor,
    lam_policy: float | Tensor,
    lam_value: float | Tensor,
) -> tuple[Float[Tensor, "*batch time"], Float[Tensor, "*batch time"]]:
    """(gae advantages with lam_policy, gae returns with lam_value).

    Yuan et al. 2025, "What's Behind PPO's Collapse in Long-CoT?", arXiv:2503.01491; VAPO, Yue et al. 2025,
    arXiv:2504.05118, takes lam_value = 1 and for lam_policy `length_adaptive_lam`.
    """
    advantages, _ = gae(rewards, values, mask, gamma=gamma, lam=lam_policy)
    return advantages, lambda_returns(rewards, values, mask, gamma=gamma, lam=lam_value)


def length_adaptive_lam(mask: Bool[Tensor, "*batch time"], *, alpha: float | Tensor) -> Float[Tensor, "*batch 1"]:
    """1 - 1 / (alpha L), at least 0, with L the True positions of the row; shaped to be `lam` of `gae`.

    The weights lam^n of a row then sum to about alpha L. VAPO, Yue et al. 2025, arXiv:2504.05118.
    """
    count = lengths(mask).clamp(min=1).to(torch.float32 if mask.device.type == "mps" else torch.float64)
    return (1 - 1 / (alpha * count)).clamp(min=0)[..., None]


def vtrace(
    logps: Float[Tensor, "*batch time"],
    old_logps: Float[Tensor, "*batch time"],
    rewards: Real[Tensor, "*batch time"],
    values: Float[Tensor, "*batch time"],
    mask: Bool[Tensor, "*batch time"],
    *,
    gamma: float | Tensor,
    lam: float | Tensor = 1.0,
    rho_max: float | Tensor = 1.0,
    c_max: float | Tensor = 1.0,
) -> tuple[Float[Tensor, "*batch time"], Float[Tensor, "*batch time"]]:
    """V-trace: (advantages, targets) with v_t = V_t + rho_t (r_t + gamma V_t' - V_t) + gamma c_t (v_t' - V_t').

    Advantages are rho_t (r_t + gamma v_t' - V_t); rho_t = min(rho_max, ratio_t), c_t = lam min(c_max, ratio_t) and
    ratio = exp(logps - old_logps). Espeholt et al. 2018, arXiv:1802.01561 eq. 1 and sec. 4.2; `lam` is their
    remark 2.
    """
    log_ratio = _log_ratio(logps, old_logps, mask)
    rho, c = _truncated(log_ratio, rho_max), lam * _truncated(log_ratio, c_max)
    return _corrected(rho, c, rewards, values, mask, gamma)


def leaky_vtrace(
    logps: Float[Tensor, "*batch time"],
    old_logps: Float[Tensor, "*batch time"],
    rewards: Real[Tensor, "*batch time"],
    values: Float[Tensor, "*batch time"],
    mask: Bool[Tensor, "*batch time"],
    *,
    gamma: float | Tensor,
    alpha: float | Tensor,
    lam: float | Tensor = 1.0,
    rho_max: float | Tensor = 1.0,
    c_max: float | Tensor = 1.0,
) -> tuple[Float[Tensor, "*batch time"], Float[Tensor, "*batch time"]]:
    """`vtrace` with alpha min(max, ratio) + (1 - alpha) ratio for both truncated ratios.

    `alpha` = 0 is importance sampling without truncation. Zahavy et al. 2020, arXiv:2002.12928.
    """
    log_ratio = _log_ratio(logps, old_logps, mask)
    ratio = finite_exp(log_ratio)
    rho, c = (alpha * _truncated(log_ratio, top) + (1 - alpha) * ratio for top in (rho_max, c_max))
    return _corrected(rho, lam * c, rewards, values, mask, gamma)


def off_policy_returns(
    traces: Float[Tensor, "*batch time"],
    rewards: Real[Tensor, "*batch time"],
    q_values: Float[Tensor, "*batch time"],
    values: Float[Tensor, "*batch time"],
    mask: Bool[Tensor, "*batch time"],
    *,
    gamma: float | Tensor,
) -> Float[Tensor, "*batch time"]:
    """G_t = r_t + gamma (V_t' + c_t' (G_t' - Q_t')) with c = traces, Q of the tokens taken, V = E_pi Q.

    Munos et al. 2016, arXiv:1606.02647 eq. 3. Their table of methods is the choice of `traces`: ratio for importance
    sampling, lam for Q^pi(lam), lam pi for tree backup, and lam min(1, ratio) for `retrace`.

    Elsewhere: `general_off_policy_returns_from_action_values` (rlax).
    """
    q_values = torch.where(mask, promote(q_values), 0)
    deltas = promote(rewards) + gamma * next_values(values, mask) - q_values
    return q_values + discounted_returns(deltas, mask, gamma=gamma * next_values(traces, mask))


def retrace(
    logps: Float[Tensor, "*batch time"],
    old_logps: Float[Tensor, "*batch time"],
    rewards: Real[Tensor, "*batch time"],
    q_values: Float[Tensor, "*batch time"],
    values: Float[Tensor, "*batch time"],
    mask: Bool[Tensor, "*batch time"],
    *,
    gamma: float | Tensor,
    lam: float | Tensor,
) -> Float[Tensor, "*batch time"]:
    """Retrace(lam): `off_policy_returns` with traces lam min(1, exp(logps - old_logps)).

    Munos et al. 2016, arXiv:1606.02647 sec. 3.
    """
    traces = lam * _truncated(_log_ratio(logps, old_logps, mask), 1.0)
    return off_policy_returns(traces, rewards, q_values, values, mask, gamma=gamma)


def q_lambda(
    rewards: Real[Tensor, "*batch time"],
    q_values: Float[Tensor, "*batch time actions"],
    mask: Bool[Tensor, "*batch time"],
    *,
    gamma: float | Tensor,
    lam: float | Tensor,
) -> Float[Tensor, "*batch time"]:
    """Peng's Q(lam): `lambda_returns` with V_t = max_a Q_ta. Peng & Williams 1996, doi:10.1007/BF00114731.

    Elsewhere: `q_lambda` (rlax) is the same; Q^pi(lam) of Harutyunyan et al. 2016, arXiv:1602.04951, is
    `off_policy_returns` with traces lam.
    """
    values = torch.where(mask[..., None], promote(q_values), 0).amax(-1)
    return lambda_returns(rewards, values, mask, gamma=gamma, lam=lam)


def _log_ratio(logps: Tensor, old_logps: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, promote(logps) - promote(old_logps), 0).detach()


def _truncated(log_ratio: Tensor, top: float | Tensor) -> Tensor:
    """min(top, ratio), without forming a ratio that overflows."""
    return log_ratio.clamp(max=torch.as_tensor(top, dtype=log_ratio.dtype, device=log_ratio.device).log()).exp()


def _corrected(
    rho: Tensor, c: Tensor, rewards: Tensor, values: Tensor, mask: Tensor, gamma: float | Tensor
) -> tuple[Tensor, Tensor]:
    """(advantages, targets) of V-trace for given truncated ratios."""
    values = torch.where(mask, promote(values), 0)
    errors = rho * td_errors(rewards, values, mask, gamma=gamma)
    targets = values + discounted_returns(errors, mask, gamma=gamma * c)
    advantages = rho * (promote(rewards) + gamma * next_values(targets, mask) - values)
    return torch.where(mask, advantages, 0), targets
