"""A flow as a drawing: functions are boxes, columns the labels between them, in orange where the gradient runs."""

from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise

from alignkit.explain.columns import Column
from alignkit.explain.flow import Step, label
from alignkit.explain.layout import Point, layout

Node = Step | Column
Edge = tuple[Node, Node]

LETTER, LINE, PAD = 6.7, 15, 10
"""The width of a letter, from line to line, and around text; in pixels."""
GAP, MARGIN, HEAD = Point(18, 28), 20, 26
STYLE = """
text { font: 11px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; fill: #212529 }
.title { font-size: 13px; font-weight: 600 } .small { font-size: 10px; fill: #6c757d }
.page { fill: #ffffff } .part { fill: #f1f3f5 }
.box { fill: #ffffff; stroke: #868e96 } .model { stroke-width: 2.5 } .expression { stroke-dasharray: 3 3 }
.edge { fill: none; stroke: #adb5bd; stroke-width: 1.2 } .tip { fill: #adb5bd } .edge.mask { stroke-dasharray: 2 3 }
.grad .box { stroke: #e8590c; fill: #fff4e6 } .grad text { fill: #d9480f }
.edge.grad { stroke: #e8590c; stroke-width: 2 } .tip.grad { fill: #e8590c }
@media (prefers-color-scheme: dark) {
text { fill: #e9ecef } .small { fill: #adb5bd } .page { fill: #16191d } .part { fill: #212529 }
.box { fill: #2b3035; stroke: #adb5bd } .edge { stroke: #6c757d } .tip { fill: #6c757d }
.grad .box { stroke: #ff922b; fill: #3d2a17 } .grad text { fill: #ffc078 }
.edge.grad { stroke: #ff922b } .tip.grad { fill: #ff922b } }
"""
PARTS = ("stream: no gradient", "loss: the gradient runs where it is orange")


def svg(steps: list[Step], title: str) -> str:
    """An SVG file, readable on light and on dark pages; of what a step returns and nothing uses, only the loss."""
    used = {x for step in steps for x in step.inputs}
    shown = {step: [x for x in step.outputs if x in used] or step.outputs for step in steps}
    rows, border = _rows(shown)
    lines = {node: _lines(node) for node in rows}
    sizes = {node: Point(max(map(len, x)) * LETTER + 2 * PAD, len(x) * LINE + PAD) for node, x in lines.items()}
    edges: list[Edge] = [(step, x) for step in steps for x in shown[step]]
    edges += [(x, step) for step in steps for x in step.inputs]
    placed = layout(sizes, edges, rows, gap=GAP)
    tops = [placed.places[node].y - sizes[node].y / 2 for node in rows if rows[node] == border]
    split = min(tops, default=placed.size.y + 1)
    width = max(placed.size.x, len(title) * 8) + 2 * MARGIN

    def at(point: Point) -> Point:
        below = 2 * HEAD if point.y >= split else 0
        return Point(point.x + (width - placed.size.x) / 2, point.y + 2 * HEAD + below)

    places = {node: at(point) for node, point in placed.places.items()}
    bends = {edge: [at(point) for point in points] for edge, points in placed.bends.items()}
    starts, ends = (_ends(edges, side, places, bends, sizes) for side in (0, 1))
    height = at(placed.size).y + MARGIN
    limits = [HEAD, at(Point(0, split)).y - 1.5 * HEAD, height] if tops else [HEAD, height]
    body = [
        _rect("page", Point(width / 2, height / 2 + 4), Point(width, height + 8), 0),
        f'<text class="title" x="{MARGIN}" y="18">{escape(title)}</text>',
    ]
    for name, top, bottom in zip(PARTS, limits, limits[1:]):
        size = Point(width - 16, bottom - top - 8 * (bottom < height))
        body.append(_rect("part", Point(width / 2, top + size.y / 2), size, 8))
        body.append(f'<text class="small" x="{MARGIN}" y="{top + 17:.0f}">{name}</text>')
    body += [_edge(edge, [starts[edge], *bends[edge], ends[edge]]) for edge in edges]
    body += [_node(node, places[node], sizes[node], lines[node]) for node in rows]
    box = f'width="{width:.0f}" height="{height + 8:.0f}" viewBox="0 0 {width:.0f} {height + 8:.0f}"'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {box}>', f"<style>{STYLE}</style>", *body, "</svg>\n"])


