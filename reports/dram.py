"""What share of the DRAM's peak a long stream reaches on each target, and what takes the rest.

    python reports/dram.py

Writes reports/dram/README.md. Streams run on the timing machine as DMA descriptors; nothing else runs beside them. The
last part runs the streams of the two reference simulators on one channel (tests/dram_oracles.py).
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np

from firsttoken_compiler.isa.dma import Load, Store, dram, spad
from firsttoken_compiler.isa.instruction import Instruction
from firsttoken_compiler.isa.program import Program
from firsttoken_compiler.isa.types import Dtype, Engine, queue_index
from firsttoken_compiler.target.dram_presets import dram_device
from firsttoken_compiler.target.load import load_target
from firsttoken_compiler.target.target import Target
from firsttoken_simulator.machine import simulate_program

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from dram_oracles import RAMULATOR, Row, all_rows, ramulator_run

TARGETS: Final = ("systolic-128", "snapdragon-x-elite")
BLOCK: Final = 128 << 10
"""Bytes of one descriptor."""
LENGTH: Final = 16 << 20
"""Bytes of a stream."""
APART: Final = 1 << 28
"""Where the written stream starts."""
ROWS_FREE: Final = dict.fromkeys(("trcd_ns", "trp_ns", "tras_ns", "trtp_ns", "twr_ns", "trrd_ns", "tfaw_ns"), 0.0)
MAPS: Final = ("group-interleaved", "bank-interleaved", "row-linear")
BOTH: Final = "no refresh, rows open in no time"
LIKE: Final = "lpddr5x-8533-16gb-x16"
"""Where a target with a controller of commands takes what its file does not state."""
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
    ]  # fmt: skip
    lines += [*controllers(targets), *oracles()]
    return "\n".join(lines)


def with_commands(target: Target) -> Target:
    """The target with a controller that places every command, on its own timings."""
    dram = target.dram
    clock_ns = dram.burst_length * 1e3 / dram.data_rate_mtps / 2
    _, commands = dram_device(LIKE)
    return replace(
        target,
        dram_commands=replace(
            commands, clock_ns=clock_ns, trc_ns=dram.tras_ns + dram.trp_ns, trcd_wr_ns=dram.trcd_ns,
            tccd_l_wr_ns=dram.tccd_l_ns, trrd_l_ns=dram.trrd_ns,
        ),
    )  # fmt: skip


def controllers(targets: list[Target]) -> list[str]:
    """The two kinds of controller on the same timings."""
    streams = {
        "one sequential stream": sequential(),
        **{f"runs of {run} B": strided(run) for run in (64, 1024)},
        **{f"sequential, and 1/{part} written in runs of {run} B": mixed(run, part)
           for run, part in ((256, 16), (4096, 4))},
    }  # fmt: skip
    heads, columns = [], []
    for target in targets:
        heads += [f"{target.name}, looks ahead", f"{target.name}, places commands"]
        columns += [target, with_commands(target)]
    rows = {name: [share(machine, stream) for machine in columns] for name, stream in streams.items()}
    return [
        "## Two kinds of controller",
        "",
        "The presets' controllers look ahead over their queue and place bursts in the order of arrival within a bank; a target "
        "that names a DRAM (`[dram] preset = ...`) has controllers that place every command, first-ready "
        "first-come-first-served, row hits first. On the same timings, percent of the peak:",
        "",
        *table("", rows, tuple(heads)),
        "",
        "Reads alone get the same. Writes beside them cost less: a writer that keeps the write queue full is drained at one go, so "
        "the bus turns less often than once per batch of half a queue, and rows are not closed while older requests want them.",
        "",
    ]


def oracles() -> list[str]:
    """This project's figure beside every row of the two reference simulators, and latencies that they were not asked for."""
    rows = all_rows()
    worst = {unit: max((abs(row.error), row) for row in rows if row.quantity == unit)[1] for unit in ("GB/s", "ns")}
    lines = [
        "## Beside Ramulator 2.1 and DRAMsim3",
        "",
        "One channel, one stream of reads, the same device by name, the same controller settings. Ramulator: one queue, oldest "
        "ready request first, open rows, all banks refreshed at once; the stream is fed as fast as it is taken. DRAMsim3: its "
        "shipped files; eight requests a bank behind a queue of 32, banks in turn, 100,000 clocks, a read offered every clock "
        "or every 200. No value is fitted: devices are JEDEC's timings, settings are those of the two programs.",
        "",
        f"Largest error of a bandwidth {_percent(worst['GB/s'])} ({worst['GB/s'].config}, {worst['GB/s'].pattern}), of a latency "
        f"{_percent(worst['ns'])} ({worst['ns'].config}, {worst['ns'].pattern}). `tests/simulator/test_dram_oracles.py` holds all "
        "rows to 3 and 5 %.",
        "",
        "| oracle | device | stream | quantity | oracle | here | error | |",
        "|---|---|---|---|---|---|---|---|",
        *(_line(row) for row in rows),
        "",
        "Unloaded latencies of hits are mostly refresh: a read every 200 clocks meets refreshes at fixed phases, so that four "
        "clocks of tREFI (9364 for 9360 on DDR4-2400) change the mean by 2 %.",
        "",
        "The two disagree with one another on DDR4: what Ramulator gives a random stream (58.5 and 43.5 % of the peak) is half of "
        "DRAMsim3's (88.3 and 81.0 %), because DRAMsim3's files have two ranks, each with its own tFAW, and queues that hold 128 "
        "requests to one rank; and its address map leaves a sequential stream in one bank group for a whole row (66.3 and 77.8 %), "
        "where Ramulator's goes round the groups. Each is met by the device with its settings.",
        "",
        "Unloaded latency of random reads, one at a time, by the same model:",
        "",
        "| device | ns |",
        "|---|---|",
        *(f"| {name} | {ramulator_run(timing, 'unloaded_random_probe').latency_ns:.1f} |" for timing, name in RAMULATOR.items()),
        "",
    ]  # fmt: skip
    return lines


def _percent(row: Row) -> str:
    return f"{100 * row.error:+.2f} %"


def _line(row: Row) -> str:
    return (
        f"| {row.oracle} | {row.config} | {row.pattern} | {row.quantity} | {row.theirs:.3f} | {row.ours:.3f} | {_percent(row)} "
        f"| {row.note} |"
    )


if __name__ == "__main__":
    OUT.parent.mkdir(exist_ok=True)
    text = page()
    OUT.write_text(text, encoding="utf-8")
    print(text)
