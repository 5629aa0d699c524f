"""Policy-gradient losses, per token or per sequence; and what to watch while they run.

`ratio` below is exp(logps - old_logps), `advantages` a constant, and [x] is x without its gradient. Given log-probs of
whole answers (`logps.sum(-1, keepdim=True)`) each is a loss on sequences; length-normalised ones are in `sequence`.

Some losses are sums or substitutions of these. One update per sample ("forced on-policy"): `old_logps` is
`logps.detach()`. PPO with a KL penalty, Schulman et al. 2017, arXiv:1707.06347 eq. 8: `surrogate(...) + coef *
kl.k3(old_logps, logps)`, by `controllers.adaptive_penalty`. An entropy bonus: `... - coef * logps.entropy(...)`. TRPO
(Schulman et al. 2015, arXiv:1502.05477) is `surrogate` under mean `kl.full(old_logits, logits, mask)` <= delta, by
conjugate gradients and a line search; with a learned multiplier add `regression.kl_constraint`.

`low` and `high` have three meanings: offsets from a ratio of 1 (`clipped_surrogate`, `cpgd`, `sequence.gspo`), bounds
of the ratio itself (`cispo`, `importance.masked`), and distances from 0 in log space (`sequence.gmpo`).

No mask enters here: where a weight is 0 the value is not read, but NaN in `advantages` or `old_logps` still makes the
gradient NaN (0 * nan): give `torch.where(mask, advantages, 0)`.
"""

import torch
from jaxtyping import Bool, Float, Real
from torch import Tensor, maximum, minimum

from alignkit.masking import clip, finite_exp, promote


def reinforce(logps: Float[Tensor, "*shape"], advantages: Real[Tensor, "*#shape"]) -> Float[Tensor, "*shape"]:
    """-A log pi: Williams 1992, doi:10.1007/BF00992696."""
    return -promote(advantages) * promote(logps)


def asymre(
    logps: Float[Tensor, "*shape"], advantages: Real[Tensor, "*#shape"], *, shift: float | Tensor
) -> Float[Tensor, "*shape"]:
    """-(A - shift) log pi, with A = r minus the mean reward of the policy that sampled.

    Off-policy the baseline changes what is learned: shift < 0 follows successes more than it flees failures. Asymmetric
    REINFORCE, Arnal et al. 2025, arXiv:2506.20520, whose delta V is `shift`.
    """
    return -(promote(advantages) - shift) * promote(logps)


def positive_nll(logps: Float[Tensor, "*shape"], advantages: Real[Tensor, "*#shape"]) -> Float[Tensor, "*shape"]:
    """-log pi where A > 0, else 0: what imitation adds to PPO in VAPO, Yue et al. 2025, arXiv:2504.05118.

    The paper averages over the tokens of correct answers: weigh it with an aggregation of `mask & (advantages > 0)`.
    """
    return torch.where(advantages > 0, -promote(logps), 0)


def gpg_scale(rewards: Real[Tensor, "*batch group"]) -> Float[Tensor, ""]:
    """Groups / max(1, groups whose rewards differ): the alpha of GPG, a factor on `reinforce`.

    Groups of equal rewards have no gradient; alpha makes a mean over groups one over those that have. Compute it on the
    rewards of the whole step. Chu et al. 2025, arXiv:2504.02546.

    Elsewhere: `gpg` (verl) counts samples of non-zero reward instead.
    """
    differs = (rewards != rewards[..., :1]).any(-1)
    return differs.numel() / differs.sum(dtype=promote(rewards).dtype).clamp(min=1)


def surrogate(
    logps: Float[Tensor, "*shape"], old_logps: Float[Tensor, "*shape"], advantages: Real[Tensor, "*#shape"]
) -> Float[Tensor, "*shape"]:
    """-ratio A: the importance-sampled policy gradient, L^CPI of Schulman et al. 2017, arXiv:1707.06347 eq. 6.

    Elsewhere: `importance_sampling` (tinker).
    """
    return -_ratio(logps, old_logps) * promote(advantages)


