"""Chooses tiles: every candidate that fits is costed, the cheapest is taken.

What a tile of a product costs is the account of `product_cost`; of attention, the time of the slowest engine per tile
of keys and the softmax per tile of rows.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from firsttoken_compiler.errors import AllocationError
from firsttoken_compiler.isa.types import Dtype, Space
from firsttoken_compiler.isa.vector_kernel import SEEN, VectorKernel
from firsttoken_compiler.isa.word import MAX_EXTENT
from firsttoken_compiler.schedule import attention, online_attention, rowwise
from firsttoken_compiler.schedule.choice import MOST_BUFFERS
from firsttoken_compiler.schedule.linear import STREAMED, Shape, Tile, fetches_of, panel_of
from firsttoken_compiler.schedule.product_bytes import linear_bytes, tiles_bytes
from firsttoken_compiler.schedule.product_cost import Same
from firsttoken_compiler.schedule.product_costs import linear_costs
from firsttoken_compiler.schedule.spec import KernelSpec
from firsttoken_compiler.schedule.tiles import Array, Tiles
from firsttoken_compiler.target.rates import (
    ceil_div,
    matmul_cost,
    pair_name,
    vector_cycles,
)
from firsttoken_compiler.target.target import Target

SLACK: Final = 1 / 128
"""Of tiles that cost at most so much more than the cheapest, a deepest one is taken: its weights lie in long runs."""
_SHOWN = VectorKernel(("select", ("le", "i1", ("add", "i0", "i2")), ("mul", "s0", "s1"), "s2"))
_SOFTMAX: Final = (
    VectorKernel("s0", "max"), VectorKernel(("f16", ("exp", ("sub", "s0", "s1")))), VectorKernel("s0", "add"),
)  # fmt: skip
ATTENTION_ROWS: Final = (1, 2, 4, 8, 16, 32, 64, 128)
MANY_ROWS: Final = (256, 512, 1024)
"""Tried for attention over keys and values that lie in DRAM, which every tile of rows reads again."""
LARGE_SAVES: Final = 0.75
"""What a tile of attention beyond half of the scratchpad may cost of the best one within."""
DRAM_SHARE = 0.9
"""Share of the DRAM's peak that long streams reach, for ranking tiles only; the simulator measures the real one."""

ROWS: Final = (16, 32, 64, 128, 256, 512, 1024)
FEW_ROWS: Final = (1, 2, 4, 8)
"""Tried when nothing larger fits."""


@dataclass(frozen=True)
class Room:
    """What a kernel may use of the scratchpad: preferably `preferred` bytes, at most `limit`."""

    preferred: int
    limit: int


def choose_linear(spec: KernelSpec, spaces: tuple[Space, ...], target: Target, room: Room) -> Tile:
    """The cheapest tile of a product; raises AllocationError when not even the smallest fits."""
    return _chosen(spec, spaces, Same(target), room)


