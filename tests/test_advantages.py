import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from alignkit.advantages import (
    discounted_returns,
    entropy_shaped,
    gae,
    gdpo,
    gigpo,
    group_center,
    group_center_by,
    group_mean_batch_std,
    group_normalize,
    group_normalize_by,
    leave_one_out,
    leave_one_out_normalize,
    logit_gradient_proxy,
    monte_carlo,
    next_values,
    on_policy_distillation,
    opo,
    opo_leave_one_out,
    optimal_token_baseline,
    reinforce_plus_plus,
    reinforce_plus_plus_baseline,
    remax,
    role_conditioned,
    turn_level,
)
from alignkit.objectives import best_minus_second, max_at_k, max_at_k_gain, max_rl, max_rl_uncentered
from alignkit.testing.strategies import Source, sources

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
factors = st.sampled_from([0.0, 0.3, 0.9, 1.0])


def reference(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[list[float], list[float]]:
    """One row, backwards, over True positions only."""
    advantages, returns = [0.0] * len(mask), [0.0] * len(mask)
    next_value = next_advantage = 0.0
    for t in reversed(range(len(mask))):
        if mask[t]:
            value = float(values[t])
            delta = float(rewards[t]) + gamma * next_value - value
            advantages[t] = next_advantage = delta + gamma * lam * next_advantage
            returns[t], next_value = advantages[t] + value, value
    return advantages, returns


@given(source=sources(max_time=11), gamma=factors, lam=factors)
def test_gae_is_the_loop_over_true_positions(source: Source, gamma: float, lam: float) -> None:
    rewards, values, mask = source.tokens(), source.tokens(), source.mask()
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    rows = [x.reshape(-1, source.time) for x in (rewards, values, mask)]
    expected = [reference(r, v, m, gamma, lam) for r, v, m in zip(*rows)]
    for got, wanted in ((advantages, [a for a, _ in expected]), (returns, [r for _, r in expected])):
        torch.testing.assert_close(got.reshape(-1, source.time), torch.tensor(wanted, dtype=torch.float64), **CLOSE)


def test_gae_by_hand() -> None:
    rewards = torch.tensor([[1.0, 99.0, 2.0, 99.0]], dtype=torch.float64)
    values = torch.tensor([[4.0, 99.0, 8.0, 99.0]], dtype=torch.float64)
    mask = torch.tensor([[True, False, True, False]])
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=0.5)
    # d_2 = 2 - 8 = -6, d_0 = 1 + 0.5 * 8 - 4 = 1, A_0 = 1 + 0.25 * -6
    assert advantages.tolist() == [[-0.5, 0, -6, 0]]
    assert returns.tolist() == [[3.5, 0, 2, 0]]


@given(source=sources(), gamma=factors)
def test_gae_with_lambda_1_is_monte_carlo_minus_values(source: Source, gamma: float) -> None:
    rewards, values, mask = source.tokens(), source.tokens(), source.mask()
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=1.0)
    monte_carlo = discounted_returns(rewards, mask, gamma=gamma)
    torch.testing.assert_close(returns, monte_carlo, **CLOSE)
    torch.testing.assert_close(advantages, monte_carlo - torch.where(mask, values, 0), **CLOSE)


@given(source=sources(), gamma=factors)
def test_gae_with_lambda_0_is_the_td_error(source: Source, gamma: float) -> None:
    rewards, values = source.tokens(), source.tokens()
    advantages, _ = gae(rewards, values, torch.ones_like(rewards, dtype=torch.bool), gamma=gamma, lam=0.0)
    following = torch.cat([values[..., 1:], torch.zeros_like(values[..., :1])], -1)
    torch.testing.assert_close(advantages, rewards + gamma * following - values, **CLOSE)


@given(source=sources(), gamma=factors, lam=factors)
def test_holes_are_stepped_over(source: Source, gamma: float, lam: float) -> None:
    rewards, values, mask = source.real(source.time), source.real(source.time), source.mask(source.time)
    with_holes = gae(rewards, values, mask, gamma=gamma, lam=lam)
    squeezed = gae(rewards[mask], values[mask], mask[mask], gamma=gamma, lam=lam) if mask.any() else ([], [])
    for wide, tight in zip(with_holes, squeezed):
        torch.testing.assert_close(wide[mask].tolist(), torch.as_tensor(tight).tolist(), **CLOSE)


