"""What share of the DRAM's peak a long stream reaches on each target, and what takes the rest.

    python reports/dram.py

Writes reports/dram/README.md. Streams run on the timing machine as DMA descriptors; nothing else runs beside them.
"""

from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np

from firsttoken_compiler.isa.dma import Load, Store, dram, spad
from firsttoken_compiler.isa.instruction import Instruction
from firsttoken_compiler.isa.program import Program
from firsttoken_compiler.isa.types import Dtype, Engine, queue_index
from firsttoken_compiler.target.load import load_target
from firsttoken_compiler.target.target import Target
from firsttoken_simulator.machine import simulate_program

TARGETS: Final = ("systolic-128", "snapdragon-x-elite")
BLOCK: Final = 128 << 10
"""Bytes of one descriptor."""
LENGTH: Final = 16 << 20
"""Bytes of a stream."""
APART: Final = 1 << 28
"""Where the written stream starts."""
ROWS_FREE: Final = dict.fromkeys(("trcd_ns", "trp_ns", "tras_ns", "trtp_ns", "twr_ns", "trrd_ns", "tfaw_ns"), 0.0)
MAPS: Final = ("group-interleaved", "bank-interleaved", "row-linear")
RAMULATOR: Final = {"bank-interleaved": 92.9, "row-linear": 80.7}
"""Percent of peak that Ramulator 2.1 reached on one LPDDR5-6400 x16 channel (tests/fixtures/dram_ramulator2.csv: its
`seq_interleaved` and `seq_rowlinear`); the test of the DRAM holds ours to 1 and 5 % of them."""
BOTH: Final = "no refresh, rows open in no time"
OUT: Final = Path(__file__).parent / "dram" / "README.md"


def read(address: int, nbytes: int, rows: int = 1, stride: int = 0) -> Load:
    """`rows` runs of `nbytes`, `stride` bytes apart."""
    operands = (spad(Dtype.I8, 0, 0, nbytes), dram(Dtype.I8, address, 0, stride))
    return Load(queue=queue_index(0, Engine.DMA_IN), dims=(1, rows, nbytes), operands=operands)


def write(address: int, nbytes: int, rows: int, stride: int) -> Store:
    """`rows` runs of `nbytes`, `stride` bytes apart."""
    operands = (dram(Dtype.I8, address, 0, stride), spad(Dtype.I8, 0, 0, nbytes))
    return Store(queue=queue_index(0, Engine.DMA_OUT), dims=(1, rows, nbytes), operands=operands)


def sequential() -> list[Instruction]:
    """One long stream, block after block."""
    return [read(at, BLOCK) for at in range(0, LENGTH, BLOCK)]


def strided(run: int) -> list[Instruction]:
    """Runs of `run` bytes, every seventh of the memory's."""
    rows = BLOCK // run
    return [read(7 * at, run, rows, 7 * run) for at in range(0, LENGTH, BLOCK)]


def mixed(run: int, part: int) -> list[Instruction]:
    """The long stream while a `part`-th of its bytes is written, in runs of `run` bytes that lie 5 runs apart."""
    rows = BLOCK // run
    return [*sequential(), *(write(APART + 5 * at, run, rows, 5 * run) for at in range(0, LENGTH // part, BLOCK))]


def share(target: Target, instructions: list[Instruction]) -> float:
    """Percent of the DRAM's peak, over the time until the last byte has moved."""
    code = np.stack([instruction.encode() for instruction in instructions])
    line = simulate_program(Program(code=code, kernels=(), tensors=(), ops=(), cores=1), target)
    moved = int((line.dram_read_bytes + line.dram_write_bytes).sum())
    return 100 * moved / (target.dram.peak_bytes_per_s * line.total_fs / 1e15)


def freed(target: Target) -> dict[str, Target]:
    """The target, and the target rid of one limit at a time."""
    d, dma = target.dram, target.dma
    return {
        "as it is": target,
        "no refresh": replace(target, dram=replace(d, trefi_ns=0.0)),
        "rows open in no time": replace(target, dram=replace(d, **ROWS_FREE)),
        "tCCD_L = tCCD_S": replace(target, dram=replace(d, tccd_l_ns=d.tccd_s_ns)),
        "4x the requests in flight": replace(target, dma=replace(dma, outstanding=4 * dma.outstanding)),
        "4x the bus": replace(target, dma=replace(dma, bus_bytes_per_cycle=4 * dma.bus_bytes_per_cycle)),
        "no descriptor set-up": replace(target, dma=replace(dma, setup_cycles=0)),
        BOTH: replace(target, dram=replace(d, trefi_ns=0.0, **ROWS_FREE)),
    }


def gains(name: str, limits: dict[str, list[float]]) -> str:
    """Points that each target gains when freed of `name`."""
    pairs = zip(limits[name], limits["as it is"], strict=True)
    return " and ".join(f"{without - with_limit:.1f}" for without, with_limit in pairs)


def table(title: str, rows: dict[str, list[float]], heads: tuple[str, ...] = TARGETS) -> list[str]:
    """A table of percentages."""
    lines = [f"| {title} | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"]
    return [
        *lines,
        *(f"| {name} | " + " | ".join(f"{v:.1f} %" for v in values) + " |" for name, values in rows.items()),
    ]


def page() -> str:
    """The report."""
    targets = [load_target(name) for name in TARGETS]
    variants = [freed(target) for target in targets]
    limits = {name: [share(variant[name], sequential()) for variant in variants] for name in variants[0]}
    mapped = [[replace(t, dram=replace(t.dram, map=name)) for name in MAPS] for t in targets]
    streams = {
        "one sequential stream": sequential(),
        **{f"runs of {run} B": strided(run) for run in (64, 256, 1024, 4096, 16384)},
        **{f"sequential, and 1/{part} written in runs of {run} B": mixed(run, part)
           for run, part in ((256, 16), (512, 16), (1024, 16), (4096, 16), (4096, 4))},
    }  # fmt: skip
    lines = [
        "# What a stream gets of the DRAM",
        "",
        "Percent of the data bus's peak. Redraw: `make dram`.",
        "",
        "## One long read, and what limits it",
        "",
        *table("", limits),
        "",
        f"Refresh of all banks takes 280 of 3906 ns; freed of it and of the time to open rows, a stream is at the peak but for "
        f"{100 - max(limits[BOTH]):.1f} points. A descriptor per {BLOCK >> 10} KiB costs {gains('no descriptor set-up', limits)} "
        "points: no request leaves while one is set up, and the controllers' queues bridge that only in part. Bank groups, "
        "requests in flight and the bus cost less than a point.",
        "",
    ]
    for target, maps in zip(targets, mapped, strict=True):
        rows = {name: [share(machine, stream) for machine in maps] for name, stream in streams.items()}
        lines += [f"## Address maps on {target.name}", "", *table("", rows, MAPS), ""]
    lines += [
        "Both targets take `group-interleaved`. Results that are written beside a stream of weights cost several times their "
        "share of the bytes: the bus turns twice per batch of writes, and short runs open rows for a few bursts each.",
        "",
        "Beside Ramulator 2.1, one LPDDR5-6400 x16 channel with requests fed as fast as it takes them: it reached "
        f"{RAMULATOR['bank-interleaved']} % on the bank-interleaved stream and {RAMULATOR['row-linear']} % on the row-linear one; "
        "`tests/simulator/test_dram.py` holds this model to within 1 and 5 % of that. It has not been run on mixes of reads and "
        "writes, nor on the group-interleaved map.",
        "",
    ]  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    OUT.parent.mkdir(exist_ok=True)
    text = page()
    OUT.write_text(text, encoding="utf-8")
    print(text)
