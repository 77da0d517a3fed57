"""Scratchpad and accumulators that a product takes with a tile, or with each of many."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from firsttoken_compiler.isa.types import Dtype, Space
from firsttoken_compiler.schedule.layout import fetch_bytes
from firsttoken_compiler.schedule.linear import (
    STREAMED,
    Shape,
    Tile,
    corrected_apart,
    operand_names,
    panel_of,
    slots_of,
)
from firsttoken_compiler.schedule.spec import KernelSpec
from firsttoken_compiler.schedule.tiles import Array, Tiles
from firsttoken_compiler.target.rates import ceil_div
from firsttoken_compiler.target.target import Target

OF_GROUPS: Final = ("w_scale", "w_zero", "w_min", "w_sum")
"""Operands of a product with a row per group of weights."""

Number = Any
"""An int, or an array with one for each tile."""


def linear_bytes(spec: KernelSpec, spaces: tuple[Space, ...], tile: Tile, target: Target) -> tuple[int, int]:
    """(scratchpad, accumulator) bytes of a tile with all its slots."""
    shape, panel = Shape.of(spec), panel_of(target)
    loops = ceil_div(shape.panels(panel), tile.panels) * ceil_div(shape.m, tile.m)
    deep = ceil_div(shape.k, tile.k)
    two, three = (2, 3) if loops * deep > 1 else (1, 1)
    slots = {"w": two, "a": two} | (slots_of(shape, tile, panel) if tile.buffers != STREAMED else {})
    rows = ceil_div(shape.m, tile.m) * tile.m if tile.whole else slots["a"] * tile.m
    along = deep * tile.k if tile.whole else tile.k
    results = 2 if loops > 1 or shape.group else 1
    sizes = _Sizes(tile.m, tile.panels * panel, tile.k, deep, two, three, slots["w"], rows, along, results)
    return _summed(spec, spaces, sizes, target)


def tiles_bytes(spec: KernelSpec, spaces: tuple[Space, ...], tiles: Tiles, target: Target) -> tuple[Array, Array]:
    """`linear_bytes` of each tile."""
    shape, panel = Shape.of(spec), panel_of(target)
    across, down, deep = tiles.counts(shape, panel)
    loops = across * down
    two, three = (np.where(loops * deep > 1, most, 1) for most in (2, 3))
    own = tiles.buffers != STREAMED
    weights, activations = (
        np.where(own & (count > 1), np.minimum(tiles.buffers, count), two) for count in tiles.fetches(shape, panel)
    )
    rows = np.where(tiles.whole, down, activations) * tiles.m
    along = np.where(tiles.whole, deep, 1) * tiles.k
    results = np.where((loops > 1) | (shape.group > 0), 2, 1)
    sizes = _Sizes(tiles.m, tiles.panels * panel, tiles.k, deep, two, three, weights, rows, along, results)
    scratch, acc = _summed(spec, spaces, sizes, target)
    return np.broadcast_to(scratch, tiles.m.shape), acc


@dataclass(frozen=True, slots=True)
class _Sizes:
    """What the bytes of a tile follow from."""

    m: Number
    n: Number
    k: Number
    deep: Number
    """Tiles along k."""
    two: Number
    """Slots of what comes and goes with every tile, if there are several."""
    three: Number
    """Slots of what also waits for the results."""
    weights: Number
    """Tiles of weights that exist at a time."""
    rows: Number
    """Rows of activations that exist at a time, `along` elements each."""
    along: Number
    results: Number
    """Tiles of sums that exist at a time, where the accumulators have room for more than one."""


def _summed(spec: KernelSpec, spaces: tuple[Space, ...], of: _Sizes, target: Target) -> tuple[Number, Number]:
    """(scratchpad, accumulator) bytes."""
    shape, align = Shape.of(spec), target.scratchpad.alignment_bytes
    names = operand_names(spec)
    groups = -(-of.k // shape.group) * of.deep if shape.group else 1
    unit, unit_of_weights = target.alignment(Space.SPAD), target.alignment(Space.SPAD, matrix_weights=True)
    total: Number = 0
    for name, space, arg in zip(names, spaces, (*spec.args, *spec.outs), strict=True):
        if space is Space.DRAM:
            nbytes = _operand_bytes(name, arg.dtype, shape.a, of, groups, target)
            total = total + nbytes + 3 * (unit_of_weights if name == "w" else unit)
    acc = -(-of.m * of.n * 4 // align) * align
    if shape.group or corrected_apart(spec):
        total = total + acc
    return total, acc * of.results if target.scratchpad.accumulator_slots != 1 else acc


def _operand_bytes(name: str, dtype: Dtype, a: Dtype, of: _Sizes, groups: Number, target: Target) -> Number:
    """Bytes of an operand's slots, or the result's; `groups`: of scales."""
    if name == "w":
        return of.weights * dtype.nbytes(of.k * of.n)
    if name == "a":
        return of.rows * (a.nbytes(of.along) + 2 * fetch_bytes(a, target))
    if name in OF_GROUPS:
        return of.three * dtype.nbytes(groups * of.n)
    if name == "a_sum":
        return of.three * of.m * groups * 4
    if name == "a_scale":
        return of.three * of.m * 4
    if name == "bias":
        return of.three * dtype.nbytes(of.n)
    if name == "residual":
        return of.three * dtype.nbytes(of.m * of.n)
    if name == "factor":
        return of.three * of.m * of.n * 2
    return of.two * dtype.nbytes(of.m * of.n) if name == "out" else 4
