"""Chooses tiles: every candidate that fits is costed, the cheapest is taken.

The cost of a tile is the time of its slowest engine over all tiles, plus what no overlap can hide: the first load
before the other engines, the last product and vector pass after the loads.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

from firsttoken_compiler.errors import AllocationError
from firsttoken_compiler.isa.types import Dtype, Space
from firsttoken_compiler.isa.vector_kernel import SEEN, Expr, VectorKernel
from firsttoken_compiler.isa.word import MAX_EXTENT
from firsttoken_compiler.schedule import attention, rowwise
from firsttoken_compiler.schedule.layout import fetch_bytes
from firsttoken_compiler.schedule.linear import (
    STREAMED,
    Shape,
    Tile,
    corrected_apart,
    fetches_of,
    operand_names,
    panel_of,
    slots_of,
)
from firsttoken_compiler.schedule.spec import KernelSpec
from firsttoken_compiler.target.rates import (
    ceil_div,
    matmul_cost,
    matmul_scratchpad_bytes,
    pair_name,
    vector_cycles,
)
from firsttoken_compiler.target.target import Dram, Target

_SCALE = VectorKernel(("add", "s0", ("mul", "s1", "s2")))
_CORRECTED = VectorKernel(("sub", "s0", ("mul", "s1", "s2")))
_MINIMUM_SCALE = VectorKernel(("add", "s0", ("add", ("mul", "s1", "s2"), ("mul", "s3", "s4"))))
OF_GROUPS: Final = ("w_scale", "w_zero", "w_min", "w_sum")
"""Operands of a product with a row per group of weights."""
_CORRECTED_SCALE = VectorKernel(("add", "s0", ("mul", ("sub", "s1", ("mul", "s2", "s3")), "s4")))
_EPILOGUE = VectorKernel(("add", ("mul", ("mul", "s0", "s1"), "s2"), "s3"))
_SILU = VectorKernel(("mul", ("mul", ("mul", "s0", "s1"), "s2"), ("sigmoid", ("mul", ("mul", "s0", "s1"), "s2"))))
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


@dataclass(frozen=True, slots=True)
class Making:
    """What a tile of an operand takes to be in the scratchpad: DMA bytes and transfers, cycles of the vector unit."""

    nbytes: int
    transfers: int
    vector: int = 0

    def __add__(self, other: Making) -> Making:
        """Both."""
        return Making(self.nbytes + other.nbytes, self.transfers + other.transfers, self.vector + other.vector)


@dataclass(frozen=True)
class Room:
    """What a kernel may use of the scratchpad: preferably `preferred` bytes, at most `limit`."""

    preferred: int
    limit: int


def choose_linear(spec: KernelSpec, spaces: tuple[Space, ...], target: Target, room: Room) -> Tile:
    """The cheapest tile of a product; raises AllocationError when not even the smallest fits."""
    shape, panel = Shape.of(spec), panel_of(target)
    for limit, rows in ((room.preferred, ROWS), (room.limit, ROWS), (room.limit, FEW_ROWS)):
        costs = {
            tile: linear_cost(spec, spaces, tile, target)
            for plain in linear_tiles(spec, target, rows)
            for tile in ((plain, replace(plain, whole=True)) if spaces[0] is Space.DRAM else (plain,))
            if (needed := linear_bytes(spec, spaces, tile, target))[0] <= limit
            and needed[1] <= target.scratchpad.accumulator_bytes
            and max(shape.w.nbytes(tile.k * tile.panels * panel), tile.m * tile.panels * panel) <= MAX_EXTENT
        }
        if costs:
            return min(costs, key=lambda tile: (costs[tile], -tile.m, -tile.k, -tile.panels))
    smallest = min(linear_bytes(spec, spaces, tile, target) for tile in linear_tiles(spec, target, FEW_ROWS))
    raise AllocationError(
        f"target {target.name}: the smallest tile of a product of {spec.args[0].shape} by {spec['n']} columns needs "
        f"{smallest[0]} bytes of scratchpad and {smallest[1]} of accumulators; {room.limit} and "
        f"{target.scratchpad.accumulator_bytes} are free: raise scratchpad.bytes or scratchpad.accumulator_bytes"
    )


def linear_tiles(spec: KernelSpec, target: Target, choices: tuple[int, ...], unit: int = 0) -> Iterator[Tile]:
    """Tiles of a product to choose from, with these numbers of rows; along k they span multiples of `unit`, or all."""
    shape, panel = Shape.of(spec), panel_of(target)
    count = shape.panels(panel)
    rows = sorted({min(shape.m, r) for r in choices})
    wide = sorted({min(count, 1 << i) for i in range(count.bit_length() + 1)})
    unit = unit or shape.group or min(shape.k, max(target.matrix.rows, 32))
    whole = ceil_div(shape.k, unit)
    deep = sorted({ceil_div(whole, parts) for parts in (1, 2, 3, 4, 6, 8, 12, 16, 32, 64, whole)})
    for m in rows:
        for panels in wide:
            for units in deep:
                k = shape.k if units == whole and not shape.group else units * unit
                yield Tile(m, panels, k)


def linear_bytes(spec: KernelSpec, spaces: tuple[Space, ...], tile: Tile, target: Target) -> tuple[int, int]:
    """(scratchpad, accumulator) bytes of a tile with all its slots."""
    shape, panel, align = Shape.of(spec), panel_of(target), target.scratchpad.alignment_bytes
    names = operand_names(spec)
    where = dict(zip(names, spaces, strict=True))
    dtypes = {name: arg.dtype for name, arg in zip(names, (*spec.args, *spec.outs), strict=True)}
    n = tile.panels * panel
    loops = ceil_div(shape.panels(panel), tile.panels) * ceil_div(shape.m, tile.m)
    deep = ceil_div(shape.k, tile.k)
    two, three = (2, 3) if loops * deep > 1 else (1, 1)
    slots = {"w": two, "a": two} | (slots_of(shape, tile, panel) if tile.buffers != STREAMED else {})
    rows = ceil_div(tile.k, shape.group) * deep if shape.group else 1
    staged: dict[str, int] = {
        "w": slots["w"] * dtypes["w"].nbytes(tile.k * n), "a": _activation_bytes(shape, tile, slots["a"], target),
        "bias": three * dtypes.get("bias", Dtype.F16).nbytes(n), "a_scale": three * tile.m * 4, "a_zero": 4,
        "inverse": 4, "r_scale": 4, "a_sum": three * tile.m * rows * 4,
        **{name: three * dtypes[name].nbytes(rows * n) for name in OF_GROUPS if name in dtypes},
        "residual": three * dtypes.get("residual", Dtype.F16).nbytes(tile.m * n),
        "factor": three * tile.m * n * 2,
        "out": two * dtypes["out"].nbytes(tile.m * n),
    }  # fmt: skip
    total = sum(
        nbytes + 3 * target.alignment(Space.SPAD, matrix_weights=name == "w")
        for name, nbytes in staged.items()
        if where.get(name) is Space.DRAM
    )
    acc = ceil_div(tile.m * n * 4, align) * align
    if shape.group or corrected_apart(spec):
        total += acc
    return total, acc * (2 if (loops > 1 or shape.group) and target.scratchpad.accumulator_slots != 1 else 1)


def _activation_bytes(shape: Shape, tile: Tile, slots: int, target: Target) -> int:
    """Scratchpad of the activations when they lie in DRAM: a tile in its slots, or all of them once."""
    pitch = 2 * fetch_bytes(shape.a, target)
    if not tile.whole:
        return slots * tile.m * (shape.a.nbytes(tile.k) + pitch)
    rows, k = (ceil_div(n, t) * t for n, t in ((shape.m, tile.m), (shape.k, tile.k)))
    return rows * (shape.a.nbytes(k) + pitch)


def linear_cost(
    spec: KernelSpec, spaces: tuple[Space, ...], tile: Tile, target: Target, weights: Making | None = None,
    scales: Making | None = None,
) -> float:  # fmt: skip
    """Cycles of a product with this tile.

    `weights` and `scales` say what a tile of weights takes, and all scales of its columns, where these are no operands
    that are loaded as they lie.
    """
    shape, panel = Shape.of(spec), panel_of(target)
    where = dict(zip(operand_names(spec), spaces, strict=True))
    n = tile.panels * panel
    across, down, deep = ceil_div(shape.n, n), ceil_div(shape.m, tile.m), ceil_div(shape.k, tile.k)
    rate = min(target.dram.peak_bytes_per_s * DRAM_SHARE / target.clock_hz, target.dma.bus_bytes_per_cycle)
    row = shape.w.nbytes(panel)
    uneven = camping(target.dram, tile.k * row, shape.k * row, tile.panels) if deep > 1 else 1.0
    weights, scales = weights or Making(shape.w.nbytes(tile.k * n), 1), scales or Making(0, 2)
    weight = weights.nbytes * uneven / rate + weights.transfers * target.dma.setup_cycles
    loads, brought = fetches_of(shape, tile, panel)
    again = across * down if tile.rows_outer else across
    dma = loads * weight + again * (scales.nbytes / rate + scales.transfers * target.dma.setup_cycles)
    first = weight + weights.vector + scales.vector
    if where["a"] is Space.DRAM:
        once = down * deep * (shape.a.nbytes(tile.m * tile.k) / rate + target.dma.setup_cycles)
        dma += once if tile.whole else once * (brought // (down * deep))
        first += once if tile.whole else once / (down * deep)
    m, k = min(tile.m, shape.m), shape.group or tile.k
    if where["out"] is Space.DRAM:
        width = spec.outs[0].dtype
        dma += across * down * storing(target.dram, width.nbytes(n), width.nbytes(shape.n), m) * target.clock_hz / 1e9
    pair = pair_name(shape.a, shape.w)
    read, _ = matmul_scratchpad_bytes(target, m, n, min(k, shape.k), shape.a.bits, shape.w.bits)
    ports = read / (target.scratchpad.banks * target.scratchpad.bank_bytes)
    product = max(matmul_cost(target, m, n, min(k, shape.k), pair).cycles, ports) + target.matrix.issue_cycles
    products = across * down * ceil_div(shape.k, k)
    sources = (Dtype.F32, Dtype.F32, Dtype.F32, Dtype.F32)
    epilogue = vector_cycles(
        target, _epilogue(spec), (m, tile.panels, panel), (spec.outs[0].dtype, *sources), sums=not shape.group
    )
    vector = across * down * epilogue + (loads - 1) * weights.vector + (across - 1) * scales.vector
    if shape.group:
        vector += products * vector_cycles(target, _scaling(spec), (m, tile.panels, panel))
    elif corrected_apart(spec):
        vector += across * down * vector_cycles(target, _CORRECTED, (m, tile.panels, panel))
    if not target.dma.decoupled or tile.buffers == 1:
        return dma + products * product + vector
    if target.scratchpad.accumulator_slots == 1:
        return max(dma + product, first + products * product + vector) + epilogue
    return max(dma + product, first + products * product, first + product + vector) + epilogue


def _scaling(spec: KernelSpec) -> VectorKernel:
    """What the vector unit does to the sums of a group."""
    if spec.get("minimum"):
        return _MINIMUM_SCALE
    return _CORRECTED_SCALE if spec.get("zeros") or spec.get("asymmetric") else _SCALE


@functools.lru_cache(maxsize=1024)
def _epilogue(spec: KernelSpec) -> VectorKernel:
    """What the lanes do with an element of the product: scale it, then what the spec asks for."""
    if spec.get("act"):
        return VectorKernel(_replaced(VectorKernel.parse(str(spec["act"])).expr, _EPILOGUE.expr))
    return _SILU if spec.get("silu") else _EPILOGUE


def _replaced(expr: Expr, source: Expr) -> Expr:
    """An expression with another one in place of its only operand."""
    if isinstance(expr, tuple):
        return (expr[0], *(_replaced(part, source) for part in expr[1:]))
    return source if expr == "s0" else expr


@functools.lru_cache(maxsize=65536)
def camping(target_dram: Dram, run: int, stride: int, count: int) -> float:
    """How much longer `count` runs of `run` bytes take because they meet the same DRAM channels: at least 1.

    The busiest channel's bytes over the mean, with runs `stride` bytes apart.
    """
    step, channels = target_dram.interleave_bytes, target_dram.channels
    load = [0] * channels
    for index in range(min(count, 8 * channels)):
        at, left = index * stride, run
        rounds, left = divmod(left, step * channels)
        load = [nbytes + rounds * step for nbytes in load]
        while left > 0:
            part = min(left, step - at % step)
            load[at // step % channels] += part
            at, left = at + part, left - part
    return max(load) * channels / sum(load)


@functools.lru_cache(maxsize=65536)
def storing(dram: Dram, run: int, stride: int, rows: int) -> float:
    """Nanoseconds that storing `rows` runs of `run` bytes keeps the DRAM from a stream of reads.

    The data bus turns round twice for every batch of writes, and each run opens rows that the reads do not use.
    """
    bursts = ceil_div(run, dram.burst_bytes)
    used = min(dram.channels, ceil_div(run, dram.interleave_bytes))
    each = ceil_div(bursts, used)
    banks = {"row-linear": 1, "group-interleaved": dram.bank_groups}.get(
        dram.map, dram.bank_groups * dram.banks_per_group
    )
    opened = max(min(banks, each), ceil_div(each * dram.burst_bytes, dram.page_bytes))
    burst_ns = dram.burst_length * 1e3 / dram.data_rate_mtps
    turn = (dram.trtw_ns + dram.tcwl_ns + burst_ns + dram.twtr_ns) / max(1, dram.queue_depth // 2)
    run_ns = each * (burst_ns + turn) + opened * max(dram.trrd_ns, dram.tfaw_ns / 4)
    return rows * used / dram.channels * run_ns * camping(dram, run, stride, rows)


def choose_attention(
    spec: KernelSpec, spaces: tuple[Space, ...], target: Target, room: Room
) -> attention.AttentionTile:
    """The cheapest tile that fits; raises AllocationError when none does.

    A tile beyond `room.preferred` must save a quarter: it keeps the next operators' loads from overlapping.
    """
    heads = attention.Heads.of(spec)
    again = heads.rows > ATTENTION_ROWS[-1] and spaces[1] is Space.DRAM
    rows = sorted({min(heads.rows, r) for r in ATTENTION_ROWS + MANY_ROWS * again}, reverse=True)
    keys = sorted({min(heads.keys, k) for k in (16, 32, 64, 128, 256, 512, 1024, 2048)}, reverse=True)
    costs = {}
    for tile in (attention.AttentionTile(r, t) for r in rows for t in keys):
        nbytes = attention.scratch_bytes(spec, spaces, tile, target)
        if attention.acc_bytes(spec, tile) <= target.scratchpad.accumulator_bytes and nbytes <= room.limit:
            cost = attention_cost(spec, spaces, tile, target)
            costs[tile] = cost if nbytes <= room.preferred else cost / LARGE_SAVES
    if costs:
        return min(costs, key=lambda tile: (costs[tile], -tile.rows, -tile.keys))
    tile = attention.AttentionTile(rows[-1], keys[-1])
    raise AllocationError(
        f"target {target.name}: one row of attention over {heads.keys} keys needs "
        f"{attention.scratch_bytes(spec, spaces, tile, target)} bytes of scratchpad and "
        f"{attention.acc_bytes(spec, tile)} of accumulators; {room.limit} and {target.scratchpad.accumulator_bytes} "
        "are free: shorten the prompt, or raise scratchpad.bytes"
    )


def attention_cost(spec: KernelSpec, spaces: tuple[Space, ...], tile: attention.AttentionTile, target: Target) -> float:
    """Cycles of an attention with this tile: per tile of keys the slowest engine and its start, per row the softmax."""
    heads = attention.Heads.of(spec)
    rate = min(
        target.dram.peak_bytes_per_s * DRAM_SHARE / target.clock_hz, target.dma.bus_bytes_per_cycle, in_flight(target)
    )
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
