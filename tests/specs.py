"""One row for each public function of the floor: how to draw its inputs, and which laws it obeys.

The laws themselves are in test_laws.py:

    padding    columns appended under a False mask change nothing, and are 0 in a per-token result
    garbage    whatever sits under a False mask reaches neither value nor gradient
    rows       a permutation of the rows permutes the result (`reduced`: leaves it alone)
    alone      every row gives by itself what it gives in the batch
    vmap       a vmapped call is the calls one by one
    dtype      computed in at least float32, and never in less than what came in
    ints       integers give what the same numbers give as floats
    gradcheck  derivatives are those of finite differences
    pure       neither the inputs nor the global random streams change (every row)
"""

import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from itertools import islice
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import alignkit
from alignkit import advantages, controllers, data, kl, logps, masking, shaping, train, weights
from alignkit.losses import policy, preference, reward, supervised, value
from tests.strategies import DIM, VOCAB, Source

UPPER_FLOORS = {"hf", "trl", "cli", "demo", "recipes", "testing"}


def floor_modules() -> list[ModuleType]:
    """Every module of the package below `hf`, whether this table knows it or not."""
    top = [f"alignkit.{m.name}" for m in pkgutil.iter_modules(alignkit.__path__) if m.name not in UPPER_FLOORS]
    found = []
    for name in top:
        module = import_module(name)
        inner = pkgutil.iter_modules(getattr(module, "__path__", []))
        found += [module, *(import_module(f"{name}.{m.name}") for m in inner)]
    return found


def public_functions(module: ModuleType) -> dict[str, Any]:
    short = module.__name__.removeprefix("alignkit.")
    return {
        f"{short}.{name}": fn
        for name, fn in vars(module).items()
        if inspect.isfunction(fn) and fn.__module__ == module.__name__ and not name.startswith("_")
    }


Draw = Callable[[Source], dict[str, Any]]


@dataclass
class Spec:
    """A function (or a call that closes over what is not a tensor) with its inputs and laws."""

    name: str
    call: Callable[..., Any]
    draw: Draw
    laws: set[str]
    tokens: dict[str, int] = field(default_factory=dict)
    """Arguments under the mask: 0 if position t is read at t, 1 if at t - 1 (logits and hidden states)."""
    per_token: bool = False
    """The result has a time axis, and is 0 where the mask is False."""
    reduced: bool = False
    fixed: tuple[str, ...] = ()
    """Arguments without a row axis."""
    diff: tuple[str, ...] = ()
    floats: tuple[str, ...] | None = None
    """Arguments that the dtype law casts; by default every float tensor."""
    ints: tuple[str, ...] = ()
    exact: bool = True
    """The result of a low precision is that of its promoted input, bit for bit."""
    masked: Callable[..., Any] | None = None
    """What the padding and garbage laws call, if not `call` itself."""

    def __str__(self) -> str:
        return self.name

    @property
    def function(self) -> str:
        return self.name.split("[")[0]


TABLE: list[Spec] = []


def row(name: str, call: Callable[..., Any], draw: Draw, laws: str = "", **rest: Any) -> None:
    TABLE.append(Spec(name, call, draw, {*laws.split(), "pure"}, **rest))


def elementwise(name: str, fn: Callable[..., Tensor], draw: Draw, laws: str = "", **hyperparameters: Any) -> None:
    """A mask-free function: log-probs are born under the mask, and the result leaves through weights."""

    def call(**columns: Tensor) -> Tensor:
        return fn(**columns, **hyperparameters)

    def masked(mask: Tensor, **columns: Tensor) -> Tensor:
        born = {k: torch.where(mask, x, 0) for k, x in columns.items()}
        out = call(**born)
        out = out if out.is_floating_point() else out.to(torch.float64)
        return weights.weigh(out, weights.token_mean(mask))

    probe = draw(Source(0, (1,), 1))
    ints = tuple(k for k in probe if "ints" in laws and k in ("advantages", "scores", "x"))
    diff = tuple(probe) if "gradcheck" in laws else ()
    everywhere = "garbage rows alone vmap dtype" + ("" if "kto" in name else " padding")
    row(name, call, draw, f"{everywhere} {laws}", masked=masked, tokens=dict.fromkeys(probe, 0), diff=diff, ints=ints)


def columns(*names: str, logps: tuple[str, ...] = ()) -> Draw:
    return lambda s: {name: s.logps() if name in logps else s.tokens() for name in names}


# masking