def clipped_surrogate(
    logps: Float[Tensor, "*shape"],
    old_logps: Float[Tensor, "*shape"],
    advantages: Real[Tensor, "*#shape"],
    *,
    low: float | Tensor = 0.2,
    high: float | Tensor = 0.2,
) -> Float[Tensor, "*shape"]:
    """-min(ratio A, clip(ratio, 1 - low, 1 + high) A).

    Schulman et al. 2017, arXiv:1707.06347 eq. 7 (low = high); separate bounds ("clip-higher"): DAPO, Yu et al. 2025,
    arXiv:2503.14476 eq. 8.
    """
    ratio, advantages = _ratio(logps, old_logps), promote(advantages)
    return maximum(-ratio * advantages, -clip(ratio, 1 - low, 1 + high) * advantages)


def clip_fraction(
    logps: Float[Tensor, "*shape"],
    old_logps: Float[Tensor, "*shape"],
    advantages: Real[Tensor, "*#shape"],
    *,
    low: float | Tensor = 0.2,
    high: float | Tensor = 0.2,
) -> Bool[Tensor, "*shape"]:
    """Where the clipped branch of `clipped_surrogate` is active, that is, where its gradient is 0."""
    ratio = _ratio(logps, old_logps)
    return ((ratio > 1 + high) & (advantages > 0)) | ((ratio < 1 - low) & (advantages < 0))


def dual_clip(
    logps: Float[Tensor, "*shape"],
    old_logps: Float[Tensor, "*shape"],
    advantages: Real[Tensor, "*#shape"],
    *,
    c: float | Tensor,
    low: float | Tensor = 0.2,
    high: float | Tensor = 0.2,
) -> Float[Tensor, "*shape"]:
    """min(clipped_surrogate, -c A) where A < 0, else clipped_surrogate: a bound c > 1 on what a bad token can cost.

    Ye et al. 2020, arXiv:1912.09729 (there c = 3).

    Elsewhere: `delta` (TRL) is c if it is above 1 + high; ROLL's bound is c = 1 + 2 high.
    """
    loss, advantages = clipped_surrogate(logps, old_logps, advantages, low=low, high=high), promote(advantages)
    return torch.where(advantages < 0, minimum(loss, -c * advantages), loss)


def decoupled_surrogate(
    logps: Float[Tensor, "*shape"],
    prox_logps: Float[Tensor, "*shape"],
    old_logps: Float[Tensor, "*shape"],
    advantages: Real[Tensor, "*#shape"],
    *,
    low: float | Tensor = 0.2,
    high: float | Tensor = 0.2,
) -> Float[Tensor, "*shape"]:
    """exp(prox_logps - old_logps) * clipped_surrogate(logps, prox_logps, A): what sampled is not what is clipped to.

    `prox_logps` of the proximal policy, a recent one; `old_logps` of the behaviour policy; both constants. Hilton et
    al. 2022, arXiv:2110.00641; for asynchronous training AReaL, Fu et al. 2025, arXiv:2505.24298.
    """
    return _ratio(prox_logps, old_logps) * clipped_surrogate(logps, prox_logps, advantages, low=low, high=high)


def cispo(
    logps: Float[Tensor, "*shape"],
    old_logps: Float[Tensor, "*shape"],
    advantages: Real[Tensor, "*#shape"],
    *,
    low: float | Tensor,
    high: float | Tensor,
) -> Float[Tensor, "*shape"]:
    """-[clip(ratio, low, high)] A log pi; `low` and `high` bound the ratio itself, low = 0 is no lower bound.

    MiniMax-M1 2025, arXiv:2506.13585. With low = 0 it is the policy gradient of IMPALA (Espeholt et al. 2018,
    arXiv:1802.01561 sec. 4), `high` being its rho bar and A = r + gamma v' - V; the advantages of `multistep.vtrace`
    have that weight already and go to `reinforce`.

    Elsewhere: (low, high) is (0, epsilon_high) in TRL and Liger, where the default of 0.2 scales even the on-policy
    gradient by 0.2; (0, 1 + eps) in open-instruct; (1 - eps_low, 1 + eps_high) in verl, slime, NeMo-RL and ROLL; (0, 4)
    in tinker.
    """
    return -clip(_ratio(logps, old_logps), low, high).detach() * promote(advantages) * promote(logps)


