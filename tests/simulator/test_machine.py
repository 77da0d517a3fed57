"""The whole machine: order, contention, bounds, determinism, and the twin of the hot loop."""

import os
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import gather, load, make_program, make_target, matmul, store, vector
from hypothesis import given, settings
from hypothesis import strategies as st
from numba.core.dispatcher import Dispatcher

from firsttoken_compiler.errors import ProgramError
from firsttoken_compiler.isa.dma import Store
from firsttoken_compiler.isa.instruction import Instruction
from firsttoken_compiler.isa.program import Program
from firsttoken_compiler.isa.types import Engine, queue_index
from firsttoken_compiler.target.target import Target
from firsttoken_simulator import kernels, machine
from firsttoken_simulator.machine import simulate_program
from firsttoken_simulator.timeline import Timeline
from firsttoken_simulator.units import bus, dma, dram, scratchpad, stream
from firsttoken_simulator.units.dma import bursts, spread, walk

BURST_FS = 2_500_000
DMA_IN, MATRIX, VECTOR = (queue_index(0, e) for e in (Engine.DMA_IN, Engine.MATRIX, Engine.VECTOR))
MIXING_LOSS = 0.5
"""What a burst loses, as a part of its time on the data bus, when two streams share a channel: they close each other's
rows, and reads and writes turn the bus around. Long streams lose 0.46, which a test below measures."""
REFRESH_FS = 300_000_000
"""One refresh (tRFC 210 ns) with the opening of the rows that it closed; a shift of a program may meet one more."""


