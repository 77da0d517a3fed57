"""Iterations alike: what a statement became in one of them, moved to the addresses of another one.

A statement's instructions follow from how it is cut, from numbers that indices put into its microprogram, and from
which of its accesses are the same stream. All else that an iteration changes are addresses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING

from firsttoken_compiler.codegen.loops import Access, Buffer, Offset, Value
from firsttoken_compiler.isa import word
from firsttoken_compiler.schedule.layout import Layout

if TYPE_CHECKING:
    from collections.abc import Sequence

    from firsttoken_compiler.codegen.slots import Room
    from firsttoken_compiler.codegen.unroll import Place

Rows = list[list[int]]


@dataclass(frozen=True, slots=True)
class Lying:
    """An access but for what iterations change: its address in bits follows from these."""

    buffer: Buffer
    base: Offset
    beside: int
    """Elements from the base to the first iteration of a piece."""
    narrow: bool
    layout: Layout | None
    """Of an operand; None for a local buffer, which has a room."""
    room: Room | None
    stream: tuple[object, ...]
    """What, beside the address, makes it the same stream as another one."""

    def address(self, env: list[int], turn: Mapping[Buffer, int]) -> int:
        """Where it begins in this iteration, in bits."""
        at = self.base(env) + self.beside
        if self.layout is not None:
            return self.layout.start + self.layout.distance(at, self.narrow)
        assert self.room is not None
        slot = self.room.address + turn[self.buffer] % self.room.depth * self.room.nbytes
        return slot * 8 + at * self.buffer.dtype.bits


@dataclass(frozen=True, slots=True)
class Alike:
    """The accesses of a piece that begins at `first`, in the narrow last panel or not."""

    places: Sequence[Place]
    rooms: Mapping[Buffer, Room]
    first: tuple[int, ...]
    narrow: bool

    def of(self, access: Access) -> Lying:
        """An access of the piece."""
        beside = sum(c * f for c, f in zip(access.coefficients, self.first, strict=False))
        buffer = access.buffer
        if buffer.param >= 0:
            layout = self.places[buffer.param].layout
            bits = tuple(layout.distance(c, self.narrow) for c in access.coefficients)
            stream = (buffer.param, buffer.dtype, bits)
            return Lying(buffer, access.base, beside, self.narrow, layout, None, stream)
        room, bits = self.rooms[buffer], tuple(c * buffer.dtype.bits for c in access.coefficients)
        return Lying(buffer, access.base, beside, self.narrow, None, room, (room.space.text, buffer.dtype, bits))


@dataclass(frozen=True, slots=True)
class _Made:
    addresses: list[int]
    rows: Rows
    symbols: Rows
    operands: tuple[int, ...]
    """Which access each operand of the instructions is."""


@dataclass
class Seen:
    """A statement cut in one way: its accesses, the first of which is the result, and what it became."""

    accesses: list[Lying]
    value: Value | None
    """Of a nest whose reads join where they are one stream; None where every access is an operand of its own."""
    made: dict[tuple[object, ...], _Made] = field(default_factory=dict)
    bases: list[Offset] = field(init=False)
    pairs: list[tuple[int, int]] = field(init=False)
    """Reads that are one stream wherever their addresses are equal."""

    def __post_init__(self) -> None:
        """Finds what decides beside addresses."""
        self.bases = [] if self.value is None else _bases(self.value)
        reads = [] if self.value is None else list(enumerate(self.accesses))[1:]
        self.pairs = [(i, j) for (i, a), (j, b) in combinations(reads, 2) if a.stream == b.stream]

    def keep(self, rows: Rows, symbols: Rows, env: list[int], turn: Mapping[Buffer, int]) -> None:
        """What the statement became in this iteration."""
        addresses = [access.address(env, turn) for access in self.accesses]
        if any(address % 8 for address in addresses):
            return
        case = self._case(addresses, env)
        same = {j for (i, j), equal in zip(self.pairs, case, strict=False) if equal}
        operands = tuple(number for number in range(len(addresses)) if number not in same)
        self.made[case] = _Made(addresses, rows, symbols, operands)

    def again(self, env: list[int], turn: Mapping[Buffer, int]) -> tuple[Rows, Rows] | None:
        """Instructions and their symbols in this iteration; None where no iteration before was like it."""
        addresses = [access.address(env, turn) for access in self.accesses]
        made = self.made.get(self._case(addresses, env))
        if made is None or any(address % 8 for address in addresses):
            return None
        moved = [
            (word.operand_column(index) + 1, (addresses[number] - made.addresses[number]) // 8)
            for index, number in enumerate(made.operands)
        ]
        rows = [row.copy() for row in made.rows]
        for row in rows:
            for column, distance in moved:
                row[column] += distance
        return rows, made.symbols

    def _case(self, addresses: list[int], env: list[int]) -> tuple[object, ...]:
        """What decides the instructions beside addresses."""
        equal = [addresses[i] == addresses[j] for i, j in self.pairs]
        return (*equal, *(base(env) for base in self.bases))


def _bases(value: Value) -> list[Offset]:
    """Offsets of the indices in a value."""
    if value[0] == "index":
        return [value[1]]
    if value[0] in ("const", "fill", "load"):
        return []
    return [base for part in value[1:] for base in _bases(part)]
