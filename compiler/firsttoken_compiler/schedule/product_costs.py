"""The account of `product_cost` for many tiles of a product at once: the same operations, in arrays.

Every sum adds in the order of the account of one tile, so that the costs are equal to the last bit. What the units and
the DRAM take for a tile is asked for once per combination of extents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from firsttoken_compiler.isa.types import Space
from firsttoken_compiler.schedule.dram_cost import storing, transfer
from firsttoken_compiler.schedule.linear import STREAMED
from firsttoken_compiler.schedule.product_cost import Account, Same, account_of
from firsttoken_compiler.schedule.spec import KernelSpec
from firsttoken_compiler.schedule.tiles import Array, Tiles
from firsttoken_compiler.target.rates import ceil_div
from firsttoken_compiler.target.target import Target


def linear_costs(spec: KernelSpec, spaces: tuple[Space, ...], tiles: Tiles, target: Target, launches: Array) -> Array:
    """`product_cost.linear_cost` of each tile, with room for so many launches each."""
    account = account_of(spec, spaces, Same(target))
    cuts = _Cuts(account, tiles)
    moved, compute = cuts.moved(), cuts.compute()
    if not target.dma.decoupled:
        waits = moved.transfers * target.dma.setup_cycles
        return np.maximum(moved.link, moved.dram) + waits + compute.matrix + compute.vector
    late = _late(moved, compute, tiles, launches, account)
    return np.maximum(np.maximum(moved.link + late, moved.dram), compute.both)


@dataclass(frozen=True, slots=True)
class _Compute:
    """`product_cost._Compute` of each tile."""

    matrix: Array
    vector: Array
    held: Array
    last: Array
    both: Array


@dataclass(frozen=True, slots=True)
class _Moved:
    """`product_cost._Moved` of each tile."""

    link: Array
    dram: Array
    weight: Array
    loads: Array
    activation: Array
    brought: Array
    transfers: Array


def _late(moved: _Moved, compute: _Compute, tiles: Tiles, launches: Array, account: Account) -> Array:
    """`product_cost._Moved.late` of each tile."""
    wait, buffers, loads = account.wait, tiles.buffers, moved.loads
    slots = np.minimum(buffers, loads)
    alone = np.maximum(0.0, (moved.link + wait + compute.both) / launches - moved.link)
    ring = (moved.weight + wait + compute.held) / slots - moved.weight
    late = np.maximum(loads * np.maximum(0.0, ring), _uneven(moved, compute, tiles, account.shape.k))
    of_rows = np.minimum(buffers, np.maximum(1, moved.brought))
    ring = (moved.activation + wait + compute.held) / of_rows - moved.activation
    late = np.where(moved.brought > 1, np.maximum(late, moved.brought * ring), late)
    ahead = np.where(launches > 1, slots, slots - 1) * moved.weight
    late = late + np.maximum(0.0, wait + compute.last - ahead)
    return np.where(loads <= buffers, alone, late)


def _uneven(moved: _Moved, compute: _Compute, tiles: Tiles, depth: int) -> Array:
    """`product_cost._Moved._uneven` of each tile."""
    deep, rest = -(-depth // tiles.k), depth % tiles.k / depth
    load, read, full = deep * moved.weight, deep * compute.held, tiles.k / depth
    pairs = np.maximum(rest * load, full * read) + np.maximum(full * load, rest * read)
    lost = moved.loads / deep * (pairs + (deep - 2) * full * np.maximum(load, read) - load)
    return np.where((tiles.buffers != STREAMED) | (rest == 0) | (deep < 2), 0.0, lost)


class _Axis:
    """How tiles of several extents cut an axis: each into long ones, and a short one where something is left."""

    def __init__(self, extent: int, tiles: Sequence[int]) -> None:
        self.sizes = [[tile, extent % tile] for tile in tiles]
        self.counts = np.array([[extent // tile, int(extent % tile > 0)] for tile in tiles])
        self.first = np.where(self.counts[:, 0] > 0, 0, 1)
        self.edge = np.where(self.counts[:, 1] > 0, 1, 0)


class _Cuts:
    """`product_cost._Cut` for each tile; tables have an axis with the long and the short tile for every extent."""

    def __init__(self, account: Account, tiles: Tiles) -> None:
        self.account, self.tiles = account, tiles
        shape = account.shape
        self.m, self.k = _Axis(shape.m, tiles.rows), _Axis(shape.k, tiles.deep)
        self.n = _Axis(shape.n, [panels * account.panel for panels in tiles.wide])
        self.across, self.down, self.deep = tiles.counts(shape, account.panel)
        self.loads, self.brought = tiles.fetches(shape, account.panel)
        self.again = self.across * np.where(tiles.rows_outer, self.down, 1)
        self.used = np.zeros((len(tiles.rows), len(tiles.wide), len(tiles.deep)), bool)
        self.used[tiles.at] = True
        self.results = self._results()

    def _results(self) -> Array:
        """Which tiles of results there are, by extents of rows and of columns."""
        used: Array = np.logical_or.reduce(self.used, axis=2)[:, None, :, None]
        return used & (self.m.counts > 0)[:, :, None, None] & (self.n.counts > 0)[None, None]

    def moved(self) -> _Moved:
        """All transfers."""
        account, tiles = self.account, self.tiles
        link, dram = self._weights()
        weight = link / self.loads
        once = transfer(account.target, 0, 2)
        link, dram = link + self.again * once, dram + self.again * once
        activation, brought = np.zeros(len(link)), np.zeros(len(link), int)
        transfers = self.loads + self.again * 2
        if account.where["a"] is Space.DRAM:
            each = self._activations()
            activation = each[..., 0]
            often = np.where(tiles.whole, self.down * self.deep, self.brought)
            brought = np.where(tiles.whole, 0, self.brought)
            transfers = transfers + often
            link, dram = link + often * activation, dram + often * each[..., 1]
        for name in ("residual", "factor", "out"):
            if account.where.get(name) is not Space.DRAM:
                continue
            transfers = transfers + self.across * self.down
            for count, each in self._of_results(name):
                if name == "out":
                    dram = dram + count * each[..., 1] * account.target.clock_hz / 1e9
                else:
                    link, dram = link + count * each[..., 0], dram + count * each[..., 1]
        return _Moved(link, dram, weight, self.loads, activation, brought, transfers)

    def _weights(self) -> tuple[Array, Array]:
        """`product_cost._Cut._weights` of each tile."""
        account, shape, (_, p, k) = self.account, self.account.shape, self.tiles.at
        row = shape.w.nbytes(account.panel)

        def one(p: int, n_part: int, k: int, k_part: int) -> tuple[float, float]:
            panels, rows = ceil_div(self.n.sizes[p][n_part], account.panel), self.k.sizes[k][k_part]
            whole = self.tiles.deep[k] >= shape.k
            run, runs = (panels * rows * row, 1) if whole else (rows * row, panels)
            load = account.reading_of(run, shape.k * row, runs)
            return load.link, load.dram

        used: Array = np.logical_or.reduce(self.used, axis=0)[:, None, :, None]
        table = _filled(used & (self.n.counts > 0)[:, :, None, None] & (self.k.counts > 0)[None, None], one, 2)
        link = dram = np.zeros(len(p))
        passes = self.loads / (self.across * self.deep)
        for n_part in range(2):
            for k_part in range(2):
                count = passes * self.n.counts[p, n_part] * self.k.counts[k, k_part]
                each = table[p, n_part, k, k_part]
                link, dram = link + count * each[:, 0], dram + count * each[:, 1]
        return link, dram

    def _activations(self) -> Array:
        """(link, DRAM) cycles of a tile of activations."""
        account, shape, (m, _, k) = self.account, self.account.shape, self.tiles.at

        def one(m: int, k: int) -> tuple[float, float]:
            run = shape.a.nbytes(min(self.tiles.deep[k], shape.k))
            load = account.reading_of(run, shape.a.nbytes(shape.k), min(self.tiles.rows[m], shape.m))
            return load.link, load.dram

        table: Array = _filled(np.logical_or.reduce(self.used, axis=1), one, 2)[m, k]
        return table

    def _of_results(self, name: str) -> Iterator[tuple[Array, Array]]:
        """(how many, (link, DRAM) cycles of a load, or (0, nanoseconds) of a store) by long and short tiles."""
        account, dram, (m, p, _) = self.account, self.account.target.dram, self.tiles.at
        dtype = account.dtypes[name]
        pitch = dtype.nbytes(account.shape.n)

        def one(m: int, m_part: int, p: int, n_part: int) -> tuple[float, float]:
            run, rows = dtype.nbytes(self.n.sizes[p][n_part]), self.m.sizes[m][m_part]
            if name == "out":
                return 0.0, storing(dram, run, pitch, rows)
            load = account.reading_of(run, pitch, rows)
            return load.link, load.dram

        table = _filled(self.results, one, 2)
        for m_part, n_part, count in self._parts():
            yield count, table[m, m_part, p, n_part]

    def compute(self) -> _Compute:
        """Products, scales of groups, and what is done to the sums."""
        account, shape, (m, p, k) = self.account, self.account.shape, self.tiles.at
        depths = [shape.group] if shape.group else self.tiles.deep
        at_k = np.zeros_like(k) if shape.group else k
        used: Array = np.logical_or.reduce(self.used, axis=2, keepdims=True) if shape.group else self.used
        matrices = _filled(
            self.results[..., None] & used[:, None, :, None],
            lambda m, i, p, j, k: account.products_of(self.m.sizes[m][i], self.n.sizes[p][j], depths[k]),
        )
        vectors = _filled(self.results, lambda m, i, p, j: account.vector_of(self.m.sizes[m][i], self.n.sizes[p][j]))
        matrix = vector = np.zeros(len(m))
        for m_part, n_part, count in self._parts():
            matrix = matrix + count * matrices[m, m_part, p, n_part, at_k]
            vector = vector + count * vectors[m, m_part, p, n_part]
        first = m, self.m.first[m], p, self.n.first[p]
        edge = m, self.m.edge[m], p, self.n.edge[p]
        passes = np.where((self.deep > 1) | self.tiles.rows_outer, 1, self.down)
        held = matrices[*first, at_k] / self.deep * passes
        groups = 1
        if shape.group:
            held = np.maximum(held, vectors[first] / self.deep * passes)
            groups = ceil_div(shape.k, shape.group)
        start, tail = matrices[*first, at_k] / groups, vectors[edge] / groups
        last = matrices[*edge, at_k] / self.deep + tail
        alone = account.target.scratchpad.accumulator_slots == 1
        both = matrix + vector if alone else np.maximum(matrix + tail, start + vector)
        return _Compute(matrix, vector, held, last, both)

    def _parts(self) -> Iterator[tuple[int, int, Array]]:
        """Long and short tiles of results, columns outermost: which of rows, which of columns, how many."""
        m, p, _ = self.tiles.at
        for n_part in range(2):
            for m_part in range(2):
                yield m_part, n_part, self.n.counts[p, n_part] * self.m.counts[m, m_part]


def _filled(used: Array, value: Callable[..., Any], width: int = 0) -> Array:
    """A table of the values (so many each, if any) at the indices that are used; 0 elsewhere."""
    table = np.zeros((*used.shape, width) if width else used.shape)
    at = np.nonzero(used)
    if len(at[0]):
        table[at] = [value(*index) for index in zip(*(axis.tolist() for axis in at), strict=True)]
    return table