def posted_bursts(target: Target) -> int:
    """Writes that the controllers may still hold when a program ends: accepted ones, and a buffer of half the queue."""
    return target.dram.channels * (target.dram.queue_depth + target.dram.queue_depth // 2)


def noise_fs(program: Program, line: Timeline) -> float:
    """By how much a faster part may slow a program: a scheduling anomaly, not a cost of the part.

    A faster part moves a stream in time, so that it may overlap another one which it missed before. At worst all
    traffic that two queues can have under way at once meets, and pays the mixing loss. One stream alone loses nothing.
    """
    moved = line.dram_read_bytes + line.dram_write_bytes
    streams = np.bincount(program.code[:, 1], weights=moved)
    shared_bytes = min(streams.sum(), 2 * (streams.sum() - streams.max()))
    return (MIXING_LOSS * shared_bytes / 32 * BURST_FS + REFRESH_FS) if shared_bytes else 0.0


def pipeline(tiles: int, nbytes: int, m: int, core: int = 0) -> list[Instruction]:
    """Load, multiply, rescale, store, tile by tile."""
    base = core * 5
    out: list[Instruction] = []
    for i in range(tiles):
        address = (core * tiles + i) * nbytes
        out.append(load(nbytes, address, core=core))
        out.append(matmul(m, 128, 128, core=core, waits=((base + Engine.DMA_IN, i + 1),)))
        out.append(vector(1, m, 128, core=core, waits=((base + Engine.MATRIX, i + 1),)))
        out.append(store(m * 64, (1 << 24) + address, core=core, waits=((base + Engine.VECTOR, i + 1),)))
    return out


def equal(a: Timeline, b: Timeline) -> bool:
    return all(
        np.array_equal(x, y) if isinstance(x, np.ndarray) else x == y
        for x, y in zip((getattr(a, f.name) for f in fields(a)), (getattr(b, f.name) for f in fields(b)), strict=True)
    )


def test_semaphores_order_instructions() -> None:
    line = simulate_program(make_program(*pipeline(4, 4096, 64)), make_target())
    for i in range(0, 16, 4):
        assert line.end_fs[i] <= line.start_fs[i + 1]
        assert line.end_fs[i + 1] <= line.start_fs[i + 2]
        assert line.end_fs[i + 2] <= line.start_fs[i + 3]
    assert np.all(line.head_fs <= line.start_fs)
    assert np.all(line.start_fs <= line.issue_end_fs)
    assert np.all(line.issue_end_fs <= line.end_fs)
    assert np.all(np.diff(line.end_fs[line.completion_order]) >= 0)
    assert line.total_fs == line.end_fs.max()


def test_waits_for_a_count_not_for_the_last_signal() -> None:
    program = make_program(load(64), load(1 << 16), vector(1, 1, 64, waits=((DMA_IN, 1),)))
    line = simulate_program(program, make_target())
    assert line.end_fs[0] <= line.start_fs[2] < line.end_fs[1]


def test_one_sequencer_issues_in_program_order() -> None:
    program = make_program(*pipeline(6, 4096, 64))
    own, one = make_target(), make_target(dma_decoupled=False)
    line = simulate_program(program, one)
    assert np.all(line.start_fs[1:] >= line.issue_end_fs[:-1])
    for i in range(0, 24, 4):
        assert np.all(line.end_fs[i : i + 3] <= line.start_fs[i + 1 : i + 4])
    assert line.total_fs > simulate_program(program, own).total_fs
    single = make_program(*pipeline(1, 4096, 64))
    assert simulate_program(single, one).total_fs == simulate_program(single, own).total_fs, "nothing overlaps in one"
    assert one.content_hash != own.content_hash


def test_one_sequencer_waits_for_what_comes_before_and_never_for_what_does_not_come() -> None:
    one = make_target(dma_decoupled=False)
    program = make_program(load(64), load(1 << 16), vector(1, 1, 64, waits=((DMA_IN, 1),)))
    line = simulate_program(program, one)
    assert line.end_fs[0] <= line.start_fs[2] < line.end_fs[1]
    late = make_program(load(64, signal=False), matmul(1, 1, 1, waits=((DMA_IN, 1),)), vector(1, 1, 1))
    with pytest.raises(ProgramError, match=r"(?s)deadlock: 1 queues.*1: core0.matrix matmul"):
        simulate_program(late, one)
    cores = make_program(*pipeline(3, 4096, 64), *pipeline(3, 4096, 64, core=1), cores=2)
    both = simulate_program(cores, make_target(dma_decoupled=False, cores=2))
    assert np.all(both.start_fs[1:12] >= both.issue_end_fs[:11])
    assert both.start_fs[12] < both.end_fs[11], "another core has a sequencer of its own"


def test_deadlock_names_the_blocked_instructions() -> None:
    program = make_program(
        load(64, signal=False), matmul(1, 1, 1, waits=((DMA_IN, 1),)), vector(1, 1, 1, waits=((MATRIX, 1),))
    )
    with pytest.raises(ProgramError, match=r"(?s)deadlock: 2 queues.*1: core0.matrix matmul.*2: core0.vector vector"):
        simulate_program(program, make_target())


def test_program_for_a_missing_core_is_refused() -> None:
    with pytest.raises(ProgramError, match=r"core1\.dma_in, target textbook has 1 cores"):
        simulate_program(make_program(load(64, core=1)), make_target())


def test_empty_program_and_empty_instructions_take_no_time() -> None:
    assert simulate_program(make_program(), make_target()).total_fs == 0
    line = simulate_program(make_program(load(0), gather(0, 64, 8)), make_target(dma_setup_cycles=3))
    assert line.total_cycles == 6
    assert line.counters["dram_bursts"] == 0


def test_progress_ends_at_one() -> None:
    seen: list[float] = []
    simulate_program(make_program(load(64)), make_target(), seen.append)
    assert seen[-1] == 1.0


def test_littles_law_when_latency_bound() -> None:
    target = make_target(dma_outstanding=4, dma_bus_latency_cycles=2000, dram_trefi_ns=0.0)
    line = simulate_program(make_program(load(1 << 15)), target)
    latency_s = (2000 + 21.25 + 2.5 + 10) * 1e-9
    expected = 4 * 32 / latency_s
    measured = (1 << 15) / (line.total_fs / 1e15)
    print(f"expected {expected:.4g} measured {measured:.4g} deviation {measured / expected - 1:+.2%}")
    assert measured == pytest.approx(expected, rel=0.02)
    assert line.stall_dram_fs[0] > 0.9 * line.total_fs


def test_saturated_bus_is_the_limit() -> None:
    target = make_target(dma_bus_bytes_per_cycle=4, dram_channels=4, dma_outstanding=256)
    line = simulate_program(make_program(load(1 << 20)), target)
    assert (1 << 20) / (line.total_fs / 1e15) == pytest.approx(4e9, rel=0.01)


def test_dram_channels_add_bandwidth() -> None:
    line = simulate_program(make_program(load(1 << 22)), make_target(dram_channels=4, dma_outstanding=256))
    share = (1 << 22) / (line.total_fs / 1e15) / (4 * 12.8e9)
    assert 0.88 < share < 1.0


def test_two_cores_share_dram_equally() -> None:
    target = make_target(cores=2, dma_outstanding=128)
    alone = simulate_program(make_program(load(1 << 20), cores=2), target)
    line = simulate_program(make_program(load(1 << 20), load(1 << 20, 1 << 24, core=1), cores=2), target)
    assert line.end_fs[0] == pytest.approx(line.end_fs[1], rel=0.02)
    assert line.total_fs > 1.7 * alone.total_fs
    assert 2 * (1 << 20) / (line.total_fs / 1e15) < target.dram.peak_bytes_per_s


def test_reads_and_writes_share_dram_with_turnaround() -> None:
    target = make_target(dma_outstanding=128)
    line = simulate_program(make_program(load(1 << 19), store(1 << 19, 1 << 24)), target)
    rate = (1 << 20) / (line.total_fs / 1e15)
    assert 0.5 * 12.8e9 < rate < 12.8e9 * (1 - 210 / 3906)
    assert line.counters["dram_bursts"] == (1 << 20) // 32


@pytest.mark.parametrize(("address", "nbytes", "count"), [(0, 32, 1), (16, 32, 2), (31, 2, 2), (1, 30, 1), (0, 33, 2)])
def test_unaligned_ends_cost_whole_bursts(address: int, nbytes: int, count: int) -> None:
    line = simulate_program(make_program(load(nbytes, address)), make_target())
    assert line.counters["dram_bursts"] == count
    assert line.busy_fs[0] == count * BURST_FS
    assert line.dram_read_bytes[0] == nbytes


@given(st.integers(1, 5), st.integers(1, 100), st.integers(0, 100), st.integers(0, 200))
@settings(max_examples=60, deadline=None)
def test_burst_count_is_the_sum_over_rows(rows: int, run: int, gap: int, address: int) -> None:
    program = make_program(load(run, address, rows=rows, stride=run + gap))
    starts = address + np.arange(rows) * (run + gap) if gap else np.array([address])
    length = run if gap else rows * run
    expected = int(((starts + length - 1) // 32 - starts // 32 + 1).sum())
    assert bursts(walk(program.code, 1), 32)[0] == expected
    assert simulate_program(program, make_target()).counters["dram_bursts"] == expected


def test_spread_covers_the_table() -> None:
    rows = spread.py_func(np.arange(4096), 64)
    assert rows.min() == 0
    assert rows.max() == 63
    assert np.bincount(rows).min() > 32


def test_account_is_the_programs() -> None:
    line = simulate_program(make_program(*pipeline(3, 4096, 64)), make_target())
    assert line.macs.sum() == 3 * 64 * 128 * 128
    assert line.vector_ops.sum() == 3 * 64 * 128
    assert line.dram_read_bytes.sum() == 3 * 4096
    assert line.dram_write_bytes.sum() == 3 * 64 * 64
    moved = line.dram_read_bytes.sum() + line.dram_write_bytes.sum()
    assert line.counters["dram_bursts"] == moved // 32
    assert line.busy_fs[0] == 4096 // 32 * BURST_FS
    activates = line.counters["dram_row_misses"] + line.counters["dram_row_conflicts"]
    assert line.dram_activates.sum() == activates


@st.composite
def programs(draw: st.DrawFn, cores: int = 2, stores: bool = True) -> Program:
    """Pipelines of random tile sizes on every core."""
    out: list[Instruction] = []
    for core in range(cores):
        tiles, nbytes = draw(st.integers(1, 4)), draw(st.sampled_from([96, 1024, 8192]))
        out += pipeline(tiles, nbytes, draw(st.integers(1, 200)), core)
    return make_program(*(i for i in out if stores or not isinstance(i, Store)), cores=cores)


FASTER: list[dict[str, Any]] = [
    {"clock_hz": 2e9}, {"dram_channels": 2}, {"dma_outstanding": 128}, {"dma_bus_bytes_per_cycle": 128},
    {"dma_bus_latency_cycles": 5}, {"scratchpad_banks": 64}, {"dram_queue_depth": 64},
]  # fmt: skip


@given(programs(1), st.sampled_from(FASTER))
@settings(max_examples=150, deadline=None)
def test_faster_parts_are_never_slower(program: Program, faster: dict[str, Any]) -> None:
    base = simulate_program(program, make_target())
    assert simulate_program(program, make_target(**faster)).total_fs <= base.total_fs + noise_fs(program, base)


@given(programs(1, stores=False), st.sampled_from(FASTER))
@settings(max_examples=100, deadline=None)
def test_faster_parts_never_slow_a_single_stream(program: Program, faster: dict[str, Any]) -> None:
    base = simulate_program(program, make_target())
    assert noise_fs(program, base) == 0
    assert simulate_program(program, make_target(**faster)).total_fs <= base.total_fs


@given(programs(2), st.sampled_from(FASTER))
@settings(max_examples=60, deadline=None)
def test_faster_parts_are_never_slower_with_two_cores(program: Program, faster: dict[str, Any]) -> None:
    base = simulate_program(program, make_target(cores=2))
    fast = simulate_program(program, make_target(cores=2, **faster))
    assert fast.total_fs <= base.total_fs + noise_fs(program, base)


def test_two_streams_lose_what_the_noise_allows() -> None:
    target, nbytes = make_target(dma_outstanding=128), 1 << 19
    read, write = load(nbytes), store(nbytes, 1 << 24)
    apart = sum(simulate_program(make_program(one), target).total_fs for one in (read, write))
    together = simulate_program(make_program(read, write), target).total_fs
    loss = (together - apart) / (2 * nbytes / 32 * BURST_FS)
    print(f"expected at most {MIXING_LOSS}, measured {loss:.3f}")
    assert 0.8 * MIXING_LOSS < loss < MIXING_LOSS


@given(programs())
@settings(max_examples=30, deadline=None)
def test_no_engine_beats_its_roofline(program: Program) -> None:
    target = make_target(cores=2)
    line = simulate_program(program, target)
    seconds = line.total_fs / 1e15
    cycles = line.total_fs / line.period_fs
    moved = line.counters["dram_bursts"] * 32
    posted = posted_bursts(target) if line.dram_write_bytes.sum() else 0
    assert moved - posted * 32 <= target.dram.peak_bytes_per_s * seconds
    assert moved / cycles <= target.dma.bus_bytes_per_cycle
    assert line.macs.sum() / cycles <= 2 * 16384
    spad = line.spad_read_bytes.sum() + line.spad_write_bytes.sum()
    assert spad / cycles <= 2 * 1024
    for queue in range(10):
        mine = program.code[:, 1] == queue
        if queue % 5 in (Engine.MATRIX, Engine.VECTOR):
            assert line.busy_fs[mine].sum() <= line.total_fs
            assert np.array_equal(
                line.end_fs[mine] - line.start_fs[mine], line.busy_fs[mine] + line.stall_spad_fs[mine]
            )


@given(programs())
@settings(max_examples=10, deadline=None)
def test_same_program_same_timeline(program: Program) -> None:
    target = make_target(cores=2)
    assert equal(simulate_program(program, target), simulate_program(program, target))


def _twin(program: Program, target: Target, monkeypatch: pytest.MonkeyPatch) -> Timeline:
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "advance", kernels.advance.py_func)
        for module in (kernels, bus, dma, dram, scratchpad, stream):
            for name, compiled in vars(module).copy().items():
                if isinstance(compiled, Dispatcher) and "no_cpython_wrapper" in compiled.targetoptions:
                    patch.setattr(module, name, compiled.py_func)
        patch.setattr(machine, "_EVENTS_PER_CALL", 100)  # and the state survives being interrupted
        return simulate_program(program, target)


def test_hot_loop_equals_its_plain_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    program = make_program(
        *pipeline(3, 1000, 70), *pipeline(2, 4096, 64, core=1), gather(9, 64, 1000, address=1 << 25), cores=2
    )
    for target in (make_target(cores=2), make_target(cores=2, dram_channels=3, dram_refresh="per-bank")):
        compiled, plain = simulate_program(program, target), _twin(program, target, monkeypatch)
        assert equal(compiled, plain)
        assert len(astuple(compiled)) == len(fields(Timeline))


def test_compiled_forms_older_than_a_unit_are_forgotten(tmp_path: Path) -> None:
    old, fresh, other = (tmp_path / name for name in ("kernels.start-1.nbi", "kernels.advance-2.nbi", "else.f-3.nbi"))
    for path in (old, fresh, other):
        path.touch()
    for path in (old, other):
        os.utime(path, ns=(0, 0))
    kernels.forget_stale(tmp_path)
    assert sorted(tmp_path.iterdir()) == [other, fresh]
