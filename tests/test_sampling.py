"""Filters against their definitions, draws against the distribution they invert, and log-probs of what is sampled."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from alignkit.heads import Head, head_entropy, head_logps
from alignkit.logps import entropy, token_logps
from alignkit.sampling import Sampling, draw, filter_logits

LOGITS = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
INF = torch.inf


@st.composite
def logits(draw_, vocab=6):
    values = draw_(st.lists(st.floats(-5, 5), min_size=3 * vocab, max_size=3 * vocab))
    return torch.tensor(values, dtype=torch.float64).reshape(3, vocab)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, 4),
        ({"top_k": 2}, 2),
        ({"top_k": 9}, 4),
        ({"top_p": 0.39}, 1),
        ({"top_p": 0.41}, 2),
        ({"top_p": 0.69}, 2),
        ({"top_p": 0.71}, 3),
        ({"min_p": 0.49}, 3),
        ({"min_p": 0.51}, 2),
        ({"min_p": 1.0}, 1),
        ({"temperature": 0.5, "top_p": 0.5}, 1),  # 16/30 of the tempered distribution
        ({"top_k": 2, "top_p": 0.6}, 2),  # 4/7 of what top-k leaves is not enough
    ],
    ids=str,
)
def test_by_hand(options, kept):
    out = filter_logits(LOGITS, **options)
    assert (out > -INF).tolist() == [True] * kept + [False] * (4 - kept)


def test_ties_stay():
    assert (filter_logits(torch.zeros(4), top_k=2) == 0).all()
    assert (filter_logits(torch.tensor([1.0, 0.0, 0.0, 0.0]), top_p=0.7) > -INF).all()


@given(logits(), st.integers(1, 6), st.floats(0.05, 1.0), st.floats(0.0, 1.0), st.floats(0.2, 3.0))
def test_what_transformers_filters(x, k, p, m, temperature):
    """One after the other, on logits without ties at the edge."""
    x = x + torch.arange(6) * 1e-3 + torch.arange(3)[:, None] * 1e-4
    theirs = x / temperature
    for warper in (TopKLogitsWarper(k), TopPLogitsWarper(p), MinPLogitsWarper(m)):
        theirs = warper(None, theirs)
    ours = filter_logits(x, temperature=temperature, top_k=k, top_p=p, min_p=m)
    differ = (ours > -INF) != (theirs > -INF)
    edge = (theirs.softmax(-1) - m * theirs.softmax(-1).amax(-1, keepdim=True)).abs().min()
    if edge > 1e-9:
        assert differ.sum() <= int(differ.any())  # a sum that reaches p up to rounding
    torch.testing.assert_close(ours[~differ], theirs[~differ], rtol=1e-12, atol=0)


def test_hyperparameters_may_be_tensors():
    ps = torch.tensor([0.3, 0.6, 1.0])
    swept = torch.vmap(lambda p: filter_logits(LOGITS, top_p=p))(ps)
    for p, out in zip(ps.tolist(), swept):
        torch.testing.assert_close(out, filter_logits(LOGITS, top_p=p))


@given(logits(), st.floats(0, 1, exclude_max=True))
def test_draw_inverts_the_cumulative_distribution(x, u):
    x = torch.where(torch.arange(6) % 4 == 3, -INF, x)
    token = draw(x, torch.full((3,), u, dtype=torch.float64))
    cumulative = x.softmax(-1).cumsum(-1)
    before = torch.nn.functional.pad(cumulative, (1, 0)).gather(-1, token[:, None])[:, 0]
    after = cumulative.gather(-1, token[:, None])[:, 0]
    assert (x.gather(-1, token[:, None]) > -INF).all()
    assert ((before <= u + 1e-12) & (u <= after + 1e-12)).all()


def test_equally_spaced_numbers_draw_the_distribution():
    u = (torch.arange(1000) + 0.5) / 1000
    tokens = draw(LOGITS.expand(1000, 4), u)
    assert tokens.bincount().tolist() == [400, 300, 200, 100]


@given(logits())
def test_the_largest_number_draws_what_may_be_drawn(x):
    x = torch.where(torch.arange(6) >= 4, -INF, x)
    assert (draw(x, torch.full((3,), math.nextafter(1, 0), dtype=torch.float64)) <= 3).all()


class TestLogProbs:
    """The log-probs, chunked or not, are those of the filtered softmax, and so is the entropy."""

    spec = Sampling(temperature=0.7, top_k=5, top_p=0.8, min_p=0.05)

    def batch(self):
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(4, 7, 5, generator=generator, dtype=torch.float64)
        weight = torch.randn(9, 5, generator=generator, dtype=torch.float64)
        mask = torch.rand(4, 7, generator=generator) > 0.3
        mask[:, 0] = False
        filtered = filter_logits(hidden @ weight.mT, **self.spec.filters)
        likely = filtered[:, :-1].argmax(-1)
        return hidden, weight, torch.nn.functional.pad(likely, (1, 0)), mask, filtered

    def test_chunked_and_plain(self):
        hidden, weight, ids, mask, filtered = self.batch()
        expected = torch.where(mask[:, 1:], filtered[:, :-1].log_softmax(-1).amax(-1), 0)
        plain = token_logps(hidden @ weight.mT, ids, mask, sampling=self.spec)
        torch.testing.assert_close(plain[:, 1:], expected)
        torch.testing.assert_close(head_logps(hidden, Head(weight), ids, mask, chunk=3, sampling=self.spec), plain)
        probs = filtered[:, :-1].softmax(-1)
        spread = torch.where(mask[:, 1:], -torch.special.xlogy(probs, probs).sum(-1), 0)
        torch.testing.assert_close(entropy(hidden @ weight.mT, mask, sampling=self.spec)[:, 1:], spread)
        chunked = head_entropy(hidden, Head(weight), mask, chunk=3, sampling=self.spec)
        torch.testing.assert_close(chunked[:, 1:], spread)

    def test_gradients(self):
        hidden, weight, ids, mask, _ = self.batch()

        def chunked(h, w):
            return head_logps(h, Head(w), ids, mask, chunk=3, sampling=self.spec).square().sum()

        def plain(h, w):
            return token_logps(h @ w.mT, ids, mask, sampling=self.spec).square().sum()

        ours, theirs = (torch.func.grad(f, argnums=(0, 1))(hidden, weight) for f in (chunked, plain))
        torch.testing.assert_close(ours, theirs)
        assert all(x.isfinite().all() and x.any() for x in ours)

    def test_a_token_that_could_not_be_drawn_is_finite_with_a_finite_gradient(self):
        x = torch.tensor([[[3.0, 0.0, -3.0], [0.0, 0.0, 0.0]]], dtype=torch.float64, requires_grad=True)
        logps = token_logps(x, torch.tensor([[0, 2]]), torch.tensor([[False, True]]), sampling=Sampling(top_k=1))
        assert logps[0, 1].item() == pytest.approx(-math.log1p(math.exp(6)))  # among itself and what is left
        (gradient,) = torch.autograd.grad(logps.sum(), x)
        assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new": 0}, "max_new=0 must be at least 1"),
        ({"temperature": 0.0}, "temperature=0.0 must be positive; for the likeliest answer sample with greedy=True"),
        ({"top_k": -1}, "top_k=-1 must be at least 1, or 0"),
        ({"top_p": 0.0}, "top_p=0.0 must be in"),
        ({"top_p": 1.1}, "top_p=1.1 must be in"),
        ({"min_p": 2.0}, "min_p=2.0 must be in"),
        ({"stop": ("a", "")}, "stop=.* must be a tuple of strings, none of them empty"),
    ],
    ids=str,
)
def test_a_spec_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


def test_plain():
    assert Sampling(max_new=3, stop=("a",)).is_plain
    assert not any(Sampling(**x).is_plain for x in ({"temperature": 0.9}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}))
