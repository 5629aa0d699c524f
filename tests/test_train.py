from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from alignkit.losses import paired, policy, preference, reward, supervised, value
from alignkit.masking import masked_sum
from alignkit.testing.strategies import Source
from alignkit.train import (
    add_metrics,
    check_columns,
    check_loss,
    evaluating,
    infer,
    joint_weights,
    minibatches,
    rollouts,
    split,
    update,
    weighted,
)
from alignkit.weights import (
    constant_length,
    group_mean,
    row_mean,
    sequence_mean,
    sequence_sum,
    token_mean,
    weigh,
)

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
BATCH = {"a": torch.arange(10).reshape(5, 2), "b": torch.arange(5)}

# parts of a batch


@pytest.mark.parametrize(
    ("rows", "sizes"), [(None, [5]), (1, [1] * 5), (2, [2, 2, 1]), (3, [3, 2]), (5, [5]), (9, [5])]
)
def test_parts_joined_are_the_batch(rows: int | None, sizes: list[int]) -> None:
    parts = list(split(BATCH, rows))
    assert [len(p["a"]) for p in parts] == sizes
    for name, column in BATCH.items():
        assert torch.equal(torch.cat([p[name] for p in parts]), column)


def test_split_refuses_what_it_cannot_split() -> None:
    for rows in (0, -1):
        with pytest.raises(ValueError, match=f"rows={rows} must be at least 1"):
            next(split(BATCH, rows))
    with pytest.raises(ValueError, match=r"one number of rows, not \{'a': 2, 'b': 3\}"):
        next(split({"a": torch.ones(2), "b": torch.ones(3)}, 1))


def test_no_rows_are_one_empty_part() -> None:
    for rows in (None, 2):
        (part,) = split({"a": torch.ones(0)}, rows)
        assert part["a"].shape == (0,)
    assert infer(torch.exp, torch.ones(0, 3)).shape == (0, 3)


