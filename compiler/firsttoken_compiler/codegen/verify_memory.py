"""What the verifier demands of the memory plan, by bytes: who may lie where, who may touch what, and when.

Two tensors may overlap only when they do not live at the same time. That their declared lives are true follows from
the instructions: each access lies in one tensor that lives at its operator, and each read of an activation, or of what
a kernel works in, follows a write since that tensor's life began.
"""

from __future__ import annotations

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
)
from firsttoken_compiler.codegen.hazards import MAX_WRITTEN_BYTES, footprints_of
from firsttoken_compiler.codegen.verify_host import Findings
from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.instruction import columns
from firsttoken_compiler.isa.matmul import Matmul
from firsttoken_compiler.isa.program import MATRIX_FORMS, Program, Tensor
from firsttoken_compiler.isa.types import ENGINES_PER_CORE, Space
from firsttoken_compiler.target.target import Target

WRITABLE: Final = ("output", "kv", "activation", "scratch")
TEMPORARY: Final = ("activation", "scratch")
"""Kinds that may share their bytes with others of other times."""
_FAR: Final = 1 << 38
"""Beyond every address."""


def limits(program: Program, target: Target) -> dict[Space, int]:
    """Bytes of each memory."""
    local = target.scratchpad
    return {Space.DRAM: program.dram_bytes, Space.SPAD: local.bytes, Space.ACC: local.accumulator_bytes}


def check_tensors(found: Findings, target: Target) -> None:
    """Tensors within their memory, on their boundaries, with their constants; overlaps only of different times."""
    program = found.program
    sizes = limits(program, target)
    for tensor in program.tensors:
        name, limit, end = f"{tensor.kind} tensor {tensor.name!r}", sizes[tensor.space], tensor.address + tensor.nbytes
        tiled = tensor.packing is not None and tensor.packing.form in MATRIX_FORMS
        unit = target.alignment(tensor.space, matrix_weights=tiled)
        if tensor.address % unit:
            found.note(f"{name} starts at {tensor.address:#x}, the alignment is {unit} bytes")
        if tensor.address < 0 or tensor.nbytes < 0 or end > limit:
            found.note(f"{name} takes bytes {tensor.address} to {end} of {tensor.space.text}, which has {limit}")
        constant = program.constants.get(tensor.name)
        if tensor.kind == "constant" and (constant is None or constant.nbytes != tensor.nbytes):
            found.note(f"{name} of {tensor.nbytes} bytes has no constant of that size in the program")
        if not tensor.lasting and (
            tensor.kind not in TEMPORARY or not 0 <= tensor.first <= tensor.last < len(program.ops)
        ):
            found.note(
                f"{name} lives from operator {tensor.first} to {tensor.last} of {len(program.ops)}; only "
                f"{' and '.join(TEMPORARY)} may live for a part of the program"
            )
    for space in Space:
        _check_overlaps(found, [tensor for tensor in program.tensors if tensor.space is space])


def _check_overlaps(found: Findings, tensors: list[Tensor]) -> None:
    placed = sorted((t for t in tensors if t.nbytes > 0), key=lambda t: (t.address, t.nbytes, t.name))
    start, end, first, last = _numbers(placed).T
    for index, tensor in enumerate(placed):
        stop = int(np.searchsorted(start, end[index]))
        later = slice(index + 1, stop)
        meets = (first[later] <= last[index]) & (last[later] >= first[index])
        for other in (np.flatnonzero(meets) + index + 1).tolist():
            both = max(int(first[index]), int(first[other]))
            when = "" if tensor.lasting and placed[other].lasting else f" while both live, at operator {both}"
            found.note(
                f"tensors {tensor.name!r} and {placed[other].name!r} overlap in {tensor.space.text} "
                f"from {placed[other].address:#x}{when}"
            )


def _numbers(tensors: list[Tensor]) -> np.ndarray:
    """int64 `[tensors, 4]`: start, end, first and last operator."""
    rows = [(t.address, t.address + t.nbytes, *((0, _FAR) if t.lasting else (t.first, t.last))) for t in tensors]
    return np.array(rows, np.int64).reshape(-1, 4)


@dataclass(frozen=True)
class _Homes:
    """Every access, and the tensor that it lies in."""

    table: np.ndarray
    """Footprints."""
    low: np.ndarray
    high: np.ndarray
    home: np.ndarray
    """Index into `tensors`, -1 for none."""
    tensors: tuple[Tensor, ...]


