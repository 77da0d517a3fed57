"""Convolutions as products of windows: the product that is scheduled, and the tile of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from firsttoken_compiler.errors import AllocationError
from firsttoken_compiler.isa.types import Dtype, Space
from firsttoken_compiler.isa.vector_kernel import VectorKernel
from firsttoken_compiler.schedule import tiling, windows
from firsttoken_compiler.schedule.linear import Shape, Tile, panel_of
from firsttoken_compiler.schedule.product_bytes import linear_bytes
from firsttoken_compiler.schedule.product_cost import linear_cost
from firsttoken_compiler.schedule.spec import KernelSpec
from firsttoken_compiler.schedule.tiling import Room
from firsttoken_compiler.schedule.windows import Windows, product_of
from firsttoken_compiler.target.rates import ceil_div, matmul_cost, pair_name, vector_cycles
from firsttoken_compiler.target.target import Target

_COPY = VectorKernel("s0")
BAND_SLOTS = 3
"""Slots of a frame: it is fetched while the vector unit still reads the one before the last."""


WALKED_SLOTS = 2
"""Slots of a frame that products read themselves."""


def walks(spec: KernelSpec, target: Target) -> bool:
    """Whether products read the image where it lies: on a unit that walks windows, in the type that it multiplies."""
    return target.matrix.windows and spec.args[0].dtype is product_of(spec).args[0].dtype


def thins(spec: KernelSpec, space: Space) -> bool:
    """Whether the pixels that a kernel of one pixel reads are fetched alone, which are a matrix then.

    Of integers in DRAM, where steps leave out some of them.
    """
    shape = Windows.of(spec)
    single = shape.kernel == (1, 1) and shape.stride != (1, 1) and not shape.padded
    return single and space is Space.DRAM and spec.args[0].dtype is Dtype.I8


def part_of(shape: Windows, pixels: int) -> int:
    """Pixels of a line that a tile is, where several tiles make up a line; 0 for tiles of lines, or across lines."""
    return pixels if pixels < shape.out[1] and shape.out[1] % pixels == 0 else 0


def lines_of(shape: Windows, pixels: int) -> int:
    """Output lines that so many pixels in a row can touch, starting at a multiple of their number."""
    if part_of(shape, pixels):
        return 1
    if pixels % shape.out[1] == 0:
        return pixels // shape.out[1]
    return min(shape.out[0], ceil_div(pixels - 1, shape.out[1]) + 1)


def choose(spec: KernelSpec, spaces: tuple[Space, ...], target: Target, room: Room) -> Tile:
    """The cheapest tile that fits: rows are whole lines of pixels, or parts of one.

    Raises AllocationError when none fits.
    """
    shape, product = Windows.of(spec), product_of(spec)
    if thins(spec, spaces[0]):
        return tiling.choose_linear(product, spaces, target, Room(room.limit, room.limit))
    accumulators = target.scratchpad.accumulator_bytes
    for limit in (room.limit,) if walks(spec, target) else (room.preferred, room.limit):
        costs: dict[Tile, float] = {}
        for tile in _candidates(spec, product, shape, target):
            scratch, acc = tile_bytes(spec, spaces, tile, target)
            if scratch <= limit and acc <= accumulators:
                costs[tile] = tile_cost(spec, spaces, tile, target)
                if scratch > room.preferred and limit > room.preferred:
                    costs[tile] /= tiling.LARGE_SAVES  # it keeps the next operators' loads from overlapping
        if costs:
            return min(costs, key=lambda tile: (costs[tile], -tile.m, -tile.k, -tile.panels))
    raise AllocationError(
        f"target {target.name}: no tile of a convolution over an image of {shape.width} x {shape.channels} with "
        f"{spec['n']} results fits into {room.limit} bytes of scratchpad and {accumulators} of accumulators: raise "
        "scratchpad.bytes or scratchpad.accumulator_bytes"
    )


def _candidates(spec: KernelSpec, product: KernelSpec, shape: Windows, target: Target) -> Iterator[Tile]:
    """Tiles, and where products walk an image that is staged, the same with all of it there at once."""
    for tile in tiles_of(product, shape, target):
        yield tile
        if walks(spec, target):
            yield replace(tile, whole=True)


def tiles_of(product: KernelSpec, shape: Windows, target: Target) -> Iterator[Tile]:
    """Whole lines, and parts of lines where one is too long."""
    line = shape.out[1]
    lines = {min(shape.out[0], 1 << i) for i in range(shape.out[0].bit_length() + 1)}
    lines |= {ceil_div(shape.out[0], parts) for parts in range(1, 9)}
    rows = {line * count for count in lines if line * count <= 2048} | {min(line, part) for part in (16, 32, 64, 128)}
    rows |= {part for part in range(16, min(line, 512)) if line % part == 0}
    yield from tiling.linear_tiles(product, target, tuple(rows))


def tile_bytes(spec: KernelSpec, spaces: tuple[Space, ...], tile: Tile, target: Target) -> tuple[int, int]:
    """(scratchpad, accumulator) bytes of a tile with all its slots, and the frame of lines."""
    if thins(spec, spaces[0]):
        return linear_bytes(product_of(spec), spaces, tile, target)
    where = Space.SPAD if walks(spec, target) else Space.DRAM
    scratch, acc = linear_bytes(product_of(spec), (where, *spaces[1:]), replace(tile, whole=False), target)
    slots = (1 if tile.whole else WALKED_SLOTS) if walks(spec, target) else BAND_SLOTS
    return scratch + slots * _band_bytes(spec, Windows.of(spec), spaces[0], tile), acc


def _band_bytes(spec: KernelSpec, shape: Windows, space: Space, tile: Tile) -> int:
    """The frame of padding once."""
    if not windows.staged(shape, space):
        return 0
    high, wide = shape.band(lines_of(shape, tile.m), part_of(shape, tile.m))
    if tile.whole:
        high, wide = shape.band(shape.out[0])
    return spec.args[0].dtype.nbytes(high * wide * shape.channels) + 64


def tile_cost(spec: KernelSpec, spaces: tuple[Space, ...], tile: Tile, target: Target) -> float:
    """Cycles: the product's, and the vector unit's for the windows, which no other unit's time hides for sure."""
    shape, product = Windows.of(spec), product_of(spec)
    if thins(spec, spaces[0]):
        return linear_cost(product, spaces, tile, target)
    sizes = Shape.of(product)
    across = ceil_div(sizes.n, tile.panels * panel_of(target))
    cut = ceil_div(sizes.m, tile.m) * ceil_div(sizes.k, tile.k)
    resident = (Space.SPAD, *spaces[1:])
    rate = min(target.dram.peak_bytes_per_s / target.clock_hz, target.dma.bus_bytes_per_cycle)
    if walks(spec, target):
        often = 1 if tile.whole else across * ceil_div(sizes.m, tile.m)
        fetching = often * _band_bytes(spec, shape, spaces[0], tile) / rate
        return max(linear_cost(product, resident, replace(tile, whole=False), target), fetching) + _walking(
            product, shape, tile, target
        )
    rects = 1 if tile.m % shape.out[1] == 0 or tile.m < shape.out[1] else 3
    runs = ceil_div(len(list(shape.runs())), ceil_div(sizes.k, tile.k)) * rects
    each = vector_cycles(target, _COPY, (1, tile.m, ceil_div(tile.k, max(1, runs // rects)))) * (runs // rects)
    gathering = across * cut * (each + (runs - runs // rects) * target.vector.startup_cycles)
    # Fetching the windows from the DRAM is not paid for: the lines of the image are, once per tile of rows.
    fetching = across * ceil_div(sizes.m, tile.m) * _band_bytes(spec, shape, Space.DRAM, tile) / rate
    return linear_cost(product, resident, tile, target) + gathering + fetching


def _walking(product: KernelSpec, shape: Windows, tile: Tile, target: Target) -> float:
    """Cycles that products of single lines take beyond those of whole tiles, and the start of each."""
    sizes = Shape.of(product)
    pair, n = pair_name(sizes.a, sizes.w), min(sizes.n, tile.panels * panel_of(target))
    across, down, deep = ceil_div(sizes.n, n), ceil_div(sizes.m, tile.m), ceil_div(sizes.k, tile.k)
    runs = max(deep, len(list(shape.runs())))
    line = min(shape.out[1], tile.m)
    count = across * ceil_div(sizes.m, line) * runs
    single = matmul_cost(target, line, n, ceil_div(sizes.k, runs), pair).cycles + target.matrix.issue_cycles
    tiles = matmul_cost(target, min(tile.m, sizes.m), n, min(tile.k, sizes.k), pair).cycles + target.matrix.issue_cycles
    return max(0.0, count * single - across * down * deep * tiles)