elementwise("masking.promote", masking.promote, columns("x"), "gradcheck ints")
elementwise("masking.clip", masking.clip, columns("x"), "gradcheck ints", low=-0.6, high=0.4)
for reduce in (masking.masked_sum, masking.masked_mean, masking.masked_var):
    for dim in (None, -1):
        row(
            f"masking.{reduce.__name__}[dim={dim}]",
            lambda x, mask, reduce=reduce, dim=dim: reduce(x, mask, dim),
            lambda s: {"x": s.tokens(), "mask": s.mask()},
            "padding garbage rows vmap dtype ints gradcheck" + (" alone" if dim else ""),
            tokens={"x": 0},
            reduced=dim is None,
            diff=("x",),
            ints=("x",),
        )
for shift_mean in (True, False):
    row(
        f"masking.whiten[shift_mean={shift_mean}]",
        lambda x, mask, shift_mean=shift_mean: masking.whiten(x, mask, shift_mean=shift_mean, eps=0.1),
        lambda s: {"x": s.tokens(), "mask": s.mask()},
        "padding garbage rows vmap dtype ints gradcheck",
        tokens={"x": 0},
        per_token=True,
        diff=("x",),
        ints=("x",),
    )
for count in (masking.lengths, masking.last_index):
    row(f"masking.{count.__name__}", count, lambda s: {"mask": s.mask()}, "padding rows alone vmap")

# logps

row(
    "logps.token_logps",
    logps.token_logps,
    lambda s: {"logits": s.tokens(VOCAB), "ids": s.ids(), "mask": s.mask()},
    "padding garbage rows alone vmap dtype gradcheck",
    tokens={"logits": 1, "ids": 0},
    per_token=True,
    diff=("logits",),
)
row(
    "logps.sequence_logps",
    logps.sequence_logps,
    lambda s: {"logits": s.tokens(VOCAB), "ids": s.ids(), "mask": s.mask()},
    "padding garbage rows alone vmap dtype gradcheck",
    tokens={"logits": 1, "ids": 0},
    diff=("logits",),
)
for of_logits in (logps.vocab_mean_logps, logps.entropy):
    row(
        f"logps.{of_logits.__name__}",
        of_logits,
        lambda s: {"logits": s.tokens(VOCAB), "mask": s.mask()},
        "padding garbage rows alone vmap dtype gradcheck",
        tokens={"logits": 1},
        per_token=True,
        diff=("logits",),
    )


def _head(s: Source) -> dict[str, Tensor]:
    return {"hidden": s.tokens(DIM), "weight": s.real(VOCAB, DIM), "bias": s.real(VOCAB), "mask": s.mask()}


row(
    "logps.head_logps",
    lambda hidden, weight, bias, ids, mask: logps.head_logps(hidden, weight, ids, mask, bias=bias, chunk=3),
    lambda s: _head(s) | {"ids": s.ids()},
    "padding garbage rows alone vmap dtype gradcheck",
    tokens={"hidden": 1, "ids": 0},
    per_token=True,
    fixed=("weight", "bias"),
    diff=("hidden", "weight", "bias"),
    exact=False,
)
row(
    "logps.head_entropy",
    lambda hidden, weight, bias, mask: logps.head_entropy(hidden, weight, mask, bias=bias, chunk=3),
    _head,
    "padding garbage rows alone vmap dtype gradcheck",
    tokens={"hidden": 1},
    per_token=True,
    fixed=("weight", "bias"),
    diff=("hidden", "weight", "bias"),
    exact=False,
)

# kl

for estimator in (kl.k1, kl.k2, kl.k3, kl.abs):
    pair = columns("logps", "ref_logps", logps=("logps", "ref_logps"))
    elementwise(f"kl.{estimator.__name__}", estimator, pair, "gradcheck")
row(
    "kl.full",
    kl.full,
    lambda s: {"logits": s.tokens(VOCAB), "ref_logits": s.tokens(VOCAB), "mask": s.mask()},
    "padding garbage rows alone vmap dtype gradcheck",
    tokens={"logits": 1, "ref_logits": 1},
    per_token=True,
    diff=("logits", "ref_logits"),
)

# weights

for name, aggregate in {
    "token_mean": weights.token_mean,
    "sequence_mean": weights.sequence_mean,
    "sequence_sum": weights.sequence_sum,
    "constant_length": lambda mask: weights.constant_length(mask, length=5.0),
}.items():
    row(f"weights.{name}", aggregate, lambda s: {"mask": s.mask()}, "padding rows vmap", per_token=True)
