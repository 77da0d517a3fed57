"""What each core of a target did in a run, where a program uses several."""

from __future__ import annotations

import numpy as np

from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.program import Program
from firsttoken_compiler.isa.types import ENGINES_PER_CORE, Engine
from firsttoken_simulator.report.document import CoreRow
from firsttoken_simulator.timeline import Timeline


def core_rows(program: Program, timeline: Timeline) -> list[CoreRow]:
    """A row per core in use; none for a program of one core. Sums over the rows are those of the run."""
    if program.cores == 1:
        return []
    core, engine = np.divmod(program.code[:, word.QUEUE], ENGINES_PER_CORE)
    span, total = timeline.end_fs - timeline.start_fs, max(1, timeline.total_fs)
    rows = []
    for index in range(program.cores):
        mine = core == index

        def share(unit: Engine, own: np.ndarray = mine) -> float:
            return 100 * int(span[own & (engine == unit)].sum()) / total

        rows.append(
            CoreRow(
                core=index, instructions=int(mine.sum()), macs=int(timeline.macs[mine].sum()),
                matrix_pct=share(Engine.MATRIX), vector_pct=share(Engine.VECTOR),
                dram_read_bytes=int(timeline.dram_read_bytes[mine].sum()),
                dram_write_bytes=int(timeline.dram_write_bytes[mine].sum()),
            )
        )  # fmt: skip
    return rows


def core_lines(rows: list[CoreRow]) -> list[str]:
    """A line per core for people."""
    return [
        f"core {row.core}: matrix unit {row.matrix_pct:.0f} % of the time, vector unit {row.vector_pct:.0f} %, "
        f"{row.macs:,} MACs, {(row.dram_read_bytes + row.dram_write_bytes) / 1e6:,.1f} MB of DRAM traffic"
        for row in rows
    ]
