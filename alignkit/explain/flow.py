"""The steps of a trace that lead to the loss, each with the columns that go in and come out."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

from alignkit.explain.frames import show
from alignkit.explain.trace import Call, Column, Trace

Event = Call | Column
MINIBATCH = "minibatch"


@dataclass(eq=False)
class Step:
    """A call, or an expression of the recipe (without arguments); `part` is "stream", "weights" or "loss"."""

    title: str
    part: str
    inputs: list[Column]
    outputs: list[Column]
    arguments: list[str] | None = None
    settings: dict[str, str] = field(default_factory=dict)
    is_model: bool = False
    differentiated: bool = False

    @property
    def text(self) -> str:
        """`name(arguments; hyperparameters)`, or the expression."""
        if self.arguments is None:
            return self.title
        settings = " ".join(f"{name}={value}" for name, value in self.settings.items())
        return f"{self.title}({', '.join(self.arguments)}{'; ' * bool(settings)}{settings})"


def flow(trace: Trace) -> tuple[list[Step], dict[str, list[str]]]:
    """The steps from the source to the loss, and its metrics by how they are made; all of a stream without a loss."""
    parts = _parts(trace)
    made_by = {x: call for events in parts.values() for call in events if isinstance(call, Call) for x in call.outputs}
    loss = [trace.loss] if trace.loss else []
    for column, call in made_by.items():
        column.default = _default(column, call)
    shown = {x for x in parts["stream"] if isinstance(x, Call) and not x.inside}
    used = [x for call in shown for x in _columns(call)]
    wanted = _closure([*loss, *used], made_by)
    path = {x for x in _closure(loss, made_by) if x.differentiated}
    steps = [Step(trace.source, "stream", [], [x for x in wanted if not x.text and x not in made_by])]
    for part, events in parts.items():
        for event in events:
            if isinstance(event, Call) and (event in shown or wanted.keys() & event.outputs):
                arguments = [x if isinstance(x, str) else label(x) for x in event.arguments]
                inputs = _visible(_columns(event), made_by)
                steps.append(Step(event.name, part, inputs, event.outputs, arguments, event.settings, event.is_model))
            elif isinstance(event, Column) and event.name and event in wanted:
                steps.append(Step(expression(event), part, _visible(event.sources, made_by), [event]))
        drawn = [x for x in wanted if x.text == [MINIBATCH]] if part == "stream" else []
        if drawn:
            steps.append(Step(MINIBATCH, part, [x.sources[0] for x in drawn], drawn))
    for step in steps:
        step.differentiated = not path.isdisjoint(step.outputs)
        for column in step.outputs:
            column.differentiated = column in path
    metrics: dict[str, list[str]] = {}
    for name, column in trace.metrics.items():
        metrics.setdefault(_metric(column, made_by), []).append(name)
    return steps, metrics


def label(column: Column) -> str:
    """A column's name in the recipe, or the expression that made it, or what made it."""
    return column.name or (expression(column) if column.text else column.default)


def expression(column: Column) -> str:
    """How arithmetic made a column, on one line, columns of a batch by their names alone."""
    text = "".join(x if isinstance(x, str) else label(x) for x in column.text)
    return re.sub(r"\w+\[\"(\w+)\"\]", r"\1", re.sub(r"\s+", " ", text))


def _parts(trace: Trace) -> dict[str, list[Event]]:
    """The events of the stream, those that make weights, those of the loss; a column of the batch is the stream's."""
    stream, loss = trace.events[: trace.before], trace.events[trace.before :] if trace.loss else []
    weights: list[Event] = []
    for name, column in trace.batch.items():
        column.name, origin = name, trace.stream.get(name)
        if name in trace.aggregates:
            continue
        if origin and origin.shape == column.shape:
            trace.batch[name] = origin
            _replace(loss, column, origin)
        elif origin:
            column.sources, column.text = [origin], [MINIBATCH]
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


def _metric(column: Column, made_by: dict[Column, Call]) -> str:
    call = made_by.get(column)
    return f"{call.name}({', '.join(label(x) for x in _columns(call))})" if call else label(column)