@given(source=sources(), gamma=factors)
def test_discounted_returns_by_the_definition(source: Source, gamma: float) -> None:
    rewards, mask = source.real(source.time), source.mask(source.time)
    got, chosen = discounted_returns(rewards, mask, gamma=gamma), rewards[mask].tolist()
    expected = [sum(gamma**k * r for k, r in enumerate(chosen[i:])) for i in range(len(chosen))]
    torch.testing.assert_close(got[mask].tolist(), expected, **CLOSE)
    assert not got[~mask].any()


def test_gamma_and_lambda_may_be_tensors() -> None:
    source = Source(0, (3,), 5)
    rewards, values, mask = source.tokens(), source.tokens(), source.mask()
    gammas, lams = torch.tensor([[0.0], [0.5], [1.0]]), torch.tensor([[1.0], [0.25], [0.5]])
    together = gae(rewards, values, mask, gamma=gammas, lam=lams)
    returns = discounted_returns(rewards, mask, gamma=gammas)
    for i, (gamma, lam) in enumerate(zip(gammas.flatten().tolist(), lams.flatten().tolist())):
        alone = gae(rewards[i], values[i], mask[i], gamma=gamma, lam=lam)
        torch.testing.assert_close([x[i] for x in together], list(alone), **CLOSE)
        torch.testing.assert_close(returns[i], discounted_returns(rewards[i], mask[i], gamma=gamma), **CLOSE)


def test_gamma_and_lambda_may_change_along_time() -> None:
    source = Source(2, (4,), 9)
    rewards, values, mask = source.tokens(), source.tokens(), source.mask()
    gammas, lams = source.uniform(0.0, 1.0, 4, 9), source.uniform(0.0, 1.0, 9)
    got, returns = gae(rewards, values, mask, gamma=gammas, lam=lams)
    for row in range(4):
        later_advantage = later_value = 0.0
        for t in reversed(range(9)):
            if not mask[row, t]:
                assert got[row, t] == returns[row, t] == 0
                continue
            delta = rewards[row, t] + gammas[row, t] * later_value - values[row, t]
            later_advantage = delta + gammas[row, t] * lams[t] * later_advantage
            later_value = values[row, t]
            torch.testing.assert_close(got[row, t], later_advantage, **CLOSE)
            torch.testing.assert_close(returns[row, t], later_advantage + later_value, **CLOSE)


@pytest.mark.parametrize("time", [257, 320, 333])
def test_long_rows_are_the_loop_too(time: int) -> None:
    source = Source(time, (2, 2), time)
    rewards, values, mask = source.tokens(), source.tokens(), source.mask()
    got = gae(rewards, values, mask, gamma=0.99, lam=0.9)
    rows = [x.reshape(-1, time) for x in (rewards, values, mask)]
    expected = zip(*(reference(r, v, m, 0.99, 0.9) for r, v, m in zip(*rows)))
    for x, wanted in zip(got, expected):
        torch.testing.assert_close(
            x.reshape(-1, time), torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=1e-12
        )
    mapped = torch.func.vmap(partial(gae, gamma=0.99, lam=0.9))(rewards, values, mask)
    for x, y in zip(mapped, got):
        torch.testing.assert_close(x, y, **CLOSE)


def test_long_rows_have_the_gradients_of_the_definition() -> None:
    source = Source(0, (1,), 300)
    rewards, mask, weights = source.tokens().requires_grad_(), source.mask(), source.tokens()
    gamma = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    place = mask.cumsum(-1)
    powers = torch.where(mask & mask.mT & (place >= place.mT), gamma ** (place - place.mT).clamp(min=0), 0)
    losses = ((powers @ rewards[0]) * weights).sum(), (discounted_returns(rewards, mask, gamma=gamma) * weights).sum()
    wanted, got = (torch.autograd.grad(loss, (rewards, gamma)) for loss in losses)
    torch.testing.assert_close(got, wanted, **CLOSE)


