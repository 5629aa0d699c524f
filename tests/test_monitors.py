from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alignkit.losses.policy import clip_fraction, reinforce
from alignkit.monitors import correlation, frontier_point, on_frontier, policy_metrics, weigh_each, zero_variance
from alignkit.testing.algebra import slope
from alignkit.train import update
from alignkit.types import Aggregates, Batch, Metrics
from alignkit.weights import constant_length, row_mean, sequence_mean, token_mean, weigh

NAN = float("nan")
MASK = torch.tensor([[0, 1, 1], [0, 1, 0]]).bool()
OLD = torch.tensor([[NAN, 0.5, 0.25], [NAN, 0.5, NAN]]).log()
"""Log-probs of three tokens in two answers."""


def _means(logps: Tensor = OLD, advantages: Any = ((0.0,), (0.0,)), **columns: Tensor) -> dict[str, float]:
    columns = {"rewards": torch.tensor([1, 4])} | columns
    weights = token_mean(MASK), row_mean(MASK)
    metrics = policy_metrics(logps, OLD, torch.tensor(advantages), MASK, *weights, **columns)
    return {name: x.item() for name, x in metrics.items()}


def test_means_of_answers_by_hand() -> None:
    got = _means(truncated=torch.tensor([True, False]), entropy=torch.tensor([[NAN, 1, 3], [NAN, 5, NAN]]))
    expected = {"reward": 2.5, "length": 1.5, "truncated": 0.5, "entropy": 3, "advantage": 0, "ratio": 1}
    assert got == pytest.approx(expected | {"approx_kl": 0})


def test_the_size_of_advantages_per_row_or_per_token() -> None:
    assert _means(advantages=[[-1.0], [2.0]])["advantage"] == pytest.approx(4 / 3)
    assert _means(advantages=[[NAN, -1.0, 3.0], [9.0, 2.0, NAN]])["advantage"] == pytest.approx(2)


def test_how_far_an_update_went_by_hand() -> None:
    new = torch.tensor([[NAN, 0.75, 0.125], [NAN, 0.5, NAN]]).log()
    clipped = clip_fraction(new, OLD, torch.ones(2, 3))
    got = _means(new, clipped=clipped)
    ratios = torch.tensor([1.5, 0.5, 1], dtype=torch.float64)
    assert got["ratio"] == pytest.approx(1)
    assert got["approx_kl"] == pytest.approx((ratios - 1 - ratios.log()).mean().item())
    assert got["clipped"] == pytest.approx(1 / 3)


def test_distances_of_what_sampled_by_hand() -> None:
    other = torch.tensor([[NAN, 0.25, 0.25], [NAN, 0.5, NAN]]).log()
    assert {"kl", "sampler_gap", "sampler_kl"}.isdisjoint(_means())
    new = torch.tensor([[NAN, 0.9, 0.9], [NAN, 0.9, NAN]]).log()
    log2 = torch.tensor(2.0).log().item()
    assert _means(new, ref_logps=other)["kl"] == pytest.approx((0.5 - 1 + log2) / 3)  # old to reference, not new
    got = _means(new, sampler_logps=torch.tensor([[NAN, 0.25, 0.5], [NAN, 0.5, NAN]]).log())
    assert got["sampler_gap"] == pytest.approx(2 * log2 / 3)
    assert got["sampler_kl"] == pytest.approx((2 - 1 - log2 + 0.5 - 1 + log2) / 3)  # sampler to old


def test_a_ratio_beyond_the_range_of_floats_is_finite() -> None:
    assert 1e37 < _means(torch.full_like(OLD, 200.0))["ratio"] < float("inf")


class Table(nn.Module):
    """A policy whose log-probs are its parameters."""

    def __init__(self, rows: int, time: int) -> None:
        super().__init__()
        self.logps = nn.Parameter(-torch.rand(rows, time, dtype=torch.float64))

    def forward(self, ids: Tensor) -> Tensor:
        return self.logps[ids]


