"""One row for each public function of the floor: how to draw its inputs, and which laws of `testing.laws` it obeys.

`row(name, call, draw, "law law ...", ...)` takes the fields of `testing.laws.Spec`; every row obeys "pure".
"""

import inspect
import pkgutil
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

from torch import Tensor

import alignkit
from alignkit.testing.laws import Draw, Spec
from alignkit.testing.strategies import Source

UPPER_FLOORS = {
    "hf",
    "trl",
    "cli",
    "demo",
    "difference",
    "explain",
    "papers",
    "pictures",
    "rl",
    "rlhf",
    "recipes",
    "testing",
    "conventions",
    "source",
}


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


TABLE: list[Spec] = []


def row(name: str, call: Callable[..., Any], draw: Draw, laws: str = "", **rest: Any) -> None:
    TABLE.append(Spec(name, call, draw, {*laws.split(), "pure"}, **rest))


def elementwise(name: str, fn: Callable[..., Tensor], draw: Draw, laws: str = "", **hyperparameters: Any) -> None:
    """A mask-free function, all of whose arguments are tensors of one shape (or rows of them)."""

    def call(**columns: Tensor) -> Tensor:
        return fn(**columns, **hyperparameters)

    probe = draw(Source(0, (1,), 1))
    ints = tuple(k for k in probe if "ints" in laws and k in ("advantages", "scores", "x"))
    diff = tuple(probe) if "gradcheck" in laws else ()
    row(name, call, draw, f"garbage rows alone vmap dtype {laws}", diff=diff, ints=ints)


def columns(*names: str, logps: tuple[str, ...] = ()) -> Draw:
    return lambda s: {name: s.logps() if name in logps else s.tokens() for name in names}


PER_GROUP = "rows alone vmap dtype ints gradcheck"


def per_group(name: str, call: Callable[..., Any], draw: Draw, laws: str = PER_GROUP) -> None:
    """Advantages [..., G] of `rewards` [..., G]."""
    row(name, call, draw, laws, diff=("rewards",), ints=("rewards",))


def rewards_of_groups(s: Source) -> dict[str, Tensor]:
    return {"rewards": s.rows(s.time + 1)}
