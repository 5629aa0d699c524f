"""What a trace is made of: columns and the calls that made them."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False)
class Column:
    """A tensor, or a list of prompts. What arithmetic in the recipe made has `text`, its expression, and `sources`.

    `site` is where that stands: columns of one site were made by one expression, for instance in a comprehension.
    """

    shape: tuple[int, ...]
    dtype: str
    differentiated: bool
    name: str = ""
    default: str = ""
    sources: "list[Column]" = field(default_factory=list)
    text: "list[str | Column]" = field(default_factory=list)
    site: Any = None


@dataclass(eq=False)
class Call:
    """A call of an alignkit function: what it was given, its hyperparameters, and what it returned."""

    name: str
    arguments: list[Column | str]
    settings: dict[str, str]
    is_model: bool = False
    inside: bool = False
    outputs: list[Column] = field(default_factory=list)
