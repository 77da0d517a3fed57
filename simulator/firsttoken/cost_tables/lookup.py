"""The lookup in a cost table: cells of two dimensions between which costs are bilinear, summed over a student's layers.

Cells are rows of one matrix: [bits, kv_heads, head_dim, hidden, heads] of attention, then [bits, hidden, intermediate],
[head_dim, hidden] of the start, [hidden, vocab] of the head. `Grid` says where a dimension's values lie in `axes`.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from firsttoken.cost_tables.space import DIMS, CostSpace

LAYERS: Final = DIMS.index("layers")
HIDDEN: Final = DIMS.index("hidden")
HEAD_DIM: Final = DIMS.index("head_dim")
VOCAB: Final = DIMS.index("vocab")
HEADS: Final = DIMS.index("heads")
KV_HEADS: Final = DIMS.index("kv_heads")
INTERMEDIATE: Final = DIMS.index("intermediate")
BITS: Final = DIMS.index("weight_bits")
WIDTHS: Final = 4
"""Dimensions that may differ from layer to layer, the last ones of `DIMS`."""
_ON_STEP: Final = 1e-9


class Grid(NamedTuple):
    """The values of every dimension between which costs are bilinear.

    Attributes:
        axes: values, those of a dimension one behind the other; query heads come last, once per value of kv_heads.
        spans: first value and how many, by dimension; then of the query heads of each value of kv_heads.
        steps: first value and step, by dimension.
        bases: first cell of attention, feed-forward, start and head, and the number of cells.
    """

    axes: NDArray[np.float64]
    spans: NDArray[np.int64]
    steps: NDArray[np.float64]
    bases: NDArray[np.int64]


def grid_of(space: CostSpace) -> Grid:
    """The grid of a space."""
    measured = {name: axis.line for name, axis in space.axes}
    lists = [measured[name] for name in DIMS]
    lists += [space.heads(kv_heads).line for kv_heads in measured["kv_heads"]]
    starts = np.cumsum([0, *map(len, lists)])
    spans = np.array([[start, len(values)] for start, values in zip(starts, lists, strict=False)], dtype=np.int64)
    count = {name: len(values) for name, values in measured.items()}
    most = max(len(values) for values in lists[len(DIMS) :])
    spans[HEADS] = 0, most
    shared = count["weight_bits"] * count["hidden"]
    sizes = [
        shared * count["kv_heads"] * count["head_dim"] * most,
        shared * count["intermediate"],
        count["head_dim"] * count["hidden"],
        count["hidden"] * count["vocab"],
    ]
    return Grid(
        np.array([value for values in lists for value in values], dtype=np.float64),
        spans,
        np.array([[axis.values[0], axis.step] for _, axis in space.axes], dtype=np.float64),
        np.cumsum([0, *sizes]).astype(np.int64),
    )


@njit(cache=True)
def _place(axes, spans, steps, row, dim, value, relaxed):  # type: ignore[no-untyped-def]
    """(position, share of the next one, whether the value is covered) of a value in one row of `spans`."""
    start, count = spans[row, 0], spans[row, 1]
    if not (axes[start] <= value <= axes[start + count - 1]):
        return 0, 0.0, False
    if not relaxed and steps[dim, 1] > 0.0:
        off = (value - steps[dim, 0]) / steps[dim, 1]
        if abs(off - round(off)) > _ON_STEP:
            return 0, 0.0, False
    low, high = 0, count - 1
    while high - low > 1:
        middle = (low + high) // 2
        if axes[start + middle] <= value:
            low = middle
        else:
            high = middle
    if high == low:
        return low, 0.0, True
    return low, (value - axes[start + low]) / (axes[start + high] - axes[start + low]), True


@njit(cache=True)
def _listed(axes, spans, dim, value):  # type: ignore[no-untyped-def]
    """Position of a value that must be one of the list; -1 where it is not."""
    start = spans[dim, 0]
    for at in range(spans[dim, 1]):
        if axes[start + at] == value:
            return at
    return -1


@njit(cache=True)
def _within(axes, spans, steps, dim, value, relaxed):  # type: ignore[no-untyped-def]
    """Whether a value that is not interpolated lies in its range."""
    return _place(axes, spans, steps, dim, dim, value, relaxed)[2]


@njit(cache=True)
def _add(cells, corner, across, down, t, u, times, out):  # type: ignore[no-untyped-def]
    """Adds `times` the bilinear mean of a cell: `t` of the way to the next row of cells, `u` to the next column."""
    for c in range(out.shape[0]):
        value = (1.0 - t) * (1.0 - u) * cells[corner, c]
        if u != 0.0:
            value += (1.0 - t) * u * cells[corner + across, c]
        if t != 0.0:
            value += t * (1.0 - u) * cells[corner + down, c]
            if u != 0.0:
                value += t * u * cells[corner + down + across, c]
        out[c] += times * value


@njit(cache=True)
def _find(grid, width, h, t, d, relaxed):  # type: ignore[no-untyped-def]
    """Where a layer's two cells are: (flags, attention's corner, its u, feed-forward's corner, its u)."""
    axes, spans, steps, bases = grid
    flags = 0
    k = _listed(axes, spans, KV_HEADS, width[1])
    b = _listed(axes, spans, BITS, width[3])
    i, w, covered = _place(axes, spans, steps, INTERMEDIATE, INTERMEDIATE, width[2], relaxed)
    if not covered:
        flags |= 1 << INTERMEDIATE
    if b < 0:
        flags |= 1 << BITS
    if k < 0:
        return flags | 1 << KV_HEADS, 0, 0.0, 0, 0.0
    a, u, covered = _place(axes, spans, steps, len(DIMS) + k, HEADS, width[0], relaxed)
    if not covered or (not relaxed and width[0] % width[1] != 0.0):
        flags |= 1 << HEADS
    if flags or d < 0:
        return flags, 0, 0.0, 0, 0.0
    n_hidden, n_heads = spans[HIDDEN, 1], spans[HEADS, 1]
    attention = (((b * spans[KV_HEADS, 1] + k) * spans[HEAD_DIM, 1] + d) * n_hidden + h) * n_heads + a
    feed = bases[1] + (b * n_hidden + h) * spans[INTERMEDIATE, 1] + i
    return flags, attention, u, feed, w


