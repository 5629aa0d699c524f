import math

import pytest
import torch
from hypothesis import given
from torch import Tensor

from alignkit.logps import (
    candidate_logps,
    entropy,
    log_sum_sq_probs,
    sequence_logps,
    token_logps,
    top_candidates,
    vocab_logps,
    vocab_mean_logps,
    with_tail,
)
from alignkit.testing.strategies import VOCAB, Source, sources

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def by_hand(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    out = torch.zeros(ids.shape, dtype=logits.dtype)
    for where in mask.nonzero().tolist():
        *row, t = where
        if t:
            scores = logits[(*row, t - 1)].tolist()
            total = sum(math.exp(x) for x in scores)
            out[tuple(where)] = math.log(math.exp(scores[ids[tuple(where)]]) / total)
    return out


@given(source=sources())
def test_the_logits_before_a_token_score_it(source: Source) -> None:
    logits, ids, mask = source.tokens(VOCAB), source.ids(), source.mask()
    expected = by_hand(logits, ids, mask)
    torch.testing.assert_close(token_logps(logits, ids, mask), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(sequence_logps(logits, ids, mask), expected.sum(-1), rtol=1e-10, atol=1e-12)


def test_the_first_position_is_never_scored() -> None:
    logits, ids = torch.randn(2, 3, VOCAB), torch.ones(2, 3, dtype=torch.long)
    mask = torch.tensor([[True, False, True]]).expand(2, 3)
    outs = [token_logps(logits, ids, mask), entropy(logits, mask), vocab_mean_logps(logits, mask)]
    outs += [log_sum_sq_probs(logits, mask), vocab_logps(logits, mask), candidate_logps(logits, ids[..., None], mask)]
    for out in outs:
        assert not out[:, :2].any()
        assert out[:, 2].all()


@given(source=sources())
def test_probabilities_of_all_answers_sum_to_1(source: Source) -> None:
    logits = source.real(3, VOCAB)
    mask = torch.tensor([False, True, True])
    total = 0.0
    for a in range(VOCAB):
        for b in range(VOCAB):
            total += sequence_logps(logits, torch.tensor([0, a, b]), mask).exp().item()
    assert total == pytest.approx(1, rel=1e-12)


@given(source=sources())
def test_entropy_and_vocabulary_mean_by_enumeration(source: Source) -> None:
    logits, mask = source.tokens(VOCAB), source.mask()
    each = [token_logps(logits, torch.full(mask.shape, v), mask) for v in range(VOCAB)]
    plogp = sum(torch.where(mask, lp.exp() * lp, 0) for lp in each)
    counted = torch.cat([torch.zeros_like(mask[..., :1]), mask[..., 1:]], -1)
    torch.testing.assert_close(entropy(logits, mask), torch.where(counted, -plogp, 0), **CLOSE)
    torch.testing.assert_close(vocab_mean_logps(logits, mask), sum(each) / VOCAB, **CLOSE)


def test_entropy_of_the_uniform_is_log_n_and_filtered_tokens_add_nothing() -> None:
    logits = torch.zeros(1, 3, 4, dtype=torch.float64)
    logits[:, 1, 1:3] = -torch.inf
    logits.requires_grad_()
    out = entropy(logits, torch.tensor([[False, True, True]]))
    assert out.tolist() == [[0, pytest.approx(math.log(4)), pytest.approx(math.log(2))]]
    assert torch.autograd.grad(out.sum(), logits)[0].isfinite().all()


@given(source=sources())
def test_sum_of_squares_by_enumeration(source: Source) -> None:
    logits, mask = source.tokens(VOCAB), source.mask()
    squares = sum(
        torch.where(mask, 2 * token_logps(logits, torch.full(mask.shape, v), mask), 0).exp() for v in range(5)
    )
    counted = torch.cat([torch.zeros_like(mask[..., :1]), mask[..., 1:]], -1)
    expected = torch.where(counted, squares.log(), 0)
    torch.testing.assert_close(log_sum_sq_probs(logits, mask), expected, rtol=1e-10, atol=1e-12)


def test_sum_of_squares_of_uniforms_and_at_extremes() -> None:
    logits = torch.tensor([[[0.0, 0, 0, 0], [0, -torch.inf, 0, -torch.inf], [900, -900, 0, 0], [0, 0, 0, 0]]])
    logits.requires_grad_()
    out = log_sum_sq_probs(logits, torch.tensor([[False, True, True, True]]))
    assert out.tolist() == [[0, pytest.approx(-math.log(4)), pytest.approx(-math.log(2)), 0]]
    assert torch.autograd.grad(out.sum(), logits)[0].isfinite().all()


def test_candidates_by_hand() -> None:
    probs = torch.tensor([[0.1, 0.6, 0.3], [0.5, 0.2, 0.3], [1 / 3, 1 / 3, 1 / 3]], dtype=torch.float64)
    logits, mask = 3 + probs.log(), torch.tensor([False, True, True])
    top = top_candidates(logits, mask, k=2)
    assert top.tolist() == [[0, 0], [1, 2], [0, 2]]
    assert top_candidates(logits, torch.tensor([False, False, True]), k=2).tolist() == [[0, 0], [0, 0], [0, 2]]
    expected = torch.tensor([[1, 1], [0.6, 0.3], [0.5, 0.3]], dtype=torch.float64)
    torch.testing.assert_close(candidate_logps(logits, top, mask).exp(), expected, **CLOSE)
    torch.testing.assert_close(vocab_logps(logits, mask).exp()[1:], probs[:2], **CLOSE)
    both, masks = logits.expand(2, 3, 3), torch.tensor([[False, True, True], [False, False, True]])
    ids = torch.tensor([[[-100, 10**9], [1, 2], [0, 2]], [[7, 7], [-1, 99], [0, 2]]])
    out = candidate_logps(both, ids, masks).exp()
    torch.testing.assert_close(out, torch.stack([expected, expected.where(masks[1, :, None], 1)]), **CLOSE)
    assert top_candidates(both, masks, k=2).tolist() == [top.tolist(), [[0, 0], [0, 0], [0, 2]]]
    torch.testing.assert_close(vocab_logps(both, masks).exp()[0, 1:], probs[:2], **CLOSE)


def test_the_tail_is_what_is_left() -> None:
    some = torch.tensor([[0.5, 0.2], [1e-9, 1e-12]], dtype=torch.float64).log()
    assert with_tail(some).exp()[:, -1].tolist() == pytest.approx([0.3, 1 - 1e-9 - 1e-12], rel=1e-14)
    assert with_tail(some).exp()[0, :2].tolist() == pytest.approx([0.5, 0.2], rel=1e-14)


@pytest.mark.parametrize(("dtype", "floor"), [(torch.float32, 2.0**-23), (torch.float64, 2.0**-52)])
def test_the_tail_of_everything_is_a_rounding_error(dtype: torch.dtype, floor: float) -> None:
    for everything in ([0.5, 0.5], [1.0], [1.0, 1.0]):
        x = torch.tensor(everything, dtype=dtype).log().requires_grad_()
        tail = with_tail(x)[-1]
        assert tail.item() == pytest.approx(math.log(floor), rel=1e-6)
        assert not torch.autograd.grad(tail, x)[0].any()
    nearly = torch.tensor([1 - 1e-5], dtype=dtype).log().requires_grad_()
    assert torch.autograd.grad(with_tail(nearly)[-1], nearly)[0].item() == pytest.approx(-1e5, rel=1e-2)


def test_ids_of_minus_100_may_sit_under_the_mask() -> None:
    logits, mask = torch.randn(1, 4, VOCAB), torch.tensor([[False, False, True, False]])
    ids, hidden = torch.tensor([[0, 0, 3, 0]]), torch.tensor([[-100, -100, 3, -100]])
    assert torch.equal(token_logps(logits, hidden, mask), token_logps(logits, ids, mask))


def test_an_unmasked_id_outside_the_vocabulary_is_an_error() -> None:
    mask, ids = torch.tensor([[False, True]]), torch.tensor([[0, VOCAB]])
    with pytest.raises((IndexError, RuntimeError)):
        token_logps(torch.zeros(1, 2, VOCAB), ids, mask)
