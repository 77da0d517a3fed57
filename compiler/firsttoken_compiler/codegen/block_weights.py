"""Weights in blocks of GGUF as the machine reads them: the planes of `formats.planes`, the same bits in another order.

Recipes of a product's weights have the forms of `FORMS` and a layout `TYPE:PLANE`: a plane `[k / group, n]` in panels.
Recipes of rows that are gathered have a layout `blocks:TYPE:PLANE`: the recipe's k is the table's rows, its n the bytes
(or half-precision numbers) of a row, packed along the row, the first number lowest. With `rows:TYPE:PLANE` the source
holds floats, which are quantised to such blocks.
"""

from dataclasses import replace
from typing import Final

import numpy as np

from firsttoken_compiler.errors import ProgramError
from firsttoken_compiler.formats.planes import Planes, split
from firsttoken_compiler.formats.quantise import quantise
from firsttoken_compiler.formats.types import BLOCK_TYPES, BlockType, Plane
from firsttoken_compiler.isa.program import Packing
from firsttoken_compiler.isa.types import pack

FORMS: Final = ("planes", "quantised")
"""Planes of blocks that the source holds, and of blocks that floats of the source are quantised to."""
TABLE: Final = "blocks:"
FLOAT_TABLE: Final = "rows:"
ROWS: Final = 4096
"""Rows of a table that are taken apart at a time."""


def is_table(packing: Packing) -> bool:
    """Whether a recipe is one of rows that are gathered."""
    return packing.layout.startswith((TABLE, FLOAT_TABLE))


def is_float_table(packing: Packing) -> bool:
    """Whether they are made of floats."""
    return packing.layout.startswith(FLOAT_TABLE)


def check(packing: Packing, where: str) -> None:
    """Raises ProgramError for a type or a plane that does not exist, or one that the recipe is not for."""
    named = _named(_rest(packing))
    if named is None:
        raise ProgramError(f"{where}: layout {packing.layout!r} names no plane of blocks")
    kind, plane = named
    if packing.form in FORMS:
        fits = packing.bits == plane.bits and packing.group == plane.per and packing.k % kind.block == 0
        fits &= packing.panel % 8 == 0 and packing.shift in (0, 8)
    else:
        fits = packing.bits == max(plane.bits, 8) and (packing.form == "vectors") == (plane.bits == 16)
    if not fits or min(packing.k, packing.n, packing.panel) < 1:
        raise ProgramError(f"{where}: {packing} is no recipe of plane {plane.name} of {kind.name}")


def matrix_of(packing: Packing) -> Packing:
    """What the recipes of all planes of a matrix have in common: the layout is its type."""
    return replace(packing, layout=packing.layout.partition(":")[0], bits=0, group=0, shift=0)


def planes_of(matrix: Packing, array: np.ndarray, first: int, last: int) -> Planes:
    """Columns `[first, last)` of the planes of a matrix.

    Raises ProgramError where the initialiser has another size, or floats that are not finite.
    """
    kind = BLOCK_TYPES[matrix.layout]
    if matrix.form == "planes":
        _require(matrix, array, (matrix.n, kind.row_bytes(matrix.k)))
        return split(np.ascontiguousarray(array[first:last]), kind)
    expected = (matrix.n, matrix.k) if matrix.transposed else (matrix.k, matrix.n)
    if array.shape != expected:
        raise ProgramError(f"initialiser {matrix.source!r} has shape {array.shape}, its packing expects {expected}")
    rows = np.ascontiguousarray(array[first:last] if matrix.transposed else array[:, first:last].T, np.float32)
    if not np.isfinite(rows).all():
        raise ProgramError(f"initialiser {matrix.source!r} has values that are not finite: repair the weights")
    return split(quantise(rows, kind), kind)


def element(packing: Packing, planes: Planes) -> np.ndarray:
    """The plane of a recipe, less what it shifts by: integers of a byte, or float16."""
    values = planes[packing.layout.partition(":")[2]]
    return values.astype(np.int8) - np.int8(packing.shift) if packing.shift else values


def columns(packing: Packing, array: np.ndarray, first: int, last: int) -> np.ndarray:
    """Columns `[first, last)` of the packed rows of a table: int8 or float16 `[rows, last - first]`.

    Raises ProgramError where the initialiser has another size.
    """
    kind, plane, across = _table(packing)
    _require(packing, array, (packing.k, kind.row_bytes(across * plane.per)))
    made = np.empty((packing.k, last - first), np.float16 if plane.bits == 16 else np.int8)
    for start in range(0, packing.k, ROWS):
        planes = split(np.ascontiguousarray(array[start : start + ROWS]), kind)
        made[start : start + ROWS] = packed_rows(packing, planes)[:, first:last]
    return made


def table_of(packing: Packing) -> tuple[str, int, int]:
    """(type, rows, floats of a row): what the recipes of all planes of a table have in common."""
    kind, plane, across = _table(packing)
    return kind.name, packing.k, across * plane.per


def float_rows(packing: Packing, array: np.ndarray, start: int) -> Planes:
    """Planes of the next `ROWS` rows of a table of floats.

    Raises ProgramError where it has another size, or values that are not finite.
    """
    kind, expected = _table(packing)[0], table_of(packing)[1:]
    if array.shape != expected or expected[1] % kind.block:
        raise ProgramError(f"initialiser {packing.source!r} has shape {array.shape}, its packing expects {expected}")
    rows = np.ascontiguousarray(array[start : start + ROWS], np.float32)
    if not np.isfinite(rows).all():
        raise ProgramError(f"table {packing.source!r} has values that are not finite; repair the student's weights")
    return split(quantise(rows, kind), kind)


def packed_rows(packing: Packing, planes: Planes) -> np.ndarray:
    """The plane of a recipe, packed along the rows: int8 or float16."""
    plane = _table(packing)[1]
    values = planes[plane.name].T
    return pack(values, plane.bits).view(np.int8) if plane.bits < 8 else values


def _table(packing: Packing) -> tuple[BlockType, Plane, int]:
    """(type, plane, elements of the plane in a row)."""
    named = _named(_rest(packing))
    assert named is not None
    kind, plane = named
    return kind, plane, packing.n * 8 // plane.bits if plane.bits < 8 else packing.n


def _rest(packing: Packing) -> str:
    return packing.layout.removeprefix(TABLE).removeprefix(FLOAT_TABLE)


def _require(packing: Packing, array: np.ndarray, shape: tuple[int, int]) -> None:
    if array.shape != shape or array.dtype != np.uint8:
        raise ProgramError(
            f"initialiser {packing.source!r} is {array.dtype}{list(array.shape)}, its packing expects blocks "
            f"uint8{list(shape)}"
        )


def _named(layout: str) -> tuple[BlockType, Plane] | None:
    name, _, part = layout.partition(":")
    kind = BLOCK_TYPES.get(name)
    plane = kind.plane(part) if kind is not None else None
    return None if kind is None or plane is None else (kind, plane)
