import pytest
import torch
from hypothesis import given

from alignkit.masking import clip, finite_exp, last_index, lengths, masked_mean, masked_sum, masked_var, promote, whiten
from alignkit.testing.strategies import Source, sources

X = torch.tensor([[1.0, 2.0, 4.0], [7.0, -3.0, 5.0], [9.0, 9.0, 9.0]], dtype=torch.float64)
MASK = torch.tensor([[True, True, False], [False, True, True], [False, False, False]])


@pytest.mark.parametrize(
    ("dtype", "promoted"),
    [
        (torch.bool, torch.float32),
        (torch.int64, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_promote_gives_at_least_float32(dtype: torch.dtype, promoted: torch.dtype) -> None:
    assert promote(torch.ones(2, dtype=dtype)).dtype == promoted


def test_sum_and_mean_read_true_positions() -> None:
    assert masked_sum(X, MASK).item() == 1 + 2 - 3 + 5
    assert masked_sum(X, MASK, -1).tolist() == [3, 2, 0]
    assert masked_sum(X, MASK, 0).tolist() == [1, -1, 5]
    assert masked_mean(X, MASK).item() == 1.25
    assert masked_mean(X, MASK, -1).tolist() == [1.5, 1, 0]
    assert masked_mean(X, MASK, 0).tolist() == [1, -0.5, 5]


def test_an_empty_selection_has_sum_mean_and_variance_0() -> None:
    none = torch.zeros_like(MASK)
    for reduce in (masked_sum, masked_mean, masked_var):
        assert reduce(X, none).item() == 0
        assert reduce(X, none, -1).tolist() == [0, 0, 0]
    assert whiten(X, none).tolist() == [[0, 0, 0]] * 3


def test_variance_by_hand() -> None:
    # deviations of 1, 2, -3, 5 from 1.25: squares sum to 0.0625 + 0.5625 + 18.0625 + 14.0625
    assert masked_var(X, MASK).item() == pytest.approx(32.75 / 3, rel=1e-14)
    assert masked_var(X, MASK, correction=0).item() == pytest.approx(32.75 / 4, rel=1e-14)
    assert masked_var(X, MASK, -1).tolist() == [0.5, 32, 0]
    assert masked_var(X, MASK, -1, correction=0).tolist() == [0.25, 16, 0]
    assert masked_var(X, MASK, 0).tolist() == [0, 12.5, 0]


def test_the_variance_of_one_element_is_0() -> None:
    assert masked_var(X, MASK & (X == 5)).item() == 0


@given(source=sources())
def test_reductions_are_those_of_the_selected_elements(source: Source) -> None:
    x, mask = source.tokens(), source.mask()
    chosen = x[mask]
    torch.testing.assert_close(masked_sum(x, mask), chosen.sum())
    if len(chosen):
        torch.testing.assert_close(masked_mean(x, mask), chosen.mean())
        torch.testing.assert_close(masked_var(x, mask, correction=0), chosen.var(correction=0))
    if len(chosen) > 1:
        torch.testing.assert_close(masked_var(x, mask), chosen.var())
    for dim in range(x.dim()):
        torch.testing.assert_close(masked_sum(x, mask, dim), (x * mask).sum(dim))
        mean = masked_mean(x, mask, dim).unsqueeze(dim)
        spread = ((x - mean) ** 2 * mask).sum(dim) / mask.sum(dim).clamp(min=1)
        torch.testing.assert_close(masked_var(x, mask, dim, correction=0), spread)


@pytest.mark.parametrize("correction", [0, 1])
@given(source=sources(fills=("plain", "wide")))
def test_whitened_values_have_mean_0_and_variance_1(correction: int, source: Source) -> None:
    x, mask = source.tokens(), source.mask()
    if mask.sum() < 2:
        return
    white = whiten(x, mask, correction=correction, eps=0.0)
    chosen = white[mask]
    torch.testing.assert_close(chosen.mean(), torch.zeros((), dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(chosen.var(correction=correction), torch.ones((), dtype=torch.float64))
    kept = whiten(x, mask, correction=correction, eps=0.0, shift_mean=False)
    torch.testing.assert_close(kept[mask], chosen + x[mask].mean())
    assert not white[~mask].any()
    assert not kept[~mask].any()


def test_whiten_keeps_the_order_and_adds_eps_to_the_variance() -> None:
    x, mask = torch.tensor([-1.0, 1.0, 50.0], dtype=torch.float64), torch.tensor([True, True, False])
    assert whiten(x, mask, eps=2.0).tolist() == [-0.5, 0.5, 0]  # variance 2
    assert whiten(x, mask, eps=3.0, correction=0).tolist() == [-0.5, 0.5, 0]  # variance 1
    assert whiten(x + 3, mask, eps=2.0, shift_mean=False).tolist() == [2.5, 3.5, 0]


def test_the_defaults_of_whiten_are_bessel_and_1e_8() -> None:
    x, mask = 1e-4 * X[:2], MASK[:2]
    expected = (x - x[mask].mean()) / (x[mask].var() + 1e-8).sqrt()
    torch.testing.assert_close(whiten(x, mask), torch.where(mask, expected, 0), rtol=1e-12, atol=0)


def test_a_constant_whitens_to_0() -> None:
    assert whiten(torch.full((2, 3), 7.0), torch.ones(2, 3, dtype=torch.bool)).tolist() == [[0.0] * 3] * 2


def test_lengths_and_last_indices() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0]]).bool()
    assert lengths(mask).tolist() == [2, 2, 0, 1, 1]
    assert last_index(mask).tolist() == [1, 3, -1, 0, 2]


def test_clip_takes_bounds_of_either_kind() -> None:
    x = torch.tensor([-2.0, 0.5, 3.0])
    assert clip(x, -1.0, 1.0).tolist() == [-1, 0.5, 1]
    assert clip(x, torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, 2.0, 2.5])).tolist() == [0, 1, 2.5]
    assert clip(x, torch.tensor(-1.0), torch.tensor(1.0)).tolist() == [-1, 0.5, 1]


def test_the_lower_bound_wins_where_bounds_cross() -> None:
    assert clip(torch.tensor([-5.0, 1.5, 5.0]), 2.0, 1.0).tolist() == [2, 2, 2]


def test_finite_exp_stops_just_below_overflow() -> None:
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor([-torch.inf, -1.0, 0.0, 1e6, torch.inf], dtype=dtype, requires_grad=True)
        out = finite_exp(x)
        torch.testing.assert_close(out[:3], x[:3].exp())
        assert (out[3:] > torch.finfo(dtype).max / 3).all()
        assert out.isfinite().all()
        (gradient,) = torch.autograd.grad(out.sum(), x)
        assert gradient[2:].tolist() == [1, 0, 0]
