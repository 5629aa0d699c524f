"""A flow as lines of text: each step and what it returns, in their order."""

from textwrap import fill

from alignkit.explain.columns import Column
from alignkit.explain.flow import Step, label

WIDTH, INDENT, ARROW = 100, "    ", " → "
TITLES = {
    "stream": "STREAM, without gradient",
    "weights": "WEIGHTS, of the masks of the whole step",
    "loss": "LOSS, differentiated where ∂ stands",
}


def text(steps: list[Step], metrics: dict[str, list[str]]) -> str:
    """At most 100 columns wide, but for a call or an expression that is longer itself."""
    names = max((len(label(x)) for step in steps for x in step.outputs), default=0)
    outputs = {step: [_describe(x, names) for x in step.outputs] for step in steps}
    right = max((len(line) for made in outputs.values() for line in made), default=0)
    left = min(max(len(step.text) for step in steps), WIDTH - len(INDENT + ARROW) - right)
    lines, part = list[str](), ""
    for step, made in outputs.items():
        if step.part != part:
            part = step.part
            lines += ["", TITLES[part]]
        lines.append(f"  {'∂' if step.differentiated else ' '} {step.text:{left}}")
        if made and len(step.text) <= left:
            lines[-1] += ARROW + made.pop(0)
        lines += [INDENT + " " * left + ARROW + line for line in made]
    lines += ["", "METRICS"] if metrics else []
    for how, own in metrics.items():
        lines.append(fill(f"{', '.join(own)} = {how}", WIDTH, initial_indent=INDENT, subsequent_indent=2 * INDENT))
    return "\n".join(line.rstrip() for line in lines[1:]) + "\n"


def _describe(column: Column, width: int) -> str:
    return f"{label(column):{width}}  {column.dtype:7}  {list(column.shape)}"
