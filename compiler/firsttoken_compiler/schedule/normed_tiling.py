"""Tiles of products that make their normalised rows themselves: rows of a block first, the product in what is left."""

from __future__ import annotations

from typing import Final

from firsttoken_compiler.isa.types import Space
from firsttoken_compiler.schedule import layout, normed, tiling
from firsttoken_compiler.schedule.linear import Tile
from firsttoken_compiler.schedule.spec import KernelSpec
from firsttoken_compiler.schedule.tiling import Room
from firsttoken_compiler.target.rates import ceil_div
from firsttoken_compiler.target.target import Target

STAGING: Final = 4
"""A quarter of the room is for the norm's input and its numbers on their way out of DRAM."""


def choose(spec: KernelSpec, spaces: tuple[Space, ...], target: Target, room: Room) -> tuple[int, Tile]:
    """(rows of a block that is normalised at a time, tile of the product).

    Raises AllocationError when rows, blocks and tile do not fit.
    """
    first, then = normed.spaces_of(spec, spaces)
    apply = normed.normalise_of(spec)
    taken = matrix_bytes(spec, target)
    share = Room(room.preferred // STAGING, max(0, room.limit - taken) // STAGING)
    block = tiling.choose_rows(apply, first, target, share)
    left = left_of(spec, spaces, block, target, room)
    return block, tiling.choose_linear(normed.product_of(spec), then, target, left)


def matrix_bytes(spec: KernelSpec, target: Target) -> int:
    """Scratchpad of the normalised rows."""
    align = target.alignment(Space.SPAD)
    return ceil_div(layout.resident_bytes(normed.rows_of(spec), target), align) * align


def left_of(spec: KernelSpec, spaces: tuple[Space, ...], block: int, target: Target, room: Room) -> Room:
    """What the rows, and the blocks that make them, leave for the product."""
    first, _ = normed.spaces_of(spec, spaces)
    taken = matrix_bytes(spec, target) + tiling.row_bytes(normed.normalise_of(spec), first, block, target)
    return Room(room.preferred - taken, room.limit - taken)
