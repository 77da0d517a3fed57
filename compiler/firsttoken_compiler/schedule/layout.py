"""Where the elements of a kernel's operands lie: bit strides per logical dimension, and the extents that really exist.

A kernel is scheduled over whole tiles; `Ragged` says how far each axis really goes, so that the instructions of the
last tile are cut to it.
"""

from __future__ import annotations

from dataclasses import dataclass

from firsttoken_compiler.isa.types import Dtype, Space
from firsttoken_compiler.schedule.spec import Arg
from firsttoken_compiler.target.target import Target


@dataclass(frozen=True, slots=True)
class Layout:
    """Logical shape of an operand as its kernel sees it (whole tiles), and bits between neighbours in memory."""

    shape: tuple[int, ...]
    bits: tuple[int, ...]
    narrow: tuple[int, ...] = ()
    """The strides inside a last panel that is narrower than the others, where they differ."""
    start: int = 0
    """Bits before the first element (rows of a cache that are already there)."""

    def coordinates(self, offset: int) -> tuple[int, ...]:
        """Logical coordinates of a flat element offset (or the part of each dimension in a flat coefficient)."""
        sign = -1 if offset < 0 else 1
        rest, out = abs(offset), []
        for extent in self.shape[:0:-1]:
            out.append(sign * (rest % extent))
            rest //= extent
        return (sign * rest, *out[::-1])

    def distance(self, offset: int, narrow: bool = False) -> int:
        """Bits between the first element and the one at a flat element offset."""
        strides = self.narrow if narrow and self.narrow else self.bits
        return sum(c * s for c, s in zip(self.coordinates(offset), strides, strict=True))


def pitch_bits(arg: Arg, space: Space, target: Target) -> int:
    """Bits from one row of a matrix to the next.

    In the scratchpad rows lie an odd number of fetches apart, so that consecutive rows start in different banks; a
    fetch is what the matrix unit takes of a row at a time, at least one word of a bank. Columns of a wider matrix lie
    in its rows.
    """
    row = arg.dtype.nbytes(arg.whole or arg.shape[-1])
    if space is not Space.SPAD or len(arg.shape) != 2 or arg.shape[0] == 1:
        return (arg.whole or arg.shape[-1]) * arg.dtype.bits
    fetch = fetch_bytes(arg.dtype, target)
    if row < fetch:
        return row * 8
    fetches = -(-row // fetch)
    return (fetches | 1) * fetch * 8


def fetch_bytes(dtype: Dtype, target: Target) -> int:
    """What the matrix unit takes of a row of activations at a time: `rows` elements of k, at least a word of a bank."""
    return max(target.scratchpad.bank_bytes, target.matrix.rows * dtype.bits // 8)


def resident_bytes(arg: Arg, target: Target) -> int:
    """Bytes of a value in the scratchpad, pitch included."""
    if len(arg.shape) != 2:
        return arg.nbytes
    return (arg.shape[0] - 1) * pitch_bits(arg, Space.SPAD, target) // 8 + arg.dtype.nbytes(arg.shape[1])


def matrix(rows: int, arg: Arg, pitch: int) -> Layout:
    """A matrix of `rows` (padded) rows `pitch` bits apart; vectors and caches are dense."""
    if len(arg.shape) != 2:
        return dense((rows, *arg.shape[1:]), arg.dtype)
    return Layout((rows, arg.shape[1]), (pitch, arg.dtype.bits))


def dense(shape: tuple[int, ...], dtype: Dtype, real: tuple[int, ...] | None = None) -> Layout:
    """Row-major; `real` are the extents in memory where `shape` is padded."""
    strides, step = [], dtype.bits
    for extent in (real or shape)[::-1]:
        strides.append(step)
        step *= extent
    return Layout(shape, tuple(strides[::-1]))


def panels(count: int, rows: int, panel: int, dtype: Dtype, real_rows: int, columns: int) -> Layout:
    """`[panels, rows, columns of a panel]`, as `codegen.weights` packs them: rows are whole bytes."""
    last = columns - (columns - 1) // panel * panel
    full, narrow = (8 * dtype.nbytes(width) for width in (panel, last))
    per_panel = real_rows * full
    return Layout((count, rows, panel), (per_panel, full, dtype.bits), (per_panel, narrow, dtype.bits))


def by_panel(rows: int, count: int, panel: int, dtype: Dtype, pitch: int) -> Layout:
    """A matrix whose rows are `pitch` bits apart, seen as `[rows, panels, columns of a panel]`."""
    return Layout((rows, count, panel), (pitch, panel * dtype.bits, dtype.bits))


@dataclass(frozen=True, slots=True)
class Diagonal:
    """Elements of row r beyond r + `past` along `across` count for nothing: a tile of rows ends with its last row."""

    down: str
    across: str
    rows: int
    """Rows of a tile."""
    past: int

    def end(self, origins: dict[str, int], extents: dict[str, int]) -> int:
        """How far the tile of rows that begins at the origin reaches along `across`."""
        last = origins.get(self.down, 0) + self.rows
        return min(last, extents.get(self.down, last)) + self.past


@dataclass(frozen=True, slots=True)
class Ragged:
    """Real extent of each named axis; `p` counts panels of `panel` columns of the axis `n`."""

    extents: dict[str, int]
    columns: int = 0
    panel: int = 0
    diagonal: Diagonal | None = None

    def left(self, axis: str, origins: dict[str, int]) -> int | None:
        """How far an axis goes from its origin, which is 0 unless stated; None for an axis without a limit."""
        origin = origins.get(axis, 0)
        if axis == "p":
            return -(-self.columns // self.panel) - origin
        total = self.extents.get(axis)
        if self.diagonal is not None and axis == self.diagonal.across and total is not None:
            total = min(total, self.diagonal.end(origins, self.extents))
        return None if total is None else total - origin

    @property
    def last_width(self) -> int:
        """Columns of the last panel."""
        return self.columns - (self.columns - 1) // self.panel * self.panel
