"""Weights that an ONNX file stores quantised, as the machine reads them: the same integers, in panels.

Unsigned integers are stored minus the middle of their range, and so are their zero points, so that all weights are
signed; no other arithmetic is done here.
"""

from collections.abc import Callable
from typing import Any, Final

import numpy as np

from firsttoken_compiler.codegen import block_weights
from firsttoken_compiler.errors import ProgramError
from firsttoken_compiler.isa.program import Packing
from firsttoken_compiler.isa.types import Dtype, unpack

VALUES: Final = ("kn", "nk", "blob", "rows", "conv")
"""How the integers lie in the initialiser: `[k, n]`, `[n, k]`, MatMulNBits' `[n, blocks, packed block]`, bytes of
packed rows `[k, n * bits / 8]`, or a convolution's `[n, channels, kernel]`, of which k counts tap by tap."""
ROWS: Final = ("gn", "ng", "n", "one", "blob4", "blob8", "rows4")
"""How scales and zero points lie: `[groups, n]`, `[n, groups]`, one per column, one, or packed like the integers.

A number behind a colon, such as `gn:128`: the rows of the file's groups where the recipe's are parts of them.
"""
FORMS: Final = ("stored", "vectors", "sums")


def check(packing: Packing, where: str) -> None:
    """Raises ProgramError for a recipe of one of `FORMS` that this module does not make."""
    if packing.group < 1:
        raise ProgramError(f"{where}: groups of {packing.group} rows; stored weights need at least 1")
    if block_weights.is_table(packing):
        block_weights.check(packing, where)
        return
    known = ROWS if packing.form == "vectors" else VALUES
    layout, of = _split(packing)
    if of % packing.group:
        raise ProgramError(f"{where}: groups of {packing.group} rows are no parts of groups of {of}")
    if layout not in known:
        raise ProgramError(f"{where}: unknown layout {packing.layout!r}; known: {', '.join(known)}")
    if packing.form != "vectors" and packing.bits not in (4, 8):
        raise ProgramError(f"{where}: stored weights of {packing.bits} bits; known: 4, 8")


def columns(packing: Packing, dtype: Dtype, array: np.ndarray, first: int, last: int) -> np.ndarray:
    """Columns `[first, last)` of what the recipe describes: `[k or groups, last - first]` in the tensor's numpy type.

    Raises ProgramError when the initialiser has another size, or holds what the recipe's type does not reach.
    """
    if block_weights.is_table(packing):
        return block_weights.columns(packing, array, first, last)
    if packing.form == "vectors":
        return _rows(packing, dtype, array, first, last)
    values = _values(packing, array, first, last)
    if packing.form == "stored":
        return values
    starts = np.arange(0, packing.k, packing.group)
    return np.add.reduceat(values.astype(np.int64), starts, axis=0).astype(np.float32)


def columns_of(student: Any) -> Callable[[Packing, Dtype], np.ndarray | None]:
    """All of `columns` for a student's initialisers; None where a recipe is none of `FORMS`, or no data is here."""

    def whole(packing: Packing, dtype: Dtype) -> np.ndarray | None:
        if packing.form not in FORMS or not student.has_data(packing.source):
            return None
        return columns(packing, dtype, student.array(packing.source), 0, packing.n)

    return whole


def _values(packing: Packing, array: np.ndarray, first: int, last: int) -> np.ndarray:
    k, n, bits = packing.k, packing.n, packing.bits
    if packing.layout == "blob":
        raw = _reshaped(packing, array, n, -1)[first:last]
        if raw.shape[1] * 8 // bits < k:
            raise _size_error(packing, array, f"{n} rows of at least {k} weights")
        whole = _unpacked(raw, bits)[:, :k].T
    elif packing.layout == "rows":
        whole = _unpacked(_reshaped(packing, array, k, -(-n * bits // 8)), bits)[:, first:last]
    elif packing.layout == "conv":
        if array.ndim < 3 or array.shape[0] != n or array.size != k * n:
            raise _size_error(packing, array, f"{n} kernels of {k} weights")
        whole = array.reshape(n, array.shape[1], -1)[first:last].transpose(2, 1, 0).reshape(k, -1)
    elif packing.layout == "nk":
        whole = _reshaped(packing, array, n, k)[first:last].T
    else:
        whole = _reshaped(packing, array, k, n)[:, first:last]
    limit = 1 << (bits - 1)
    shifted = whole.astype(np.int16) - np.int16(packing.shift)
    if shifted.size and not -limit <= int(shifted.min()) <= int(shifted.max()) < limit:
        raise ProgramError(
            f"initialiser {packing.source!r} holds integers from {shifted.min() + packing.shift} to "
            f"{shifted.max() + packing.shift}, which are not of {bits} bits: export the model again"
        )
    return np.ascontiguousarray(shifted.astype(np.int8))


def _rows(packing: Packing, dtype: Dtype, array: np.ndarray, first: int, last: int) -> np.ndarray:
    n, (layout, of) = packing.n, _split(packing)
    groups = -(-packing.k // of)
    if layout == "rows4":
        part = _unpacked(_reshaped(packing, array, groups, -(-n // 2)), 4)[:, :n][:, first:last]
    elif layout == "gn":
        part = _reshaped(packing, array, groups, n)[:, first:last]
    elif layout == "ng":
        part = _reshaped(packing, array, n, groups)[first:last].T
    elif layout in ("n", "one"):
        row = _reshaped(packing, array, 1, n if layout == "n" else 1)
        part = np.broadcast_to(np.broadcast_to(row, (1, n))[:, first:last], (groups, last - first))
    else:
        bits = int(layout.removeprefix("blob"))
        part = _unpacked(_reshaped(packing, array, n, -(-groups * bits // 8))[first:last], bits)[:, :groups].T
    wide = part.astype(np.float32)
    made = (wide - np.float32(packing.shift)).astype(dtype.numpy)
    if not np.isfinite(wide).all() or not np.array_equal(made.astype(np.float32), wide - np.float32(packing.shift)):
        raise ProgramError(
            f"initialiser {packing.source!r} holds numbers that are not finite or not {dtype.text}: "
            "quantise the model again"
        )
    return np.ascontiguousarray(made[np.arange(0, packing.k, packing.group) // of])


def _split(packing: Packing) -> tuple[str, int]:
    """Layout, and rows of a group as the file has it."""
    layout, _, of = packing.layout.partition(":")
    return layout, int(of or packing.group)


def _reshaped(packing: Packing, array: np.ndarray, rows: int, width: int) -> np.ndarray:
    if (width >= 0 and array.size != rows * width) or array.size % rows:
        raise _size_error(packing, array, f"{rows} x {width if width >= 0 else 'any'} elements")
    return array.reshape(rows, width)


def _size_error(packing: Packing, array: np.ndarray, expected: str) -> ProgramError:
    return ProgramError(f"initialiser {packing.source!r} has shape {array.shape}, its packing expects {expected}")


def _unpacked(raw: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned integers of rows of bytes, the low ones first."""
    data = np.ascontiguousarray(raw).view(np.uint8)
    if bits == 8:
        return data
    return unpack(data, Dtype.U4)
