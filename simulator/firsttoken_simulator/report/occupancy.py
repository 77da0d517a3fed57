"""What the scratchpad holds over time, and which values between operators do not lie there.

A value holds its bytes from the start of the first instruction that touches it to the end of the last one; so does what
a kernel works in. One may begin while another is read to its end in bytes that both have: these count once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np

from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.instruction import REGION_COLUMNS
from firsttoken_compiler.isa.memory_plan import arena_use
from firsttoken_compiler.isa.opcodes import regions
from firsttoken_compiler.isa.program import Program, Tensor
from firsttoken_compiler.isa.types import Space
from firsttoken_simulator.report.document import ArenaRow, OccupancyPoint, SpillRow
from firsttoken_simulator.report.tables import pattern_of
from firsttoken_simulator.timeline import Timeline

MAX_POINTS: Final = 240


@dataclass(frozen=True)
class Occupancy:
    """Bytes held from each moment on: by values between operators, and by kernels that work."""

    at_fs: np.ndarray
    resident: np.ndarray
    working: np.ndarray


def occupancy(program: Program, timeline: Timeline) -> Occupancy:
    """Every change, in order; starts with nothing at 0."""
    table = regions(program.code)
    column = {name: index for index, name in enumerate(REGION_COLUMNS)}
    table = table[table[:, column["space"]] == Space.SPAD]
    number, low = table[:, column["instruction"]], table[:, column["address"]].copy()
    for axis in range(3):
        low += np.minimum(0, (table[:, column[f"c{axis}"]] - 1) * table[:, column[f"s{axis}"]])
    op = program.code[number, word.OP]
    order = np.argsort(op, kind="stable")
    op, number, low = op[order], number[order], low[order]
    spans: list[tuple[int, int, Tensor]] = []
    for tensor in program.tensors:
        if tensor.space is not Space.SPAD or tensor.lasting:
            continue
        span = slice(*np.searchsorted(op, (tensor.first, tensor.last + 1)).tolist())
        mine = number[span][(low[span] >= tensor.address) & (low[span] < tensor.address + tensor.nbytes)]
        if len(mine):
            spans.append((int(timeline.start_fs[mine].min()), int(timeline.end_fs[mine].max()), tensor))
    return _held(spans)


def _held(spans: list[tuple[int, int, Tensor]]) -> Occupancy:
    """The bytes of the tensors whose (start, end) span each change, every byte once; values come first."""
    moments = sorted({0, *(start for start, _, _ in spans), *(end for _, end, _ in spans)})
    waiting = sorted(spans, key=lambda span: -span[0])
    living: list[tuple[int, int, Tensor]] = []
    rows = []
    for moment in moments:
        living = [span for span in living if span[1] > moment]
        while waiting and waiting[-1][0] <= moment:
            span = waiting.pop()
            if span[1] > moment:
                living.append(span)
        values = _covered(tensor for _, _, tensor in living if tensor.kind == "activation")
        rows.append((moment, values, _covered(tensor for _, _, tensor in living) - values))
    at, resident, working = np.array(rows, np.int64).T
    return Occupancy(at, resident, working)


def _covered(tensors: Iterable[Tensor]) -> int:
    """Bytes that at least one of the tensors has."""
    total = reach = 0
    for start, end in sorted((tensor.address, tensor.address + tensor.nbytes) for tensor in tensors):
        total += max(0, end - max(start, reach))
        reach = max(reach, end)
    return total


def occupancy_points(found: Occupancy, total_fs: int) -> list[OccupancyPoint]:
    """At most `MAX_POINTS` equal windows, each with what it holds at its fullest."""
    count = min(MAX_POINTS, max(1, total_fs))
    edges = np.linspace(0, total_fs, count + 1)
    points = []
    total = found.resident + found.working
    for begin, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        first = max(0, int(np.searchsorted(found.at_fs, begin, side="right")) - 1)
        last = max(first + 1, int(np.searchsorted(found.at_fs, end, side="left")))
        fullest = first + int(np.argmax(total[first:last]))
        points.append(
            OccupancyPoint(
                at_ms=begin / 1e12, resident_bytes=int(found.resident[fullest]),
                working_bytes=int(found.working[fullest]),
            )
        )  # fmt: skip
    return points


def spills(program: Program) -> list[SpillRow]:
    """Values that lie in DRAM, and why; the same value of every layer counts together."""
    reasons = dict(program.meta.get("spilled", {}))
    groups: dict[tuple[str, int, str], int] = {}
    for tensor in program.of_kind("activation"):
        if tensor.space is Space.DRAM:
            key = pattern_of(program.ops[tensor.first].name), tensor.nbytes, str(reasons.get(tensor.name, ""))
            groups[key] = groups.get(key, 0) + 1
    return [
        SpillRow(value=name, count=count, bytes=nbytes, reason=reason)
        for (name, nbytes, reason), count in groups.items()
    ]


def arenas(program: Program) -> list[ArenaRow]:
    """How well values between operators share each memory that they lie in."""
    rows = []
    for space in (Space.SPAD, Space.DRAM):
        use = arena_use(program, space)
        if use.values:
            rows.append(
                ArenaRow(
                    memory=space.text, values=use.values, value_bytes=use.value_bytes, bound_bytes=use.bound_bytes,
                    peak_bytes=use.peak_bytes, ratio=use.ratio, reuse=use.reuse, fragmentation=use.fragmentation,
                )
            )  # fmt: skip
    return rows
