from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from alignkit import masking, train, weights
from alignkit.testing.strategies import Source
from tests.specs.base import row


def _batch(s: Source) -> dict[str, Any]:
    return {"batch": {"x": s.real(4, s.time), "mask": s.mask(4, s.time)}}


def _step(batch: dict[str, Tensor]) -> Any:
    model = nn.utils.skip_init(nn.Linear, 1, 1, dtype=torch.float64)
    model.load_state_dict({"weight": torch.ones(1, 1), "bias": torch.zeros(1)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return train.update(_squares, model, optimizer, batch, aggregate=weights.token_mean, micro=2)


def _squares(model: nn.Module, x: Tensor, mask: Tensor, weights: Tensor) -> Any:
    return masking.masked_sum(model(x[..., None])[..., 0] ** 2 * weights, mask), {}


def _evaluated(x: Tensor) -> Any:
    with train.evaluating(nn.Dropout(0.9)) as model_or_device:
        return x, model_or_device is None


row(
    "train.split_tokens",
    lambda batch: list(train.split_tokens(batch, 5)),
    lambda s: {"batch": {"ids": s.integer(0, 9, 3, s.time), "mask": s.mask(3, s.time)}},
)
row("train.update", _step, _batch)
row("train.split", lambda batch: list(train.split(batch, 3)), _batch)
row(
    "train.minibatches",
    lambda batch: list(train.minibatches(batch, 2, epochs=2, generator=torch.Generator().manual_seed(1))),
    _batch,
)
row(
    "train.rollouts",
    lambda batch: list(islice(train.rollouts(lambda i: batch, {}, size=2, epochs=2, seed=1), 5)),
    _batch,
)
row("train.infer", lambda batch: train.infer(lambda x, mask: (x.exp(), mask), *batch.values(), rows=3), _batch)
row("train.joint_weights", lambda batch: train.joint_weights([batch["mask"]] * 2, weights.token_mean), _batch)
row("train.weighted", lambda batch: train.weighted([batch], weights.token_mean), _batch)
row("train.evaluating", _evaluated, lambda s: {"x": s.real(3)})
row("train.add_metrics", lambda metrics: train.add_metrics({}, metrics), lambda s: {"metrics": {"a": s.real()}})
row("train.check_columns", lambda batch: train.check_columns(lambda model, x, mask: 0, batch), _batch)
row("train.check_loss", lambda out: train.check_loss(out), lambda s: {"out": (s.real(), {"a": s.real()})})
