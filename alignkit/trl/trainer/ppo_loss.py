"""The formulas of `PPOTrainer`, composed of the primitives, and some of its methods."""

import warnings
from typing import Any

import torch
from torch import Tensor

from alignkit import kl
from alignkit.advantages import gae
from alignkit.losses.policy import clip_fraction, clipped_surrogate
from alignkit.losses.value import clipped_value, squared, value_clip_fraction
from alignkit.masking import finite_exp, masked_var
from alignkit.shaping import clip_score, normalize_score, scale_score, terminal_reward
from alignkit.trl.core import entropy_from_logits, masked_whiten
from alignkit.weights import token_mean, weigh

KL_PENALTIES = {"kl": kl.k1, "abs": kl.abs, "mse": kl.k2, "full": kl.categorical}


def transform_scores(trainer: Any, scores: Tensor) -> Tensor:
    """The scores [B], scaled as the config says by all seen so far, which they join, and clipped."""
    config, running = trainer.config, trainer.running
    if config.use_score_scaling:
        running.update(scores)
        eps = torch.finfo(scores.dtype).eps
        if config.use_score_norm:
            scores = normalize_score(scores, running.mean, running.std, eps=eps)
        else:
            scores = scale_score(scores, running.std, eps=eps)
    return scores if config.score_clip is None else clip_score(scores, limit=config.score_clip)


def kl_penalty(trainer: Any, logprob: Tensor, ref_logprob: Tensor) -> Tensor:
    """The penalty per token by `config.kl_penalty`, of [B, T] log-probs, or for "full" [B, T, V]."""
    kind = trainer.config.kl_penalty
    if kind not in KL_PENALTIES:
        raise NotImplementedError(f"kl_penalty={kind!r} must be one of {', '.join(KL_PENALTIES)}")
    return KL_PENALTIES[kind](logprob, ref_logprob)


def compute_rewards(
    trainer: Any, scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, masks: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(rewards, their part without the scores, KL penalties), [B, T]; a score is at the last token that counts.

    A row without such a token has no score. With `kl_penalty="full"` the log-probs are those of all tokens, [B, T, V].
    """
    kls = trainer._kl_penalty(logprobs, ref_logprobs)
    non_score_rewards = -trainer.kl_ctl.value * kls
    return non_score_rewards + terminal_reward(scores, masks.bool()), non_score_rewards, kls


def compute_advantages(trainer: Any, values: Tensor, rewards: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(values, whitened advantages, returns), [B, T]; tokens that do not count have no value and no reward."""
    config, mask = trainer.config, mask.bool()
    values, rewards = (torch.where(mask, x, 0) for x in (values, rewards))
    if config.whiten_rewards:
        rewards = masked_whiten(rewards, mask, shift_mean=False)
    # they are steps in time all the same, through which advantages decay
    advantages, returns = gae(rewards, values, torch.ones_like(mask), gamma=config.gamma, lam=config.lam)
    return values, masked_whiten(advantages, mask).detach(), returns


def loss(
    trainer: Any,
    old_logprobs: Tensor,
    values: Tensor,
    logits: Tensor,
    vpreds: Tensor,
    logprobs: Tensor,
    mask: Tensor,
    advantages: Tensor,
    returns: Tensor,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(policy loss, `vf_coef` times value loss, statistics), means over the tokens [B, T] where `mask` is not 0.

    Both are 0 where the mean ratio of new and old policy exceeds `ratio_threshold`, with a warning; in `step` with one
    for all mini batches.
    """
    config = trainer.config
    mask = mask.bool()
    weights = token_mean(mask)
    ratio = finite_exp(kl.k1(logprobs.detach(), old_logprobs))
    stats = {"policy/advantages": advantages.detach(), "policy/ratio": ratio}
    logprobs, old_logprobs, advantages = (torch.where(mask, x, 0) for x in (logprobs, old_logprobs, advantages))
    vpreds, values, returns = (torch.where(mask, x, 0) for x in (vpreds, values, returns))
    bounds, value_bound = {"low": config.cliprange, "high": config.cliprange}, {"clip": config.cliprange_value}

    policy = weigh(clipped_surrogate(logprobs, old_logprobs, advantages, **bounds), weights)
    value = weigh(clipped_value(vpreds, values, returns, **value_bound), weights)
    average = weigh(ratio, weights)
    policy, value = (torch.where(average > config.ratio_threshold, 0, x) for x in (policy, value))
    if trainer._ratios is None:
        warn_if_skipped(trainer, average)
    else:  # within a step, which warns at its end: to ask the device now would be to wait for it
        trainer._ratios.append(average)

    with torch.no_grad():
        means = {
            "policy/entropy": entropy_from_logits(logits).expand_as(mask),
            "policy/approxkl": kl.k2(logprobs, old_logprobs),
            "policy/policykl": kl.k1(old_logprobs, logprobs),
            "policy/clipfrac": clip_fraction(logprobs, old_logprobs, advantages, **bounds),
            "policy/advantages_mean": advantages,
            "returns/mean": returns,
            "val/vpred": vpreds,
            "val/error": 2 * squared(vpreds, returns),
            "val/clipfrac": value_clip_fraction(vpreds, values, returns, **value_bound),
            "val/mean": values,
        }
        stats |= {"loss/policy": policy, "loss/value": value, "loss/total": policy + config.vf_coef * value}
        stats |= {name: weigh(x, weights) for name, x in means.items()}
        stats |= {"returns/var": masked_var(returns, mask), "val/var": masked_var(values, mask)}
    return policy, config.vf_coef * value, {name: x.detach() for name, x in stats.items()}


def warn_if_skipped(trainer: Any, average: Tensor) -> None:
    """Warn if a mean ratio exceeds `ratio_threshold`."""
    if average > (limit := trainer.config.ratio_threshold):
        warnings.warn(
            f"The average ratio of batch ({average:.2f}) exceeds threshold {limit:.2f}. Skipping batch.", stacklevel=3
        )
