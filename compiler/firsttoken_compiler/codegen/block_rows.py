"""Rows of the planes of a table in blocks: an element for each number, packed along the row, the first one lowest.

The recipe's `k` is the table's rows, its `n` the bytes (or fp16 numbers) of a row of one plane.
"""

from typing import Final

import numpy as np

from firsttoken_compiler.errors import ProgramError
from firsttoken_compiler.formats.types import BLOCK_TYPES, BlockType, Plane
from firsttoken_compiler.isa.program import Packing

PREFIX: Final = "blocks:"
"""Layouts are `blocks:TYPE:PLANE`."""
ROWS: Final = 4096
"""Rows of the table that are taken apart at a time."""


def check(packing: Packing, where: str) -> None:
    """Raises ProgramError for a type or a plane that does not exist."""
    if _named(packing) is None:
        raise ProgramError(f"{where}: layout {packing.layout!r} names no plane of blocks")


def columns(packing: Packing, array: np.ndarray, first: int, last: int) -> np.ndarray:
    """Columns `[first, last)` of the rows of a plane: bytes as int8, or float16.

    Raises ProgramError where the initialiser has another size.
    """
    from firsttoken_compiler.formats.planes import split

    named = _named(packing)
    assert named is not None
    kind, plane = named
    across = packing.n * 8 // plane.bits if plane.bits < 8 else packing.n
    row_bytes = kind.row_bytes(across * plane.per)
    if array.shape != (packing.k, row_bytes) or array.dtype != np.uint8:
        raise ProgramError(
            f"initialiser {packing.source!r} is {array.dtype}{list(array.shape)}, its packing expects blocks "
            f"uint8{[packing.k, row_bytes]}"
        )
    made = np.empty((packing.k, last - first), np.float16 if plane.dtype == "float16" else np.int8)
    for start in range(0, packing.k, ROWS):
        values = split(np.ascontiguousarray(array[start : start + ROWS]), kind)[plane.name].T
        made[start : start + ROWS] = _packed(values, plane)[:, first:last]
    return made


def _named(packing: Packing) -> tuple[BlockType, Plane] | None:
    kind = BLOCK_TYPES.get(packing.layout.split(":")[1])
    plane = kind.plane(packing.layout.split(":")[-1]) if kind is not None else None
    return None if kind is None or plane is None else (kind, plane)


def _packed(values: np.ndarray, plane: Plane) -> np.ndarray:
    if plane.bits >= 8:
        return values
    each = 8 // plane.bits
    shifts = (np.arange(each) * plane.bits).astype(np.uint8)
    pieces = values.astype(np.uint8).reshape(len(values), -1, each) << shifts
    return np.bitwise_or.reduce(pieces, axis=-1).view(np.int8)
