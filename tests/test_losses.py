import inspect
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch.nn.functional import cross_entropy

from alignkit.logps import token_logps, vocab_mean_logps
from alignkit.losses.policy import clip_fraction, clipped_surrogate, reinforce
from alignkit.losses.preference import dpo, hinge, ipo, kto_pair
from alignkit.losses.reward import bradley_terry, centering
from alignkit.losses.supervised import nll, smoothed_nll
from alignkit.losses.value import clipped_value, squared, value_clip_fraction
from tests.strategies import VOCAB, Source, sources

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def real(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def slope(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The derivative of an element-wise function."""
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(fn(x).sum(), x)[0]


unchecked = inspect.unwrap  # what a user meets: without the checker of types that the suite runs under


# policy


def test_reinforce_by_hand() -> None:
    assert reinforce(real(-1, -2, -3), real(2, -1, 0)).tolist() == [2, -2, 0]


@given(source=sources())
def test_on_policy_gradient_of_the_surrogate_is_that_of_reinforce(source: Source) -> None:
    logps, advantages = source.logps(), source.tokens()
    surrogate = slope(lambda x: clipped_surrogate(x, logps, advantages), logps)
    torch.testing.assert_close(surrogate, slope(lambda x: reinforce(x, advantages), logps), **CLOSE)
    torch.testing.assert_close(surrogate, -advantages, **CLOSE)


@given(source=sources(fills=("plain", "ties")))
def test_the_surrogate_is_pessimistic(source: Source) -> None:
    """Never below the unclipped loss, and equal to it wherever clipping would help."""
    logps, old, advantages = source.logps(), source.logps(), source.tokens()
    unclipped = -(logps - old).exp() * advantages
    loss = clipped_surrogate(logps, old, advantages, low=0.1, high=0.3)
    assert (loss >= unclipped).all()
    active = clip_fraction(logps, old, advantages, low=0.1, high=0.3)
    torch.testing.assert_close(loss[~active], unclipped[~active], **CLOSE)
    assert (loss[active] > unclipped[active]).all()


def test_two_sided_bounds_by_hand() -> None:
    ratios = real(0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5)
    loss = {a: clipped_surrogate(ratios.log(), torch.zeros(7), a * torch.ones(7), low=0.5, high=1.0) for a in (1, -1)}
    assert loss[1].tolist() == pytest.approx([-0.25, -0.5, -0.75, -1, -1.5, -2, -2], rel=1e-14)
    assert loss[-1].tolist() == pytest.approx([0.5, 0.5, 0.75, 1, 1.5, 2, 2.5], rel=1e-14)


def test_at_the_bounds_nothing_is_clipped_yet() -> None:
    zero, one = real(0.0), real(1.0)  # a ratio of exactly 1 against bounds that touch it
    for advantages in (one, -one):
        assert not clip_fraction(zero, zero, advantages, low=0.0, high=0.0).any()
    above, below = real(2.0).log(), real(0.5).log()
    assert above.exp().item() == 2.0
    assert below.exp().item() == 0.5
    assert not clip_fraction(above, zero, one, low=0.5, high=1.0).any()
    assert not clip_fraction(below, zero, -one, low=0.5, high=1.0).any()
    assert clip_fraction(above + 1e-9, zero, one, low=0.5, high=1.0).all()
    assert clip_fraction(below - 1e-9, zero, -one, low=0.5, high=1.0).all()


def test_ratios_keep_their_precision() -> None:
    old = real(-1.3)  # not a float32
    logps = old + math.log(2) + 1e-9
    assert clip_fraction(logps, old, real(1.0), low=0.5, high=1.0).all()
    assert not clip_fraction(logps - 2e-9, old, real(1.0), low=0.5, high=1.0).any()


@given(source=sources())
def test_clip_fraction_is_where_the_gradient_is_0(source: Source) -> None:
    logps, old, advantages = source.logps(), source.logps(), source.tokens()
    bounds = {"low": 0.1, "high": 0.3}
    flat = slope(lambda x: clipped_surrogate(x, old, advantages, **bounds), logps) == 0
    clipped = clip_fraction(logps, old, advantages, **bounds)
    assert torch.equal(flat & (advantages != 0), clipped)
    assert clipped.dtype == torch.bool


def test_the_bounds_of_the_ratio_are_0_2_unless_told() -> None:
    for fn in (clipped_surrogate, clip_fraction):
        for ratio in (0.75, 0.85, 1.15, 1.25):
            for sign in (1.0, -1.0):
                args = real(ratio).log(), real(0.0), real(sign)
                assert fn(*args).item() == fn(*args, low=0.2, high=0.2).item()
                assert fn(*args).item() == fn(*args, low=real(0.2), high=real(0.2)).item()


def test_without_an_advantage_nothing_is_clipped() -> None:
    assert clip_fraction(real(5, -5), real(0, 0), real(0, 0)).tolist() == [False, False]


# values


def test_squared_by_hand() -> None:
    assert squared(real(3, 1), real(1, 1)).tolist() == [2, 0]


def test_clipped_value_by_hand() -> None:
    values, old, returns = real(5, 5, -5, 0.25, 1), real(0, 0, 0, 0, 0), real(0, 5, 1, 9, 1)
    assert clipped_value(values, old, returns, clip=1.0).tolist() == [12.5, 8, 18, 0.5 * 8.75**2, 0]
    assert value_clip_fraction(values, old, returns, clip=1.0).tolist() == [False, True, False, False, False]
    assert clipped_value(values, old, returns, clip=real(10, 5, 1, 1, 0.5)).tolist() == [
        12.5,
        0,
        18,
        0.5 * 8.75**2,
        0.125,
    ]


@given(source=sources())
def test_the_clipped_value_loss_is_never_below_the_plain_one(source: Source) -> None:
    values, old, returns = source.tokens(), source.tokens(), source.tokens()
    loss, plain = clipped_value(values, old, returns, clip=0.3), squared(values, returns)
    active = value_clip_fraction(values, old, returns, clip=0.3)
    assert (loss >= plain).all()
    assert torch.equal(active, loss > plain)
    assert active.dtype == torch.bool
    gradient = slope(lambda x: clipped_value(x, old, returns, clip=0.3), values)
    assert not gradient[active].any()
    inside = (values - old).abs() < 0.3
    torch.testing.assert_close(gradient[inside], (values - returns)[inside], **CLOSE)


# preference pairs


@given(source=sources())
def test_dpo_and_its_mirror_differ_by_the_reward(source: Source) -> None:
    margin = source.tokens()
    torch.testing.assert_close(dpo(margin, beta=0.3) - dpo(-margin, beta=0.3), -0.3 * margin, **CLOSE)


@given(source=sources())
def test_dpo_is_the_bradley_terry_likelihood(source: Source) -> None:
    margin = source.tokens()
    torch.testing.assert_close((-dpo(margin, beta=0.3)).exp(), (0.3 * margin).sigmoid(), **CLOSE)
    torch.testing.assert_close(slope(lambda m: dpo(m, beta=0.3), margin), -0.3 * (-0.3 * margin).sigmoid(), **CLOSE)


@given(source=sources())
def test_smoothing_mixes_the_two_labels(source: Source) -> None:
    margin, s = source.tokens(), float(source.uniform(0, 0.5, 1))
    mixed = (1 - s) * dpo(margin, beta=0.3) + s * dpo(-margin, beta=0.3)
    torch.testing.assert_close(dpo(margin, beta=0.3, smoothing=s), mixed, **CLOSE)
    torch.testing.assert_close(dpo(margin, beta=0.3, smoothing=s), dpo(margin, beta=0.3) + 0.3 * s * margin, **CLOSE)


def test_cdpo_is_stationary_where_the_model_believes_the_label_noise() -> None:
    best = real(math.log(0.9 / 0.1)) / 0.5  # sigmoid(beta margin) = 1 - smoothing
    assert slope(lambda m: dpo(m, beta=0.5, smoothing=0.1), best).item() == pytest.approx(0, abs=1e-15)


def test_dpo_at_0_and_far_out() -> None:
    assert dpo(real(0), beta=0.1).item() == pytest.approx(math.log(2))
    assert dpo(real(1e4, -1e4), beta=1.0).tolist() == [0, 1e4]


def test_hinge_has_its_kink_at_1_over_beta() -> None:
    assert hinge(real(0, 1, 2, 3, -1), beta=0.5).tolist() == [1, 0.5, 0, 0, 1.5]
    assert slope(lambda m: hinge(m, beta=0.5), real(1.999, 2.001)).tolist() == [-0.5, 0]


def test_ipo_is_stationary_at_half_of_1_over_beta_with_curvature_2() -> None:
    assert ipo(real(0, 5, 6), beta=0.1).tolist() == [25, 0, 1]
    assert slope(lambda m: ipo(m, beta=0.1), real(4, 5, 6)).tolist() == [-2, 0, 2]


@pytest.mark.parametrize("loss", [dpo, hinge, ipo])
def test_beta_may_be_given_per_pair(loss: Callable[..., Tensor]) -> None:
    margin, betas = real(1, -2, 0.5), real(0.1, 0.5, 2)
    got = loss(margin, beta=betas)
    assert got.tolist() == [loss(m, beta=b.item()).item() for m, b in zip(margin, betas)]


def test_kto_compares_each_answer_with_the_reference_point_of_the_other() -> None:
    log_ratios, kl = real(1, -2), real(0.25, 3)
    got = kto_pair(log_ratios, kl, beta=0.5)
    chosen, rejected = 1 / (1 + math.exp(-0.5 * (1 - 3))), 1 / (1 + math.exp(-0.5 * (0.25 + 2)))
    assert got.tolist() == pytest.approx([1 - chosen, 1 - rejected], rel=1e-14)


@given(source=sources())
def test_kto_rewards_chosen_and_punishes_rejected_answers(source: Source) -> None:
    log_ratios, kl = source.rows(2), source.rows(2).abs()
    gradient = slope(lambda r: kto_pair(r, kl, beta=0.1), log_ratios)
    assert (gradient[..., 0] < 0).all()
    assert (gradient[..., 1] > 0).all()
    loss = kto_pair(log_ratios, kl, beta=0.1)
    assert ((loss > 0) & (loss < 1)).all()
    mirrored = kto_pair(-log_ratios.flip(-1), -kl.flip(-1), beta=0.1)
    torch.testing.assert_close(mirrored, loss.flip(-1), **CLOSE)


# reward models


def test_bradley_terry_by_hand() -> None:
    chosen, rejected = real(1, 2), real(0, 2.5)
    wins = [1 / (1 + math.exp(-1)), 1 / (1 + math.exp(0.5))]
    assert bradley_terry(chosen, rejected).tolist() == pytest.approx([-math.log(w) for w in wins], rel=1e-14)
    wins = [1 / (1 + math.exp(-0.25)), 1 / (1 + math.exp(1.25))]
    for margin in (0.75, real(0.75, 0.75)):
        got = bradley_terry(chosen, rejected, margin=margin)
        assert got.tolist() == pytest.approx([-math.log(w) for w in wins], rel=1e-14)


def test_a_margin_may_be_a_tensor_without_axes() -> None:
    chosen, rejected, margin = real(1, 2), real(0, 2.5), torch.tensor(0.75)
    assert torch.equal(bradley_terry(chosen, rejected, margin=margin), bradley_terry(chosen, rejected, margin=0.75))


@given(source=sources())
def test_only_the_difference_of_rewards_matters(source: Source) -> None:
    chosen, rejected = source.tokens(), source.tokens()
    torch.testing.assert_close(bradley_terry(chosen + 3, rejected + 3), bradley_terry(chosen, rejected), **CLOSE)
    torch.testing.assert_close(bradley_terry(chosen, rejected), dpo(chosen - rejected, beta=1.0), **CLOSE)
    with_margin = bradley_terry(chosen, rejected, margin=0.5)
    torch.testing.assert_close(with_margin, bradley_terry(chosen - 0.5, rejected), **CLOSE)
    assert (with_margin > bradley_terry(chosen, rejected)).all()


@pytest.mark.parametrize(
    ("chosen", "rejected", "margin"),
    [((3,), (3, 1), ()), ((3, 1), (3,), ()), ((3, 1), (3, 1), (3,)), ((3,), (3,), (1,))],
)
def test_rewards_are_not_compared_crosswise(
    chosen: tuple[int, ...], rejected: tuple[int, ...], margin: tuple[int, ...]
) -> None:
    shapes = [s for s in (chosen, rejected, margin) if s]
    with pytest.raises(ValueError, match="chosen, rejected and margin must have one shape") as error:
        unchecked(bradley_terry)(torch.zeros(chosen), torch.zeros(rejected), margin=torch.zeros(margin))
    assert str(shapes) in str(error.value)


def test_centering_is_the_squared_sum() -> None:
    assert centering(real(1, 2), real(3, -2)).tolist() == [16, 0]
    with pytest.raises(ValueError, match=r"chosen and rejected must have one shape, not \(3,\), \(3, 1\)"):
        unchecked(centering)(torch.zeros(3), torch.zeros(3, 1))


# demonstrations


@given(source=sources())
def test_smoothed_nll_is_cross_entropy_against_smoothed_labels(source: Source) -> None:
    logits, ids = source.real(4, VOCAB), source.integer(0, VOCAB, 4)
    mask = torch.tensor([False, True, True, True])
    chosen, mean = token_logps(logits, ids, mask), vocab_mean_logps(logits, mask)
    for s in (0.0, 0.1, 0.7):
        expected = cross_entropy(logits[:-1], ids[1:], label_smoothing=s, reduction="none")
        torch.testing.assert_close(smoothed_nll(chosen, mean, smoothing=s)[1:], expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(nll(chosen)[1:], cross_entropy(logits[:-1], ids[1:], reduction="none"))


def test_smoothing_by_hand() -> None:
    assert nll(real(-1, -2)).tolist() == [1, 2]
    assert smoothed_nll(real(-1), real(-3), smoothing=0.25).item() == 1.5
    assert smoothed_nll(real(-1, -1), real(-3, -3), smoothing=real(0, 1)).tolist() == [1, 3]
