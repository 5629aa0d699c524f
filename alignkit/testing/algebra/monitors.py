"""Identities of monitors: what they say of an update, and of a group."""

import torch

from alignkit.advantages import group_center
from alignkit.filters import dynamic_sampling
from alignkit.masking import masked_mean
from alignkit.monitors import policy_metrics, zero_variance
from alignkit.testing.algebra import Sides, identity
from alignkit.testing.strategies import Source
from alignkit.weights import token_mean

DAPO = "Yu et al. 2025, arXiv:2503.14476"


@identity(r"\max r = \min r \iff \forall i:\ r_i - \bar r = 0", source=DAPO, fills=("ties",))
def groups_of_zero_variance_have_no_advantage(s: Source) -> Sides:
    rewards = s.rows(2)
    nothing = (group_center(rewards) == 0).all(-1, keepdim=True).expand_as(rewards)
    return (zero_variance(rewards), zero_variance(rewards)[..., 0]), (nothing, ~dynamic_sampling(rewards))


@identity(r"\pi = \pi_{\mathrm{old}} = \mu:\ \bar\rho = 1,\ \mathrm{KL} = 0", fills=("plain", "ties"))
def without_an_update_nothing_has_moved(s: Source) -> Sides:
    logps, mask = s.logps(), s.mask()
    mask[0] |= True  # a mean of something
    weights = token_mean(mask), torch.zeros_like(mask[..., 0].double())
    same = policy_metrics(logps, logps, s.tokens(), mask, *weights, rewards=s.rows(), sampler_logps=logps)
    one = torch.ones((), dtype=torch.float64)
    return tuple(same[x] for x in ("ratio", "approx_kl", "sampler_gap", "sampler_kl")), (one, *3 * (0 * one,))


@identity(
    r"\mathrm{KL}(\pi_{\mathrm{old}}\,\|\,\pi) \approx \bar\rho - 1 - \overline{\log \rho}",
    source="Schulman 2020",
    fills=("plain", "ties"),
)
def the_approximate_kl_is_that_of_the_ratios(s: Source) -> Sides:
    logps, old, mask = s.logps(), s.logps(), s.mask()
    mask[0] |= True
    weights = token_mean(mask), torch.zeros_like(mask[..., 0].double())
    metrics = policy_metrics(logps, old, s.tokens(), mask, *weights, rewards=s.rows())
    return metrics["approx_kl"], metrics["ratio"] - 1 - masked_mean(logps - old, mask)
