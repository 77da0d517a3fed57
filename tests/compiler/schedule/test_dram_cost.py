"""What transfers take by formula, beside what the simulator takes for them."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_bench import small_target

from firsttoken_compiler.isa.dma import Load
from firsttoken_compiler.isa.program import Program
from firsttoken_compiler.isa.types import Dtype, Engine, Operand, Space, queue_index
from firsttoken_compiler.schedule.dram_cost import camping, reading, storing
from firsttoken_compiler.target.target import Dram, Target
from firsttoken_simulator.machine import simulate_program

LOADS = 24


def dram(channels: int) -> Dram:
    return replace(small_target().dram, channels=channels, interleave_bytes=256)


def test_camping_of_runs_that_meet_one_channel() -> None:
    assert camping(dram(4), 256, 1024, 16) == 4.0  # every run starts on the same channel
    assert camping(dram(4), 256, 256, 16) == 1.0
    assert camping(dram(4), 1024, 1024, 5) == 1.0
    assert camping(dram(4), 256, 512, 16) == 2.0
    assert camping(dram(3), 256, 1024, 9) == 1.0
    assert camping(dram(1), 100, 1000, 7) == 1.0


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(1, 3000), st.integers(0, 5000), st.integers(1, 30))
def test_camping_is_the_busiest_channel_over_the_mean(channels: int, run: int, gap: int, count: int) -> None:
    count = min(count, 8 * channels)
    starts = np.arange(count) * (run + gap)
    places = (starts[:, None] + np.arange(run)[None]).ravel() // 256 % channels
    loads = np.bincount(places, minlength=channels)
    assert camping(dram(channels), run, run + gap, count) == pytest.approx(loads.max() * channels / loads.sum())


def simulated(target: Target, run: int, stride: int, rows: int) -> float:
    """Cycles of a load among others of its kind, one behind the other in memory."""
    code = []
    for number in range(LOADS):
        operands = (
            Operand(Space.SPAD, Dtype.I8, 0, 0, run),
            Operand(Space.DRAM, Dtype.I8, number * (run if rows > 1 else stride), 0, stride),
        )
        code.append(Load(queue=queue_index(0, Engine.DMA_IN), dims=(1, rows, run), operands=operands).encode())
    line = simulate_program(Program(code=np.stack(code), kernels=(), tensors=(), ops=(), cores=1), target)
    return line.total_cycles / LOADS


@pytest.mark.parametrize("name", ["systolic-128", "snapdragon-x-elite", "rk3588", "snapdragon-8-gen3"])
@pytest.mark.parametrize("runs", [(1 << 16, 1 << 16, 1), (2048, 24576, 32), (512, 17920, 64), (512, 3072, 64)])
def test_loads_take_what_the_simulator_takes(name: str, runs: tuple[int, int, int]) -> None:
    target, (run, stride, rows) = Target.load(name), runs
    took = simulated(target, run, stride, rows)
    assert 0.7 * took < reading(target, run, stride, rows).link < 1.5 * took


def test_few_requests_in_flight_are_the_rate() -> None:
    target = Target.load("systolic-128")
    few = replace(target, dma=replace(target.dma, outstanding=64))
    fewer = replace(target, dma=replace(target.dma, outstanding=32))
    much = 1 << 20
    assert reading(fewer, much, much, 1).link == pytest.approx(2 * reading(few, much, much, 1).link, rel=0.01)
    assert reading(few, much, much, 1).dram == reading(fewer, much, much, 1).dram


def test_short_runs_cost_more_than_long_ones() -> None:
    dram = Target.load("systolic-128").dram
    assert storing(dram, 256, 17920, 64) > 1.5 * storing(dram, 64 * 256, 64 * 256, 1)
    assert storing(dram, 512, 17920, 64) > storing(dram, 512, 512, 64)
