import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from alignkit import func
from tests.specs.base import row

MODEL = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Tanh()).double()
for i, parameter in enumerate(MODEL.parameters()):
    parameter.data = torch.linspace(-1, 1.5, parameter.numel(), dtype=torch.float64).cos().view_as(parameter) / (i + 1)


def _loss(model: torch.nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return model(x.clamp(-3, 3)).square().sum(), {}


for name in ("per_sample_grads", "grad_norms"):
    row(
        f"func.{name}",
        lambda x, name=name: getattr(func, name)(_loss, MODEL, {"x": x}, chunk=2),
        lambda s: {"x": s.real(s.lead[0], 3)},
        "rows alone vmap",
        flat=True,
    )
row(
    "func.noise_scale",
    lambda small, big: func.noise_scale(small, big, rows=2),
    lambda s: {"small": s.uniform(0.1, 0.5, *s.lead, 3), "big": s.uniform(1.0, 2.0, *s.lead)},
    "rows alone vmap dtype ints gradcheck",
    diff=("small", "big"),
    ints=("small", "big"),
)
row(
    "func.sweep",
    lambda outputs, beta: func.sweep(lambda x, beta: -logsigmoid(beta * x).sum(), outputs, beta=beta),
    lambda s: {"outputs": s.rows(), "beta": s.uniform(0.1, 2.0, 3)},
    "vmap gradcheck",
    diff=("outputs", "beta"),
)


def _pulled(x: Tensor, slopes: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    outputs, pull = func.pullback(MODEL, x)
    return outputs, pull(slopes)


row(
    "func.pullback",
    _pulled,
    lambda s: {"x": s.rows(3), "slopes": s.real(2, *s.lead, 2)},
    "vmap gradcheck",
    diff=("x", "slopes"),
)