row(
    "weights.group_mean",
    lambda mask: weights.group_mean(mask.flatten(0, 1), size=2).unflatten(0, (-1, 2)),
    lambda s: {"mask": s.mask(s.lead[0], 2, *s.lead[1:], s.time)},
    "padding rows vmap",
    per_token=True,
)
row("weights.row_mean", weights.row_mean, lambda s: {"mask": s.mask()}, "padding rows vmap")
row(
    "weights.weigh",
    lambda x, w, mask: weights.weigh(x, torch.where(mask, w, 0)),
    lambda s: {"x": s.tokens(), "w": s.tokens(), "mask": s.mask()},
    "padding garbage rows vmap dtype ints gradcheck",
    tokens={"x": 0, "w": 0},
    reduced=True,
    diff=("x", "w"),
    floats=("x",),
    ints=("x",),
)

# advantages

for gamma, lam in ((0.9, 0.8), (1.0, 0.95)):
    row(
        f"advantages.gae[gamma={gamma}]",
        lambda rewards, values, mask, gamma=gamma, lam=lam: advantages.gae(rewards, values, mask, gamma=gamma, lam=lam),
        lambda s: {"rewards": s.tokens(), "values": s.tokens(), "mask": s.mask()},
        "padding garbage rows alone vmap dtype ints gradcheck",
        tokens={"rewards": 0, "values": 0},
        per_token=True,
        diff=("rewards", "values"),
        ints=("rewards",),
    )
row(
    "advantages.discounted_returns",
    lambda rewards, mask: advantages.discounted_returns(rewards, mask, gamma=0.9),
    lambda s: {"rewards": s.tokens(), "mask": s.mask()},
    "padding garbage rows alone vmap dtype ints gradcheck",
    tokens={"rewards": 0},
    per_token=True,
    diff=("rewards",),
    ints=("rewards",),
)
for baseline in (advantages.group_center, advantages.group_normalize, advantages.leave_one_out):
    row(
        f"advantages.{baseline.__name__}",
        baseline,
        lambda s: {"rewards": s.rows(s.time + 1)},
        "rows alone vmap dtype ints gradcheck",
        diff=("rewards",),
        ints=("rewards",),
    )

# shaping

row(
    "shaping.kl_shaped",
    lambda scores, kl, mask: shaping.kl_shaped(scores, kl, mask, coef=0.3),
    lambda s: {"scores": s.rows(), "kl": s.tokens(), "mask": s.mask()},
    "padding garbage rows alone vmap dtype ints gradcheck",
    tokens={"kl": 0},
    per_token=True,
    diff=("scores", "kl"),
    ints=("scores",),
)
elementwise("shaping.clip_score", shaping.clip_score, columns("scores"), "gradcheck ints", limit=0.7)
elementwise("shaping.scale_score", shaping.scale_score, columns("scores"), "gradcheck ints", std=0.7)
elementwise("shaping.normalize_score", shaping.normalize_score, columns("scores"), "gradcheck ints", mean=0.2, std=0.7)
row(
    "shaping.missing_eos",
    lambda scores, ids, mask: shaping.missing_eos(scores, ids, mask, eos=2, penalty=1.5),
    lambda s: {"scores": s.rows(), "ids": s.ids(), "mask": s.mask()},
    "padding garbage rows alone vmap dtype ints gradcheck",
    tokens={"ids": 0},
    diff=("scores",),
    ints=("scores",),
)

# controllers


def _machine(machine: Any, *signals: Any) -> Any:
    state = machine.init()
    for signal in signals:
        state = machine.update(state, *signal)
    return tuple(state)


row(
    "controllers.constant_kl",
    lambda kl: (*_machine(controllers.constant_kl(coef=0.3), (kl, 4)), kl),
    lambda s: {"kl": s.real()},
    "vmap",
)
row(
    "controllers.adaptive_kl",
    lambda kl: _machine(controllers.adaptive_kl(coef=0.3, target=1.0, horizon=100.0), (kl, 4), (2 * kl, 5)),
    lambda s: {"kl": s.real()},
    "vmap",
)
row(
    "controllers.running_moments",
    lambda x, y: _machine(controllers.running_moments(), (x,), (y,)),
    lambda s: {"x": s.rows(), "y": s.tokens()},
    "rows vmap",
    reduced=True,
)
row(
    "controllers.merge_moments",
    lambda a, b: tuple(controllers.merge_moments(controllers.Moments(*a), controllers.Moments(*b))),
    lambda s: {"a": s.uniform(1, 4, 3).unbind(), "b": s.uniform(1, 4, 3).unbind()},
)
row(
    "controllers.ema",
    lambda old, new: (m := controllers.ema(decay=0.9)).update(m.init({"w": old}), {"w": new})["w"],
    lambda s: {"old": s.tokens(), "new": s.tokens()},
    "rows alone vmap",
)


PROMPTS = tuple("abcaab")


def _prompts(s: Source) -> dict[str, Any]:
    return {"rewards": s.real(6), "seen": s.real(2)}


