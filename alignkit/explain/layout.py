"""A layered layout: boxes of given sizes in rows, edges downwards, few crossings, short edges.

Sugiyama et al. 1981: rows by the longest way from the top, order by the mean place of the neighbours; and places within
a row by least squares.
"""

from collections.abc import Hashable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

SWEEPS = 24
BEND = 14
"""The room that an edge takes in a row that it crosses."""


class Point(NamedTuple):
    """Where something is, from the top left; or its size."""

    x: float
    y: float


class Layout(NamedTuple):
    """The middle of each node, the points that each edge goes through between its ends, and the size of it all.

    An edge has two points in each row that it crosses, one above the other, so that it bends between the rows.
    """

    places: dict[Any, Point]
    bends: dict[Any, list[Point]]
    size: Point


def layout(
    sizes: Mapping[Any, Point],
    edges: Sequence[tuple[Hashable, Hashable]],
    rows: Mapping[Any, int],
    *,
    gap: Point,
) -> Layout:
    """`rows` numbers the row of each node, `edges` go to higher rows; `gap` is between nodes, and between rows."""
    grid: list[list[Hashable]] = [[] for _ in range(max(rows.values()) + 1)]
    for node, row in rows.items():
        grid[row].append(node)
    chains: dict[tuple[Hashable, Hashable], list[tuple[Hashable, Hashable, int]]] = {}
    for a, b in edges:
        chains[a, b] = [(a, b, row) for row in range(rows[a] + 1, rows[b])]
        for bend, row in zip(chains[a, b], range(rows[a] + 1, rows[b])):
            grid[row].append(bend)
    above: dict[Hashable, list[Hashable]] = {node: [] for row in grid for node in row}
    below: dict[Hashable, list[Hashable]] = {node: [] for row in grid for node in row}
    for (a, b), bends in chains.items():
        for upper, lower in pairwise([a, *bends, b]):
            below[upper].append(lower)
            above[lower].append(upper)
    size = {node: sizes.get(node, Point(BEND, 0)) for row in grid for node in row}
    x = _across(grid, above, below, {node: point.x for node, point in size.items()}, gap.x)
    y, top = list[tuple[float, float]](), 0.0
    for line in grid:
        bottom = top + max(size[node].y for node in line)
        y.append((top, bottom))
        top = bottom + gap.y
    left = min(x[node] - size[node].x / 2 for node in x)
    right = max(x[node] + size[node].x / 2 for node in x)
    places = {node: Point(x[node] - left, sum(y[row]) / 2) for node, row in rows.items()}
    points = {
        edge: [Point(x[bend] - left, at) for bend in bends for at in y[bend[2]]] for edge, bends in chains.items()
    }
    return Layout(places, points, Point(right - left, y[-1][1]))


def _across(
    grid: list[list[Hashable]],
    above: Mapping[Hashable, list[Hashable]],
    below: Mapping[Hashable, list[Hashable]],
    width: Mapping[Hashable, float],
    gap: float,
) -> dict[Hashable, float]:
    """Where the middle of each node is in its row; sorts the rows. Long edges are pulled straight."""
    x = {node: float(i) for row in grid for i, node in enumerate(row)}
    for sweep in range(4 * SWEEPS):
        down, ordering = sweep % 2 == 0, sweep < SWEEPS
        for row in grid if down else grid[::-1]:
            wanted, pull = {}, {}
            for node in row:
                near = [*above[node], *below[node]] if not ordering else above[node] if down else below[node]
                pulls = [1 if ordering else _pull(width[node]) * _pull(width[other]) for other in near]
                wanted[node] = sum(p * x[other] for p, other in zip(pulls, near)) / sum(pulls) if near else x[node]
                pull[node] = max(sum(pulls), 1)
            if ordering:
                row.sort(key=wanted.__getitem__)
            x |= _apart(row, wanted, pull, width, gap)
    return x


def _pull(width: float) -> int:
    return 4 if width == BEND else 1


def _apart(
    row: list[Hashable],
    wanted: Mapping[Hashable, float],
    pull: Mapping[Hashable, float],
    width: Mapping[Hashable, float],
    gap: float,
) -> dict[Hashable, float]:
    """The places nearest to the wanted ones, by squares, at which the nodes of a row, in order, do not overlap."""
    offsets, blocks = [0.0], list[tuple[float, float, int]]()  # a block's sum of shifts, of pulls, and its nodes
    for a, b in pairwise(row):
        offsets.append(offsets[-1] + (width[a] + width[b]) / 2 + gap)
    for node, offset in zip(row, offsets):
        block = (pull[node] * (wanted[node] - offset), pull[node], 1)
        while blocks and blocks[-1][0] / blocks[-1][1] >= block[0] / block[1]:
            before = blocks.pop()
            block = (before[0] + block[0], before[1] + block[1], before[2] + block[2])
        blocks.append(block)
    shifts = [total / pulls for total, pulls, n in blocks for _ in range(n)]
    return {node: shift + offset for node, shift, offset in zip(row, shifts, offsets)}
