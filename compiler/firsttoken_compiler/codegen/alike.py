"""Iterations alike: what a statement became in one of them, moved to the addresses of another one.

A statement's instructions follow from how it is cut, from numbers that indices put into its microprogram, and from
which of its accesses are the same stream. All else that an iteration changes are addresses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING

from firsttoken_compiler.codegen.loops import Access, Buffer, MatmulCall, Nest, Offset, Value
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
    beside: int
    """Elements from the base to the first iteration of a piece."""
    narrow: bool
    layout: Layout | None
    """Of an operand; None for a local buffer, which has a room."""
    room: Room | None
    stream: tuple[object, ...]
    """What, beside the address, makes it the same stream as another one."""

    def address(self, base: int, turn: Mapping[Buffer, int]) -> int:
        """Where it begins in an iteration in which its base is this, in bits."""
        at = base + self.beside
        if self.layout is not None:
            return self.layout.start + self.layout.distance(at, self.narrow)
        assert self.room is not None
        slot = self.room.address + turn[self.buffer] % self.room.depth * self.room.nbytes
        return slot * 8 + at * self.buffer.dtype.bits


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
    offsets: list[Offset]
    """Where they begin, by the iteration."""
    bases: list[Offset] = field(default_factory=list)
    """Offsets that become numbers of its microprogram."""
    joins: bool = True
    """Whether reads that are one stream become one operand."""
    positions: list[int] = field(default_factory=list)
    """Of a nest that is made for each iteration: which accesses of its form these are."""
    made: dict[tuple[object, ...], _Made] = field(default_factory=dict)
    pairs: list[tuple[int, int]] = field(init=False)
    """Reads that are one stream wherever their addresses are equal."""

    def __post_init__(self) -> None:
        """Finds what decides beside addresses."""
        reads = list(enumerate(self.accesses))[1:] if self.joins else []
        self.pairs = [(i, j) for (i, a), (j, b) in combinations(reads, 2) if a.stream == b.stream]

    def keep(self, rows: Rows, symbols: Rows, now: Now) -> None:
        """What the statement became in this iteration."""
        addresses = self._addresses(now)
        if any(address % 8 for address in addresses):
            return
        case = self._case(addresses, now.env)
        same = {j for (i, j), equal in zip(self.pairs, case, strict=False) if equal}
        operands = tuple(number for number in range(len(addresses)) if number not in same)
        self.made[case] = _Made(addresses, rows, symbols, operands)

    def again(self, now: Now) -> tuple[Rows, Rows] | None:
        """Instructions and their symbols in this iteration; None where no iteration before was like it."""
        addresses = self._addresses(now)
        made = self.made.get(self._case(addresses, now.env))
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

    def _addresses(self, now: Now) -> list[int]:
        form, env, turn = now.form, now.env, now.turn
        offsets = self.offsets if form is None else [form.accesses[position].base for position in self.positions]
        return [access.address(base(env), turn) for access, base in zip(self.accesses, offsets, strict=True)]

    def _case(self, addresses: list[int], env: list[int]) -> tuple[object, ...]:
        """What decides the instructions beside addresses."""
        equal = [addresses[i] == addresses[j] for i, j in self.pairs]
        return (*equal, *(base(env) for base in self.bases))


@dataclass(frozen=True, slots=True)
class Now:
    """An iteration: values of the sequential loops, turns of the buffers, the form of what was made for it alone."""

    env: list[int]
    turn: Mapping[Buffer, int]
    form: Form | None = None


@dataclass(frozen=True, slots=True)
class Form:
    """A nest but for what iterations change: equal forms become instructions that differ in addresses alone."""

    key: tuple[object, ...]
    accesses: list[Access]
    """The result and all reads."""

    @staticmethod
    def of(nest: Nest, env: list[int]) -> Form:
        """The form of a nest that was made for one iteration: its indices are numbers."""
        accesses = [nest.dst]
        key = (nest.axes, nest.dst.buffer, nest.dst.coefficients, _form(nest.value, env, accesses))
        return Form(key, accesses)


def _form(value: Value, env: list[int], accesses: list[Access]) -> tuple[object, ...]:
    kind = value[0]
    if kind == "load":
        first = next((i for i, access in enumerate(accesses) if access is value[1]), len(accesses))
        accesses.append(value[1])
        return kind, value[1].buffer, value[1].coefficients, first
    if kind in ("const", "fill"):
        return value
    if kind == "index":
        return kind, value[1](env), value[2]
    return kind, *(_form(part, env, accesses) for part in value[1:])


def _bases(value: Value) -> list[Offset]:
    """Offsets of the indices in a value."""
    if value[0] == "index":
        return [value[1]]
    if value[0] in ("const", "fill", "load"):
        return []
    return [base for part in value[1:] for base in _bases(part)]


@dataclass(frozen=True, slots=True)
class Alike:
    """The accesses of a piece that begins at `first`, in the narrow last panel or not."""

    places: Sequence[Place]
    rooms: Mapping[Buffer, Room]
    first: tuple[int, ...]
    narrow: bool

    def nest(self, accesses: list[Access], nest: Nest, form: Form | None) -> Seen:
        """A nest whose instruction has the first of these accesses as its result and reads the others."""
        lying = [self._of(access) for access in accesses]
        if form is None:
            return Seen(lying, [access.base for access in accesses], _bases(nest.value))
        known = {id(access): position for position, access in enumerate(form.accesses)}
        return Seen(lying, [], positions=[known[id(access)] for access in accesses])

    def product(self, call: MatmulCall) -> Seen:
        """A product, whose accesses are operands whether or not they are alike."""
        accesses = (call.acc, call.a, call.w)
        return Seen([self._of(access) for access in accesses], [access.base for access in accesses], joins=False)

    def _of(self, access: Access) -> Lying:
        """An access of the piece."""
        beside = sum(c * f for c, f in zip(access.coefficients, self.first, strict=False))
        buffer = access.buffer
        if buffer.param >= 0:
            layout = self.places[buffer.param].layout
            bits = tuple(layout.distance(c, self.narrow) for c in access.coefficients)
            stream = (buffer.param, buffer.dtype, bits)
            return Lying(buffer, beside, self.narrow, layout, None, stream)
        room, bits = self.rooms[buffer], tuple(c * buffer.dtype.bits for c in access.coefficients)
        return Lying(buffer, beside, self.narrow, None, room, (room.space.text, buffer.dtype, bits))
