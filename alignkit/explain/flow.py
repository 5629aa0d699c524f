"""The steps of a trace that lead to the loss, each with the columns that go in and come out."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby

from alignkit.explain.columns import Call, Column
from alignkit.explain.frames import show
from alignkit.explain.trace import Trace

Event = Call | Column
ARGUMENTS = 6
"""More are not listed."""


@dataclass(eq=False)
class Step:
    """A call, or an expression of the recipe (without arguments); `part` is "stream", "weights" or "loss"."""

    title: str
    part: str
    inputs: list[Column]
    outputs: list[Column]
    arguments: str = ""
    settings: dict[str, str] = field(default_factory=dict)
    is_model: bool = False
    differentiated: bool = False

    @property
    def text(self) -> str:
        """`name(arguments; hyperparameters)`, or the expression."""
        settings = "".join(f" {name}={value}" for name, value in self.settings.items())
        return f"{self.title}{self.arguments[:-1]};{settings})" if settings else self.title + self.arguments


def flow(trace: Trace) -> tuple[list[Step], dict[str, list[str]]]:
    """The steps from the source to the loss, and its metrics by how they are made; all of a stream without a loss."""
    parts = _parts(trace)
    made_by = {x: call for events in parts.values() for call in events if isinstance(call, Call) for x in call.outputs}
    loss = [trace.loss] if trace.loss else []
    for column, call in made_by.items():
        column.default = _default(column, call)
    shown = [x for x in parts["stream"] if isinstance(x, Call) and not x.inside]
    wanted = _closure([*loss, *(x for call in shown for x in _columns(call))], made_by)
    path = {x for x in _closure(loss, made_by) if x.differentiated}
    given = [x for x in wanted if not x.text and x not in made_by]
    steps = [Step(trace.source, "stream", [], given)] if given else []
    for part, events in parts.items():
        kept = [x for x in events if x in shown or any(y in wanted for y in _named(x))]
        for _, group in groupby(kept, key=lambda x: x.site if isinstance(x, Column) else x):
            steps.append(_step(list(group), part, made_by))
    for step in steps:
        step.differentiated = not path.isdisjoint(step.outputs)
        for column in step.outputs:
            column.differentiated = column in path
    metrics: dict[str, list[str]] = {}
    for name, column in trace.metrics.items():
        how = made_by[column].name + _listed(made_by[column]) if column in made_by else label(column)
        metrics.setdefault(how, []).append(name)
    return steps, metrics


def label(column: Column) -> str:
    """A column's name in the recipe, or the expression that made it, or what made it."""
    return column.name or (_expression([column]) if column.text else column.default)


def _expression(columns: Sequence[Column]) -> str:
    """How arithmetic made columns, on one line, with "…" for what differs and a batch's columns by their names."""
    parts = [x[0] if x.count(x[0]) == len(x) else "…" for x in zip(*(column.text for column in columns))]
    text = "".join(x if isinstance(x, str) else label(x) for x in parts)
    return re.sub(r"\w+\[\"(\w+)\"\]", r"\1", re.sub(r"\s+", " ", text))


def _named(event: Event) -> list[Column]:
    """The columns that a step for this event would return."""
    return event.outputs if isinstance(event, Call) else [event] if event.name else []


def _step(group: list[Event], part: str, made_by: dict[Column, Call]) -> Step:
    """The step of a call, or of the columns that one expression made."""
    call, columns = group[0], [x for x in group if isinstance(x, Column)]
    if isinstance(call, Column):
        inputs = _visible([x for column in columns for x in column.sources], made_by)
        return Step(_expression(columns), part, inputs, columns)
    inputs = _visible(_columns(call), made_by)
    return Step(call.name, part, inputs, call.outputs, _listed(call), call.settings, call.is_model)


def _listed(call: Call) -> str:
    """The arguments of a call, unless they are very many."""
    names = [x if isinstance(x, str) else label(x) for x in call.arguments]
    return f"({', '.join(names) if len(names) <= ARGUMENTS else '…'})"


def _parts(trace: Trace) -> dict[str, list[Event]]:
    """The events of the stream, those that make weights, those of the loss; a column of the batch is the stream's."""
    stream, loss = trace.events[: trace.before], trace.events[trace.before :] if trace.loss else []
    weights = list[Event]()
    for name, column in trace.batch.items():
        column.name, origin = name, trace.stream.get(name)
        if name in trace.aggregates:
            continue
        if origin and origin.shape == column.shape:
            trace.batch[name] = origin
            _replace(loss, column, origin)
        elif origin:
            column.sources, column.text = [origin], ["minibatch"]
            stream.append(column)
    for name, (mask, aggregate) in trace.aggregates.items():
        options = aggregate.keywords if isinstance(aggregate, partial) else {}
        fn = aggregate.func if isinstance(aggregate, partial) else aggregate
        settings = {key: show(x) for key, x in options.items()}
        if name in trace.batch:
            weights.append(Call(fn.__name__, [trace.batch[mask]], settings, outputs=[trace.batch[name]]))
    return {"stream": stream, "weights": weights, "loss": loss}


def _replace(events: Iterable[Event], old: Column, new: Column) -> None:
    for event in events:
        if isinstance(event, Call):
            event.arguments[:] = [new if x is old else x for x in event.arguments]
        else:
            event.sources[:] = [new if x is old else x for x in event.sources]


def _columns(call: Call) -> list[Column]:
    return [x for x in call.arguments if isinstance(x, Column)]


def _closure(columns: Iterable[Column], made_by: dict[Column, Call]) -> dict[Column, None]:
    """The columns and all that they were made from."""
    found: dict[Column, None] = {}
    open_ = list(columns)[::-1]
    while open_:
        column = open_.pop()
        if column not in found:
            found[column] = None
            open_ += [*column.sources, *(_columns(made_by[column]) if column in made_by else [])][::-1]
    return found


def _visible(columns: Iterable[Column], made_by: dict[Column, Call]) -> list[Column]:
    """The columns that steps return, in place of the nameless arithmetic between."""
    found: dict[Column, None] = {}
    for x in columns:
        found |= dict.fromkeys([x] if x.name or x in made_by or not x.text else _visible(x.sources, made_by))
    return list(found)


def _default(column: Column, call: Call) -> str:
    """The name of a column that the recipe gives none."""
    first = next(iter(_columns(call)), column)
    if not call.is_model:
        return column.default or call.name
    return ["logps", "values"][call.outputs.index(column) % 2] if column.shape == first.shape else "rewards"
