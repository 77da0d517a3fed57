"""The samples of all probes as cells of the table: one per place and operator, the mean where there are several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from firsttoken.cost_tables.lookup import grid_of
from firsttoken.cost_tables.probes import METRICS, Row, Sample, samples

if TYPE_CHECKING:
    from firsttoken.cost_tables.space import Axis, CostSpace
    from firsttoken.student import StudentConfig


def cells_of(
    space: CostSpace, measured: Sequence[Sequence[Sequence[Row]]]
) -> tuple[tuple[str, ...], NDArray[np.float64]]:
    """The operators' names, and [operators, cells, graphs, metrics]; cells that no student has are NaN.

    `measured`: rows of `space.probes`, graph by graph.
    """
    bases = grid_of(space).bases.tolist()
    graphs = len(measured[0])
    numbers: dict[str, int] = {}
    found: list[tuple[int, int, Sample]] = []
    count = np.zeros((bases[-1], graphs))
    for probe, rows in zip(space.probes, measured, strict=True):
        places = set()
        for sample in samples(rows, probe.layers):
            cell = _cell(space, bases, probe, sample)
            found.append((numbers.setdefault(f"{sample.group}.{sample.op}", len(numbers)), cell, sample))
            places.add((cell, sample.layer, sample.graph))
        for cell, _, graph in places:
            count[cell, graph] += 1
    total = np.zeros((len(numbers), bases[-1], graphs, len(METRICS)))
    for number, cell, sample in found:
        total[number, cell, sample.graph] += sample.metrics
    mean = total / np.where(count > 0, count, np.nan)[:, :, None]
    _fill(space, bases, mean)
    return tuple(numbers), mean


def _fill(space: CostSpace, bases: list[int], cells: NDArray[np.float64]) -> None:
    """Puts in the cells of widths that are measured on lines alone."""
    size = {name: len(axis.line) for name, axis in space.axes}
    hidden = space["hidden"].measured
    lines = [hidden.index(value) for value in space.line_hidden]
    heads = [space.heads(value) for value in space["kv_heads"].measured]
    most = max(len(axis.line) for axis in heads)
    shape = (len(cells), size["weight_bits"], size["kv_heads"], size["head_dim"], len(hidden), most, *cells.shape[2:])
    attention = cells[:, : bases[1]].reshape(shape)
    for kv, axis in enumerate(heads):
        part = attention[:, :, kv, :, :, : len(axis.line)]
        part[...] = _between(part, 3, axis, hidden, lines)
    cells[:, : bases[1]] = attention.reshape(len(cells), bases[1], *cells.shape[2:])
    wide = space["intermediate"]
    feed = cells[:, bases[1] : bases[2]].reshape(len(cells), size["weight_bits"], len(hidden), len(wide.line),
                                                 *cells.shape[2:])  # fmt: skip
    cells[:, bases[1] : bases[2]] = _between(feed, 2, wide, hidden, lines).reshape(
        len(cells), bases[2] - bases[1], *cells.shape[2:]
    )


def _between(
    block: NDArray[np.float64], at: int, axis: Axis, hidden: tuple[int, ...], lines: list[int]
) -> NDArray[np.float64]:
    """Costs with hidden on axis `at` and the values of a line on the next one, all of them.

    Measured values are joined by lines. What a width of a line costs beyond that is known on the rows `lines`, and in
    the rows between them lies between.
    """
    known = [axis.line.index(value) for value in axis.measured]
    if not lines or len(known) == len(axis.line):
        return block
    moved = np.moveaxis(block, (at, at + 1), (0, 1))
    smooth = np.einsum("xc,hc...->hx...", _shares(axis.line, axis.measured), moved[:, known])
    beyond = moved[lines] - smooth[lines]
    found = smooth + np.einsum("hl,lx...->hx...", _shares(hidden, tuple(hidden[i] for i in lines)), beyond)
    found[lines], found[:, known] = moved[lines], moved[:, known]
    return np.moveaxis(found, (0, 1), (at, at + 1))


def _shares(values: Sequence[int], known: Sequence[int]) -> NDArray[np.float64]:
    """[values, known]: what each known value contributes to a value on the lines between them."""
    return np.stack([np.interp(values, known, unit) for unit in np.eye(len(known))], axis=1)


def _cell(space: CostSpace, bases: list[int], probe: StudentConfig, sample: Sample) -> int:
    """Number of the cell that a sample belongs to; the order is that of `lookup`."""
    at = {name: axis.line.index for name, axis in space.axes}
    size = {name: len(axis.line) for name, axis in space.axes}
    hidden, head_dim = at["hidden"](probe.hidden), at["head_dim"](probe.head_dim)
    if sample.group == "start":
        return bases[2] + head_dim * size["hidden"] + hidden
    if sample.group == "head":
        return bases[3] + hidden * size["vocab"] + at["vocab"](probe.vocab)
    layer = probe.layer(sample.layer)
    bits = at["weight_bits"](layer.weight_bits or 0)
    if sample.group == "feed_forward":
        return (
            bases[1] + (bits * size["hidden"] + hidden) * size["intermediate"] + at["intermediate"](layer.intermediate)
        )
    kv = at["kv_heads"](layer.kv_heads)
    heads = [space.heads(value).line for value in space["kv_heads"].measured]
    most = max(map(len, heads))
    row = ((bits * size["kv_heads"] + kv) * size["head_dim"] + head_dim) * size["hidden"] + hidden
    return row * most + heads[kv].index(layer.heads)