def test_a_tensor_gamma_takes_the_dtype_of_the_rest() -> None:
    rewards, mask = torch.ones(1, 3), torch.ones(1, 3, dtype=torch.bool)
    half = torch.tensor([[0.5]], dtype=torch.float64)
    assert {x.dtype for x in gae(rewards, rewards, mask, gamma=half, lam=half)} == {torch.float32}
    assert discounted_returns(rewards, mask, gamma=half).tolist() == [[1.75, 1.5, 1.0]]
    third = torch.tensor(1 / 3, dtype=torch.float64)
    for kinds in ((torch.float64, torch.float32), (torch.float32, torch.float64)):
        data = [rewards.to(kind) for kind in kinds]
        got = gae(*data, mask, gamma=third, lam=1.0)[1]
        torch.testing.assert_close(got, gae(*data, mask, gamma=1 / 3, lam=1.0)[1], **CLOSE)
        assert got.dtype == torch.float64


def test_gae_sweeps_over_gamma_with_vmap_and_differentiates_in_it() -> None:
    source = Source(1, (2,), 5)
    rewards, values, mask = source.tokens(), source.tokens(), source.mask()
    gammas = torch.tensor([0.3, 0.9], dtype=torch.float64)
    swept = torch.func.vmap(lambda g: gae(rewards, values, mask, gamma=g, lam=0.5))(gammas)
    for i, gamma in enumerate(gammas.tolist()):
        one = gae(rewards, values, mask, gamma=gamma, lam=0.5)
        torch.testing.assert_close([x[i] for x in swept], list(one), **CLOSE)
    factor = gammas[1].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda g: gae(rewards, values, mask, gamma=g, lam=0.5), factor)
    assert torch.autograd.gradcheck(lambda g: gae(rewards, values, mask, gamma=0.5, lam=g), factor)
    assert torch.autograd.gradcheck(lambda g: discounted_returns(rewards, mask, gamma=g), factor)


def test_advantages_stay_finite_over_long_rows() -> None:
    rewards = torch.ones(1, 5000, dtype=torch.float64)
    got = discounted_returns(rewards, rewards > 0, gamma=0.999)
    assert got[0, 0].item() == pytest.approx((1 - 0.999**5000) / 0.001, rel=1e-10)
    assert discounted_returns(rewards, rewards > 0, gamma=1.0)[0].tolist() == list(range(5000, 0, -1))


# groups


def test_baselines_by_hand() -> None:
    rewards = torch.tensor([[1.0, 2.0, 6.0], [5.0, 5.0, 5.0]], dtype=torch.float64)
    assert group_center(rewards).tolist() == [[-2, -1, 3], [0, 0, 0]]
    assert leave_one_out(rewards).tolist() == [[-3, -1.5, 4.5], [0, 0, 0]]
    std = math.sqrt(7)
    expected = [[-2 / (std + 1e-4), -1 / (std + 1e-4), 3 / (std + 1e-4)], [0, 0, 0]]
    assert group_normalize(rewards).tolist() == [pytest.approx(row, rel=1e-14) for row in expected]
    std = math.sqrt(14 / 3)
    population = group_normalize(rewards, correction=0, eps=0.5)
    assert population[0].tolist() == pytest.approx([-2 / (std + 0.5), -1 / (std + 0.5), 3 / (std + 0.5)], rel=1e-14)


@given(source=sources())
def test_leave_one_out_subtracts_the_mean_of_the_others(source: Source) -> None:
    rewards = source.rows(size := source.time + 1)
    got = leave_one_out(rewards)
    torch.testing.assert_close(got, group_center(rewards) * size / (size - 1), **CLOSE)
    for i in range(size):
        others = [j for j in range(size) if j != i]
        torch.testing.assert_close(got[..., i], rewards[..., i] - rewards[..., others].mean(-1), **CLOSE)


