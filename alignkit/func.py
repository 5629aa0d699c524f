"""Gradients of many losses at once, by `torch.func`: of each row, of each value of a hyperparameter.

`model` is any module and `loss_fn` a loss as everywhere, `loss_fn(model, **columns) -> (scalar, metrics)`; what it gets
as `model` is a function of the module's arguments. Gradients are by parameter name, of the trainable parameters (of an
adapter alone, if the model has one) or of those in `params`, which maps names to the values to differentiate at.
Nothing random may run in the model: dropout is off or the model in eval mode.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Real, Shaped
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, vjp, vmap

from alignkit.masking import promote
from alignkit.types import Batch, Metrics


class NoiseScale(NamedTuple):
    """The simple noise scale in rows, and the estimates that it is the ratio of."""

    scale: Tensor
    signal: Tensor
    noise: Tensor


def per_sample_grads(
    loss_fn: Callable[..., tuple[Tensor, Metrics]],
    model: nn.Module,
    batch: Batch,
    *,
    params: Mapping[str, Tensor] | None = None,
    chunk: int | None = None,
) -> dict[str, Float[Tensor, "rows ..."]]:
    """The gradient of each row's loss by parameter name, [rows, ...]: `loss_fn` of batches of one row, [1, ...].

    As losses are weighed with weights of the whole batch, they add up to the batch's gradient. All rows go through the
    model together, or `chunk` at a time; see `grad_norms` for what needs no gradient of all rows at once.
    """
    call, params = _split(model, params)
    rows = vmap(grad(_loss_of_row(loss_fn, call)), (None, 0), chunk_size=chunk)
    grads: dict[str, Tensor] = rows(params, batch)
    return grads


def grad_norms(
    loss_fn: Callable[..., tuple[Tensor, Metrics]],
    model: nn.Module,
    batch: Batch,
    *,
    params: Mapping[str, Tensor] | None = None,
    chunk: int | None = None,
) -> Float[Tensor, "rows"]:
    """The norm of each row's gradient over all parameters, holding the gradients of `chunk` rows at a time (None: all).

    Rows and gradients as in `per_sample_grads`.
    """
    call, params = _split(model, params)
    slopes = grad(_loss_of_row(loss_fn, call))

    def norm(params: dict[str, Tensor], row: Batch) -> Tensor:
        return torch.stack([promote(x).square().sum() for x in slopes(params, row).values()]).sum().sqrt()

    norms: Tensor = vmap(norm, (None, 0), chunk_size=chunk)(params, batch)
    return norms


def noise_scale(small: Real[Tensor, "*batch n"], big: Real[Tensor, "*batch"], *, rows: int = 1) -> NoiseScale:
    """B = tr(Sigma) / |G|^2: the batch size at which a step's noise is as large as the gradient itself.

    `small` are the squared norms of the mean gradients of n micro-batches, each of `rows` rows (1 for the gradients of
    single rows), `big` that of the mean gradient of all n; the results have the shape of `big`. `signal` and `noise`
    are unbiased for |G|^2 and tr(Sigma), Sigma the covariance of single rows' gradients. Their ratio `scale`, in rows,
    is not, and signal may be negative: average both over steps before dividing. McCandlish et al. 2018,
    arXiv:1812.06162 eq. 2.9 and appendix A.1. Raises ValueError for fewer than two micro-batches.
    """
    n = small.shape[-1]
    if n < 2:
        raise ValueError(f"small has shape {tuple(small.shape)}: noise_scale needs at least 2 squared norms")
    mean, big = promote(small).mean(-1), promote(big)
    signal, noise = (n * big - mean) / (n - 1), (mean - big) * (rows * n / (n - 1))
    return NoiseScale(noise / signal, signal, noise)


def sweep(loss: Callable[..., Tensor], outputs: Any, **values: Shaped[Tensor, "k ..."]) -> tuple[Tensor, Any]:
    """(losses [K], gradients in the outputs [K, ...]) of `loss(outputs, **values)` at K values of hyperparameters.

    `loss` returns a scalar; `outputs` is a tensor, or a tuple or dict of tensors, that a model gave once. With
    `pullback` the gradients reach the parameters:

        logps, pull = pullback(policy, ids, mask)
        losses, slopes = sweep(lambda logps, beta: dpo(margin(logps), beta=beta).mean(), logps, beta=betas)
        grads = pull(slopes)  # name -> [K, ...]
    """
    slopes, losses = vmap(grad_and_value(lambda outputs, values: loss(outputs, **values)), (None, 0))(outputs, values)
    return losses, slopes


def pullback(
    model: nn.Module, *args: Any, params: Mapping[str, Tensor] | None = None, **kwargs: Any
) -> tuple[Any, Callable[..., dict[str, Tensor]]]:
    """(outputs of `model(*args, **kwargs)`, pull), with pull(gradients in the outputs [K, ...]) -> those by parameter.

    One forward pass for all K backward passes: name -> [K, ...]. They run together, or `pull(slopes, chunk=n)` n at a
    time, which needs less memory. See `sweep`.
    """
    call, params = _split(model, params)
    outputs, back, *_ = vjp(lambda params: call(params, *args, **kwargs), params)

    def pull(slopes: Any, *, chunk: int | None = None) -> dict[str, Tensor]:
        grads: dict[str, Tensor] = vmap(lambda x: back(x)[0], chunk_size=chunk)(slopes)
        return grads

    return outputs, pull


def _loss_of_row(
    loss_fn: Callable[..., tuple[Tensor, Metrics]], call: Callable[..., Any]
) -> Callable[[dict[str, Tensor], Batch], Tensor]:
    def loss(params: dict[str, Tensor], row: Batch) -> Tensor:
        return loss_fn(partial(call, params), **{name: column[None] for name, column in row.items()})[0]

    return loss


def _split(model: nn.Module, params: Mapping[str, Tensor] | None) -> tuple[Callable[..., Any], dict[str, Tensor]]:
    """`call(params, *args, **kwargs)`, in which all other parameters are constants, and the params."""
    known = dict(model.named_parameters())
    if params is None:
        params = {name: x.detach() for name, x in known.items() if x.requires_grad}
    unknown = sorted(params.keys() - known.keys())
    if unknown or not params:
        what = f"{unknown}, but the {type(model).__name__} has no parameter of that name"
        raise ValueError(
            f"params names {what if unknown else 'nothing to differentiate by: no parameter is trainable'}"
        )
    others = {name: x.detach() for name, x in known.items() if name not in params}

    def call(params: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        return functional_call(model, (others, params), args, kwargs)

    return call, dict(params)
