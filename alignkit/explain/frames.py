"""What a frame of the running recipe tells: the expression it is in, its parameters, the tensors that it holds."""

import linecache
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from types import CodeType, FrameType
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")
Span = tuple[int, int]
"""The first byte of an expression in its file, and the one behind its last."""
WORD = re.compile(r"(?<![\w.\"])([A-Za-z_]\w*)(?![\w\"]|\s*=[^=])")
"""A variable in an expression."""


def span(frame: FrameType) -> Span:
    """The expression that a frame is evaluating; (0, 0) where its code tells no positions."""
    line, end_line, column, end_column = _positions(frame.f_code)[frame.f_lasti // 2]
    if line is None or end_line is None or column is None or end_column is None:
        return 0, 0
    starts = _text(frame.f_code.co_filename)[1]
    return starts[line - 1] + column, starts[end_line - 1] + end_column


def quote(frame: FrameType, calls: Mapping[Span, T], variables: Mapping[str, T]) -> list[str | T]:
    """The expression that a frame is in: source text, and in it what `calls` and `variables` stand for."""
    text = _text(frame.f_code.co_filename)[0]
    (at, end), parts = span(frame), list[str | T]()

    def add(source: bytes) -> None:
        parts.extend(variables.get(word, word) for word in WORD.split(source.decode()))

    for (start, stop), what in sorted(calls.items(), key=lambda item: item[0]):
        if at <= start and stop <= end and (start, stop) != span(frame):
            add(text[at:start])
            parts.append(what)
            at = stop
    add(text[at:end])
    return parts


def parameters(code: CodeType) -> tuple[list[str], list[str]]:
    """The names of a function's parameters, and of those that are keywords only."""
    positional, keywords = code.co_argcount, code.co_kwonlyargcount
    more = bool(code.co_flags & 4) + bool(code.co_flags & 8)  # *args and **kwargs
    names = list(code.co_varnames[: positional + keywords + more])
    return names, names[positional : positional + keywords]


def leaves(x: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """What is in dicts, lists and tuples, with its key or the name of its field; prompts are one leaf."""
    if isinstance(x, Mapping):
        for key, value in x.items():
            yield from leaves(value, str(key))
    elif isinstance(x, list | tuple) and not is_prompts(x):
        fields = getattr(type(x), "__match_args__", ())
        for i, value in enumerate(x):
            yield from leaves(value, f"{name}.{fields[i]}".lstrip(".") if i < len(fields) else "")
    else:
        yield name, x


def scopes(frame: FrameType | None, files: tuple[str, ...], *, inner: bool = True) -> list[dict[str, Any]]:
    """The variables of the running functions of `files`, the outermost first; not of comprehensions without `inner`."""
    found: list[dict[str, Any]] = []
    while frame is not None:
        if frame.f_code.co_filename in files and (inner or not frame.f_code.co_name.endswith("comp>")):
            found.insert(0, frame.f_locals)
        frame = frame.f_back
    return found


def is_prompts(x: Any) -> bool:
    """Whether `x` is a list of prompts or of rows."""
    if not isinstance(x, list) or not x or not isinstance(x[0], str | Mapping | list):
        return False
    return not (isinstance(x[0], Mapping) and any(isinstance(value, Tensor) for value in x[0].values()))


def show(x: Any) -> str:
    """A hyperparameter as text; empty for what is none."""
    if isinstance(x, Tensor):
        return f"{x.item():.4g}" if x.dim() == 0 else ""
    return f"{x:.4g}" if isinstance(x, float) else str(x) if isinstance(x, int | str) and x is not False else ""


@contextmanager
def unwatched() -> Iterator[None]:
    """Calls go by unseen, for speed."""
    watch = sys.getprofile()
    sys.setprofile(None)
    try:
        yield
    finally:
        sys.setprofile(watch)


@cache
def _positions(code: CodeType) -> list[tuple[int | None, int | None, int | None, int | None]]:
    return list(code.co_positions())


@cache
def _text(file: str) -> tuple[bytes, list[int]]:
    """The bytes of a file, and where its lines start."""
    lines, starts = [line.encode() for line in linecache.getlines(file)], [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    return b"".join(lines), starts
