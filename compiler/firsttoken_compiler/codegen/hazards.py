"""Which instruction must follow which: data hazards between queues, found over 64-byte granules of memory.

Program order defines the meaning. An instruction conflicts with an earlier one of another queue when both touch a
granule and at least one of them writes it. DRAM that no instruction writes cannot conflict and costs nothing here.
"""

import hashlib
from dataclasses import dataclass
from typing import Final

import numpy as np
from numba import njit

from firsttoken_compiler.codegen.footprints import (
    ADDRESS,
    AXES,
    GRANULE,
    INSTRUCTION,
    RUN,
    SPACE,
    WRITE,
    bounds,
    footprints,
)
from firsttoken_compiler.errors import ProgramError
from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.types import ENGINES_PER_CORE, Space

MAX_LOCAL_BYTES: Final = 1 << 30
"""Scratchpad or accumulator addresses above this are an error of whoever emitted them."""
MAX_WRITTEN_BYTES: Final = 1 << 34
MAX_QUEUES: Final = 4096

UNREAD: Final = range(word.OP, word.WAITS + 2 * word.MAX_WAITS)
"""Fields that no footprint depends on: operator, signal and waits."""


@dataclass(frozen=True)
class Hazards:
    """Not to be written to, since they may be another caller's too.

    `need[i, q]`: the last instruction of queue q that i must follow, -1 for none and for i's own queue.

    Conflicts with earlier ones are implied: queues run in order, and chains of conflicts order the rest.
    """

    need: np.ndarray
    """int32 `[instructions, queues]`."""
    unwritten: np.ndarray
    """int64 `[n, 3]`: (instruction, space, granule) of the first granule of a local read that nothing wrote before."""
    table: np.ndarray
    """The footprints of the code."""


_known: dict[bytes, Hazards] = {}


def hazards(code: np.ndarray, queues: int) -> Hazards:
    """All hazards of a program in encoded form; raises ProgramError for addresses or queues that cannot be.

    Those of the last code are kept, by its content without waits and signals: who inserts these and who checks them
    ask about the same instructions one after the other.
    """
    queue = np.ascontiguousarray(code[:, word.QUEUE])
    if len(queue) and (queue.min() < 0 or queue.max() >= queues or queues > MAX_QUEUES):
        raise ProgramError(
            f"queues {queue.min()} to {queue.max()} are used; the program has {queues}, the limit is {MAX_QUEUES}: "
            "check the core numbers"
        )
    digest = _digest(code, queues)
    known = _known.get(digest)
    if known is None:
        known = _hazards(code, queue, queues)
        _known.clear()
        _known[digest] = known
    return known


def footprints_of(code: np.ndarray, queues: int) -> np.ndarray:
    """The footprints of a code, not to be written to; those that its hazards were found by, where it is the last one.

    Unlike `hazards` it accepts every code whose opcodes are known.
    """
    known = _known.get(_digest(code, queues))
    return footprints(code) if known is None else known.table


def _digest(code: np.ndarray, queues: int) -> bytes:
    """What decides hazards."""
    digest = hashlib.sha256(f"{queues}".encode())
    for read in (code[:, : UNREAD.start], code[:, UNREAD.stop :]):
        digest.update(np.ascontiguousarray(read).data)
    return digest.digest()


def _hazards(code: np.ndarray, queue: np.ndarray, queues: int) -> Hazards:
    everything = footprints(code)
    everything.setflags(write=False)
    spans = _written_spans(everything)
    table = _drop_read_only(everything, spans)
    rows, sizes = _placed(table, queue, spans)
    need = np.full((len(code), queues), -1, np.int32)
    unwritten = np.full(len(rows), -1, np.int64)
    stop, writer, reader = np.zeros(sizes[0], np.int32), np.empty(sizes[0], np.int32), np.empty(sizes[1], np.int32)
    _scan(rows, queue, *spans, sizes[0] - int((spans[1] - spans[0]).sum()), stop, writer, reader, need, unwritten)
    found = np.flatnonzero(unwritten >= 0)
    return Hazards(need, np.column_stack([table[found][:, [INSTRUCTION, SPACE]], unwritten[found]]), everything)


def conflict(code: np.ndarray, earlier: int, later: int) -> str:
    """Where two instructions conflict, for messages: `RAW on spad 0x40`."""
    sides = []
    for number in (earlier, later):
        table = footprints(code[number : number + 1])
        sides.append([(int(row[SPACE]), bool(row[WRITE]), _granules(row)) for row in table])
    for space, wrote, first in sides[0]:
        for other, writes, second in sides[1]:
            shared = np.intersect1d(first, second)
            if space == other and (wrote or writes) and len(shared):
                kind = ("RAW" if not writes else "WAW") if wrote else "WAR"
                return f"{kind} on {Space(space).text} {int(shared[0]) * GRANULE:#x}"
    return "conflict"


