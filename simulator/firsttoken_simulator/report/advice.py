"""Advice on the costliest operators, and the ladder from the ideal to the actual time."""

from typing import Final

import numpy as np

from firsttoken_compiler.isa.program import Program
from firsttoken_compiler.target.target import Target
from firsttoken_simulator.report.critical import CAUSES
from firsttoken_simulator.report.document import Rung
from firsttoken_simulator.report.steps import BY_NAME, OF_OPERATORS
from firsttoken_simulator.report.tables import OpTable, bound_word, pattern_of
from firsttoken_simulator.timeline import Timeline

WORST: Final = 3


def advise(program: Program, table: OpTable, target: Target, timeline: Timeline, steps: np.ndarray) -> list[str]:
    """One line for each of the three costliest operators; the same operator of all layers counts together.

    `steps` are those of the ladder, `[ops, OF_OPERATORS]`.
    """
    groups: dict[str, list[int]] = {}
    for i, op in enumerate(program.ops):
        groups.setdefault(pattern_of(op.name), []).append(i)
    time = {name: int(table.attributed_fs[members].sum()) for name, members in groups.items()}
    worst = sorted(time, key=lambda name: (-time[name], name))[:WORST]
    return [_line(program, name, groups[name], table, target, timeline, steps) for name in worst if time[name]]


def _line(
    program: Program, name: str, members: list[int], table: OpTable, target: Target, timeline: Timeline,
    steps: np.ndarray,
) -> str:  # fmt: skip
    by_cause = table.time_fs[members].sum(axis=0)
    bound = bound_word(by_cause)
    fs = int(by_cause.sum())
    moved = int((table.dram_read_bytes + table.dram_write_bytes)[members].sum())
    ideal = int(table.ideal_matrix_fs[members].sum())
    busy = int(table.matrix_busy_fs[members].sum())
    share = 100 * int(by_cause[CAUSES.index(bound)]) / fs
    hint = {
        "dma": _dma_hint(program.ops[members[0]].w_bits, moved, fs, target, steps[members].sum(axis=0)),
        "matrix": f"matrix unit at {100 * ideal * program.cores / max(busy, 1):.0f} % of its peak while it works; "
        + ("fewer multiplies or a faster type pair" if ideal * program.cores > busy // 2 else "fill larger tiles"),
        "vector": "bound by the vector unit: fuse it into its neighbour, or widen the lanes",
        "spad_conflict": "bound by bank conflicts: change strides or add banks",
        "host": "runs on the host: replace the operator by a supported one",
    }[bound]
    count = f" ({len(members)}x)" if len(members) > 1 else ""
    total = 100 * fs / timeline.total_fs
    return f"{name}{count}: {fs / 1e12:.3f} ms, {total:.1f} % of the NPU's time, {share:.0f} % of it {bound}; {hint}"


_REMEDIES: Final = {
    "dma_bus": "widen the bus", "dma_outstanding": "raise dma.outstanding", "dma_latency": "prefetch earlier",
    "dma_setup": "move longer runs", "dma_refresh": "refresh bank by bank", "dma_rows": "move longer runs",
}  # fmt: skip
"""Against what a stream lacks of the peak."""


def _dma_hint(w_bits: int, moved: int, fs: int, target: Target, steps: np.ndarray) -> str:
    rate = moved / (fs * 1e-15)
    used = f"{moved / 1e6:.1f} MB at {rate / 1e9:.1f} GB/s ({100 * rate / target.dram.peak_bytes_per_s:.0f} % of peak)"
    if rate < 0.5 * target.dram.peak_bytes_per_s:
        lacking = max(_REMEDIES, key=lambda name: int(steps[OF_OPERATORS.index(name)]))
        return f"{used}: waits for memory without filling it ({BY_NAME[lacking].title}); {_REMEDIES[lacking]}"
    if w_bits > 4:
        return f"{used}: narrower weights move fewer bytes (now {w_bits} bit)"
    return f"{used}: fewer weights, more tokens per pass, or more bandwidth"


def ladder(
    table: OpTable, timeline: Timeline, target: Target, host_fs: int, cores: int, whole: str
) -> list[Rung]:
    """Lower bounds of the time, each engine alone, then the actual time with its parts; `whole` names the last."""
    moved = int((table.dram_read_bytes + table.dram_write_bytes).sum())
    ideal = int(table.ideal_matrix_fs.sum())
    dram = moved / target.dram.peak_bytes_per_s * 1e15
    matrix = int(table.matrix_busy_fs.sum()) / cores
    rungs = (
        ("MACs at peak", ideal, "every multiply at the unit's rate for its types"),
        ("matrix unit busy", max(matrix, ideal), "with fill, drain, padding of tiles, and issue"),
        ("DRAM at peak", dram, "every byte at the bandwidth of the data bus"),
        ("vector unit busy", int(table.vector_fs.sum()) / cores, "all vector instructions back to back"),
        ("roofline", max(ideal, dram), "the longer of MACs and DRAM, perfectly overlapped"),
        ("NPU", timeline.total_fs, "with dependences, latency, conflicts and refresh"),
        (whole, timeline.total_fs + host_fs, "with the host's dispatch"),
    )
    return [Rung(name=name, ms=float(np.float64(fs) / 1e12), note=note) for name, fs, note in rungs]