def topr(
    logps: Float[Tensor, "*shape"], old_logps: Float[Tensor, "*shape"], advantages: Real[Tensor, "*#shape"]
) -> Float[Tensor, "*shape"]:
    """-A log pi where A >= 0, -[min(ratio, 1)] A log pi where A < 0: tapered off-policy REINFORCE.

    Le Roux et al. 2025, arXiv:2503.14286, where the ratio is that of whole answers: `sequence.topr`.

    Elsewhere: `topr` (ROLL) is this one, with ratios of tokens.
    """
    weight = torch.where(advantages < 0, _ratio(logps, old_logps).clamp(max=1), 1).detach()
    return -weight * promote(advantages) * promote(logps)


def sapo(
    logps: Float[Tensor, "*shape"],
    old_logps: Float[Tensor, "*shape"],
    advantages: Real[Tensor, "*#shape"],
    *,
    tau_pos: float | Tensor = 1.0,
    tau_neg: float | Tensor = 1.05,
) -> Float[Tensor, "*shape"]:
    """-4 / tau sigmoid(tau (ratio - 1)) A, with tau = tau_pos where A > 0, else tau_neg.

    A soft clip, of slope -A at a ratio of 1 whatever tau. Soft adaptive policy optimisation, Gao et al. 2025,
    arXiv:2511.20347; the defaults are the paper's.
    """
    from_one = _ratio(logps, old_logps) - 1
    positive, negative = (4 / tau * torch.sigmoid(tau * from_one) for tau in (tau_pos, tau_neg))
    return -torch.where(advantages > 0, positive, negative) * promote(advantages)


def cpgd(
    logps: Float[Tensor, "*shape"],
    old_logps: Float[Tensor, "*shape"],
    advantages: Real[Tensor, "*#shape"],
    *,
    low: float | Tensor,
    high: float | Tensor,
    alpha: float | Tensor,
) -> Float[Tensor, "*shape"]:
    """-min(l A, clip(l, log(1 - low), log(1 + high)) A) + alpha (ratio - 1 - l), with l = logps - old_logps.

    Clipped policy gradient with policy drift, Liu et al. 2025, arXiv:2505.12504: no ratio multiplies the advantage, and
    the drift is KL(old || pi), estimated as `kl.k3(old_logps, logps)` on what the old policy sampled.
    """
    log_ratio, advantages = promote(logps) - promote(old_logps), promote(advantages)
    bounds = (torch.as_tensor(x, dtype=log_ratio.dtype, device=log_ratio.device).log1p() for x in (-low, high))
    clipped = clip(log_ratio, *bounds)
    return maximum(-log_ratio * advantages, -clipped * advantages) + alpha * (torch.expm1(log_ratio) - log_ratio)


def kl_cov(
    logps: Float[Tensor, "*shape"],
    old_logps: Float[Tensor, "*shape"],
    advantages: Real[Tensor, "*#shape"],
    selected: Bool[Tensor, "*shape"],
    *,
    coef: float | Tensor,
) -> Float[Tensor, "*shape"]:
    """-ratio A, plus coef |logps - old_logps| where `selected`: the tokens of highest covariance of log pi and A.

    KL-Cov, Cui et al. 2025, arXiv:2505.22617, with the penalty of the authors' code in place of KL(old || pi); select
    by `filters.kl_cov`. Their Clip-Cov needs no loss of its own: `filters.clip_cov` takes tokens out of the mask.
    """
    drift = (promote(logps) - promote(old_logps)).abs()
    return surrogate(logps, old_logps, advantages) + torch.where(selected, coef * drift, 0)


def _ratio(logps: Tensor, old_logps: Tensor) -> Tensor:
    return finite_exp(promote(logps) - promote(old_logps))