def check_homes(found: Findings, target: Target) -> None:
    """Accesses within memories; each of DRAM in one living tensor, of the scratchpad too where tensors lie in it.

    Writes go to what may be written; reads of what lives for a time follow a write of that time; weights that the
    matrix unit reads begin on its own boundary.
    """
    program = found.program
    table = footprints_of(program.code, program.cores * ENGINES_PER_CORE)
    number, (low, high) = table[:, INSTRUCTION], bounds(table)
    for space, limit in limits(program, target).items():
        bad = np.flatnonzero((table[:, SPACE] == space) & ((low < 0) | (high > limit)))
        found.at(number[bad], "touches {} bytes {} to {}, limit {}", space.text, low[bad], high[bad], limit)
    homes = _Homes(table, low, high, np.full(len(table), -1), program.tensors)
    for space in (Space.DRAM, Space.SPAD):
        _find(found, homes, space)
    spoiled = np.flatnonzero((homes.home >= 0) & (table[:, WRITE] == 1))
    kinds = np.array([t.kind for t in program.tensors] + ["none"])
    names = np.array([t.name for t in program.tensors] + [""], dtype=object)
    spoiled = spoiled[~np.isin(kinds, WRITABLE)[homes.home[spoiled]]]
    owner = homes.home[spoiled]
    found.at(number[spoiled], "writes {} tensor {!r}; only {} may be", kinds[owner], names[owner], "/".join(WRITABLE))
    _check_fresh(found, homes)
    _check_tiles(found, target, homes)


def _find(found: Findings, homes: _Homes, space: Space) -> None:
    """Fills `home` for one memory, and reports what lies in no tensor."""
    mine = np.array([i for i, t in enumerate(homes.tensors) if t.space is space and t.nbytes > 0], np.int64)
    rows = np.flatnonzero(homes.table[:, SPACE] == space)
    if space is Space.SPAD and not len(mine):
        return
    low, high = homes.low[rows], homes.high[rows]
    numbers = _numbers([homes.tensors[i] for i in mine.tolist()])
    op = found.program.code[homes.table[rows, INSTRUCTION], word.OP]
    home = np.full(len(rows), -1)
    by_life = np.lexsort((numbers[:, 0], numbers[:, 2]))
    _sweep(np.argsort(op, kind="stable"), op, low, high, numbers, by_life, home)
    homes.home[rows] = np.append(mine, -1)[home]
    lost = rows[home < 0]
    found.at(
        homes.table[lost, INSTRUCTION], "touches {} bytes {} to {}, not in one tensor that lives at its operator",
        space.text, homes.low[lost], homes.high[lost],
    )  # fmt: skip


@njit(cache=True)
def _sweep(
    order: np.ndarray, op: np.ndarray, low: np.ndarray, high: np.ndarray, numbers: np.ndarray, by_life: np.ndarray,
    home: np.ndarray,
) -> None:  # fmt: skip
    """Goes through the operators with the living tensors in order of address; `home` gets the one around each access.

    `numbers` as `_numbers` makes them; `by_life` are its rows in the order in which lives begin.
    """
    living = np.empty(len(numbers), np.int64)
    count, born, now = 0, 0, -1
    for r in order:
        if op[r] != now:
            now = op[r]
            kept = 0
            for i in range(count):
                if numbers[living[i], 3] >= now:
                    living[kept] = living[i]
                    kept += 1
            count = kept
            while born < len(by_life) and numbers[by_life[born], 2] <= now:
                tensor = by_life[born]
                born += 1
                if numbers[tensor, 3] < now:
                    continue
                at = count
                while at > 0 and numbers[living[at - 1], 0] > numbers[tensor, 0]:
                    living[at] = living[at - 1]
                    at -= 1
                living[at] = tensor
                count += 1
        first, last = 0, count
        while first < last:
            middle = (first + last) // 2
            if numbers[living[middle], 0] <= low[r]:
                first = middle + 1
            else:
                last = middle
        if first > 0 and high[r] <= numbers[living[first - 1], 1]:
            home[r] = living[first - 1]


