from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alignkit.func import grad_norms, noise_scale, per_sample_grads, pullback, sweep
from alignkit.losses.policy import clipped_surrogate
from alignkit.losses.preference import dpo
from alignkit.weights import sequence_mean, weigh

EXACT = {"rtol": 1e-12, "atol": 1e-12}


class Net(nn.Module):
    """Log-probs of tokens by two layers that share a weight, and one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.frozen, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=True)
        self.head.weight = self.embed.weight
        self.frozen.requires_grad_(False)
        self.double()

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        logits = self.head(self.frozen(self.embed(ids)).tanh().cumsum(-2))
        logps = logits[..., :-1, :].log_softmax(-1).gather(-1, ids[..., 1:, None])[..., 0]
        return torch.where(mask, torch.cat([logps.new_zeros(*ids.shape[:-1], 1), logps], -1), 0)


def policy_batch(rows: int = 5, time: int = 6, vocab: int = 7) -> dict[str, Tensor]:
    ids, lengths = torch.randint(vocab, (rows, time)), torch.randint(2, time + 1, (rows, 1))
    mask = (torch.arange(time) < lengths) & (torch.arange(time) > 0)
    return {"ids": ids, "mask": mask, "weights": sequence_mean(mask)}


def loss_fn(policy: nn.Module, ids: Tensor, mask: Tensor, weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    logps = policy(ids, mask)
    return weigh(logps.exp() - 2 * logps, weights), {"logps": logps.sum()}


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: x for name, x in model.named_parameters() if x.requires_grad}


def by_backward(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    return dict(zip(trainable(model), torch.autograd.grad(loss, list(trainable(model).values()))))


@pytest.mark.parametrize("chunk", [None, 1, 2, 9])
def test_per_sample_grads_are_those_of_separate_backward_passes(chunk: int | None) -> None:
    model, batch = Net(), policy_batch()
    got = per_sample_grads(loss_fn, model, batch, chunk=chunk)
    norms = grad_norms(loss_fn, model, batch, chunk=chunk)
    assert list(got) == list(trainable(model)) == ["embed.weight", "head.bias"]
    for i in range(5):
        loss = loss_fn(model, **{name: x[i : i + 1] for name, x in batch.items()})[0]
        wanted = by_backward(model, loss)
        torch.testing.assert_close({name: x[i] for name, x in got.items()}, wanted, **EXACT)
        torch.testing.assert_close(norms[i], torch.cat([x.flatten() for x in wanted.values()]).norm(), **EXACT)
    whole = by_backward(model, loss_fn(model, **batch)[0])
    torch.testing.assert_close({name: x.sum(0) for name, x in got.items()}, whole, **EXACT)
    assert not norms.requires_grad
    assert not any(x.requires_grad for x in got.values())


def test_params_are_the_place_and_the_choice() -> None:
    model, batch = Net(), policy_batch()
    moved = {"frozen.bias": model.frozen.bias.detach() + 1}
    got = per_sample_grads(loss_fn, model, batch, params=moved)
    assert list(got) == ["frozen.bias"]
    model.frozen.bias.data += 1
    torch.testing.assert_close(got, per_sample_grads(loss_fn, model, batch, params=moved), **EXACT)
    model.frozen.bias.requires_grad_()
    loss = loss_fn(model, **batch)[0]
    torch.testing.assert_close(got["frozen.bias"].sum(0), torch.autograd.grad(loss, model.frozen.bias)[0], **EXACT)
    norms = grad_norms(loss_fn, model, batch, params=moved)
    torch.testing.assert_close(norms, got["frozen.bias"].norm(dim=-1), **EXACT)
    assert not got["frozen.bias"].requires_grad


@pytest.mark.parametrize("fn", [grad_norms, per_sample_grads])
def test_rows_go_through_the_model_by_chunks(fn: Callable[..., Any]) -> None:
    seen = []

    def watched(policy: nn.Module, **columns: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        ids = columns["ids"]
        assert ids.shape == (1, 6)
        while torch._C._functorch.is_functorch_wrapped_tensor(ids):
            ids = torch._C._functorch.get_unwrapped(ids)
        seen.append(ids.numel() // 6)
        return loss_fn(policy, **columns)

    fn(watched, Net(), policy_batch(), chunk=2)
    assert seen == [2, 2, 1]


def test_unknown_and_missing_parameters_are_named() -> None:
    with pytest.raises(ValueError, match=r"\['nose'\], but the Net has no parameter"):
        grad_norms(loss_fn, Net(), policy_batch(), params={"nose": torch.ones(1)})
    with pytest.raises(ValueError, match="no parameter is trainable"):
        per_sample_grads(loss_fn, Net().requires_grad_(False), policy_batch())
    with pytest.raises(ValueError, match="nothing to differentiate by"):
        pullback(Net(), torch.ones(1, 2).long(), torch.ones(1, 2) > 0, params={})


def test_noise_scale_is_unbiased_over_all_draws() -> None:
    """The mean over all 3^4 draws of 4 rows from 3 is |G|^2 and tr(Sigma), also in micro-batches of 2."""
    rows = torch.randn(3, 2, dtype=torch.float64)
    mean = rows.mean(0)
    signal, noise = mean.square().sum(), (rows - mean).square().sum(-1).mean()
    drawn = rows[torch.tensor(list(product(range(3), repeat=4)))]  # [81, 4, 2]
    for size in (1, 2):
        micro = drawn.unflatten(1, (-1, size)).mean(2)
        got = noise_scale(micro.square().sum(-1), drawn.mean(1).square().sum(-1), rows=size)
        torch.testing.assert_close((got.signal.mean(), got.noise.mean()), (signal, noise), **EXACT)
        torch.testing.assert_close(got.scale, got.noise / got.signal, **EXACT)


def test_noise_scale_of_single_rows_has_the_sample_covariance() -> None:
    rows = torch.randn(6, 3, dtype=torch.float64)
    got = noise_scale(rows.square().sum(-1), rows.mean(0).square().sum())
    torch.testing.assert_close(got.noise, rows.T.cov().trace(), **EXACT)
    with pytest.raises(ValueError, match="at least 2"):
        noise_scale(torch.ones(3, 1), torch.ones(3))


def test_sweep_and_pullback_are_separate_backward_passes() -> None:
    model, batch = Net(), policy_batch()
    old, advantages = torch.randn(5, 6, dtype=torch.float64) - 2, torch.randn(5, 1, dtype=torch.float64)
    lows, highs = torch.tensor([0.1, 0.3, 0.5]), torch.tensor([0.2, 0.4, 0.1])

    def loss(logps: Tensor, low: Tensor, high: Tensor) -> Tensor:
        return weigh(clipped_surrogate(logps, old, advantages, low=low, high=high), batch["weights"])

    logps, pull = pullback(model, batch["ids"], mask=batch["mask"])
    torch.testing.assert_close(logps, model(batch["ids"], batch["mask"]).detach(), **EXACT)
    losses, slopes = sweep(loss, logps, low=lows, high=highs)
    grads = pull(slopes)
    torch.testing.assert_close(pull(slopes, chunk=2), grads, **EXACT)
    assert list(grads) == list(trainable(model))
    assert len({x.item() for x in losses}) == 3
    for k in range(3):
        outputs = model(batch["ids"], batch["mask"])
        one = loss(outputs, lows[k], highs[k])
        torch.testing.assert_close(losses[k], one.detach(), **EXACT)
        torch.testing.assert_close(
            slopes[k], torch.autograd.grad(one, outputs, retain_graph=True)[0].nan_to_num(), **EXACT
        )
        torch.testing.assert_close({name: x[k] for name, x in grads.items()}, by_backward(model, one), **EXACT)


def test_gradients_are_pulled_by_chunks() -> None:
    backward_passes = []

    class Counted(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            backward_passes.append(grad)
            return grad

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([2.0, 3.0]))

        def forward(self, x: Tensor) -> Tensor:
            return Counted.apply(x * self.weight)

    _, pull = pullback(Scale(), torch.tensor([5.0, 7.0]))
    for chunk, times in ((None, 1), (2, 2), (1, 3)):
        backward_passes.clear()
        assert pull(torch.ones(3, 2), chunk=chunk)["weight"].tolist() == [[5.0, 7.0]] * 3
        assert len(backward_passes) == times


def test_sweep_takes_the_outputs_of_an_actor_critic() -> None:
    logps, values = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    coefs = torch.tensor([0.5, 2.0], dtype=torch.float64)
    losses, (d_logps, d_values) = sweep(
        lambda x, coef: (x[0].exp() + coef * x[1] ** 2).sum(), (logps, values), coef=coefs
    )
    torch.testing.assert_close(losses, logps.exp().sum() + coefs * (values**2).sum(), **EXACT)
    torch.testing.assert_close(d_logps, logps.exp().expand(2, 2, 3), **EXACT)
    torch.testing.assert_close(d_values, 2 * coefs[:, None, None] * values, **EXACT)


def test_a_llama_with_an_adapter() -> None:
    from alignkit import hf

    policy, _ = hf.causal_lm("builtin:tiny", dtype="float64", lora=2)
    for x in trainable(policy).values():
        nn.init.normal_(x, std=0.1)
    batch = policy_batch(4, vocab=30)
    got = per_sample_grads(loss_fn, policy, batch, chunk=3)
    norms = grad_norms(loss_fn, policy, batch)
    assert all("lora" in name for name in got)
    for i in range(4):
        wanted = by_backward(policy, loss_fn(policy, **{name: x[i : i + 1] for name, x in batch.items()})[0])
        torch.testing.assert_close({name: x[i] for name, x in got.items()}, wanted, **EXACT)
        torch.testing.assert_close(norms[i], torch.cat([x.flatten() for x in wanted.values()]).norm(), **EXACT)

    def margin(logps: Tensor) -> Tensor:
        return logps.sum(-1).view(2, 2) @ torch.tensor([1.0, -1.0], dtype=torch.float64)

    betas = torch.tensor([0.1, 1.0], dtype=torch.float64)
    logps, pull = pullback(policy, batch["ids"], batch["mask"])
    _, slopes = sweep(lambda logps, beta: dpo(margin(logps), beta=beta).mean(), logps, beta=betas)
    grads = pull(slopes)
    for k, beta in enumerate(betas):
        wanted = by_backward(policy, dpo(margin(policy(batch["ids"], batch["mask"])), beta=beta).mean())
        torch.testing.assert_close({name: x[k] for name, x in grads.items()}, wanted, **EXACT)