def _granules(row: np.ndarray) -> np.ndarray:
    starts = row[ADDRESS : ADDRESS + 1]
    for count, stride in AXES:
        starts = (starts[:, None] + np.arange(row[count]) * row[stride]).ravel()
    first, last = starts // GRANULE, (starts + row[RUN] - 1) // GRANULE
    return np.unique(np.concatenate([np.arange(a, b + 1) for a, b in zip(first.tolist(), last.tolist(), strict=True)]))


def _written_spans(table: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Disjoint sorted granule intervals of DRAM that hold every write, and where each begins in the compact index."""
    writes = table[(table[:, SPACE] == Space.DRAM) & (table[:, WRITE] == 1)]
    low, high = bounds(writes)
    low, high = low // GRANULE, -(-high // GRANULE)
    order = np.argsort(low, kind="stable")
    low, high = low[order], np.maximum.accumulate(high[order]) if len(low) else high
    begins = np.ones(len(low), bool)
    begins[1:] = low[1:] > high[:-1]
    ends = np.append(begins[1:], True) if len(low) else begins
    starts, stops = low[begins], high[ends]
    total = int((stops - starts).sum())
    if total * GRANULE > MAX_WRITTEN_BYTES or (len(starts) and starts[0] < 0):
        raise ProgramError(
            f"stores span {total * GRANULE} bytes of DRAM from byte {starts[0] * GRANULE}; "
            f"the limit is {MAX_WRITTEN_BYTES} bytes from byte 0: check the store addresses"
        )
    return starts, stops, np.cumsum(stops - starts) - (stops - starts)


def _drop_read_only(table: np.ndarray, spans: tuple[np.ndarray, np.ndarray, np.ndarray]) -> np.ndarray:
    starts, stops, _ = spans
    low, high = bounds(table)
    at = np.searchsorted(stops, low // GRANULE, side="right")
    padded = np.append(starts, np.iinfo(np.int64).max)
    return table[(table[:, SPACE] != Space.DRAM) | (padded[at] < -(-high // GRANULE))]


def _placed(
    table: np.ndarray, queue: np.ndarray, spans: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> tuple[np.ndarray, tuple[int, int]]:
    """Rows for the scan: where a footprint's granules lie in the writer and reader arrays, and the sizes of those.

    The writer array holds, core by core, scratchpad then accumulator granules, and after them the compact DRAM index.
    Each local granule has one reader slot per engine, each DRAM granule one per queue that reads DRAM at all.
    """
    owner = queue[table[:, INSTRUCTION]]
    low, high = bounds(table)
    local, accumulator = table[:, SPACE] != Space.DRAM, table[:, SPACE] == Space.ACC
    if local.any() and (low[local].min() < 0 or high[local].max() > MAX_LOCAL_BYTES):
        raise ProgramError(
            f"scratchpad addresses reach from {low[local].min()} to {high[local].max()}; "
            f"the limit is {MAX_LOCAL_BYTES}: check the operand addresses"
        )
    spad = int(-(-high[local & ~accumulator].max(initial=0) // GRANULE))
    per_core = spad + int(-(-high[accumulator].max(initial=0) // GRANULE))
    cores = int(owner.max(initial=0)) // ENGINES_PER_CORE + 1
    fabric, position = np.unique(owner[~local], return_inverse=True)
    slot, width = owner % ENGINES_PER_CORE, np.full(len(table), ENGINES_PER_CORE)
    slot[~local], width[~local] = position, len(fabric)
    base = np.where(local, owner // ENGINES_PER_CORE * per_core + np.where(accumulator, spad, 0), cores * per_core)
    reader_base = np.where(local, base * ENGINES_PER_CORE, cores * per_core * ENGINES_PER_CORE)
    dram = int((spans[1] - spans[0]).sum())
    sizes = cores * per_core + dram, cores * per_core * ENGINES_PER_CORE + dram * len(fabric)
    rows = np.column_stack([np.delete(table, SPACE, axis=1), ~local, base, reader_base, width, slot])
    return np.ascontiguousarray(rows), sizes


@njit(cache=True)
def _scan(
    rows: np.ndarray, queue: np.ndarray, starts: np.ndarray, stops: np.ndarray, offsets: np.ndarray, local: int,
    stop: np.ndarray, writer: np.ndarray, reader: np.ndarray, need: np.ndarray, unwritten: np.ndarray,
) -> None:  # fmt: skip
    """Walks all runs in program order and fills `need` and `unwritten`.

    Granules of one history lie in one piece: `stop[p]` is where the piece that begins at position p ends, 0 where none
    begins; `writer` and `reader` count at the beginnings of pieces only. An access cuts pieces at its ends, and what is
    written together becomes one piece, because whatever happened before a write matters no longer.
    """
    words = len(stop) // 64 + 1
    bits, summary = np.zeros(words, np.uint64), np.zeros(words // 64 + 1, np.uint64)
    for begin, end, first, last in (
        (0, local, 0, local * ENGINES_PER_CORE), (local, len(stop), local * ENGINES_PER_CORE, len(reader)),
    ):  # fmt: skip
        if begin < end:
            stop[begin], writer[begin] = end, -1
            reader[first : first + (last - first) // (end - begin)] = -1
            _begin(bits, summary, begin)
    for r in range(rows.shape[0]):
        i, write, address, c0, s0, c1, s1, c2, s2, run, dram, base, reader_base, width, slot = rows[r]
        for a in range(c0):
            for b in range(c1):
                for c in range(c2):
                    at = address + a * s0 + b * s1 + c * s2
                    low, high = at // GRANULE, (at + run - 1) // GRANULE + 1
                    if dram == 0:
                        miss = _touch(
                            i, write, base + low, base + high, reader_base - base * width, width, slot, queue, bits,
                            summary, stop, writer, reader, need,
                        )  # fmt: skip
                        if miss >= 0 and unwritten[r] < 0:
                            unwritten[r] = miss - base
                        continue
                    t = np.searchsorted(stops, low, side="right")
                    while t < starts.shape[0] and starts[t] < high:
                        shift = offsets[t] - starts[t] + base
                        first, last = max(low, starts[t]) + shift, min(high, stops[t]) + shift
                        _touch(
                            i, write, first, last, reader_base - base * width, width, slot, queue, bits, summary, stop,
                            writer, reader, need,
                        )  # fmt: skip
                        t += 1


@njit(cache=True)
def _touch(
    i: int, write: int, low: int, high: int, readers: int, width: int, slot: int, queue: np.ndarray, bits: np.ndarray,
    summary: np.ndarray, stop: np.ndarray, writer: np.ndarray, reader: np.ndarray, need: np.ndarray,
) -> int:  # fmt: skip
    """Positions `[low, high)`: records their hazards and this access; the first one never written before, or -1.

    The readers of position p begin at `readers + p * width`.
    """
    own, missing = queue[i], -1
    if stop[low] == 0:
        _cut(_piece_of(bits, summary, low), low, readers, width, bits, summary, stop, writer, reader)
    at = low
    while at < high:
        end = stop[at]
        if end > high:
            _cut(at, high, readers, width, bits, summary, stop, writer, reader)
            end = high
        last = writer[at]
        if last >= 0 and queue[last] != own and need[i, queue[last]] < last:
            need[i, queue[last]] = last
        if last < 0 and missing < 0:
            missing = at
        first = readers + at * width
        if write == 0:
            reader[first + slot] = i
        else:
            for other in range(first, first + width):
                user = reader[other]
                if user > last and queue[user] != own and need[i, queue[user]] < user:
                    need[i, queue[user]] = user
            if at > low:
                stop[at] = 0
                word = at >> 6
                bits[word] &= ~(np.uint64(1) << np.uint64(at & 63))
                if bits[word] == 0:
                    summary[word >> 6] &= ~(np.uint64(1) << np.uint64(word & 63))
        at = end
    if write != 0:
        stop[low], writer[low] = high, i
        return -1
    return missing


@njit(cache=True)
def _cut(
    piece: int, at: int, readers: int, width: int, bits: np.ndarray, summary: np.ndarray, stop: np.ndarray,
    writer: np.ndarray, reader: np.ndarray,
) -> None:  # fmt: skip
    """Cuts the piece that begins at `piece` in two, the second of which begins at `at`."""
    stop[at], stop[piece], writer[at] = stop[piece], at, writer[piece]
    for slot in range(width):
        reader[readers + at * width + slot] = reader[readers + piece * width + slot]
    _begin(bits, summary, at)


@njit(cache=True)
def _begin(bits: np.ndarray, summary: np.ndarray, at: int) -> None:
    """Notes that a piece begins at a position: a bit of it, and one of its word of 64 bits."""
    word = at >> 6
    bits[word] |= np.uint64(1) << np.uint64(at & 63)
    summary[word >> 6] |= np.uint64(1) << np.uint64(word & 63)


@njit(cache=True)
def _piece_of(bits: np.ndarray, summary: np.ndarray, at: int) -> int:
    """The beginning of the piece in which a position lies: the last bit up to it."""
    word = at >> 6
    found = bits[word] & (~np.uint64(0) >> np.uint64(63 - (at & 63)))
    if found != 0:
        return word * 64 + _top(found)
    word -= 1
    group = word >> 6
    found = summary[group] & (~np.uint64(0) >> np.uint64(63 - (word & 63)))
    while found == 0:
        group -= 1
        found = summary[group]
    word = group * 64 + _top(found)
    return word * 64 + _top(bits[word])


@njit(cache=True)
def _top(found: np.uint64) -> int:
    """The number of the highest bit that is set."""
    top = 0
    for step in (32, 16, 8, 4, 2, 1):
        if found >> np.uint64(step) != 0:
            found >>= np.uint64(step)
            top += step
    return top
