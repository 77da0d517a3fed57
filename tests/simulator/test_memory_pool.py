"""Memory that outlives programs: size classes, blocks that serve again, weights that stay."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firsttoken_compiler.errors import ProgramError
from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.program import Packing, Program, Tensor
from firsttoken_compiler.isa.types import Dtype, Space
from firsttoken_compiler.target.target import Target
from firsttoken_simulator.functional import FunctionalMachine
from firsttoken_simulator.memory_pool import SMALLEST, DeviceMemory, MemoryPool, size_class

TARGET = Target.load("systolic-128")


@given(st.integers(0, 1 << 40))
def test_classes_hold_what_is_asked_for_and_waste_at_most_a_quarter(nbytes: int) -> None:
    found = size_class(nbytes)
    assert found >= nbytes
    assert found == SMALLEST or found <= 1.25 * nbytes
    assert size_class(found) == found


@settings(max_examples=100)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 1 << 20)), max_size=40))
def test_blocks_are_never_used_twice_and_the_counts_add_up(steps: list[tuple[bool, int]]) -> None:
    pool, used = MemoryPool(), []
    asked = most = 0
    for give, nbytes in steps:
        if give and used:
            pool.give(used.pop(0))
            continue
        block = pool.take(nbytes)
        assert len(block) >= nbytes
        assert not any(block is other for other in used)
        used.append(block)
        asked += nbytes
        most = max(most, sum(len(other) for other in used))
    use = pool.use
    assert use.requested_bytes == asked
    assert use.peak_bytes == most <= use.allocated_bytes
    assert use.allocations <= use.requests
    assert 0 <= use.fragmentation < 1


def test_the_same_sizes_in_turn_allocate_once() -> None:
    pool = MemoryPool()
    for _ in range(5):
        blocks = [pool.take(nbytes) for nbytes in (1 << 20, 3 << 18, 5000)]
        for block in blocks:
            pool.give(block)
    assert (pool.use.requests, pool.use.allocations) == (15, 3)
    assert pool.use.reuse == pytest.approx(5 * ((1 << 20) + (3 << 18) + 5000) / ((1 << 20) + (3 << 18) + 5120))


def test_a_block_of_another_pool_is_refused() -> None:
    with pytest.raises(ProgramError, match="a block of 4096 bytes is given back to a pool that it is not in use of"):
        MemoryPool().give(MemoryPool().take(10))


def plain(name: str, address: int, kind: str = "weight") -> Tensor:
    recipe = Packing(name, "plain", 0, 0, 0, 8, 0, False) if kind == "weight" else None
    return Tensor(name, kind, Space.DRAM, address, 64, Dtype.I8, (64,), recipe)


def program(*tensors: Tensor, dram_bytes: int = 8192) -> Program:
    data = {t.name: np.full(64, 7, np.uint8) for t in tensors if t.kind == "constant"}
    code = np.zeros((0, word.WIDTH), np.int64)
    return Program(code, (), tensors, (), constants=data, dram_bytes=dram_bytes)


SHORT = program(plain("w", 0), plain("k", 128, "kv"), plain("angles", 192), plain("c", 256, "constant"))
LONG = program(plain("w", 0), plain("k", 128, "kv"), plain("angles", 4096), plain("y", 256, "output"), dram_bytes=40000)


def test_weights_before_the_caches_stay_and_the_rest_comes_again() -> None:
    memory = DeviceMemory(MemoryPool(), TARGET)
    short = FunctionalMachine(SHORT, TARGET, memory=memory)
    assert [t.name for t in memory.missing(SHORT)] == ["w", "angles"]
    short.write_bytes(0, np.arange(64, dtype=np.uint8))
    long = FunctionalMachine(LONG, TARGET, memory=memory)
    assert [t.name for t in memory.missing(LONG)] == ["angles"]
    assert long.bytes(Space.DRAM, 0)[:64].tolist() == list(range(64))  # the larger block has them too
    long.write_bytes(256, np.zeros(64, np.uint8))
    assert short.enter()
    assert not short.enter()
    assert [t.name for t in memory.missing(SHORT)] == ["angles"]
    assert short.bytes(Space.DRAM, 0)[256:320].tolist() == [7] * 64  # the constant is stored again
    assert memory.pool.use.allocations == 4  # two blocks of DRAM, scratchpad, accumulators


def test_weights_of_another_program_push_those_at_their_place_out() -> None:
    memory = DeviceMemory(MemoryPool(), TARGET)
    memory.missing(SHORT)
    other = program(plain("v", 0), plain("k", 128, "kv"))
    assert [t.name for t in memory.missing(other)] == ["v"]
    assert [t.name for t in memory.missing(SHORT)] == ["w", "angles"]


def test_a_machine_sees_no_more_than_its_program_has() -> None:
    memory = DeviceMemory(MemoryPool(), TARGET)
    FunctionalMachine(LONG, TARGET, memory=memory)
    short = FunctionalMachine(SHORT, TARGET, memory=memory)
    assert len(memory.dram) > len(short.bytes(Space.DRAM, 0)) == SHORT.dram_bytes
    with pytest.raises(ProgramError, match="of a DRAM of 8192 bytes"):
        short.write_bytes(8190, np.zeros(4, np.uint8))
    pad = replace(TARGET, scratchpad=replace(TARGET.scratchpad, bytes=1 << 16))
    assert len(FunctionalMachine(SHORT, pad).bytes(Space.SPAD, 0)) == 1 << 16