@given(source=sources(fills=("plain", "wide")))
def test_group_normalize_ignores_scale_and_shift(source: Source) -> None:
    rewards = source.rows(source.time + 2)
    base = group_normalize(rewards, eps=0.0)
    torch.testing.assert_close(group_normalize(3 * rewards + 7, eps=0.0), base, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(group_normalize(-2 * rewards, eps=0.0), -base, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(base.std(-1), torch.ones(source.lead, dtype=torch.float64))
    population = group_normalize(rewards, correction=0, eps=0.0)
    torch.testing.assert_close(population.std(-1, correction=0), torch.ones(source.lead, dtype=torch.float64))


@given(source=sources())
def test_baselines_keep_the_sum_at_0(source: Source) -> None:
    rewards = source.rows(source.time + 1)
    for baseline in (group_center, group_normalize, leave_one_out):
        zero = torch.zeros(source.lead, dtype=torch.float64)
        torch.testing.assert_close(baseline(rewards).sum(-1), zero, atol=1e-9, rtol=0)


@pytest.mark.parametrize("baseline", [group_center, group_normalize, leave_one_out])
def test_a_constant_group_gives_0(baseline: Callable[[Tensor], Tensor]) -> None:
    assert baseline(torch.full((2, 4), 0.25)).tolist() == [[0] * 4] * 2
    assert baseline(torch.full((2, 4), 3)).tolist() == [[0] * 4] * 2


@pytest.mark.parametrize("baseline", [group_normalize, leave_one_out])
@pytest.mark.parametrize("shape", [(3, 1), (1,), (2, 0)])
def test_a_group_of_one_raises(baseline: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="needs at least 2 per group on the last axis") as error:
        baseline(torch.ones(shape))
    assert str(shape) in str(error.value)
    assert baseline.__name__ in str(error.value)


def test_a_group_of_two_is_enough() -> None:
    rewards = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert leave_one_out(rewards).tolist() == [-1, 1]
    assert group_normalize(rewards, eps=0.0).tolist() == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5)])


def test_next_values_by_hand() -> None:
    mask = torch.tensor([False, True, False, True, True, False])
    values = torch.tensor([9, 1, 9, 2, 3, 9])
    assert next_values(values, mask).tolist() == [0, 2, 0, 3, 0, 0]
    assert next_values(values, ~mask & mask).tolist() == [0] * 6


# scale and baseline


def test_group_mean_batch_std_by_hand() -> None:
    rewards = torch.tensor([[1.0, 3.0], [4.0, 8.0]], dtype=torch.float64)
    # mean 4, squares 9 + 1 + 0 + 16 = 26
    std = math.sqrt(26 / 3) + 0.5
    expected = [pytest.approx([-1 / std, 1 / std]), pytest.approx([-2 / std, 2 / std])]
    assert group_mean_batch_std(rewards, eps=0.5).tolist() == expected
    std = math.sqrt(26 / 4) + 1e-4
    assert group_mean_batch_std(rewards, correction=0)[1].tolist() == pytest.approx([-2 / std, 2 / std], rel=1e-12)


def test_reinforce_plus_plus_by_hand() -> None:
    rewards = torch.tensor([[1.0, 99.0, 2.0], [4.0, 0.0, 99.0]], dtype=torch.float64)
    mask = torch.tensor([[True, False, True], [True, True, False]])
    got = reinforce_plus_plus(rewards, mask, gamma=0.5, correction=0, eps=1.0)
    # returns 2, 2 and 4, 0: mean 2, variance 2
    scale = 1 / math.sqrt(3)
    assert got.tolist() == [[0, 0, 0], pytest.approx([2 * scale, -2 * scale, 0])]
    undiscounted = reinforce_plus_plus(rewards, mask)
    # returns 3, 2, 4, 0: mean 2.25, squares 0.5625 + 0.0625 + 3.0625 + 5.0625 = 8.75
    assert undiscounted[1, 1].item() == pytest.approx(-2.25 / math.sqrt(8.75 / 3 + 1e-8), rel=1e-12)