row(
    "controllers.prompt_stats",
    lambda rewards, seen: list(controllers.prompt_stats(buffer=3).update({"a": seen}, PROMPTS, rewards).values()),
    _prompts,
)
row(
    "controllers.prompt_normalize",
    lambda rewards, seen: controllers.prompt_normalize(rewards, PROMPTS, {"a": masking.promote(seen)}, min_count=2),
    _prompts,
    "dtype gradcheck ints vmap",
    diff=("rewards", "seen"),
    ints=("rewards",),
)

# losses

elementwise("losses.supervised.nll", supervised.nll, columns("logps", logps=("logps",)), "gradcheck")
elementwise(
    "losses.supervised.smoothed_nll",
    supervised.smoothed_nll,
    columns("logps", "vocab_mean_logps", logps=("logps", "vocab_mean_logps")),
    "gradcheck",
    smoothing=0.1,
)
ratio = columns("logps", "old_logps", "advantages", logps=("logps", "old_logps"))
elementwise("losses.policy.reinforce", policy.reinforce, columns("logps", "advantages"), "gradcheck ints")
elementwise("losses.policy.clipped_surrogate", policy.clipped_surrogate, ratio, "gradcheck ints", low=0.1, high=0.3)
elementwise("losses.policy.clip_fraction", policy.clip_fraction, ratio, "ints", low=0.1, high=0.3)
elementwise("losses.value.squared", value.squared, columns("values", "returns"), "gradcheck")
triple = columns("values", "old_values", "returns")
elementwise("losses.value.clipped_value", value.clipped_value, triple, "gradcheck", clip=0.3)
elementwise("losses.value.value_clip_fraction", value.value_clip_fraction, triple, clip=0.3)
elementwise("losses.preference.dpo", preference.dpo, columns("margin"), "gradcheck", beta=0.3, smoothing=0.1)
elementwise("losses.preference.hinge", preference.hinge, columns("margin"), "gradcheck", beta=0.3)
elementwise("losses.preference.ipo", preference.ipo, columns("margin"), "gradcheck", beta=0.3)
elementwise(
    "losses.preference.kto_pair",
    preference.kto_pair,
    lambda s: {"log_ratios": s.rows(2), "kl": s.rows(2).abs()},
    "gradcheck",
    beta=0.3,
)
comparison = columns("chosen", "rejected")
elementwise("losses.reward.bradley_terry", reward.bradley_terry, comparison, "gradcheck", margin=0.2)
elementwise("losses.reward.centering", reward.centering, comparison, "gradcheck")

# data: lists in, columns out


def _list_rows(s: Source) -> dict[str, Any]:
    return {"rows": [{"ids": s.integer(0, 9, n).tolist(), "mask": s.mask(n).tolist()} for n in (3, 1, 4)]}


row("data.pad", data.pad, lambda s: {"nested": [[[1, 2], [3]], [[4], []]]})
row("data.collate", data.collate, _list_rows)
row(
    "data.truncate",
    lambda ids, mask: data.truncate(ids, mask, max_length=3, keep="keep_end", bos=1),
    lambda s: {"ids": [1, *s.integer(2, 9, s.time).tolist()], "mask": [False, *s.mask(s.time).tolist()]},
)
row("data.stream", lambda rows: list(islice(data.stream(rows, batch=2, seed=1), 3)), _list_rows)
row("data.add_columns", lambda rows: data.add_columns(rows, lambda b: {"n": b["mask"].sum(-1)}, batch=2), _list_rows)

# train: a step and what surrounds it


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


row("train.update", _step, _batch)
row("train.split", lambda batch: list(train.split(batch, 3)), _batch)
row(
    "train.minibatches",
    lambda batch: list(train.minibatches(batch, 2, epochs=2, generator=torch.Generator().manual_seed(1))),
    _batch,
)
row("train.infer", lambda batch: train.infer(lambda x, mask: (x.exp(), mask), *batch.values(), rows=3), _batch)
row("train.joint_weights", lambda batch: train.joint_weights([batch["mask"]] * 2, weights.token_mean), _batch)
row("train.weighted", lambda batch: train.weighted([batch], weights.token_mean), _batch)
row("train.evaluating", _evaluated, lambda s: {"x": s.real(3)})
row("train.add_metrics", lambda metrics: train.add_metrics({}, metrics), lambda s: {"metrics": {"a": s.real()}})
row("train.check_columns", lambda batch: train.check_columns(lambda model, x, mask: 0, batch), _batch)
row("train.check_loss", lambda out: train.check_loss(out), lambda s: {"out": (s.real(), {"a": s.real()})})