def _rows(shown: Mapping[Step, Sequence[Column]]) -> tuple[dict[Node, int], int]:
    """The row of each node, below all that goes into it, and the first row that is not the stream's."""
    rows: dict[Node, int] = {}
    border = 0
    for step, outputs in shown.items():
        border = border or (step.part != "stream") * (max(rows.values(), default=0) + 1)
        rows[step] = max([border, *(rows[x] + 1 for x in step.inputs)])
        rows |= dict.fromkeys(outputs, rows[step] + 1)
    return rows, border or -1


def _lines(node: Node) -> list[str]:
    if isinstance(node, Column):
        return [label(node), f"{node.dtype} {list(node.shape)}"]
    settings = " ".join(f"{name}={value}" for name, value in node.settings.items())
    return [node.title, settings] if settings else [node.title]


def _ends(
    edges: Sequence[Edge],
    side: int,
    places: Mapping[Node, Point],
    bends: Mapping[Edge, Sequence[Point]],
    sizes: Mapping[Node, Point],
) -> dict[Edge, Point]:
    """Where edges leave (side 0) or enter (side 1): along the width of a node, in the order of their next points."""
    own: dict[Node, list[Edge]] = {}
    for edge in edges:
        own.setdefault(edge[side], []).append(edge)
    found = {}
    for node, them in own.items():
        them.sort(key=lambda edge: (bends[edge][-side] if bends[edge] else places[edge[1 - side]]).x)
        width = sizes[node].x - 2 * PAD if isinstance(node, Step) else min(12 * len(them), sizes[node].x - 2 * PAD)
        y = places[node].y + (sizes[node].y / 2 if side == 0 else -sizes[node].y / 2)
        for i, edge in enumerate(them):
            found[edge] = Point(places[node].x + width * ((i + 0.5) / len(them) - 0.5), y)
    return found


def _edge(edge: Edge, points: Sequence[Point]) -> str:
    column = edge[0] if isinstance(edge[0], Column) else edge[1]
    marks = " grad" * (edge[0].differentiated and edge[1].differentiated) + " mask" * (_lines(column)[1][:4] == "bool")
    path = f"M{points[0].x:.1f} {points[0].y:.1f}"
    for a, b in pairwise(points):
        half = (a.y + b.y) / 2
        path += f"C{a.x:.1f} {half:.1f} {b.x:.1f} {half:.1f} {b.x:.1f} {b.y:.1f}"
    tip = f'<path class="tip{marks}" d="M{points[-1].x - 4:.1f} {points[-1].y - 7:.1f}l8 0l-4 7z"/>'
    return f'<path class="edge{marks}" d="{path}"/>' + tip * isinstance(edge[1], Step)


def _node(node: Node, place: Point, size: Point, lines: Sequence[str]) -> str:
    parts = [f'<g class="{type(node).__name__.lower()}{" grad" * node.differentiated}">']
    if isinstance(node, Step):
        is_expression = not node.arguments and node.inputs
        parts.append(_rect("box" + " model" * node.is_model + " expression" * bool(is_expression), place, size, 5))
    for i, line in enumerate(lines):
        y = place.y + (i - (len(lines) - 1) / 2) * LINE + 4
        kind = ' class="small"' * bool(i)
        parts.append(f'<text{kind} text-anchor="middle" x="{place.x:.1f}" y="{y:.1f}">{escape(line)}</text>')
    return "".join([*parts, "</g>"])


def _rect(kind: str, place: Point, size: Point, radius: int) -> str:
    corner = f'x="{place.x - size.x / 2:.1f}" y="{place.y - size.y / 2:.1f}"'
    return f'<rect class="{kind}" {corner} width="{size.x:.1f}" height="{size.y:.1f}" rx="{radius}"/>'