def _check_fresh(found: Findings, homes: _Homes) -> None:
    """Reads of temporary tensors follow a write of their time."""
    temporary = np.array([not tensor.lasting for tensor in homes.tensors] + [False])
    rows = np.flatnonzero(temporary[homes.home])
    if not len(rows):
        return
    numbers = _numbers(list(homes.tensors))
    spaces = np.array([int(tensor.space) for tensor in homes.tensors])
    base, total, local = np.zeros(len(homes.tensors), np.int64), 0, 0
    for space in (Space.DRAM, Space.SPAD):
        local = -total
        mine = np.flatnonzero((spaces == space) & temporary[:-1])
        if len(mine):
            start = int(numbers[mine, 0].min()) // GRANULE
            base[mine] = total - start
            total += -(-int(numbers[mine, 1].max()) // GRANULE) - start
    local += total  # granules of a scratchpad: each core has its own
    if total * GRANULE > MAX_WRITTEN_BYTES:
        found.note(f"tensors that live for a time span {total * GRANULE} bytes, the limit is {MAX_WRITTEN_BYTES}")
        return
    # Granules of which a part may be another tensor's tell nothing; on boundaries of GRANULE there are none.
    whole = np.column_stack([-(-numbers[:, 0] // GRANULE), -(-numbers[:, 1] // GRANULE)])
    shared = (numbers[:, 0] % GRANULE != 0).any()
    if shared:
        whole[:, 1] = numbers[:, 1] // GRANULE
    core = found.program.code[homes.table[rows, INSTRUCTION], word.QUEUE] // ENGINES_PER_CORE
    shift = np.where(homes.table[rows, SPACE] == Space.SPAD, core * local, 0)
    owner = np.zeros(total + int(shift.max()), np.int32)  # of each granule: 1 + the tensor that was written there last
    stale = np.full(len(rows), -1, np.int64)
    _scan(np.ascontiguousarray(homes.table[rows]), homes.home[rows], whole, base, owner, stale, shift)
    bad = np.flatnonzero(stale >= 0)
    names = np.array([tensor.name for tensor in homes.tensors], dtype=object)[homes.home[rows[bad]]]
    found.at(
        homes.table[rows[bad], INSTRUCTION], "reads {!r} at byte {} of {}, which nothing wrote since its life began",
        names, stale[bad] * GRANULE, np.array(["", *(s.text for s in Space)])[homes.table[rows[bad], SPACE]],
    )  # fmt: skip


@njit(cache=True)
def _scan(
    table: np.ndarray, home: np.ndarray, whole: np.ndarray, base: np.ndarray, owner: np.ndarray, stale: np.ndarray,
    shift: np.ndarray,
) -> None:  # fmt: skip
    """Walks the granules of all accesses in program order; `stale` gets the first granule of a read without a write."""
    for r in range(table.shape[0]):
        row, tensor = table[r], home[r]
        write, run = row[WRITE], row[RUN]
        for a in range(row[AXES[0][0]]):
            for b in range(row[AXES[1][0]]):
                for c in range(row[AXES[2][0]]):
                    at = row[ADDRESS] + a * row[AXES[0][1]] + b * row[AXES[1][1]] + c * row[AXES[2][1]]
                    first = max(at // GRANULE, whole[tensor, 0])
                    last = min((at + run - 1) // GRANULE + 1, whole[tensor, 1])
                    for granule in range(first, last):
                        index = granule + base[tensor] + shift[r]
                        if write == 1:
                            owner[index] = tensor + 1
                        elif owner[index] != tensor + 1 and stale[r] < 0:
                            stale[r] = granule


def _check_tiles(found: Findings, target: Target, homes: _Homes) -> None:
    """What each operator's products read as weights begins on the matrix unit's boundary."""
    unit = target.matrix.tile_bytes
    rows = np.flatnonzero(found.program.code[:, word.OPCODE] == Matmul.OPCODE)
    if not unit or not len(rows):
        return
    op, address = found.program.code[rows, word.OP], columns(found.program.code, 2)[1][rows]
    scratch = [t for t in homes.tensors if t.kind == "scratch" and t.space is Space.SPAD and not t.lasting]
    start, end, first, last = _numbers(scratch).T
    for index in range(len(scratch)):
        mine = np.flatnonzero((op >= first[index]) & (op <= last[index]))
        mine = mine[(address[mine] >= start[index]) & (address[mine] < end[index])]
        if len(mine):
            lowest = mine[[int(np.argmin(address[mine]))]]
            if address[lowest[0]] % unit:
                message = "weights in the scratchpad begin at {:#x}, the matrix unit's tiles on {} bytes"
                found.at(rows[lowest], message, address[lowest], unit)
