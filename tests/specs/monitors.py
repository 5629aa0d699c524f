import torch
from torch import Tensor

from alignkit import monitors
from alignkit.testing.strategies import Source
from tests.specs.base import rewards_of_groups, row

LOGPS = ("logps", "old_logps", "sampler_logps", "ref_logps")


def _update(s: Source) -> dict[str, Tensor]:
    # log-probs near each other: of ratios of e^40 a sum depends on its order; weights of rows exact in float32
    signals = {name: s.uniform(-2, 0, *s.lead, s.time) for name in LOGPS}
    signals |= {"advantages": s.tokens(), "entropy": s.tokens(), "mask": s.mask(), "tokens": s.tokens()}
    return signals | {"rewards": s.rows(), "truncated": s.rows() > 0, "rows": s.rows().round()}


row(
    "monitors.policy_metrics",
    lambda mask, tokens, **rest: monitors.policy_metrics(mask=mask, tokens=torch.where(mask, tokens, 0), **rest),
    _update,
    "padding garbage rows vmap additive ints",
    tokens=dict.fromkeys((*LOGPS, "advantages", "entropy", "tokens"), 0),
    reduced=True,
    ints=("advantages", "rewards"),
)
row(
    "monitors.weigh_each",
    lambda x, y, tokens, rows: monitors.weigh_each({"x": x, "y": y}, tokens, rows),
    lambda s: {"x": s.tokens(), "y": s.rows(), "tokens": s.tokens(), "rows": s.rows()},
    "rows vmap additive dtype ints gradcheck",
    reduced=True,
    diff=("x", "y", "tokens", "rows"),
    floats=("x", "y"),
    ints=("x", "y"),
)
row(
    "monitors.zero_variance", monitors.zero_variance, rewards_of_groups, "rows alone vmap dtype ints", ints=("rewards",)
)
row(
    "monitors.correlation",
    monitors.correlation,
    lambda s: {"x": s.tokens(), "y": s.tokens()},
    "rows alone vmap dtype ints gradcheck",
    diff=("x", "y"),
    ints=("x", "y"),
)
row(  # not alone: the means run over the rows
    "monitors.frontier_point",
    monitors.frontier_point,
    lambda s: {"scores": s.rows(), "kl": s.tokens(), "mask": s.mask()},
    "padding garbage rows vmap dtype ints gradcheck",
    tokens={"kl": 0},
    reduced=True,
    diff=("scores", "kl"),
    ints=("scores",),
)
row(
    "monitors.on_frontier",
    monitors.on_frontier,
    lambda s: {"kl": s.tokens(), "scores": s.tokens()},
    "rows alone vmap ints",
    ints=("kl", "scores"),
)
