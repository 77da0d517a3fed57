"""Stretches of a stream that are sent at once: every time equals that of sending burst by burst, and of before."""

import hashlib
import random
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from harness import gather, load, make_program, make_target, matmul, store, vector

from firsttoken_compiler.isa.instruction import Instruction
from firsttoken_compiler.isa.program import Program
from firsttoken_compiler.isa.types import Engine
from firsttoken_compiler.target.target import Target
from firsttoken_simulator import machine
from firsttoken_simulator.memory import LookAhead
from firsttoken_simulator.timeline import Timeline
from firsttoken_simulator.units import dram, layout

TARGETS: dict[str, dict[str, Any]] = {
    "plain": {},
    "eight channels": {"dram_channels": 8, "dma_outstanding": 175, "dma_bus_bytes_per_cycle": 128},
    "three channels": {"dram_channels": 3, "dram_queue_depth": 10, "dram_interleave_bytes": 128},
    "one row after the other": {"dram_map": "row-linear", "dma_outstanding": 96},
    "all banks": {"dram_map": "bank-interleaved", "dma_outstanding": 96},
    "one bank group each": {"dram_map": "group-interleaved", "dma_outstanding": 96},
    "a bank refreshed at a time": {"dram_refresh": "per-bank", "dma_outstanding": 64},
    "few requests in flight": {"dma_outstanding": 3},
    "narrow scratchpad": {"scratchpad_banks": 2, "dma_outstanding": 96},
    "long chunks": {"dram_interleave_bytes": 4096, "dma_outstanding": 200, "dma_bus_bytes_per_cycle": 128},
}
BEFORE: dict[str, str] = {
    "plain": "8e55550a0fdab003",
    "eight channels": "1301d17285a20b01",
    "three channels": "1ffc890a32270d68",
    "one row after the other": "34af5d8f0d1d4c1a",
    "all banks": "23cf83d297fa4430",
    "one bank group each": "1cdaf1a0fb4f50a7",
    "a bank refreshed at a time": "a3a73a73ba744be5",
    "few requests in flight": "0a226b269d4867cd",
    "narrow scratchpad": "f4016b259f8ff0f4",
    "long chunks": "3b7182f083721ee1",
}
"""Hashes of all times of `random_program(0..4)` as the machine gave them when it sent every burst by itself; they
change where the model does."""


def random_program(seed: int) -> Program:
    """Two cores that load, multiply, rescale and store tiles of any size and stride, and gather."""
    draw = random.Random(seed)
    out: list[Instruction] = []
    for core in range(2):
        base, loads, products, vectors = core * 5, 0, 0, 0
        for _ in range(draw.randint(4, 12)):
            address, nbytes = draw.randrange(1 << 24), draw.choice([32, 700, 4096, 30_000, 200_000])
            for _ in range(draw.randint(1, 3)):
                out.append(load(nbytes, address, core=core))
                address += nbytes + draw.choice([0, 0, 64, 8192])
                loads += 1
            if draw.random() < 0.7:
                m = draw.randint(1, 300)
                out.append(matmul(m, 128, 128, core=core, waits=((base + Engine.DMA_IN, loads),)))
                products += 1
                out.append(vector(1, m, 128, core=core, waits=((base + Engine.MATRIX, products),)))
                vectors += 1
                nbytes = draw.choice([64, 5000, 40_000])
                out.append(store(nbytes, (1 << 25) + address, core=core, waits=((base + Engine.VECTOR, vectors),)))
    if draw.random() < 0.5:
        out.append(gather(draw.randint(1, 30), 640, 1000, address=1 << 26))
    return make_program(*out, cores=2)


def run(program: Program, target: Target, stretches: bool) -> Timeline:
    """Simulates with stretches sent at once, or burst by burst."""
    simulated = machine._Machine(program, target)
    simulated.x[layout.X_STRETCHES] = stretches
    return simulated.run(None)


def digest(lines: list[Timeline]) -> str:
    """Of every number of the timelines."""
    state = hashlib.sha256()
    for line in lines:
        for name in sorted(field.name for field in fields(line)):
            value = getattr(line, name)
            state.update(name.encode())
            state.update(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
    return state.hexdigest()[:16]


@pytest.mark.parametrize("name", TARGETS)
def test_times_are_those_of_burst_by_burst(name: str) -> None:
    target = make_target(cores=2, **TARGETS[name])
    for seed in range(5, 40):
        program = random_program(seed)
        whole, single = (run(program, target, stretches) for stretches in (True, False))
        for field in fields(Timeline):
            a, b = getattr(whole, field.name), getattr(single, field.name)
            assert np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b, f"seed {seed}: {field.name}"


@pytest.mark.parametrize("name", TARGETS)
def test_times_are_those_of_the_machine_before(name: str) -> None:
    target = make_target(cores=2, **TARGETS[name])
    assert digest([run(random_program(seed), target, True) for seed in range(5)]) == BEFORE[name]


def test_a_long_load_is_sent_in_stretches() -> None:
    """Two ways that were one would be equal, too: only the one notes which rows it has found open."""
    noted = {}
    for stretches in (True, False):
        simulated = machine._Machine(make_program(load(5000)), make_target(dram_map="row-linear", dma_outstanding=96))
        simulated.x[layout.X_STRETCHES] = stretches
        simulated.run(None)
        assert isinstance(simulated.memory, LookAhead)
        words = simulated.memory.state.words.reshape(-1, int(simulated.memory.p[dram.P_WORDS]))
        noted[stretches] = bool((words[:, dram.C_OPEN] >= 0).any())
    assert noted == {True: True, False: False}