def test_every_epoch_of_minibatches_has_every_row_once_in_a_new_order() -> None:
    batch = {"x": torch.arange(12), "y": -torch.arange(12)}
    got = list(minibatches(batch, 4, epochs=3, generator=torch.Generator().manual_seed(0)))
    assert [len(p["x"]) for p in got] == [4] * 9
    assert all(torch.equal(p["x"], -p["y"]) for p in got)
    orders = [torch.cat([p["x"] for p in got[i : i + 3]]).tolist() for i in (0, 3, 6)]
    assert all(sorted(order) == list(range(12)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    again = list(minibatches(batch, 4, epochs=3, generator=torch.Generator().manual_seed(0)))
    assert all(torch.equal(p["x"], q["x"]) for p, q in zip(got, again))


def test_minibatches_make_one_pass_unless_told() -> None:
    assert len(list(minibatches(BATCH, 5))) == 1
    assert len(list(minibatches(BATCH, 1))) == 5


@pytest.mark.parametrize("size", [0, 2, 10, -5])
def test_minibatches_must_divide_the_rows(size: int) -> None:
    with pytest.raises(ValueError, match=f"size={size} does not divide the batch's 5 rows"):
        next(minibatches(BATCH, size))


# inference


class Doubling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.dropout = nn.Dropout(0.5)
        self.frozen = nn.Dropout(0.5).eval()
        self.calls: list[tuple[int, bool]] = []

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        self.calls.append((len(x), torch.is_grad_enabled() or self.training or self.dropout.training))
        out = self.frozen(self.dropout(self.scale * x))
        return out if y is None else (out, out + y)


@pytest.mark.parametrize("rows", [None, 1, 2, 4])
def test_inference_is_one_call_in_eval_mode(rows: int | None) -> None:
    model, x = Doubling().train(), torch.arange(8.0).reshape(4, 2)
    model.frozen.eval()
    assert torch.equal(infer(model, x, rows=rows), 2 * x)
    doubled, summed = infer(model, x, x, rows=rows)
    assert torch.equal(doubled, 2 * x)
    assert torch.equal(summed, 3 * x)
    assert not doubled.requires_grad
    assert [n for n, _ in model.calls] == [rows or 4] * (4 // (rows or 4)) * 2
    assert not any(unsafe for _, unsafe in model.calls)
    assert (model.training, model.dropout.training, model.frozen.training) == (True, True, False)


def test_the_mode_returns_after_an_error_too() -> None:
    model = Doubling().train()
    with pytest.raises(RuntimeError):
        infer(model, torch.ones(2), torch.ones(2, 3, 5))
    assert model.calls == [(2, False)]
    assert model.training
    assert model.dropout.training


def test_a_module_gets_its_columns_on_its_own_device() -> None:
    class Where(nn.Module):
        def __init__(self, device: str) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(1, device=device))

        def forward(self, x: Tensor) -> Tensor:
            assert x.device == self.w.device
            return x

    assert infer(Where("meta"), torch.ones(2)).device.type == "meta"
    assert infer(Where("cpu"), torch.ones(2)).device.type == "cpu"
    assert infer(nn.Identity(), torch.ones(2)).tolist() == [1, 1]  # has no parameter to be on a device
    with evaluating(Where("meta")) as device:
        assert device == torch.device("meta")


def test_a_plain_function_may_be_inferred() -> None:
    x = torch.ones(3, requires_grad=True)
    out = infer(lambda x: x * 2, x, rows=2)
    assert out.tolist() == [2] * 3
    assert not out.requires_grad


# weights of a whole step

AGGREGATES = {
    "token_mean": token_mean,
    "sequence_mean": sequence_mean,
    "sequence_sum": sequence_sum,
    "constant_length": partial(constant_length, length=5.0),
    "group_mean": partial(group_mean, size=2),
    "row_mean": row_mean,
}


@pytest.mark.parametrize("aggregate", AGGREGATES.values(), ids=AGGREGATES)
@given(seed=st.integers(0, 999), times=st.lists(st.integers(1, 5), min_size=1, max_size=3))
def test_joint_weights_are_those_of_one_batch(
    aggregate: Callable[[Tensor], Tensor], seed: int, times: list[int]
) -> None:
    source = Source(seed, (2,), 1)
    masks = [source.mask(2, time) for time in times]
    padded = [nn.functional.pad(m, (0, max(times) - m.shape[-1])) for m in masks]
    whole, got = aggregate(torch.cat(padded)), joint_weights(masks, aggregate)
    assert len(got) == len(masks)
    for i, (w, m) in enumerate(zip(got, masks)):
        expected = whole[2 * i : 2 * i + 2]
        assert torch.equal(w, expected[:, : m.shape[-1]] if w.dim() > 1 else expected)
        assert w.shape == (m.shape if w.dim() > 1 else m.shape[:1])


def test_one_aggregation_makes_weights_of_the_mask() -> None:
    masks = [torch.tensor([[True, True, False]]), torch.tensor([[True, False], [True, True]])]
    batches = [{"mask": m, "x": m.float()} for m in masks]
    got = weighted(batches, token_mean)
    assert [b["weights"].tolist() for b in got] == [[[0.2, 0.2, 0]], [[0.2, 0], [0.2, 0.2]]]
    assert [sorted(b) for b in batches] == [["mask", "x"]] * 2
    assert all(a["x"] is b["x"] for a, b in zip(got, batches))


def test_every_batch_gets_its_own_rows_of_the_weights() -> None:
    masks = [torch.arange(3).expand(1, 2, 3)[..., : n + 1] <= n for n in range(3)]
    got = weighted([{"mask": m} for m in masks], sequence_mean)
    for n, b in enumerate(got):
        assert b["weights"].shape == masks[n].shape
        torch.testing.assert_close(b["weights"], torch.full((1, 2, n + 1), 1 / (6 * (n + 1)), dtype=torch.float64))


def test_several_weights_on_several_masks() -> None:
    batch = {"mask": torch.tensor([[True, False]]), "demo_mask": torch.tensor([[True, True]])}
    (got,) = weighted(
        [batch], {"a": token_mean, "b": ("demo_mask", token_mean), "c": ("mask", sequence_sum), "d": row_mean}
    )
    assert {k: got[k].tolist() for k in "abcd"} == {"a": [[1, 0]], "b": [[0.5, 0.5]], "c": [[1, 0]], "d": [1]}
    assert "weights" not in got


def test_masks_of_all_processes_count() -> None:
    mine = [torch.tensor([[True, True]]), torch.tensor([[True, False]])]
    theirs = [torch.tensor([[True, True, True]]), torch.tensor([[True, True, False]])]
    for own in (0, 1):

        def gather(masks: list[Tensor], own: int = own) -> tuple[list[list[Tensor]], int]:
            return ([masks, theirs] if own == 0 else [theirs, masks]), own

        got = weighted([{"mask": m} for m in mine], token_mean, gather)
        assert [b["weights"].tolist() for b in got] == [[[1 / 8, 1 / 8]], [[1 / 8, 0]]]


def test_the_rows_of_a_process_stay_together() -> None:
    masks = [torch.tensor([[True, True]]), torch.tensor([[True, False]])]
    theirs = [torch.ones(1, 2, dtype=torch.bool)] * 2

    def gather(mine: list[Tensor]) -> tuple[list[list[Tensor]], int]:
        return [theirs, mine], 1

    got = weighted([{"mask": m} for m in masks], partial(group_mean, size=2), gather)
    assert [b["weights"].tolist() for b in got] == [[[1 / 6, 1 / 6]], [[1 / 6, 0]]]


def test_a_missing_mask_and_a_taken_name_are_refused() -> None:
    mask = torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"aggregate needs the column 'mask'; the batch has \['ids'\]"):
        weighted([{"mask": mask}, {"ids": mask}], token_mean)
    with pytest.raises(ValueError, match="aggregate needs the column 'demo'"):
        weighted([{"mask": mask}], {"w": ("demo", token_mean)})
    with pytest.raises(ValueError, match="aggregate makes the column 'weights', which the batch has already"):
        weighted([{"mask": mask, "weights": mask}], token_mean)


# one exact step


class Linear(nn.Module):
    """Features [..., D] to one number each; two heads so that some losses see two functions of the parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.3, -0.7, 0.2], dtype=torch.float64))
        self.v = nn.Parameter(torch.tensor([-0.4, 0.1, 0.5], dtype=torch.float64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return (x @ self.w).sin(), (x @ self.v).cos()


Columns = dict[str, Tensor]
TOKEN_LOSSES: dict[str, Callable[[Tensor, Tensor, Columns], Tensor]] = {
    "nll": lambda p, q, c: supervised.nll(p),
    "smoothed_nll": lambda p, q, c: supervised.smoothed_nll(p, q, smoothing=0.1),
    "reinforce": lambda p, q, c: policy.reinforce(p, c["a"]),
    "clipped_surrogate": lambda p, q, c: policy.clipped_surrogate(p, c["old"], c["a"], low=0.2, high=0.4),
    "squared": lambda p, q, c: value.squared(q, c["a"]),
    "clipped_value": lambda p, q, c: value.clipped_value(q, c["old"], c["a"], clip=0.2),
}
PAIR_LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "dpo": lambda r: preference.dpo(r[:, 0] - r[:, 1], beta=0.3, smoothing=0.1),
    "hinge": lambda r: preference.hinge(r[:, 0] - r[:, 1], beta=0.3),
    "ipo": lambda r: preference.ipo(r[:, 0] - r[:, 1], beta=0.3),
    "kto_pair": lambda r: paired.kto_pair(r, torch.full_like(r, 0.1), beta=0.3).sum(-1),
    "bradley_terry": lambda r: reward.bradley_terry(r[:, 0], r[:, 1], margin=0.2),
    "centering": lambda r: reward.centering(r[:, 0], r[:, 1]),
}


def step_batch(*lead: int) -> Columns:
    source = Source(7, lead, 5)
    mask = source.mask()
    mask[0], mask[1, ..., 1:] = False, True  # an empty row and a long one, whatever was drawn
    garbage = torch.where(mask, 0, float("nan"))
    return {"x": source.tokens(3) + garbage[..., None], "old": source.tokens(), "a": source.tokens(), "mask": mask}


def loss_of(name: str) -> Callable[..., tuple[Tensor, Columns]]:
    def loss_fn(
        model: nn.Module, x: Tensor, old: Tensor, a: Tensor, mask: Tensor, weights: Tensor
    ) -> tuple[Tensor, Columns]:
        p, q = (torch.where(mask, out, 0) for out in model(torch.where(mask[..., None], x, 0)))
        if name in TOKEN_LOSSES:
            per_token = TOKEN_LOSSES[name](p, q, {"old": old, "a": a})
            losses = masked_sum(per_token, mask, -1) if weights.dim() == 1 else per_token
        else:
            losses = PAIR_LOSSES[name](p.sum(-1))
        losses = losses.flatten(1).sum(-1) if losses.dim() > weights.dim() else losses
        return weigh(losses, weights), {"large": weigh(losses > 0.1, weights)}

    return loss_fn


def step(loss_fn: Any, batch: Columns, **kwargs: Any) -> tuple[list[Tensor], Columns]:
    model = Linear()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    metrics = update(loss_fn, model, optimizer, batch, **kwargs)
    assert all(p.grad is None for p in model.parameters())
    return [b - p.detach() for b, p in zip(before, model.parameters())], metrics


PAIRS = [(name, how, (4,)) for name in TOKEN_LOSSES for how in AGGREGATES]
PAIRS += [(name, how, (4, 2)) for name in TOKEN_LOSSES for how in AGGREGATES]
PAIRS += [(name, "row_mean", (4, 2)) for name in PAIR_LOSSES]


@pytest.mark.parametrize(("name", "how", "lead"), PAIRS, ids=lambda x: str(x).replace(" ", ""))
def test_the_gradient_does_not_depend_on_the_micro_batch(name: str, how: str, lead: tuple[int, ...]) -> None:
    loss_fn, batch, aggregate = loss_of(name), step_batch(*lead), AGGREGATES[how]
    model = Linear()
    loss, metrics = loss_fn(model, **batch, weights=aggregate(batch["mask"]))
    exact = [torch.zeros_like(p) if g is None else g for p, g in zip(model.parameters(), _grads(loss, model))]
    assert any(g.abs().max() > 1e-4 for g in exact)
    for micro in (1, 2, 3, None):
        moved, got = step(loss_fn, batch, aggregate=aggregate, micro=micro, max_grad_norm=None)
        torch.testing.assert_close(moved, exact, **CLOSE)
        torch.testing.assert_close(got["loss"], loss.detach(), **CLOSE)
        torch.testing.assert_close(got["large"], metrics["large"], rtol=1e-6, atol=1e-6)  # a float32 count
        norm = torch.cat(exact).norm()
        torch.testing.assert_close(got["grad_norm"], norm, **CLOSE)


def _grads(loss: Tensor, model: nn.Module) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)


def test_clipping_scales_the_step_and_reports_the_norm_before() -> None:
    loss_fn, batch = loss_of("squared"), step_batch(4)
    free, metrics = step(loss_fn, batch, aggregate=sequence_sum, max_grad_norm=None)
    norm = metrics["grad_norm"].item()
    for limit in (norm / 2, norm * 2):
        moved, got = step(loss_fn, batch, aggregate=sequence_sum, max_grad_norm=limit)
        assert got["grad_norm"].item() == pytest.approx(norm, rel=1e-12)
        torch.testing.assert_close(moved, [g * min(1, limit / norm) for g in free], rtol=1e-5, atol=0)


def test_the_norm_is_clipped_to_1_unless_told() -> None:
    def steep(model: nn.Module, x: Tensor, mask: Tensor, weights: Tensor) -> Any:
        return 100 * weigh(model(x)[0], weights), {}

    batch = {"x": torch.ones(2, 3, 3, dtype=torch.float64), "mask": torch.ones(2, 3, dtype=torch.bool)}
    moved, metrics = step(steep, batch, aggregate=token_mean)
    assert metrics["grad_norm"].item() > 50
    assert torch.cat(moved).norm().item() == pytest.approx(1, rel=1e-5)


def test_gradients_left_by_others_do_not_count() -> None:
    batch, model = step_batch(4), Linear()
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e3)
    metrics = update(
        loss_of("squared"), model, torch.optim.SGD(model.parameters(), lr=0.1), batch, aggregate=token_mean
    )
    assert metrics["grad_norm"].item() < 10


def test_metrics_add_up_and_carry_no_graph() -> None:
    totals: Columns = {}
    for i in (1.0, 2.0):
        add_metrics(totals, {"a": torch.tensor(i, requires_grad=True) * 2, "b": torch.tensor(i)})
    add_metrics(totals, {"c": torch.tensor(7)})
    assert {k: v.item() for k, v in totals.items()} == {"a": 6, "b": 3, "c": 7}
    assert not any(v.requires_grad for v in totals.values())
    _, metrics = step(loss_of("nll"), step_batch(4), aggregate=token_mean, micro=1)
    assert sorted(metrics) == ["grad_norm", "large", "loss"]
    assert not any(v.requires_grad for v in metrics.values())


def test_several_terms_have_weights_of_their_own() -> None:
    def two_terms(model: nn.Module, x: Tensor, mask: Tensor, demo: Tensor, weights: Tensor, rows: Tensor) -> Any:
        p, q = model(x)
        return weigh(p, weights) + weigh(masked_sum(q, demo, -1), rows), {}

    batch = {k: v for k, v in step_batch(4).items() if k == "mask"}
    batch |= {"x": Source(1, (4,), 5).tokens(3), "demo": ~batch["mask"]}
    aggregates = {"weights": token_mean, "rows": ("demo", row_mean)}
    whole, _ = step(two_terms, batch, aggregate=aggregates, max_grad_norm=None)
    for micro in (1, 3):
        parts, _ = step(two_terms, batch, aggregate=aggregates, micro=micro, max_grad_norm=None)
        torch.testing.assert_close(parts, whole, **CLOSE)


# what a loss takes and gives


def test_columns_are_the_arguments_of_the_loss() -> None:
    def loss_fn(model: Any, ids: Tensor, mask: Tensor, extra: Any = None) -> None: ...

    one = torch.ones(1)
    check_columns(loss_fn, {"ids": one, "mask": one})
    check_columns(loss_fn, {"ids": one, "mask": one, "extra": one})
    check_columns(lambda model, ids, **rest: None, {"ids": one, "anything": one})
    check_columns(lambda model, *args, ids: None, {"ids": one})
    check_columns(lambda model: None, {})
    with pytest.raises(TypeError, match=r"missing: \['mask'\]$"):
        check_columns(loss_fn, {"ids": one})
    with pytest.raises(TypeError, match=r"unknown: \['masks', 'model'\]$"):
        check_columns(loss_fn, {"ids": one, "mask": one, "masks": one, "model": one})
    with pytest.raises(TypeError, match=r"missing: \['mask'\]; unknown: \['x'\]$") as error:
        check_columns(loss_fn, {"ids": one, "x": one})
    assert "it takes ['extra', 'ids', 'mask'], the batch has ['ids', 'x']" in str(error.value)
    with pytest.raises(TypeError, match=r"missing: \['ids'\]$"):
        check_columns(lambda model, ids, **rest: None, {"anything": one})
    with pytest.raises(TypeError, match=r"unknown: \['args'\]"):
        check_columns(lambda model, *args: None, {"args": one})


def test_the_step_names_the_column_that_does_not_fit() -> None:
    batch = step_batch(2)
    with pytest.raises(TypeError, match=r"missing: \['weights'\]; unknown: \['other'\]"):
        step(loss_of("nll"), batch, aggregate={"other": token_mean})


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (torch.ones(()), r"must return \(loss, metrics\).* not Tensor"),
        (None, "not NoneType"),
        ((torch.ones(()),), "not tuple"),
        ((torch.ones(()), {}, {}), "not tuple"),
        ((1.0, {}), "not tuple"),
        ((torch.ones(()), [1]), "not tuple"),
        ([torch.ones(()), {}], "not list"),
        ((torch.ones(2), {}), r"returned the loss as of shape \(2,\); reduce it"),
        ((torch.ones(()), {"accuracy": torch.ones(3, 1)}), r"returned accuracy as of shape \(3, 1\)"),
        ((torch.ones(()), {"ok": torch.ones(()), "accuracy": 0.5}), "returned accuracy as a float"),
    ],
)
def test_a_loss_returns_a_scalar_and_scalars(out: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        check_loss(out)


def test_a_good_loss_passes_through() -> None:
    loss, metrics = torch.ones(()), {"a": torch.zeros(())}
    got = check_loss((loss, metrics))
    assert got[0] is loss
    assert got[1] == metrics
    assert got[1] is not metrics


@given(st.data())
def test_rollouts_can_be_continued_anywhere(data: st.DataObject) -> None:
    size, parts, epochs = (data.draw(st.integers(1, 3)) for _ in range(3))
    begun: list[int] = []

    def collect(i: int) -> dict[str, Tensor]:
        begun.append(i)
        return {"x": 100 * i + torch.arange(size * parts)}

    state: dict[str, Any] = {}
    stream = rollouts(collect, state, size=size, epochs=epochs, seed=3)
    seen, saved = [], []
    for _ in range(3 * parts * epochs):
        seen.append(next(stream)["x"].tolist())
        saved.append(dict(state))
    assert begun == [0, 1, 2]  # each only when it is due
    for i in range(3):
        own = [x for part in seen[i * parts * epochs : (i + 1) * parts * epochs] for x in part]
        assert sorted(own) == sorted(epochs * list(range(100 * i, 100 * i + size * parts)))
    stop = data.draw(st.integers(1, len(seen) - 1))
    again = rollouts(collect, dict(saved[stop - 1]), size=size, epochs=epochs, seed=3, start=stop)
    assert [next(again)["x"].tolist() for _ in range(len(seen) - stop)] == seen[stop:]
    if parts > 1:
        with pytest.raises(ValueError, match="does not divide"):
            next(rollouts(collect, {}, size=size * parts + 1, epochs=1, seed=3))