def test_reinforce_plus_plus_baseline_by_hand() -> None:
    rewards = torch.tensor([1.0, 3.0], dtype=torch.float64)
    mask = torch.tensor([[True, True, True], [False, True, False]])
    # -1 three times and 1 once: mean -1/2, variance 3 (1/4) + 9/4 = 3 over 4 or 3
    got = reinforce_plus_plus_baseline(rewards, mask, correction=0, eps=0.25)
    assert got.tolist() == [pytest.approx([-0.5] * 3), pytest.approx([0, 1.5, 0])]
    assert reinforce_plus_plus_baseline(rewards, mask)[1, 1].item() == pytest.approx(
        1.5 / math.sqrt(1 + 1e-8), rel=1e-12
    )


def test_monte_carlo_by_hand() -> None:
    rewards = torch.tensor([[1.0, 2.0, 99.0], [99.0, 4.0, 2.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [False, True, True]])
    # returns 2, 2 and 5, 2: mean 11 / 4
    assert monte_carlo(rewards, mask, gamma=0.5).tolist() == [[-0.75, -0.75, 0], [0, 2.25, -0.75]]


def test_optimal_token_baseline_by_hand() -> None:
    rewards = torch.tensor([[0.0, 6.0, 99.0, 99.0], [1.0, 99.0, 2.0, 4.0]], dtype=torch.float64)
    energy = torch.tensor([[1.0, 2.0, 99.0, 99.0], [3.0, 99.0, 6.0, 1.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False, False], [True, False, True, True]])
    # tokens 1, 2, 3: returns 6, 6 and 7, 6, 4; weights 1, 3 and 3, 9, 10; baselines 27 / 4, 72 / 12, none
    assert optimal_token_baseline(rewards, energy, mask).tolist() == [[-0.75, 0, 0, 0], [0.25, 0, 0, 4]]


def test_optimal_token_baseline_weighs_by_what_came_before() -> None:
    rewards, ones = torch.tensor([[0.0, 1.0], [0.0, 5.0]]), torch.ones(2, 2, dtype=torch.bool)
    energy = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    # weights 1, 1 and 0, 1: the baseline is the first answer's, then the mean of both
    assert optimal_token_baseline(rewards, energy, ones).tolist() == [[0, -2], [4, 2]]
    assert optimal_token_baseline(rewards, 0 * energy, ones).tolist() == [[1, 1], [5, 5]]


def test_every_group_has_optimal_baselines_of_its_own() -> None:
    source = Source(0, (3,), 5)
    rewards, energy, mask = source.rows(4, 5), source.uniform(0.1, 2.0, 3, 4, 5), source.mask(3, 4, 5)
    alone = [optimal_token_baseline(rewards[i], energy[i], mask[i]) for i in range(3)]
    torch.testing.assert_close(optimal_token_baseline(rewards, energy, mask), torch.stack(alone), **CLOSE)


def test_the_last_answer_left_has_no_baseline() -> None:
    rewards, mask = torch.tensor([[3.0, 0.0, 2.0], [1.0, 0.0, 0.0]]), torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    assert optimal_token_baseline(rewards, torch.ones(2, 3), mask).tolist() == [[2, 2, 2], [-2, 0, 0]]
    assert optimal_token_baseline(rewards[:1], torch.ones(1, 3), mask[:1]).tolist() == [[5, 2, 2]]


def test_logit_gradient_proxy_by_hand() -> None:
    p = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    got = logit_gradient_proxy(p.log(), (p**2).sum().expand(3))
    # (1 - p_a)^2 plus the squares of the others
    assert got.tolist() == pytest.approx([0.25 + 0.125, 0.5625 + 0.3125, 0.5625 + 0.3125])


def test_on_policy_distillation_by_hand() -> None:
    got = on_policy_distillation(torch.tensor([-1.0, -3.0]), torch.tensor([-1.5, -0.5]))
    assert got.tolist() == [-0.5, 2.5]


def test_entropy_shaped_by_hand() -> None:
    advantages, entropy = torch.tensor([1.0, -1.0, 4.0, 0.0]), torch.tensor([9.0, 9.0, 2.0, 9.0])
    assert entropy_shaped(advantages, entropy, alpha=0.5).tolist() == [1.5, -0.5, 5, 0]
    assert entropy_shaped(advantages, entropy, alpha=0.5, kappa=1.0).tolist() == [2, 0, 5, 0]


def test_the_entropy_bonus_has_no_gradient() -> None:
    advantages, entropy = torch.tensor([4.0], requires_grad=True), torch.tensor([1.0], requires_grad=True)
    entropy_shaped(advantages, entropy, alpha=0.5).sum().backward()
    assert advantages.grad is not None
    assert advantages.grad.item() == 1
    assert entropy.grad is None


def test_turn_level_by_hand() -> None:
    turns, mask = torch.tensor([0, 0, 7, 1, 2]), torch.tensor([True, True, False, True, True])
    assert turn_level(torch.tensor([5.0, -1.0, 2.0]), turns, mask).tolist() == [5, 5, 0, -1, 2]


def test_turns_may_have_advantages_of_their_own_estimator() -> None:
    rewards, values, per_turn = torch.tensor([1.0, 2.0]), torch.tensor([4.0, 8.0]), torch.tensor([True, True])
    advantages, _ = gae(rewards, values, per_turn, gamma=0.5, lam=0.5)
    turns = torch.tensor([0, 0, 0, 1])
    assert turn_level(advantages, turns, turns >= 0).tolist() == [-0.5, -0.5, -0.5, -6]


@given(source=sources(fills=("plain", "ties")))
def test_leave_one_out_normalize_by_the_definition(source: Source) -> None:
    rewards = source.rows(size := source.time + 2)
    for correction, eps in ((1, 1e-6), (0, 0.3)):
        got = leave_one_out_normalize(rewards, correction=correction, eps=eps)
        for i in range(size):
            others = rewards[..., [j for j in range(size) if j != i]]
            centered, std = rewards[..., i] - others.mean(-1), others.std(-1, correction=correction)
            torch.testing.assert_close(got[..., i], torch.where(std > eps, centered / (std + eps), centered), **CLOSE)


def test_leave_one_out_normalize_is_bounded_on_near_constant_groups() -> None:
    rewards = torch.tensor([0.0] + [0.3] * 7)
    others = torch.tensor([0.0] + [0.3] * 6)
    positive = (0.3 - others.mean()) / (others.std() + 1e-6)
    got = leave_one_out_normalize(rewards)  # 0.3 is not a number of float32: sums of squares leave a residue
    torch.testing.assert_close(got, torch.tensor([-0.3] + [positive.item()] * 7))
    noise = torch.tensor([0.0, 1e-9, 3e-9, -2e-9], dtype=torch.float64)
    assert leave_one_out_normalize(noise).abs().max().item() < 1e-8
    assert leave_one_out_normalize(torch.full((3, 5), 0.1)).abs().max().item() < 1e-7


def test_leave_one_out_normalize_has_a_gradient_on_constant_groups() -> None:
    rewards = torch.full((4,), 0.3, requires_grad=True)
    leave_one_out_normalize(rewards)[0].backward()
    assert rewards.grad is not None
    torch.testing.assert_close(rewards.grad, torch.tensor([1.0, -1 / 3, -1 / 3, -1 / 3]))


@pytest.mark.parametrize(("shape", "correction", "least"), [((2,), 1, 3), ((4, 2), 1, 3), ((3, 1), 0, 2)])
def test_leave_one_out_normalize_needs_others(shape: tuple[int, ...], correction: int, least: int) -> None:
    with pytest.raises(ValueError, match=f"leave_one_out_normalize needs at least {least} per group"):
        leave_one_out_normalize(torch.ones(shape), correction=correction)
    bigger = (*shape[:-1], least)
    assert not leave_one_out_normalize(torch.ones(bigger), correction=correction).any()


@pytest.mark.parametrize("baseline", [group_mean_batch_std, best_minus_second])
def test_other_groups_of_one_raise(baseline: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match=f"{baseline.__name__} needs at least 2 per group"):
        baseline(torch.ones(3, 1))


def test_baselines_from_elsewhere_by_hand() -> None:
    rewards = torch.tensor([1.0, 2.0, 6.0])
    assert remax(rewards, torch.tensor([3.0, 2.0, 1.0])).tolist() == [-2, 0, 5]
    assert role_conditioned(rewards, torch.tensor([1, 0, 1]), torch.tensor([0.5, -1.0])).tolist() == [2, 1.5, 7]


def test_opo_by_hand() -> None:
    rewards, length = torch.tensor([[1.0, 2.0, 6.0]]), torch.tensor([[1, 3, 4]])
    assert opo(rewards, length).tolist() == [[1 - 31 / 8, 2 - 31 / 8, 6 - 31 / 8]]
    # the others: 30 / 7, 25 / 5, 7 / 4
    expected = pytest.approx([1 - 30 / 7, 2 - 5, 6 - 7 / 4])
    assert opo_leave_one_out(rewards.double(), length).tolist() == [expected]


def test_opo_of_empty_answers() -> None:
    rewards, length = torch.tensor([1.0, 2.0]), torch.tensor([0, 5])
    assert opo(rewards, 0 * length).tolist() == [1, 2]
    assert opo_leave_one_out(rewards, length).tolist() == [1 - 2, 2]
    with pytest.raises(ValueError, match="opo_leave_one_out needs at least 2"):
        opo_leave_one_out(rewards[:1], length[:1])


def test_gdpo_by_hand() -> None:
    rewards = torch.tensor([[[0.0, 2.0], [10.0, 10.0]], [[0.0, 4.0], [3.0, 1.0]]], dtype=torch.float64)
    half = math.sqrt(2) / 2  # normalised rewards of two with correction 1 are -half, half
    first, second = 2 * half, (2 - 3) * half
    std = math.sqrt(2 * (first**2 + second**2) / 3)
    got = gdpo(rewards, weights=torch.tensor([2.0, 3.0]), eps=1e-12)
    assert got.tolist() == [
        pytest.approx([-first / std, first / std], rel=1e-9),
        pytest.approx([-second / std, second / std], rel=1e-9),
    ]
    plain = gdpo(rewards, eps=0.5)
    z = (2 / 2) / (math.sqrt(2) + 0.5)  # of the first group; those of the second nearly cancel
    other = 2 / (math.sqrt(8) + 0.5) - 1 / (math.sqrt(2) + 0.5)
    std = math.sqrt(2 * (z**2 + other**2) / 3) + 0.5
    assert plain[:, 1].tolist() == pytest.approx([z / std, other / std])
    z, other = 1 / 1.5, 2 / 2.5 - 1 / 1.5
    population = gdpo(rewards, correction=0, eps=0.5)[0, 1].item()
    assert population == pytest.approx(z / (math.sqrt((z**2 + other**2) / 2) + 0.5))


# groups by id


def test_groups_by_id_by_hand() -> None:
    rewards, ids = torch.tensor([1.0, 5.0, 3.0, 99.0, 8.0]).double(), torch.tensor([7, 2, 7, 7, 3])
    mask = torch.tensor([True, True, True, False, True])
    assert group_center_by(rewards, ids, mask).tolist() == [-1, 0, 1, 0, 0]
    scale = 1 / (math.sqrt(2) + 0.5)
    got = group_normalize_by(rewards, ids, mask, eps=0.5)
    assert got.tolist() == pytest.approx([-scale, 0, scale, 0, 0])
    got = group_normalize_by(rewards, ids, mask, correction=0)
    assert got.tolist() == pytest.approx([-1 / 1.0001, 0, 1 / 1.0001, 0, 0])


def test_groups_by_id_have_a_gradient_where_they_are_constant() -> None:
    rewards = torch.tensor([3.0, 3.0, 5.0], requires_grad=True)
    group_normalize_by(rewards, torch.tensor([0, 0, 1]), torch.ones(3, dtype=torch.bool), eps=0.5)[0].backward()
    assert rewards.grad is not None
    assert rewards.grad.tolist() == [1, -1, 0]


def test_gigpo_by_hand() -> None:
    rewards = torch.tensor([[0.0, 4.0, 99.0], [0.0, 0.0, 2.0]]).double()
    mask = torch.tensor([[True, True, False], [True, True, True]])
    anchors = torch.tensor([[0, 1, 0], [0, 2, 1]])
    # episodes 4 and 2; returns 2, 4 and 0.5, 1, 2; states 0: {2, 0.5}, 1: {4, 2}, 2: {1}
    episode, of_0, of_1 = 1 / (math.sqrt(2) + 0.5), 0.75 / (math.sqrt(1.125) + 0.5), 1 / (math.sqrt(2) + 0.5)
    got = gigpo(rewards, anchors, mask, gamma=0.5, omega=3.0, eps=0.5)
    assert got[0].tolist() == pytest.approx([episode + 3 * of_0, episode + 3 * of_1, 0])
    assert got[1].tolist() == pytest.approx([-episode - 3 * of_0, -episode, -episode - 3 * of_1])
    got = gigpo(rewards, anchors, mask, gamma=0.5, correction=0, eps=1e-12)
    assert got.flatten().tolist() == pytest.approx([2, 2, 0, -2, -1, -2])


# best of k and maximum likelihood


# digits


GROUPS = torch.tensor([[3.0, 1.0, 7.0, 4.0], [2.0, 2.0, 9.0, 1.0]], dtype=torch.float64)
SIZES = torch.tensor([[1, 4, 2, 3], [5, 1, 1, 2]])


@pytest.mark.parametrize(
    ("estimator", "degree"),
    [
        (lambda r: remax(r, r.flip(-1)), 1),
        (lambda r: role_conditioned(r[0], SIZES[0] - 1, r[1]), 1),
        (lambda r: opo(r, SIZES), 1),
        (lambda r: opo_leave_one_out(r, SIZES), 1),
        (lambda r: group_center_by(r, SIZES % 2, SIZES > 0), 1),
        (lambda r: max_at_k(r, k=2), 1),
        (lambda r: max_at_k_gain(r, k=3), 1),
        (best_minus_second, 1),
        (lambda r: -on_policy_distillation(r, -r), 1),
        (lambda r: entropy_shaped(r, r, alpha=0.25), 1),
        (lambda r: leave_one_out_normalize(r, eps=1e-13), 0),
        (max_rl, 0),
        (max_rl_uncentered, 0),
    ],
)
def test_float64_keeps_all_its_digits(estimator: Callable[[Tensor], Tensor], degree: int) -> None:
    torch.testing.assert_close(estimator(0.1 * GROUPS), 0.1**degree * estimator(GROUPS), **CLOSE)


def test_weights_of_baselines_keep_their_digits_and_need_no_scale() -> None:
    for baseline in (opo, opo_leave_one_out):
        torch.testing.assert_close(baseline(GROUPS, 0.01 * SIZES.double()), baseline(GROUPS, SIZES), **CLOSE)
    p = torch.tensor([0.1, 0.3, 0.6], dtype=torch.float64)
    expected = [0.81 + 0.09 + 0.36, 0.01 + 0.49 + 0.36, 0.01 + 0.09 + 0.16]
    got = logit_gradient_proxy(p.log(), (p**2).sum().expand(3))
    assert got.tolist() == pytest.approx(expected, rel=1e-12)


def test_gigpo_takes_its_eps_from_grpo() -> None:
    rewards, anchors = GROUPS[..., None], SIZES[..., None] % 2
    default, named = (
        gigpo(rewards, anchors, anchors >= 0, gamma=1.0, **kw) for kw in ({}, {"eps": 1e-4, "omega": 1.0})
    )
    torch.testing.assert_close(default, named, **CLOSE)


def test_signals_of_distillation_and_baselines_have_no_gradient() -> None:
    logps = torch.tensor([-1.0, -0.5], requires_grad=True)
    assert not on_policy_distillation(logps, logps.detach() - 1).requires_grad
    assert not logit_gradient_proxy(logps, logps.exp()).requires_grad
