from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from alignkit import heads
from alignkit.heads import (
    Head,
    head_candidate_logps,
    head_divergence,
    head_entropy,
    head_logps,
    head_top_candidates,
    row_logps,
    row_measures,
)
from alignkit.logps import candidate_logps, entropy, token_logps, top_candidates, vocab_logps
from alignkit.losses.distillation import jsd, reverse_kl
from alignkit.sampling import Sampling
from alignkit.testing.strategies import DIM, VOCAB, Source, sources

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
CHUNKS = (1, 2, 3, 7, 512)
few = settings(max_examples=max(settings.default.max_examples // 2, 3))


def inputs(source: Source) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return source.tokens(DIM), source.real(VOCAB, DIM), source.real(VOCAB), source.ids(), source.mask()


def plain(kind: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, mask: Tensor) -> Tensor:
    logits = hidden @ weight.T + (0 if bias is None else bias)
    return token_logps(logits, ids, mask) if kind == "logps" else entropy(logits, mask)


def head(kind: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, mask: Tensor, n: int) -> Tensor:
    if kind == "logps":
        return head_logps(hidden, Head(weight, bias), ids, mask, chunk=n)
    return head_entropy(hidden, Head(weight, bias), mask, chunk=n)


forward_mode = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # raised inside torch
kinds = pytest.mark.parametrize("kind", ["logps", "entropy"])


@kinds
@given(source=sources(), chunk=st.sampled_from(CHUNKS), biased=st.booleans())
def test_the_chunked_head_is_the_plain_one(kind: str, source: Source, chunk: int, biased: bool) -> None:
    hidden, weight, bias, ids, mask = inputs(source)
    leaves = [x.requires_grad_() for x in ((hidden, weight, bias) if biased else (hidden, weight))]
    bias = bias if biased else None
    cotangent = source.tokens()
    got, expected = head(kind, hidden, weight, bias, ids, mask, chunk), plain(kind, hidden, weight, bias, ids, mask)
    torch.testing.assert_close(got, expected, **CLOSE)
    grads = [torch.autograd.grad((out * cotangent).sum(), leaves, create_graph=True) for out in (got, expected)]
    torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-11)
    second = [torch.autograd.grad(sum((g**2).sum() for g in first), leaves, materialize_grads=True) for first in grads]
    torch.testing.assert_close(*second, rtol=1e-9, atol=1e-9)


@kinds
@forward_mode
@few
@given(source=sources(), chunk=st.sampled_from(CHUNKS))
def test_forward_mode_through_the_chunked_head(kind: str, source: Source, chunk: int) -> None:
    hidden, weight, bias, ids, mask = inputs(source)
    primals = (hidden, weight, bias)
    tangents = tuple(source.real(*x.shape) for x in primals)
    got = torch.func.jvp(lambda h, w, b: head(kind, h, w, b, ids, mask, chunk), primals, tangents)
    expected = torch.func.jvp(lambda h, w, b: plain(kind, h, w, b, ids, mask), primals, tangents)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    for i in range(3):  # a tangent of one input at a time; the others have none

        def one(f: Any, i: int = i) -> tuple[Tensor, Tensor]:
            return torch.func.jvp(lambda x: f(*primals[:i], x, *primals[i + 1 :]), (primals[i],), (tangents[i],))

        got = one(lambda h, w, b: head(kind, h, w, b, ids, mask, chunk))
        torch.testing.assert_close(got, one(lambda h, w, b: plain(kind, h, w, b, ids, mask)), rtol=1e-11, atol=1e-11)


@kinds
@few
@given(source=sources(), chunk=st.sampled_from(CHUNKS))
def test_vmap_over_the_batch_and_over_gradients_of_the_weight(kind: str, source: Source, chunk: int) -> None:
    hidden, weight, bias, ids, mask = inputs(source)
    both = [
        torch.func.vmap(lambda h, i, m, f=f: f(kind, h, weight, bias, i, m))(hidden, ids, mask)
        for f in (lambda *args: head(*args, chunk), plain)
    ]
    torch.testing.assert_close(*both, **CLOSE)
    per_sample = [
        torch.func.vmap(
            torch.func.grad(lambda w, h, i, m, f=f: f(kind, h, w, bias, i, m).sum()), in_dims=(None, 0, 0, 0)
        )(weight, hidden, ids, mask)
        for f in (lambda *args: head(*args, chunk), plain)
    ]
    torch.testing.assert_close(*per_sample, rtol=1e-11, atol=1e-11)
    several = torch.stack([weight, weight + 1, -weight])
    over_weights = [
        torch.func.vmap(lambda w, f=f: f(kind, hidden, w, bias, ids, mask))(several)
        for f in (lambda *args: head(*args, chunk), plain)
    ]
    torch.testing.assert_close(*over_weights, rtol=1e-11, atol=1e-11)


@kinds
@few
@given(source=sources(), chunk=st.sampled_from(CHUNKS))
def test_anything_may_sit_under_the_mask_within_transforms(kind: str, source: Source, chunk: int) -> None:
    hidden, weight, bias, ids, mask = inputs(source)
    before = torch.cat([mask[..., 1:], torch.zeros_like(mask[..., :1])], -1)[..., None].expand(hidden.shape)
    dirty = torch.where(before, hidden, source.garbage(hidden)), torch.where(mask, ids, source.garbage(ids))

    def loss(h: Tensor, w: Tensor, i: Tensor, m: Tensor) -> Tensor:
        return head(kind, h, w, bias, i, m, chunk).sum()

    per_row = torch.func.vmap(torch.func.grad_and_value(loss, (0, 1)), (0, None, 0, 0))
    clean = torch.where(before, hidden, 0), torch.where(mask, ids, 0)
    got, expected = (per_row(h, weight, i, mask) for h, i in (dirty, clean))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert all(x.isfinite().all() for x in (*got[0], got[1]))


@kinds
@forward_mode
@settings(max_examples=3)
@given(source=sources(fills=("plain",), max_rows=1, max_time=4))
def test_first_and_second_derivatives_of_the_chunked_head(kind: str, source: Source) -> None:
    hidden, weight, bias, ids, mask = inputs(source)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]

    def call(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return head(kind, h, w, b, ids, mask, 2)

    assert torch.autograd.gradcheck(call, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, leaves)


class Shapes(TorchDispatchMode):
    """The shapes of all tensors that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[torch.Size] = []

    def __torch_dispatch__(self, fn: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = fn(*args, **(kwargs or {}))
        self.made += [x.shape for x in pytree.tree_leaves(out) if isinstance(x, Tensor)]
        return out

    def positions(self, vocab: int) -> set[int]:
        return {int(s[:-1].numel()) for s in self.made if s[-1:] == (vocab,) and len(s) == 2} - {1}


@kinds
def test_no_logits_are_kept_or_made_whole(kind: str) -> None:
    source, vocab, chunk = Source(0, (4,), 9), 23, 3
    hidden, weight = source.tokens(DIM).requires_grad_(), source.real(vocab, DIM).requires_grad_()
    ids, mask = source.integer(0, vocab, 4, 9), torch.ones(4, 9, dtype=torch.bool)
    kept: list[torch.Size] = []
    with Shapes() as shapes:
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
            out = head(kind, hidden, weight, None, ids, mask, chunk)
        out.sum().backward()
    assert kept
    assert not [shape for shape in kept if shape[-1:] == (vocab,) and len(shape) > 1]
    assert shapes.positions(vocab) == {chunk, 32 % chunk}


@kinds
def test_only_counted_positions_go_through_the_head(kind: str) -> None:
    source, vocab = Source(0, (2,), 5), 11
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 1]]).bool()
    with Shapes() as shapes:
        head(kind, source.tokens(DIM), source.real(vocab, DIM), None, source.ids(), mask, 512)
    assert shapes.positions(vocab) == {3}


@kinds
def test_a_chunk_has_as_many_positions_whatever_the_vocabulary_needs(kind: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(heads, "LOGITS", 44)
    monkeypatch.setattr(heads, "ROWS", {"cpu": 4})
    hidden, weight = torch.zeros(1, 11, 1), torch.zeros(11, 1)
    ids, mask = torch.zeros(1, 11, dtype=torch.long), torch.ones(1, 11, dtype=torch.bool)
    with Shapes() as shapes:
        head(kind, hidden, weight, None, ids, mask, None)
    assert shapes.positions(11) == {4, 2}
    with Shapes() as shapes:
        head(kind, hidden, torch.zeros(100, 1), None, ids, mask, None)
    assert shapes.positions(100) == {4, 2}  # at least four


@kinds
@pytest.mark.parametrize("chunk", [0, -3])
def test_a_chunk_has_at_least_1_position(kind: str, chunk: int) -> None:
    with pytest.raises(ValueError, match=f"chunk={chunk} must be at least 1"):
        head(kind, *inputs(Source(0, (1,), 2)), chunk)


@kinds
def test_the_head_of_a_low_precision_model_gives_float32(kind: str) -> None:
    hidden, weight, bias, ids, mask = inputs(Source(3, (2,), 4))
    low = [x.to(torch.bfloat16).requires_grad_() for x in (hidden, weight, bias)]
    out = head(kind, *low, ids, mask, 2)
    assert out.dtype == torch.float32
    for x, grad in zip(low, torch.autograd.grad(out.sum(), low)):
        assert grad.dtype == x.dtype


@kinds
def test_nothing_to_count(kind: str) -> None:
    hidden, weight, bias, ids, _ = inputs(Source(0, (2,), 3))
    weight.requires_grad_()
    out = head(kind, hidden, weight, bias, ids, torch.zeros(2, 3, dtype=torch.bool), 2)
    assert out.tolist() == [[0] * 3] * 2
    assert not torch.autograd.grad(out.sum(), weight)[0].any()


@pytest.mark.parametrize("half", [False, True])
def test_head_computes_backward_as_forward_under_autocast(half: bool) -> None:
    torch.manual_seed(0)
    ids, mask = torch.randint(0, 11, (3, 6)), torch.rand(3, 6) > 0.3
    hidden, weight = torch.randn(3, 6, 8), torch.randn(11, 8)
    grads = []
    for chunked in (False, True):
        h = (hidden.bfloat16() if half else hidden).clone().requires_grad_()
        w = weight.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if chunked:
                out = head_logps(h, Head(w), ids, mask, chunk=4)
            else:
                out = token_logps(torch.nn.functional.linear(h, w), ids, mask)
        out.sum().backward()
        grads.append((out, h.grad, w.grad))
    (a, dh, dw), (b, eh, ew) = grads
    torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    torch.testing.assert_close(dh, eh, atol=1e-2, rtol=2e-2)
    torch.testing.assert_close(dw, ew, atol=3e-2, rtol=2e-2)
    assert (dh.dtype, dw.dtype) == (eh.dtype, ew.dtype)


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, weight = torch.randn(2, 5, 4, requires_grad=True), torch.randn(7, 4)
    ids, mask = torch.zeros(2, 5, dtype=torch.long), torch.ones(2, 5, dtype=torch.bool)
    head_logps(hidden, Head(weight), ids, mask, chunk=3).sum().backward()
    assert weight.grad is None
    assert hidden.grad[:, :-1].abs().sum() > 0
    hidden, weight = hidden.detach(), weight.requires_grad_()
    head_logps(hidden, Head(weight), ids, mask, chunk=3).sum().backward()
    assert hidden.grad is None
    assert weight.grad.abs().sum() > 0


# what a head can be, and what can be asked of it

HEADS = st.builds(
    lambda scale, softcap: {"scale": scale, "softcap": softcap},
    st.sampled_from((1.0, 0.25, 3.0)),
    st.sampled_from((None, 0.5, 30.0)),
)


def gradients(out: Tensor, cotangent: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad((out * cotangent).sum(), leaves, materialize_grads=True, retain_graph=True)


@given(source=sources(), chunk=st.sampled_from(CHUNKS), form=HEADS, temperature=st.sampled_from((1.0, 0.7)))
def test_scale_softcap_and_temperature(source: Source, chunk: int, form: dict[str, Any], temperature: float) -> None:
    hidden, weight, bias, ids, mask = inputs(source)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    spec = Sampling(temperature=temperature)
    logits = form["scale"] * (hidden @ weight.T + bias)
    if form["softcap"]:
        logits = form["softcap"] * (logits / form["softcap"]).tanh()
    cotangent = source.tokens()
    head = Head(weight, bias, **form)
    for got, expected in (
        (head_logps(hidden, head, ids, mask, sampling=spec, chunk=chunk), token_logps(logits / temperature, ids, mask)),
        (head_entropy(hidden, head, mask, sampling=spec, chunk=chunk), entropy(logits / temperature, mask)),
    ):
        torch.testing.assert_close(got, expected, **CLOSE)
        torch.testing.assert_close(
            gradients(got, cotangent, *leaves), gradients(expected, cotangent, *leaves), rtol=1e-11, atol=1e-11
        )


@given(source=sources(), chunk=st.sampled_from(CHUNKS))
def test_the_backward_pass_written_out_is_that_of_autograd(source: Source, chunk: int) -> None:
    """One graph is differentiated in place, the other with a graph of its own."""
    hidden, weight, bias, ids, mask = inputs(source)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    cotangent = source.tokens()
    for wanted in (leaves, leaves[:1], leaves[1:2], leaves[2:]):
        out = head_logps(hidden, Head(weight, bias, 0.5), ids, mask, chunk=chunk)
        torch.testing.assert_close(
            torch.autograd.grad((out * cotangent).sum(), wanted, retain_graph=True),
            torch.autograd.grad((out * cotangent).sum(), wanted, create_graph=True),
            rtol=1e-11,
            atol=1e-11,
        )


@given(source=sources(), chunk=st.sampled_from(CHUNKS), form=HEADS)
def test_candidates(source: Source, chunk: int, form: dict[str, Any]) -> None:
    hidden, weight, bias, _, mask = inputs(source)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    head = Head(weight, bias, **form)
    logits = head.logits(hidden)
    top = head_top_candidates(hidden, head, mask, k=2, chunk=chunk)
    assert torch.equal(top, top_candidates(logits, mask, k=2))
    got, expected = head_candidate_logps(hidden, head, top, mask, chunk=chunk), candidate_logps(logits, top, mask)
    torch.testing.assert_close(got, expected, **CLOSE)
    cotangent = source.tokens(2)
    torch.testing.assert_close(
        gradients(got, cotangent, hidden, weight),
        gradients(expected, cotangent, hidden, weight),
        rtol=1e-11,
        atol=1e-11,
    )


@pytest.mark.parametrize("divergence", [reverse_kl, lambda a, b: jsd(a, b, beta=0.3)], ids=["reverse_kl", "jsd"])
@given(source=sources(), chunk=st.sampled_from(CHUNKS))
def test_divergences_of_two_heads(divergence: Any, source: Source, chunk: int) -> None:
    hidden, weight, bias, _, mask = inputs(source)
    teacher, other = source.tokens(DIM + 1), source.real(VOCAB, DIM + 1)
    leaves = [x.requires_grad_() for x in (hidden, weight, teacher, other)]
    head, teacher_head = Head(weight, bias), Head(other, None, 2.0)
    got = head_divergence(hidden, head, teacher, teacher_head, mask, divergence=divergence, chunk=chunk)
    logps = [vocab_logps(h.logits(x), mask) for h, x in ((head, hidden), (teacher_head, teacher))]
    counted = torch.cat([torch.zeros_like(mask[..., :1]), mask[..., 1:]], -1)
    expected = torch.where(counted, divergence(*logps), 0)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    cotangent = source.tokens()
    torch.testing.assert_close(
        gradients(got, cotangent, *leaves), gradients(expected, cotangent, *leaves), rtol=1e-10, atol=1e-10
    )


def test_a_divergence_needs_one_vocabulary() -> None:
    hidden, mask = torch.zeros(1, 2, DIM), torch.ones(1, 2, dtype=torch.bool)
    heads_ = Head(torch.zeros(3, DIM)), Head(torch.zeros(4, DIM))
    with pytest.raises(ValueError, match="teacher_head has a vocabulary of 4 tokens, head one of 3"):
        head_divergence(hidden, heads_[0], hidden, heads_[1], mask, divergence=reverse_kl)


@given(source=sources(), chunk=st.sampled_from(CHUNKS), top_k=st.sampled_from((0, 2)))
def test_rows_are_positions_without_an_order(source: Source, chunk: int, top_k: int) -> None:
    hidden, weight, bias, ids, mask = inputs(source)
    head, spec = Head(weight, bias), Sampling(temperature=0.7, top_k=top_k)
    counted = mask[..., 1:]
    x, targets = hidden[..., :-1, :][counted], ids[..., 1:][counted]
    expected = head_logps(hidden, head, ids, mask, sampling=spec)[..., 1:][counted]
    torch.testing.assert_close(row_logps(x, head, targets, sampling=spec, chunk=chunk), expected, **CLOSE)
    both = row_measures(x, head, targets, sampling=spec, chunk=chunk)
    torch.testing.assert_close(both[0], expected, **CLOSE)
    torch.testing.assert_close(both[1], head_entropy(hidden, head, mask, sampling=spec)[..., 1:][counted], **CLOSE)
