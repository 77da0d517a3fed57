"""Scratchpad and accumulator allocation of one kernel: how many slots each local buffer gets, and where they lie."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

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
from firsttoken_compiler.isa.types import Engine, Space

_STAGE_OF = {Engine.DMA_IN: 0, Engine.MATRIX: 1, Engine.VECTOR: 2, Engine.DMA_OUT: 3}
"""Position of an engine in `Loop.stages`."""


@dataclass(frozen=True, slots=True)
class Room:
    """`depth` slots of `nbytes` each from `address`, relative to the kernel's working memory."""

    space: Space
    address: int
    nbytes: int
    depth: int


@dataclass
class Memory:
    """Rooms of all local buffers, and how much they take."""

    rooms: dict[Buffer, Room] = field(default_factory=dict)
    scratch_bytes: int = 0
    acc_bytes: int = 0


def assign(body: list[Statement], spaces: list[Space], alignment: int, weights_alignment: int = 0) -> Memory:
    """Rooms in order of first allocation, every slot aligned; what products read as weights on its own boundary."""
    memory, weights = Memory(), _weights(body)
    for buffer, (stages, fixed) in _allocations(body, ()).items():
        unit = max(alignment, weights_alignment) if buffer in weights else alignment
        nbytes = -(-buffer.dtype.nbytes(buffer.elements) // unit) * unit
        depth = fixed or _depth(buffer, stages, body, spaces)
        if buffer.scope == "acc":
            memory.rooms[buffer] = Room(Space.ACC, memory.acc_bytes, nbytes, depth)
            memory.acc_bytes += nbytes * depth
        else:
            start = -(-memory.scratch_bytes // unit) * unit
            memory.rooms[buffer] = Room(Space.SPAD, start, nbytes, depth)
            memory.scratch_bytes = start + nbytes * depth
    return memory


def _weights(body: list[Statement]) -> set[Buffer]:
    """Buffers that a product reads as weights."""
    found: set[Buffer] = set()
    for statement in body:
        if isinstance(statement, MatmulCall):
            found.add(statement.w.buffer)
        elif isinstance(statement, Loop):
            found |= _weights(statement.body)
        elif isinstance(statement, Computed):
            found |= _weights([*statement.sample])
    return found


def _allocations(body: list[Statement], stages: tuple[int, ...]) -> dict[Buffer, tuple[tuple[int, ...], int]]:
    """Every local buffer: stages of the innermost pipelined loop that allocates it, and the slots that it demands."""
    found: dict[Buffer, tuple[tuple[int, ...], int]] = {}
    for statement in body:
        if isinstance(statement, Alloc):
            found.setdefault(statement.buffer, (stages, statement.slots))
        elif isinstance(statement, Loop):
            inner = statement.stages if statement.stages and statement.extent > 1 else stages
            found |= {b: s for b, s in _allocations(statement.body, inner).items() if b not in found}
    return found


def _depth(buffer: Buffer, stages: tuple[int, ...], body: list[Statement], spaces: list[Space]) -> int:
    if not stages:
        return 1
    writes = [stages[_STAGE_OF[engine]] for engine, wrote in _uses(buffer, body, spaces) if wrote]
    reads = [stages[_STAGE_OF[engine]] for engine, wrote in _uses(buffer, body, spaces) if not wrote]
    return 1 + max(0, max(reads, default=0) - min(writes, default=0))


def _uses(buffer: Buffer, body: list[Statement], spaces: list[Space]) -> Iterator[tuple[Engine, bool]]:
    """(engine, whether it writes) of every statement that touches the buffer."""
    for statement in body:
        if isinstance(statement, Loop):
            yield from _uses(buffer, statement.body, spaces)
        elif isinstance(statement, Computed):
            yield from _uses(buffer, [*statement.sample], spaces)
        elif isinstance(statement, MatmulCall):
            yield from ((Engine.MATRIX, True) for _ in (1,) if statement.acc.buffer is buffer)
            yield from ((Engine.MATRIX, False) for access in (statement.a, statement.w) if access.buffer is buffer)
        elif isinstance(statement, (Nest, GatherNest)):
            engine = engine_of(statement, spaces)
            if statement.dst.buffer is buffer and engine is not None:
                yield engine, True
            if isinstance(statement, Nest) and engine is not None:
                yield from ((engine, False) for access in loads(statement.value) if access.buffer is buffer)


def engine_of(nest: Nest | GatherNest, spaces: list[Space]) -> Engine | None:
    """The engine that runs a nest; None for a constant that the next instruction absorbs."""
    if isinstance(nest, GatherNest):
        return Engine.DMA_IN
    if nest.value[0] == "const":
        return None
    if nest.value[0] == "load":
        if _in_dram(nest.value[1], spaces):
            return Engine.DMA_IN
        if _in_dram(nest.dst, spaces):
            return Engine.DMA_OUT
    return Engine.VECTOR


def loads(value: Value) -> Iterator[Access]:
    """All accesses that a value reads."""
    if value[0] == "load":
        yield value[1]
    elif value[0] not in ("const", "index", "fill"):
        for part in value[1:]:
            yield from loads(part)


def _in_dram(access: Access, spaces: list[Space]) -> bool:
    return access.buffer.param >= 0 and spaces[access.buffer.param] is Space.DRAM
