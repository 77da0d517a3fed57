"""Weights in blocks of GGUF as the machine reads them: the planes of `formats.planes`, the same bits in another order.

Layouts of recipes: `planes:TYPE:PLANE` is a plane `[k / per, n]` of a product's weights, integers less the middle of
their range, scales as they are. `blocks:TYPE:PLANE` is a plane of rows that are gathered: the recipe's k is the table's
rows, its n the bytes (or half-precision numbers) of a row, packed along the row, the first number lowest.
"""

from typing import Final

import numpy as np

from firsttoken_compiler.errors import ProgramError
from firsttoken_compiler.formats.planes import split
from firsttoken_compiler.formats.types import BLOCK_TYPES, BlockType, Plane
from firsttoken_compiler.isa.program import Packing

PRODUCT: Final = "planes"
TABLE: Final = "blocks"
ROWS: Final = 4096
"""Rows of a table that are taken apart at a time."""


def is_blocks(packing: Packing) -> bool:
    """Whether a recipe is one of these."""
    return packing.layout.partition(":")[0] in (PRODUCT, TABLE)


def check(packing: Packing, where: str) -> None:
    """Raises ProgramError for a type or a plane that does not exist, or one that the recipe is not for."""
    named = _named(packing)
    if named is None or packing.form not in ("stored", "vectors"):
        raise ProgramError(f"{where}: layout {packing.layout!r} names no plane of blocks")
    kind, plane = named
    of_table = packing.layout.startswith(TABLE)
    bits = plane.bits if not of_table or plane.bits == 16 else 8
    fits = packing.bits == bits and (packing.form == "vectors") == (plane.bits == 16)
    if not fits or (not of_table and (packing.k % kind.block or (packing.form == "vectors") != (plane.per > 1))):
        raise ProgramError(f"{where}: {packing} is no recipe of plane {plane.name} of {kind.name}")


def columns(packing: Packing, array: np.ndarray, first: int, last: int) -> np.ndarray:
    """Columns `[first, last)` of what the recipe describes: int8 or float16 `[rows, last - first]`.

    Raises ProgramError where the initialiser has another size.
    """
    named = _named(packing)
    assert named is not None
    kind, plane = named
    if packing.layout.startswith(PRODUCT):
        _require(packing, array, (packing.n, kind.row_bytes(packing.k)))
        values = split(np.ascontiguousarray(array[first:last]), kind)[plane.name]
        return values if plane.bits == 16 else (values.astype(np.int16) - packing.shift).astype(np.int8)
    across = packing.n * 8 // plane.bits if plane.bits < 8 else packing.n
    _require(packing, array, (packing.k, kind.row_bytes(across * plane.per)))
    made = np.empty((packing.k, last - first), np.float16 if plane.bits == 16 else np.int8)
    for start in range(0, packing.k, ROWS):
        values = split(np.ascontiguousarray(array[start : start + ROWS]), kind)[plane.name].T
        made[start : start + ROWS] = _packed(values, plane)[:, first:last]
    return made


def _require(packing: Packing, array: np.ndarray, shape: tuple[int, int]) -> None:
    if array.shape != shape or array.dtype != np.uint8:
        raise ProgramError(
            f"initialiser {packing.source!r} is {array.dtype}{list(array.shape)}, its packing expects blocks "
            f"uint8{list(shape)}"
        )


def _named(packing: Packing) -> tuple[BlockType, Plane] | None:
    _, _, rest = packing.layout.partition(":")
    name, _, part = rest.partition(":")
    kind = BLOCK_TYPES.get(name)
    plane = kind.plane(part) if kind is not None else None
    return None if kind is None or plane is None else (kind, plane)


def _packed(values: np.ndarray, plane: Plane) -> np.ndarray:
    if plane.bits >= 8:
        return values
    each = 8 // plane.bits
    shifts = (np.arange(each) * plane.bits).astype(np.uint8)
    pieces = values.reshape(len(values), -1, each) << shifts
    return np.asarray(np.bitwise_or.reduce(pieces, axis=-1)).view(np.int8)