@functools.lru_cache(maxsize=512)
def _chosen(spec: KernelSpec, spaces: tuple[Space, ...], same: Same, room: Room) -> Tile:
    target = same.target
    shape, panel, streams = Shape.of(spec), panel_of(target), spaces[0] is Space.DRAM
    for limits, rows in (((room.preferred, room.limit), ROWS), ((room.limit,), FEW_ROWS)):
        tiles = Tiles.of(shape, panel, tile_extents(spec, target, rows), streams)
        scratch, acc = tiles_bytes(spec, spaces, tiles, target)
        fits = (acc <= target.scratchpad.accumulator_bytes) & (tiles.extents(shape, panel) <= MAX_EXTENT)
        for limit in limits:
            kept = np.flatnonzero(fits & (scratch <= limit))
            if len(kept):
                launches = np.maximum(1, room.limit // np.maximum(1, scratch[kept]))
                some = tiles.only(kept)
                costs = np.rint(linear_costs(spec, spaces, some, target, launches))
                return _cheapest(some, costs)
    smallest = min(linear_bytes(spec, spaces, tile, target) for tile in linear_tiles(spec, target, FEW_ROWS))
    raise AllocationError(
        f"target {target.name}: the smallest tile of a product of {spec.args[0].shape} by {spec['n']} columns needs "
        f"{smallest[0]} bytes of scratchpad and {smallest[1]} of accumulators; {room.limit} and "
        f"{target.scratchpad.accumulator_bytes} are free: raise scratchpad.bytes or scratchpad.accumulator_bytes"
    )


def _cheapest(tiles: Tiles, costs: Array) -> Tile:
    """Of the deepest tiles that cost little more than the cheapest one: the cheapest, then the one with most rows."""
    near = np.flatnonzero(costs <= costs.min() * (1 + SLACK))
    near = near[tiles.k[near] == tiles.k[near].max()]
    order = np.lexsort((tiles.buffers[near], -tiles.panels[near], -tiles.m[near], costs[near]))
    return tiles.tile(int(near[order[0]]))


def variants(shape: Shape, plain: Tile, streams: bool, target: Target) -> Iterator[Tile]:
    """Orders, buffers and whole activations, where they make a difference; `streams`: these come out of DRAM."""
    panel = panel_of(target)
    several = plain.panels < shape.panels(panel) and plain.m < shape.m
    for rows_outer in (False, True) if several else (False,):
        for whole in (False, True) if streams else (False,):
            tile = Tile(plain.m, plain.panels, plain.k, whole, rows_outer)
            once = max(fetches_of(shape, tile, panel)[: 2 if streams else 1]) == 1
            for buffers in (STREAMED,) if once else range(1, MOST_BUFFERS + 1):
                yield Tile(plain.m, plain.panels, plain.k, whole, rows_outer, buffers)


def extent(shape: Shape, tile: Tile, target: Target) -> int:
    """The largest extent or stride of an instruction that could be too large for its field."""
    n = tile.panels * panel_of(target)
    return max(shape.w.nbytes(tile.k * n), tile.m * n)


def linear_tiles(spec: KernelSpec, target: Target, choices: tuple[int, ...], unit: int = 0) -> Iterator[Tile]:
    """Tiles of a product to choose from, with these numbers of rows; along k they span multiples of `unit`, or all."""
    return (Tile(m, panels, k) for m, panels, k in itertools.product(*tile_extents(spec, target, choices, unit)))


def tile_extents(
    spec: KernelSpec, target: Target, choices: tuple[int, ...], unit: int = 0
) -> tuple[list[int], list[int], list[int]]:
    """Rows, panels and rows of k of these tiles, each in rising order."""
    shape, panel = Shape.of(spec), panel_of(target)
    count = shape.panels(panel)
    rows = sorted({min(shape.m, r) for r in choices})
    most = own_panels(shape, target) or count
    wide = sorted({min(most, 1 << i) for i in range(most.bit_length() + 1)})
    unit = unit or shape.group or min(shape.k, max(target.matrix.rows, 32))
    whole = ceil_div(shape.k, unit)
    deep = sorted({ceil_div(whole, parts) for parts in (1, 2, 3, 4, 6, 8, 12, 16, 32, 64, whole)})
    return rows, wide, [shape.k if units == whole and not shape.group else units * unit for units in deep]


def own_panels(shape: Shape, target: Target) -> int:
    """Most panels that a tile unit makes side by side of a product of several rows; 0: as many as a schedule says.

    A half or a quarter of all its columns where these divide those of the product, else the most panels that do.
    """
    most, panel = target.matrix.tile_columns, panel_of(target)
    if not most or shape.m == 1:
        return 0
    widths = (most, most // 2, most // 4, *range(most, 0, -panel))
    return next((width // panel for width in widths if width >= panel and shape.n % width == 0), 0)


def choose_attention(
    spec: KernelSpec, spaces: tuple[Space, ...], target: Target, room: Room
) -> attention.AttentionTile:
    """The cheapest tile that fits; raises AllocationError when none does.

    A tile beyond `room.preferred` must save a quarter: it keeps the next operators' loads from overlapping. Where no
    whole row of scores fits, softmax is online.
    """
    heads = attention.Heads.of(spec)
    again = heads.rows > ATTENTION_ROWS[-1] and spaces[1] is Space.DRAM
    rows = sorted({min(heads.rows, r) for r in ATTENTION_ROWS + MANY_ROWS * again}, reverse=True)
    keys = sorted({min(heads.keys, k) for k in (16, 32, 64, 128, 256, 512, 1024, 2048)}, reverse=True)
    whole = [attention.AttentionTile(r, t) for r in rows for t in keys]
    refused = online_attention.refusal(spec, target)
    online = [] if refused else list(online_attention.tiles(spec, set(rows), set(keys)))
    for tiles in (whole, online):
        costs = {}
        for tile in tiles:
            nbytes = attention_bytes(spec, spaces, tile, target)
            if attention.acc_bytes(spec, tile) <= target.scratchpad.accumulator_bytes and nbytes <= room.limit:
                cost = attention_cost(spec, spaces, tile, target)
                costs[tile] = cost if nbytes <= room.preferred else cost / LARGE_SAVES
        if costs:
            return min(costs, key=lambda tile: (costs[tile], -tile.rows, -tile.keys))
    tile = min((*whole, *online), key=lambda tile: attention_bytes(spec, spaces, tile, target))
    raise AllocationError(
        f"target {target.name}: one row of attention over {heads.keys} keys needs "
        f"{attention_bytes(spec, spaces, tile, target)} bytes of scratchpad and "
        f"{attention.acc_bytes(spec, tile)} of accumulators; {room.limit} and {target.scratchpad.accumulator_bytes} "
        "are free: shorten the prompt, or raise scratchpad.bytes"
    )


def attention_bytes(spec: KernelSpec, spaces: tuple[Space, ...], tile: attention.AttentionTile, target: Target) -> int:
    """Scratchpad bytes of a tile of attention with all its slots."""
    account = online_attention if tile.online else attention
    return account.scratch_bytes(spec, spaces, tile, target)


def attention_cost(spec: KernelSpec, spaces: tuple[Space, ...], tile: attention.AttentionTile, target: Target) -> float:
    """Cycles of an attention with this tile: per tile of keys the slowest engine and its start, per row the softmax."""
    heads = attention.Heads.of(spec)
    rate = min(
        target.dram.peak_bytes_per_s * DRAM_SHARE / target.clock_hz, target.dma.bus_bytes_per_cycle, in_flight(target)
    )
    if tile.online:
        return online_attention.cost(spec, spaces, tile, target, rate)
    stored = Dtype.F16 if attention.widens(target) else spec.args[1].dtype
    pair = pair_name(Dtype.F16, stored)
    start = target.dma.setup_cycles + target.matrix.issue_cycles + target.vector.startup_cycles
    mark, parts = SEEN if attention.mapped(spec, target) is not None else "", attention.value_parts(spec, target)
    load = 0.0
    if spaces[1] is Space.DRAM:
        load = spec.args[1].dtype.nbytes(tile.keys * heads.width) / rate + target.dma.setup_cycles
    together = max if target.dma.decoupled or heads.rows <= ATTENTION_ROWS[-1] else _added
    scores = together(
        load,
        matmul_cost(target, tile.rows, tile.keys, heads.width, pair, bool(mark)).cycles,
        vector_cycles(target, replace(_SHOWN, rows=mark), (1, tile.rows, tile.keys)),
    )
    values = together(load, matmul_cost(target, tile.rows, heads.width // parts, tile.keys, pair, bool(mark)).cycles)
    softmax = sum(vector_cycles(target, replace(kernel, rows=mark), (1, tile.rows, heads.keys)) for kernel in _SOFTMAX)
    down, tiles = ceil_div(heads.rows, tile.rows), ceil_div(heads.keys, tile.keys)
    if heads.rows <= ATTENTION_ROWS[-1]:
        return heads.batches * parts * down * (tiles * (scores + values + 2 * start) + softmax)
    store = 0.0 if target.dma.decoupled else spec.outs[0].nbytes / heads.batches / down / rate
    work = tiles * (scores + values + 2 * start) + softmax
    seen = _seen(spec, heads, tile) if attention.skips_masked(spec, target) else 1.0
    return heads.batches * parts * down * (seen * work + store)


def in_flight(target: Target) -> float:
    """Bytes per cycle that the requests of one engine bring while each waits for a row, its burst and the way back."""
    dram, dma = target.dram, target.dma
    waits_ns = dram.trcd_ns + dram.tcl_ns + dram.burst_length * 1e3 / dram.data_rate_mtps + dram.controller_ns
    waits = waits_ns * target.clock_hz / 1e9 + dma.bus_latency_cycles
    return dma.outstanding * dram.burst_bytes / waits


def _added(*cycles: float) -> float:
    """Cycles of units that one sequencer runs one after the other."""
    return sum(cycles)


def _seen(spec: KernelSpec, heads: attention.Heads, tile: attention.AttentionTile) -> float:
    """Share of its keys that a tile of rows of a causal attention reads, on average over the tiles."""
    if not spec["causal"] or spec["mask"]:
        return 1.0
    past, down = int(spec["past"]), ceil_div(heads.rows, tile.rows)
    return sum(min(heads.keys, past + (at + 1) * tile.rows) for at in range(down)) / down / heads.keys


ROW_SLOTS: Final = 3
"""Blocks of rows that a pipeline of loads, vector work and stores holds."""


def choose_rows(spec: KernelSpec, spaces: tuple[Space, ...], target: Target, room: Room) -> int:
    """Rows of a block of a row-wise kernel; raises AllocationError when not even one row fits."""
    total = rowwise.rows_of(spec)
    for limit in (room.preferred, room.limit):
        for parts in range(1, total + 1):
            rows = ceil_div(total, parts)
            if row_bytes(spec, spaces, rows, target) <= limit:
                return rows
    raise AllocationError(
        f"target {target.name}: one row of {spec.kind} needs {row_bytes(spec, spaces, 1, target)} bytes of "
        f"scratchpad, {room.limit} are free: raise scratchpad.bytes"
    )


def row_bytes(spec: KernelSpec, spaces: tuple[Space, ...], rows: int, target: Target) -> int:
    """Scratchpad of a block: staged operands in their slots, and the numbers per row."""
    per_row = rowwise.row_elements(spec)
    operands = rowwise.kernel_operands(spec, (*spec.args, *spec.outs))
    total = (6 * rows * rowwise.row_parts(spec) * Dtype.F32.bits // 8) * 4 + 16 * target.scratchpad.alignment_bytes
    total += rows * rowwise.kept_elements(spec) * Dtype.F32.bits // 8
    slots = row_slots(spec, spaces, target)
    for index, (arg, space) in enumerate(zip(operands, spaces, strict=True)):
        if space is Space.DRAM and not (spec.kind in rowwise.COPIES and index < len(operands) - len(spec.outs)):
            total += arg.dtype.nbytes(per_row[index] * rows) * slots if index in per_row else arg.nbytes
    return total


def row_slots(spec: KernelSpec, spaces: tuple[Space, ...], target: Target) -> int:
    """Blocks of rows that are staged at a time: one where three of a single row fill more than half of the scratchpad.

    Then a row is loaded, worked on and stored before the next one.
    """
    per_row = rowwise.row_elements(spec)
    operands = rowwise.kernel_operands(spec, (*spec.args, *spec.outs))
    row = sum(
        arg.dtype.nbytes(per_row[index])
        for index, (arg, space) in enumerate(zip(operands, spaces, strict=True))
        if space is Space.DRAM and index in per_row
    )
    kept = rowwise.kept_elements(spec) * Dtype.F32.bits // 8
    return 1 if ROW_SLOTS * row + kept > target.scratchpad.bytes // 2 else ROW_SLOTS