@njit(cache=True)
def _ends(grid, row, relaxed):  # type: ignore[no-untyped-def]
    """What holds for all layers: (flags, hidden's position and share, head_dim's position, vocab's and share)."""
    axes, spans, steps, _ = grid
    flags = 0
    if not _within(axes, spans, steps, LAYERS, row[LAYERS], relaxed):
        flags |= 1 << LAYERS
    h, t, covered = _place(axes, spans, steps, HIDDEN, HIDDEN, row[HIDDEN], relaxed)
    if not covered:
        flags |= 1 << HIDDEN
    d = _listed(axes, spans, HEAD_DIM, row[HEAD_DIM])
    if d < 0:
        flags |= 1 << HEAD_DIM
    v, u, covered = _place(axes, spans, steps, VOCAB, VOCAB, row[VOCAB], relaxed)
    if not covered:
        flags |= 1 << VOCAB
    return flags, h, t, d, v, u


@njit(cache=True)
def one(grid, cells, row, widths, relaxed, out):  # type: ignore[no-untyped-def]
    """Adds a student's costs to `out` and returns the dimensions that are not covered, a bit each.

    `row`: the first dimensions of `DIMS`. `widths`: the last ones, one line per layer, or one line for all layers.
    """
    flags, h, t, d, v, u = _ends(grid, row, relaxed)
    lines = widths.shape[0]
    layers = lines
    times = 1.0
    if lines == 1:
        times = row[LAYERS]
    elif row[LAYERS] <= lines:
        layers = int(row[LAYERS])
    else:
        flags |= 1 << LAYERS
    spans, bases = grid[1], grid[3]
    for at in range(layers):
        wrong, attention, x, feed, y = _find(grid, widths[at], h, t, d, relaxed)
        flags |= wrong
        if flags == 0:
            _add(cells, attention, 1, spans[HEADS, 1], t, x, times, out)
            _add(cells, feed, 1, spans[INTERMEDIATE, 1], t, y, times, out)
    if flags == 0:
        _add(cells, bases[2] + d * spans[HIDDEN, 1] + h, 0, 1, t, 0.0, 1.0, out)
        _add(cells, bases[3] + h * spans[VOCAB, 1] + v, 1, spans[VOCAB, 1], t, u, 1.0, out)
    return flags


@njit(cache=True)
def many(grid, cells, rows, widths, relaxed, out, flags):  # type: ignore[no-untyped-def]
    """`one` for every row; costs that are not covered are NaN."""
    for at in range(rows.shape[0]):
        flags[at] = one(grid, cells, rows[at], widths[at], relaxed, out[at])
        if flags[at] != 0:
            out[at] = np.nan