@pytest.mark.parametrize("aggregate", [sequence_mean, partial(constant_length, length=50.0)])
def test_they_are_means_of_the_step_however_it_is_split_and_the_loss_weighed(aggregate: Any) -> None:
    mask = torch.arange(5) < torch.tensor([[5], [1], [3], [2], [4], [2]])
    real = {name: torch.randn(6, 5, dtype=torch.float64) for name in ("old_logps", "entropy")}
    batch = {"ids": torch.arange(6), "mask": mask, **real, "rewards": torch.arange(6.0), "truncated": mask.all(-1)}

    def loss_fn(
        policy: Any,
        ids: Tensor,
        mask: Tensor,
        old_logps: Tensor,
        weights: Tensor,
        tokens: Tensor,
        rows: Tensor,
        **seen: Any,
    ) -> tuple[Tensor, Metrics]:
        logps, advantages = policy(ids), seen["rewards"][:, None]
        metrics = policy_metrics(logps, old_logps, advantages, mask, tokens, rows, **seen)
        return weigh(reinforce(logps, advantages.expand(logps.shape)), weights), metrics

    def step(micro: int | None) -> Batch:
        torch.manual_seed(0)
        table = Table(6, 5)
        makes: Aggregates = {"weights": aggregate, "tokens": token_mean, "rows": row_mean}
        optimizer = torch.optim.SGD(table.parameters(), lr=0)
        return update(loss_fn, table, optimizer, batch, aggregate=makes, micro=micro)

    whole, parts, rest = (step(micro) for micro in (None, 1, 4))
    for name, x in whole.items():
        torch.testing.assert_close(parts[name], x, check_dtype=False)
        torch.testing.assert_close(rest[name], x, check_dtype=False)
    assert whole["entropy"].item() == pytest.approx(real["entropy"][mask].mean().item())
    assert whole["length"].item() == pytest.approx(17 / 6)
    assert whole["reward"].item() == pytest.approx(2.5)


def test_a_signal_without_weights_is_refused() -> None:
    tokens, rows = token_mean(MASK), row_mean(MASK)
    with pytest.raises(
        ValueError, match=r"the signal 'x' has shape \(2, 3, 1\), which no weights of \[\(2, 3\), \(2,\)\]"
    ):
        weigh_each({"x": torch.zeros(2, 3, 1)}, tokens, rows)
    with pytest.raises(ValueError, match=r"weights of shapes \[\(2, 3\), \(2, 3\)\]: give one for each number of axes"):
        weigh_each({"x": torch.zeros(2, 3)}, tokens, tokens)


def test_pairs_have_weights_of_their_own() -> None:
    signals = {"reward": torch.tensor([[1.0, 3.0]]), "accuracy": torch.tensor([True])}
    got = weigh_each(signals, torch.full((1, 2, 3), 1 / 3), torch.full((1, 2), 0.5), torch.ones(1))
    assert {name: x.item() for name, x in got.items()} == {"reward": 2, "accuracy": 1}


def test_groups_of_zero_variance_by_hand() -> None:
    groups = torch.tensor([[1.0, 1, 1], [0, 1, 0], [0, 0, 0], [0, 0, 1e-6]])
    assert zero_variance(groups).tolist() == [[True] * 3, [False] * 3, [True] * 3, [False] * 3]
    assert zero_variance(torch.tensor([[1, 1], [1, 2]])).flatten().tolist() == [True, True, False, False]


def test_correlation_by_hand() -> None:
    scores, lengths = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0], [1.0, 2.0, 1.0]]), torch.tensor([10, 20, 30])
    got = correlation(scores, lengths.expand(3, 3))
    assert got.tolist() == pytest.approx([1, -1, 0])
    x, y = torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.tensor([0, 1, 1, 1])
    assert correlation(x, y).item() == pytest.approx(3**-0.5)


def test_it_is_the_same_for_every_unit_and_origin() -> None:
    x, y = torch.randn(2, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(correlation(2 * x - 3, 1e-3 * y + 7), correlation(x, y))
    torch.testing.assert_close(
        correlation(x, y), torch.stack([torch.corrcoef(p)[0, 1] for p in torch.stack([x, y], 1)])
    )


@pytest.mark.parametrize("value", [0.3, 1.1, 1e6 / 3])
def test_what_does_not_vary_is_not_correlated(value: float) -> None:
    for n in (3, 5, 7, 11):
        x, y = torch.full((n,), value), torch.arange(n)
        assert correlation(x, y).item() == correlation(y, x).item() == 0
    assert slope(lambda x: correlation(x, y), x).isfinite().all()


def test_a_frontier_point_sums_the_kl_of_a_row() -> None:
    kl = torch.tensor([[1.0, 2.0, float("nan")], [4.0, 9.0, 9.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    distance, score = frontier_point(torch.tensor([1, 4]), kl, mask)
    assert (distance.item(), score.item()) == (3.5, 2.5)


def test_the_frontier_holds_what_nothing_dominates() -> None:
    kl = torch.tensor([0.0, 1.0, 2.0, 2.0, 3.0, 1.0])
    scores = torch.tensor([0.0, 2.0, 1.0, 3.0, 3.0, 2.0])
    assert on_frontier(kl, scores).tolist() == [True, True, False, True, False, True]
    both = on_frontier(torch.stack([kl, -kl]), torch.stack([scores, scores]))
    assert both[1].tolist() == [False, False, False, False, True, False]


def test_the_smallest_gain_dominates() -> None:
    one = torch.ones(2, dtype=torch.float64)
    more = one + torch.tensor([0, 1e-12])
    assert on_frontier(one, more).tolist() == [False, True]
    assert on_frontier(more, one).tolist() == [True, False]
