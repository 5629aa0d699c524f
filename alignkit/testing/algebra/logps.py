"""Identities of log-probabilities."""

import torch

from alignkit.heads import Head, head_entropy, head_logps
from alignkit.logps import (
    candidate_logps,
    entropy,
    log_sum_sq_probs,
    token_logps,
    vocab_logps,
    vocab_mean_logps,
    with_tail,
)
from alignkit.testing.algebra import Sides, identity
from alignkit.testing.strategies import DIM, VOCAB, Source


@identity(r"\log p(y_t) = \big(\log p(v)\big)_{v = y_t}")
def a_token_is_a_list_of_one_candidate(s: Source) -> Sides:
    logits, ids, mask = s.tokens(VOCAB), s.ids(), s.mask()
    by_candidate = candidate_logps(logits, ids[..., None], mask)[..., 0]
    by_vocabulary = vocab_logps(logits, mask).gather(-1, ids[..., None])[..., 0]
    return (by_candidate, by_vocabulary), (token_logps(logits, ids, mask),) * 2


@identity(r"H = -\sum_v p_v \log p_v, \quad \overline{\log p} = \tfrac{1}{V} \sum_v \log p_v")
def entropy_and_vocabulary_mean_are_sums_over_candidates(s: Source) -> Sides:
    logits, mask = s.tokens(VOCAB), s.mask()
    logps = vocab_logps(logits, mask)
    return (-(logps.exp() * logps).sum(-1), logps.mean(-1)), (entropy(logits, mask), vocab_mean_logps(logits, mask))


@identity(
    r"\log \sum_v p_v^2 = \log \mathbb{E}_{v \sim p}[p_v]",
    source="the weights of WPO, Zhou et al. 2024, arXiv:2406.11827",
)
def the_sum_of_squares_is_the_expected_probability(s: Source) -> Sides:
    logits, mask = s.tokens(VOCAB), s.mask()
    logps = vocab_logps(logits, mask)
    counted = torch.cat([torch.zeros_like(mask[..., :1]), mask[..., 1:]], -1)
    expected = (logps.exp() * logps.exp()).sum(-1).log()
    return log_sum_sq_probs(logits, mask), torch.where(counted, expected, 0)


@identity(r"\sum_{i \le k} p_i + \Big(1 - \sum_{i \le k} p_i\Big) = 1")
def candidates_and_their_tail_sum_to_one(s: Source) -> Sides:
    some = s.tokens(VOCAB).log_softmax(-1)[..., :3]
    total = with_tail(some).exp().sum(-1)
    return total, torch.ones_like(total)


@identity(r"\log p(y_t) = \log \mathrm{softmax}(h_{t-1} W^\top + b)_{y_t}")
def the_chunked_head_is_the_plain_one(s: Source) -> Sides:
    hidden, weight, bias, ids, mask = s.tokens(DIM), s.real(VOCAB, DIM), s.real(VOCAB), s.ids(), s.mask()
    logits = hidden @ weight.mT + bias
    head = Head(weight, bias)
    chunked = head_logps(hidden, head, ids, mask, chunk=2), head_entropy(hidden, head, mask)
    return chunked, (token_logps(logits, ids, mask), entropy(logits, mask))