@njit(cache=True)
def parts(grid, cells, row, widths, out):  # type: ignore[no-untyped-def]
    """The lines of a covered student: its start, one line per line of `widths`, its head."""
    _, h, t, d, v, u = _ends(grid, row, True)
    spans, bases = grid[1], grid[3]
    _add(cells, bases[2] + d * spans[HIDDEN, 1] + h, 0, 1, t, 0.0, 1.0, out[0])
    for at in range(widths.shape[0]):
        _, attention, x, feed, y = _find(grid, widths[at], h, t, d, True)
        _add(cells, attention, 1, spans[HEADS, 1], t, x, 1.0, out[at + 1])
        _add(cells, feed, 1, spans[INTERMEDIATE, 1], t, y, 1.0, out[at + 1])
    _add(cells, bases[3] + h * spans[VOCAB, 1] + v, 1, spans[VOCAB, 1], t, u, 1.0, out[widths.shape[0] + 1])


@njit(cache=True)
def _slopes(cells, column, corner, across, down, t, u, has_t, has_u):  # type: ignore[no-untyped-def]
    """(value, slope per share along rows, slope per share along columns) of a cell."""
    at = cells[corner, column]
    right = cells[corner + across, column] if has_u else at
    below = cells[corner + down, column] if has_t else at
    both = cells[corner + down + across, column] if has_t and has_u else (below if has_t else right)
    value = (1 - t) * ((1 - u) * at + u * right) + t * ((1 - u) * below + u * both)
    return value, (1 - u) * (below - at) + u * (both - right), (1 - t) * (right - at) + t * (both - below)


@njit(cache=True)
def _width(axes, spans, row, at):  # type: ignore[no-untyped-def]
    """Distance of a measured value from the next one; infinite where there is one alone."""
    start, count = spans[row, 0], spans[row, 1]
    return axes[start + at + 1] - axes[start + at] if count > 1 else np.inf


@njit(cache=True)
def slopes(grid, cells, column, rows, widths, ends, lines, flags):  # type: ignore[no-untyped-def]
    """Derivatives of one metric.

    `ends` [n, 3] takes those by layers, hidden and vocab, `lines` [n, layers, 2] those by heads and intermediate. The
    one by layers is the mean layer.
    """
    axes, spans, _, bases = grid
    for at in range(rows.shape[0]):
        row = rows[at]
        flags[at], h, t, d, v, u = _ends(grid, row, True)
        uniform = widths.shape[1] == 1
        layers = 1 if uniform else int(min(row[LAYERS], widths.shape[1]))
        times = row[LAYERS] if uniform else 1.0
        has_t = spans[HIDDEN, 1] > 1
        step = _width(axes, spans, HIDDEN, h)
        if flags[at] == 0:
            start = bases[2] + d * spans[HIDDEN, 1] + h
            ends[at, 1] += _slopes(cells, column, start, 0, 1, t, 0.0, has_t, False)[1] / step
            corner = bases[3] + h * spans[VOCAB, 1] + v
            _, s, w = _slopes(cells, column, corner, 1, spans[VOCAB, 1], t, u, has_t, spans[VOCAB, 1] > 1)
            ends[at, 1] += s / step
            ends[at, 2] = w / _width(axes, spans, VOCAB, v)
        for layer in range(layers):
            wrong, attention, x, feed, y = _find(grid, widths[at, layer], h, t, d, True)
            flags[at] |= wrong
            if flags[at] != 0:
                break
            k = _listed(axes, spans, KV_HEADS, widths[at, layer, 1])
            own = spans[len(DIMS) + k, 1]
            cost, s, w = _slopes(cells, column, attention, 1, spans[HEADS, 1], t, x, has_t, own > 1)
            a = attention % spans[HEADS, 1]
            lines[at, layer, 0] = times * w / _width(axes, spans, len(DIMS) + k, a)
            wide = spans[INTERMEDIATE, 1]
            more, z, w = _slopes(cells, column, feed, 1, wide, t, y, has_t, wide > 1)
            lines[at, layer, 1] = times * w / _width(axes, spans, INTERMEDIATE, (feed - bases[1]) % wide)
            ends[at, 1] += times * (s + z) / step
            ends[at, 0] += (cost + more) / layers
        if flags[at] != 0:
            ends[at] = np.nan
            lines[at] = np.nan
