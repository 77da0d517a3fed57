"""Plain loops → an instruction template: iterations unrolled, ragged tiles cut, buffers given slots.

Software pipelining: engines are decoupled in-order queues, so a pipeline is realised by giving a buffer as many slots
as there are stages between the engine that fills it and the one that reads it. Every allocation takes the next slot.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from firsttoken_compiler.codegen import slots
from firsttoken_compiler.codegen.alike import Alike, Form, Now, Seen
from firsttoken_compiler.codegen.loops import (
    Access,
    Alloc,
    Buffer,
    Computed,
    GatherNest,
    Loop,
    MatmulCall,
    Nest,
    Statement,
    Value,
)
from firsttoken_compiler.codegen.template import ABSOLUTE, SCRATCH, Template
from firsttoken_compiler.codegen.vectorise import Stream, Streams, merged, neutral
from firsttoken_compiler.errors import ProgramError
from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.dma import Gather, Load, Store
from firsttoken_compiler.isa.matmul import ACCUMULATE, ATTENDS, TRANSPOSED, Matmul
from firsttoken_compiler.isa.types import PACKED, Dtype, Engine, Space
from firsttoken_compiler.isa.vector import INITIALISE, KERNEL_SHIFT, Vector
from firsttoken_compiler.isa.vector_kernel import VectorKernel
from firsttoken_compiler.schedule.layout import Layout, Ragged


@dataclass(frozen=True, slots=True)
class Place:
    """Where an operand of the kernel lies, and in what layout."""

    space: Space
    layout: Layout


Piece = tuple[tuple[int, ...], tuple[int, ...], bool]
"""Extents of a nest after cutting, first iteration of each loop, whether it lies in a narrow last panel."""


def unroll(
    body: list[Statement], places: list[Place], ragged: Ragged, alignment: int, tile: str = "",
    weights_alignment: int = 0, marks: Mapping[str, str] | None = None,
) -> Template:  # fmt: skip
    """The template of a kernel; raises ProgramError when an instruction cannot express a statement.

    Local buffers begin on multiples of `alignment`, those that products read as weights also of `weights_alignment`.
    `marks`: of microprograms by the buffer that they write, under "" of all others, where a target maps attention in
    its own way.
    """
    memory = slots.assign(body, [place.space for place in places], alignment, weights_alignment)
    state = _Unroller(places, ragged, memory, marks or {})
    state.run(body)
    order = state.order()
    rows = np.array(state.rows, np.int64).reshape(-1, word.WIDTH)[order]
    symbols = np.array(state.symbols, np.int16).reshape(-1, word.MAX_OPERANDS)[order]
    kernels = tuple(state.kernels)
    return Template(rows, symbols, kernels, memory.scratch_bytes, memory.acc_bytes, tile)


@dataclass
class _Unroller:
    places: list[Place]
    ragged: Ragged
    memory: slots.Memory
    marks: Mapping[str, str]
    rows: list[list[int]] = field(default_factory=list)
    symbols: list[list[int]] = field(default_factory=list)
    kernels: dict[VectorKernel, int] = field(default_factory=dict)
    env: list[int] = field(default_factory=list)
    origin: dict[str, int] = field(default_factory=dict)
    turn: dict[Buffer, int] = field(default_factory=dict)
    pending: dict[Buffer, float] = field(default_factory=dict)
    """Buffers that were set to a constant which no instruction has written yet."""
    unwritten: dict[Buffer, list[tuple[Nest, Piece, Stream]]] = field(default_factory=dict)
    """What would write them."""
    ahead: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    """By operand, ranges of instructions that make its tiles."""
    spans: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    """Ranges of instructions of skewed loops, in the iterations so far of the loop around them."""
    moved: dict[int, int] = field(default_factory=dict)
    """Instructions that stand right before another one."""
    seen: dict[tuple[object, ...], Seen] = field(default_factory=dict)
    """What statements became in iterations before, by the statement and what cut it."""

    def order(self) -> list[int]:
        """The instructions in their final order, by the numbers under which they were made.

        Those that make a tile are spread over the products since the tile before was made; transfers come first.
        """
        behind = list(range(len(self.rows)))
        for ranges in self.ahead.values():
            for (_, free), (first, last) in pairwise(ranges):
                products = [i for i in range(free, first) if self.rows[i][word.OPCODE] == Matmul.OPCODE]
                work = [i for i in range(first, last) if self.rows[i][word.OPCODE] == Vector.OPCODE]
                for i in range(first, last) if products else ():
                    behind[i] = products[0]
                for index, i in enumerate(work if products else ()):
                    behind[i] = products[index * len(products) // len(work)]
        return sorted(range(len(behind)), key=lambda i: (self.moved.get(i, behind[i]), i not in self.moved, i))

    def run(self, body: list[Statement]) -> None:
        for statement in body:
            if isinstance(statement, Alloc):
                self.turn[statement.buffer] = self.turn.get(statement.buffer, -1) + 1
            elif isinstance(statement, Loop):
                self._loop(statement)
            elif isinstance(statement, MatmulCall):
                self._matmul(statement, again=True)
            elif isinstance(statement, GatherNest):
                self._gather(statement)
            elif isinstance(statement, Computed):
                for part in statement.make(self.env):
                    self._matmul(part) if isinstance(part, MatmulCall) else self._nest(part)
            else:
                self._nest(statement, again=True)

    def _loop(self, loop: Loop) -> None:
        start = len(self.rows)
        self._iterations(loop)
        if loop.ahead:
            self.ahead.setdefault(loop.ahead, []).append((start, len(self.rows)))
        if loop.skew:
            self.spans.setdefault(id(loop), []).append((start, len(self.rows)))
        for part in loop.body:
            if isinstance(part, Loop) and part.skew:
                self._skew(part.skew, self.spans.pop(id(part), []))

    def _skew(self, skew: int, spans: list[tuple[int, int]]) -> None:
        """Moves the instructions of a skewed loop, whose ranges these are, to those of the iteration beside."""
        for before, after in pairwise(spans):
            self.moved |= dict.fromkeys(range(*(after if skew < 0 else before)), before[1] if skew < 0 else after[0])

    def _iterations(self, loop: Loop) -> None:
        before = self.origin.get(loop.axis, 0)
        del self.env[loop.depth :]
        self.env.append(0)
        for index in range(loop.extent):
            self.env[loop.depth] = index
            if loop.axis:
                self.origin[loop.axis] = before + index * loop.step
                left = self.ragged.left(loop.axis, self.origin)
                if left is not None and left <= 0:
                    break
            self.run(loop.body)
            del self.env[loop.depth + 1 :]
        self.origin[loop.axis] = before
        self.env.pop()

    def _cut(self, extent: int, axis: str) -> int:
        left = self.ragged.left(axis, self.origin) if axis else None
        return extent if left is None else min(extent, left)

    def _pieces(self, nest: Nest) -> Iterator[Piece]:
        """The cut extents; a narrow last panel is a piece of its own."""
        extents = [self._cut(e, a) for e, a in zip(nest.extents, nest.axes, strict=True)]
        if min(extents, default=1) < 1:
            return
        zero = (0,) * len(extents)
        last = self.ragged.last_width if self.ragged.panel else 0
        if "p" not in nest.axes or "j" not in nest.axes or last == self.ragged.panel:
            yield tuple(extents), zero, False
            return
        p, j = nest.axes.index("p"), nest.axes.index("j")
        if extents[p] < (self.ragged.left("p", self.origin) or 0):
            yield tuple(extents), zero, False
            return
        if extents[p] > 1:
            yield tuple(e - 1 if i == p else e for i, e in enumerate(extents)), zero, False
        narrow = tuple(1 if i == p else last if i == j else e for i, e in enumerate(extents))
        yield narrow, tuple(extents[p] - 1 if i == p else 0 for i in range(len(extents))), True

    def _stream(self, access: Access, first: tuple[int, ...] = (), narrow: bool = False) -> Stream:
        """Address and strides, in bits, of an access."""
        buffer = access.buffer
        base = access.base(self.env) + sum(c * f for c, f in zip(access.coefficients, first, strict=False))
        if buffer.param >= 0:
            place = self.places[buffer.param]
            strides = tuple(place.layout.distance(c, narrow) for c in access.coefficients)
            start = place.layout.start + place.layout.distance(base, narrow)
            return Stream(buffer.param, place.space, buffer.dtype, start, strides)
        bits = buffer.dtype.bits
        strides = tuple(c * bits for c in access.coefficients)
        room = self.memory.rooms[buffer]
        address = room.address + self.turn[buffer] % room.depth * room.nbytes
        if room.space is Space.ACC:
            return Stream(ABSOLUTE, Space.ACC, buffer.dtype, address * 8 + base * bits, strides)
        return Stream(SCRATCH, Space.SPAD, buffer.dtype, address * 8 + base * bits, strides)

    def _nest(self, nest: Nest, again: bool = False) -> None:
        """`again`: the same object comes in every iteration; without it nests are told apart by their form."""
        if nest.value[0] == "const" and nest.dst.buffer.param < 0:
            self.pending[nest.dst.buffer] = nest.value[1]
            self.unwritten[nest.dst.buffer] = [(nest, p, self._stream(nest.dst, *p[1:])) for p in self._pieces(nest)]
            return
        if self.pending:
            self._write_constants(nest.value, nest.dst.buffer)
        initial = self.pending.pop(nest.dst.buffer, None)
        now = Now(self.env, self.turn, None if again else Form.of(nest, self.env))
        for extents, first, narrow in self._pieces(nest):
            key = (id(nest) if now.form is None else now.form.key, extents, first, narrow, initial)
            if self._repeated(key, now):
                continue
            start = len(self.rows)
            dst = self._stream(nest.dst, first, narrow)
            accesses = [nest.dst, *self._instructions(nest, extents, first, narrow, dst, initial)]
            if key not in self.seen:
                alike = Alike(self.places, self.memory.rooms, first, narrow)
                self.seen[key] = alike.nest(accesses, nest, now.form)
            self.seen[key].keep(self.rows[start:], self.symbols[start:], now)

    def _instructions(
        self, nest: Nest, extents: tuple[int, ...], first: tuple[int, ...], narrow: bool, dst: Stream,
        initial: float | None,
    ) -> list[Access]:  # fmt: skip
        """Emits a piece of a nest; what it reads, in the order in which that becomes operands."""
        if nest.value[0] == "load":
            source = self._stream(nest.value[1], first, narrow)
            if Space.DRAM in (dst.space, source.space):
                self._copy(extents, dst, source)
                return [nest.value[1]]
        return self._vector(nest, extents, first, narrow, dst, initial)

    def _repeated(self, key: tuple[object, ...], now: Now) -> bool:
        """Emits what a statement became before, at the addresses of now; False where that is not known."""
        seen = self.seen.get(key)
        made = None if seen is None else seen.again(now)
        if made is None:
            return False
        rows, symbols = made
        self.rows += rows
        self.symbols += symbols
        return True

    def _write_constants(self, value: Value, own: Buffer) -> None:
        """Writes constants that are read elsewhere than where the result `own` starts from them."""
        if value[0] == "load" and value[1].buffer is not own and value[1].buffer in self.pending:
            del self.pending[value[1].buffer]
            for nest, piece, dst in self.unwritten.pop(value[1].buffer):
                self._vector(nest, *piece, dst, None)
        elif value[0] not in ("load", "const", "index", "fill"):
            for part in value[1:]:
                self._write_constants(part, own)

    def _vector(
        self,
        nest: Nest,
        extents: tuple[int, ...],
        first: tuple[int, ...],
        narrow: bool,
        dst: Stream,
        initial: float | None,
    ) -> list[Access]:
        """One instruction; the accesses that its sources may be, in order."""
        read: list[Access] = []

        def stream(access: Access) -> Stream:
            read.append(access)
            return self._stream(access, first, narrow)

        streams = Streams(stream, self.env, first)
        folded = any(n > 1 and s == 0 for n, s in zip(extents, dst.bits, strict=True))
        value: Value = nest.value
        reduction = None
        flags = 0
        if folded:
            reduction, value = streams.reduction(nest)
            if initial is not None:
                if not neutral(reduction, initial):
                    raise ProgramError(f"internal: a reduction by {reduction} starts at {initial}")
                flags |= INITIALISE
        expr = streams.expression(value, None if folded else nest.dst, initial)
        dims, dst, sources, expr = merged(extents, dst, streams.found, expr)
        mark = self.marks.get(nest.dst.buffer.name, self.marks.get("", ""))
        number = self.kernels.setdefault(VectorKernel(expr, reduction, mark), len(self.kernels))
        flags |= number << KERNEL_SHIFT
        operands = [_operand(dst, 3), *(_operand(source, 3) for source in sources)]
        self._emit(Vector.OPCODE, Engine.VECTOR, flags, dims, operands)
        return read

    def _copy(self, extents: tuple[int, ...], dst: Stream, source: Stream) -> None:
        """A DMA descriptor, or several when the copy has more than two strides."""
        loops = [(n, d, s) for n, d, s in zip(extents, dst.bits, source.bits, strict=True) if n > 1]
        unit = dst.dtype.bits
        if not loops or loops[-1][1:] != (unit, unit):
            loops.append((1, unit, unit))
        joined = [loops[-1]]
        for n, d, s in loops[-2::-1]:
            inner, di, si = joined[0]
            if (d, s) == (di * inner, si * inner):
                joined[0] = (n * inner, di, si)
            else:
                joined.insert(0, (n, d, s))
        self._descriptor(joined, dst, source, dst.address, source.address)

    def _descriptor(
        self, loops: list[tuple[int, int, int]], dst: Stream, source: Stream, at: int, source_at: int
    ) -> None:
        if len(loops) > 3:
            n, d, s = loops[0]
            for index in range(n):
                self._descriptor(loops[1:], dst, source, at + index * d, source_at + index * s)
            return
        outer = [(1, 0, 0)] * (3 - len(loops)) + loops[:-1]
        run = (loops[-1][0] * dst.dtype.bits + 7) // 8
        (n0, d0, s0), (n1, d1, s1) = outer
        operands = [
            (dst.symbol, dst.space, dst.dtype, at // 8, d0 // 8, d1 // 8, 0),
            (source.symbol, source.space, source.dtype, source_at // 8, s0 // 8, s1 // 8, 0),
        ]
        load = source.space is Space.DRAM
        if load == (dst.space is Space.DRAM):
            raise ProgramError("internal: a copy inside one memory is not a DMA transfer")
        opcode, engine = (Load.OPCODE, Engine.DMA_IN) if load else (Store.OPCODE, Engine.DMA_OUT)
        self._emit(opcode, engine, 0, (n0, n1, run), operands)

    def _gather(self, nest: GatherNest) -> None:
        rows = self._cut(nest.rows, nest.axis)
        dst, indices = self._stream(nest.dst), self._stream(nest.indices)
        table = self.places[nest.table.param]
        row = nest.width * nest.table.dtype.bits // 8
        operands = [
            (dst.symbol, dst.space, dst.dtype, dst.address // 8, dst.bits[0] // 8, 0, 0),
            (indices.symbol, indices.space, indices.dtype, indices.address // 8, indices.bits[0] // 8, 0, 0),
            (nest.table.param, table.space, nest.table.dtype, 0, row, nest.table_rows, 0),
        ]
        self._emit(Gather.OPCODE, Engine.DMA_IN, 0, (rows, 1, row), operands)

    def _matmul(self, call: MatmulCall, again: bool = False) -> None:
        m, k = self._cut(call.m, call.axes[0]), self._cut(call.k, call.axes[2])
        if call.axes[1] == "p":
            n = min(call.n, self.ragged.columns - self.origin.get("p", 0) * self.ragged.panel)
        else:
            n = self._cut(call.n, call.axes[1])
        started = self.pending.pop(call.acc.buffer, None) is not None
        fresh = started if call.fresh is None else call.fresh
        key, start, now = (id(call), m, n, k, fresh), len(self.rows), Now(self.env, self.turn)
        if again and self._repeated(key, now):
            return
        flags = (0 if fresh else ACCUMULATE) | (0 if call.panel else TRANSPOSED) | (ATTENDS if self.marks else 0)
        acc, a, w = (self._stream(access) for access in (call.acc, call.a, call.w))
        panel_stride, row_stride = (
            self._elements(call.w, stride) // 8 for stride in (call.w_panel_stride, call.w_row_stride)
        )
        operands = [
            (acc.symbol, acc.space, acc.dtype, acc.address // 8, self._elements(call.acc, call.acc_stride) // 8, 0, 0),
            (a.symbol, a.space, a.dtype, a.address // 8, self._elements(call.a, call.a_stride) // 8, 0, 0),
            (w.symbol, w.space, w.dtype, w.address // 8, panel_stride if call.panel else 0, row_stride, call.panel),
        ]
        self._emit(Matmul.OPCODE, Engine.MATRIX, flags, (m, n, k), operands)
        if again:
            alike = Alike(self.places, self.memory.rooms, (), narrow=False)
            self.seen.setdefault(key, alike.product(call)).keep(self.rows[start:], self.symbols[start:], now)

    def _elements(self, access: Access, count: int) -> int:
        """Bits of a flat element stride in a buffer."""
        if access.buffer.param >= 0:
            return self.places[access.buffer.param].layout.distance(count)
        return count * access.buffer.dtype.bits

    def _emit(
        self,
        opcode: int,
        engine: Engine,
        flags: int,
        dims: tuple[int, ...],
        operands: list[tuple[int, Space, Dtype, int, int, int, int]],
    ) -> None:
        row = [0] * word.WIDTH
        row[word.OPCODE], row[word.QUEUE], row[word.FLAGS] = opcode, int(engine), flags
        row[word.DIMS : word.DIMS + 3] = dims
        symbols = [ABSOLUTE] * word.MAX_OPERANDS
        if len(operands) > word.MAX_OPERANDS:
            raise ProgramError(f"internal: {len(operands)} operands, an instruction holds {word.MAX_OPERANDS}")
        for index, (symbol, space, dtype, address, s0, s1, s2) in enumerate(operands):
            at = word.operand_column(index)
            row[at : at + word.OPERAND_WIDTH] = word.kind(space, dtype), address, s0, s1, s2
            symbols[index] = symbol
        self.rows.append(row)
        self.symbols.append(symbols)


def _operand(stream: Stream, axes: int) -> tuple[int, Space, Dtype, int, int, int, int]:
    strides = [bits // 8 for bits in stream.bits]
    if stream.dtype in PACKED and strides:
        if stream.address % 8 or any(bits % 8 for bits in stream.bits[:-1]):
            raise ProgramError(f"internal: rows of {stream.dtype.text} that do not start at whole bytes")
        strides[-1] = stream.bits[-1] // stream.dtype.bits
    padded = [0] * (axes - len(strides)) + strides
    return (stream.symbol, stream.space, stream.dtype, stream.address // 8, padded[0], padded[1], padded[2])
