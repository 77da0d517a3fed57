"""Many tiles of one product as arrays, an element a tile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from firsttoken_compiler.schedule.choice import MOST_BUFFERS
from firsttoken_compiler.schedule.linear import STREAMED, Shape, Tile

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Tiles:
    """Tiles whose extents are some of `rows`, `wide` (panels) and `deep` (rows of k): which, and how they are used."""

    rows: Sequence[int]
    wide: Sequence[int]
    deep: Sequence[int]
    at: tuple[Array, Array, Array]
    """Index of each tile's extent among `rows`, `wide` and `deep`."""
    whole: Array
    rows_outer: Array
    buffers: Array

    @staticmethod
    def of(shape: Shape, panel: int, extents: tuple[list[int], list[int], list[int]], streams: bool) -> Tiles:
        """Every tile with these extents, its orders, buffers and whole activations (`tiling.variants`), in that order.

        `streams`: activations come out of DRAM.
        """
        rows, wide, deep = extents
        axes = (len(rows), len(wide), len(deep), 2, 1 + streams, MOST_BUFFERS)
        m, p, k, outer, whole, buffers = (axis.ravel() for axis in np.indices(axes))
        every = Tiles(rows, wide, deep, (m, p, k), whole > 0, outer > 0, buffers + 1)
        several = (every.panels < shape.panels(panel)) & (every.m < shape.m)
        weights, activations = every.fetches(shape, panel)
        once = (weights == 1) & (activations == 1) if streams else weights == 1
        return every.only(np.flatnonzero((several | (outer == 0)) & (~once | (every.buffers == STREAMED))))

    def only(self, kept: Array) -> Tiles:
        """Those with these indices."""
        m, p, k = self.at
        at = m[kept], p[kept], k[kept]
        return Tiles(self.rows, self.wide, self.deep, at, self.whole[kept], self.rows_outer[kept], self.buffers[kept])

    def tile(self, index: int) -> Tile:
        """One of them."""
        m, p, k = (int(at[index]) for at in self.at)
        whole, outer, buffers = bool(self.whole[index]), bool(self.rows_outer[index]), int(self.buffers[index])
        return Tile(self.rows[m], self.wide[p], self.deep[k], whole, outer, buffers)

    @cached_property
    def m(self) -> Array:
        """Rows."""
        return np.array(self.rows)[self.at[0]]

    @cached_property
    def panels(self) -> Array:
        """Panels of columns."""
        return np.array(self.wide)[self.at[1]]

    @cached_property
    def k(self) -> Array:
        """Rows of k."""
        return np.array(self.deep)[self.at[2]]

    def counts(self, shape: Shape, panel: int) -> tuple[Array, Array, Array]:
        """How many tiles lie across the columns, down the rows, and along k."""
        return -(-shape.panels(panel) // self.panels), -(-shape.m // self.m), -(-shape.k // self.k)

    def fetches(self, shape: Shape, panel: int) -> tuple[Array, Array]:
        """`linear.fetches_of` each tile."""
        across, down, deep = self.counts(shape, panel)
        weights = across * deep * np.where((deep > 1) | self.rows_outer, down, 1)
        stays = self.rows_outer & (deep == 1)
        return weights, np.where(self.whole, 1, down * deep * np.where(stays, 1, across))

    def extents(self, shape: Shape, panel: int) -> Array:
        """`tiling.extent` of each tile."""
        n = self.panels * panel
        return np.maximum((self.k * n * shape.w.bits + 7) // 8, self.m * n)
