"""A claim, what would refute it, and its verdict from results."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

KINDS = ("identity", "number", "trend")
VERDICTS = ("holds", "differs", "fails", "not run")
LEAST_SEEDS = 5
"""Of a confidence interval."""
Line = dict[str, Any]


@dataclass(frozen=True)
class Criterion:
    """What the metrics must satisfy.

    `metric` within `tolerance` (or `sigmas` standard errors) of `value`, at every seed for an identity, else in the
    mean; or `at_least`, `at_most`, in which a trend's confidence interval must lie; or the metrics of `order`, of which
    each must be above the next by a paired interval.
    """

    metric: str = ""
    value: float | None = None
    tolerance: float | None = None
    sigmas: float | None = None
    at_least: float | None = None
    at_most: float | None = None
    order: tuple[str, ...] = ()
    confidence: float = 0.95

    def __post_init__(self) -> None:
        near = self.tolerance is not None or self.sigmas is not None
        bounded = self.at_least is not None or self.at_most is not None
        ways = [len(self.order) > 1, near and bool(self.metric), bounded and bool(self.metric)]
        if ways.count(True) != 1:
            raise ValueError("needs a metric with tolerance, sigmas, at_least or at_most, or an order of two metrics")

    @property
    def metrics(self) -> tuple[str, ...]:
        """Those that are looked at."""
        return self.order or (self.metric,)

    def passes(self, kind: str, seen: dict[str, np.ndarray]) -> bool:
        """Of the values of each metric over seeds; nothing passes that is not finite."""
        if not all(np.isfinite(seen[name]).all() for name in self.metrics):
            return False
        if self.order:
            return all(self._interval(seen[a] - seen[b])[0] > 0 for a, b in zip(self.order, self.order[1:]))
        x = seen[self.metric]
        allowed = self.tolerance if self.sigmas is None else self.sigmas * self._error(seen)
        if allowed is not None:
            gaps = np.abs((x if kind == "identity" else x.mean(keepdims=True)) - (self.value or 0.0))
            return bool((gaps <= allowed).all())
        low, high = self._interval(x) if kind == "trend" else (x.min(), x.max())
        above = self.at_least is None or low >= self.at_least
        return bool(above and (self.at_most is None or high <= self.at_most))

    def _error(self, seen: dict[str, np.ndarray]) -> float:
        """The standard error of the mean: of the run's own `<metric>_se`, or over seeds."""
        own = seen.get(f"{self.metric}_se")
        x = seen[self.metric]
        return float(np.sqrt((own**2).sum()) / len(own) if own is not None else x.std(ddof=1) / math.sqrt(len(x)))

    def _interval(self, x: np.ndarray) -> tuple[float, float]:
        """Of the mean, by the bootstrap over seeds."""
        drawn = np.random.default_rng(0).choice(x, (10_000, len(x))).mean(1)
        low, high = np.quantile(drawn, [(1 - self.confidence) / 2, (1 + self.confidence) / 2])
        return float(low), float(high)


@dataclass(frozen=True)
class Claim:
    """One claim of a paper. `scale` says how near the experiment is to the paper's, `paper` what was published."""

    id: str
    text: str
    source: str
    kind: str
    scale: str
    run: str
    criterion: Criterion
    differs: Criterion | None = None
    paper: str | float = ""
    provenance: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} must be one of {', '.join(KINDS)}")
        if self.kind == "number" and (self.criterion.value is None or not self.provenance):
            raise ValueError("a number needs a value and its provenance")

    def judge(self, lines: Sequence[Line], seeds: int) -> tuple[str, str]:
        """(verdict, what was measured) from the results of its run: the newest line of each seed."""
        newest = {line["seed"]: line["metrics"] for line in lines if line["run"] == self.run}
        if len(newest) < seeds:
            return "not run", f"{len(newest)} of {seeds} seeds"
        seen = _columns(list(newest.values()))
        names = self.criterion.metrics
        missing = [name for name in (*names, *(self.differs.metrics if self.differs else ())) if name not in seen]
        if missing:
            return "fails", f"no metric {', '.join(missing)}"
        verdict = "holds" if self.criterion.passes(self.kind, seen) else "fails"
        if verdict == "fails" and self.differs and self.differs.passes(self.kind, seen):
            verdict = "differs"
        return verdict, " > ".join(_shown(seen[name]) for name in names)


def _columns(metrics: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """The numbers that every seed has; lists are for figures."""
    names = set.intersection(*(set(m) for m in metrics))
    numbers = [name for name in names if not any(isinstance(m[name], list) for m in metrics)]
    return {name: np.array([math.nan if m[name] is None else m[name] for m in metrics], float) for name in numbers}


def _shown(x: np.ndarray) -> str:
    spread = f" ± {x.std(ddof=1) / math.sqrt(len(x)):.2g}" if len(x) > 1 and x.std() > 0 else ""
    return f"{x.mean():.4g}{spread}"
