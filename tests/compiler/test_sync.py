"""Semaphore insertion against a brute-force oracle: every conflicting pair is ordered, and no wait is spare."""

import time
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firsttoken_compiler.codegen.footprints import GRANULE, footprints
from firsttoken_compiler.codegen.hazards import hazards
from firsttoken_compiler.codegen.sync import insert_semaphores
from firsttoken_compiler.errors import ProgramError
from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.dma import Gather, Load, Store, dram, spad
from firsttoken_compiler.isa.instruction import Instruction
from firsttoken_compiler.isa.matmul import ACCUMULATE, Matmul
from firsttoken_compiler.isa.opcodes import decode, regions
from firsttoken_compiler.isa.types import Dtype, Engine, Operand, Space, queue_index
from firsttoken_compiler.isa.vector import Vector

WEIGHTS = 1 << 36


def load(core: int, to: int, at: int, rows: int = 1, run: int = 64, stride: int = 0) -> Instruction:
    queue = queue_index(core, Engine.DMA_IN)
    return Load(
        queue=queue, dims=(1, rows, run), operands=(spad(Dtype.I8, to, 0, run), dram(Dtype.I8, at, 0, stride or run))
    )


def store(core: int, to: int, at: int, rows: int = 1, run: int = 64, stride: int = 0) -> Instruction:
    queue = queue_index(core, Engine.DMA_OUT)
    return Store(
        queue=queue, dims=(1, rows, run), operands=(dram(Dtype.I8, to, 0, stride or run), spad(Dtype.I8, at, 0, run))
    )


def matmul(core: int, acc: int, a: int, w: int, m: int = 2, n: int = 16, k: int = 32, flags: int = 0) -> Instruction:
    operands = (Operand(Space.ACC, Dtype.I32, acc, n * 4), spad(Dtype.I8, a, k), spad(Dtype.I8, w, 0, n, n))
    return Matmul(queue=queue_index(core, Engine.MATRIX), dims=(m, n, k), flags=flags, operands=operands)


def vector(core: int, to: int, source: int, n: int = 16, stride: int = 1, space: Space = Space.ACC) -> Instruction:
    queue = queue_index(core, Engine.VECTOR)
    operands = (spad(Dtype.I8, to, 0, 0, stride), Operand(space, Dtype.I32, source, 0, 0, 4))
    return Vector(queue=queue, dims=(1, 1, n), operands=operands)


def encode(instructions: list[Instruction]) -> np.ndarray:
    return np.stack([instruction.encode() for instruction in instructions])


@st.composite
def codes(draw: st.DrawFn, cores: int = 2) -> np.ndarray:
    """Programs that crowd a few granules, so that conflicts of every kind and many implied ones arise."""
    place = st.integers(0, 7).map(lambda slot: slot * 48)
    out: list[Instruction] = []
    for _ in range(draw(st.integers(1, 14))):
        core, x, y, z = draw(st.integers(0, cores - 1)), draw(place), draw(place), draw(place)
        rows, stride = draw(st.integers(1, 3)), draw(st.sampled_from([0, 64, 100, 192, -130]))
        kind = draw(st.integers(0, 5))
        if kind == 0:
            out.append(load(core, x, 400 + y + draw(st.sampled_from([0, WEIGHTS])), rows, 40, stride))
        elif kind == 1:
            out.append(store(core, 400 + x, y, rows, 40, stride))
        elif kind == 2:
            out.append(matmul(core, x // 48 * 64, y, z, m=rows, k=8, flags=draw(st.sampled_from([0, ACCUMULATE]))))
        elif kind == 3:
            out.append(vector(core, x, y // 48 * 64, stride=draw(st.sampled_from([1, 20, 70]))))
        elif kind == 4:
            out.append(vector(core, x, y // 4 * 4, space=Space.SPAD))
        else:
            operands = (spad(Dtype.I8, x, 32), dram(Dtype.I64, 400 + y, 8), dram(Dtype.I8, 400 + z, 32, 4))
            out.append(Gather(queue=queue_index(core, Engine.DMA_IN), dims=(rows, 1, 32), operands=operands))
    return encode(out)


def touched(code: np.ndarray) -> list[tuple[set[tuple[int, ...]], set[tuple[int, ...]]]]:
    """Granules read and written by each instruction, by plain loops over the unmerged footprints."""
    sets: list[tuple[set[tuple[int, ...]], set[tuple[int, ...]]]] = [(set(), set()) for _ in code]
    for i, write, space, address, c0, s0, c1, s1, c2, s2, run in regions(code).tolist():
        core = code[i, word.QUEUE] // 5 if space != Space.DRAM else 0
        for a, b, c in np.ndindex(c0, c1, c2):
            first = address + a * s0 + b * s1 + c * s2
            for granule in range(first // GRANULE, (first + run - 1) // GRANULE + 1):
                sets[i][write].add((space, core, granule))
    return sets


def conflicts(code: np.ndarray) -> list[tuple[int, int]]:
    sets = touched(code)
    return [
        (i, j)
        for i, j in combinations(range(len(code)), 2)
        if code[i, word.QUEUE] != code[j, word.QUEUE]
        and (sets[i][1] & (sets[j][0] | sets[j][1]) or sets[i][0] & sets[j][1])
    ]


def completed_before(code: np.ndarray) -> list[set[int]]:
    """For each instruction, what is complete when it starts; by the meaning of waits, without vector clocks."""
    signals: dict[int, list[int]] = {}
    members: dict[int, list[int]] = {}
    known: list[set[int]] = []
    for i, row in enumerate(code):
        instruction = decode(row)
        own = members.setdefault(instruction.queue, [])
        facts = set(known[own[-1]]) if own else set()
        for queue, value in instruction.waits:
            producer = signals[queue][value - 1]
            facts |= {j for j in members[queue] if j <= producer} | known[producer]
        known.append(facts)
        own.append(i)
        if instruction.signal:
            signals.setdefault(instruction.queue, []).append(i)
    return known


def ordered(code: np.ndarray, pairs: list[tuple[int, int]]) -> bool:
    known = completed_before(code)
    return all(i in known[j] for i, j in pairs)


@settings(max_examples=150, deadline=None)
@given(codes())
def test_every_conflict_is_ordered_and_every_wait_is_needed(code: np.ndarray) -> None:
    pairs = conflicts(code)
    synced = insert_semaphores(code)
    assert ordered(synced, pairs)
    awaited = set()
    for i, row in enumerate(synced):
        for slot in range(word.MAX_WAITS):
            if not row[word.WAITS + 2 * slot]:
                continue
            awaited.add(tuple(row[word.WAITS + 2 * slot : word.WAITS + 2 * slot + 2].tolist()))
            without = synced.copy()
            without[i, word.WAITS + 2 * slot : word.WAITS + 2 * slot + 2] = 0
            assert not ordered(without, pairs)
    assert len(awaited) == synced[:, word.SIGNAL].sum()  # a signal nobody waits for would be spare
    assert np.array_equal(insert_semaphores(synced), synced)


@settings(max_examples=100, deadline=None)
@given(codes())
def test_merged_footprints_touch_the_same_granules(code: np.ndarray) -> None:
    rows = footprints(code)
    merged: list[tuple[set[tuple[int, ...]], set[tuple[int, ...]]]] = [(set(), set()) for _ in code]
    for i, write, space, address, c0, s0, c1, s1, c2, s2, run in rows.tolist():
        core = code[i, word.QUEUE] // 5 if space != Space.DRAM else 0
        for a, b, c in np.ndindex(c0, c1, c2):
            first = address + a * s0 + b * s1 + c * s2
            for granule in range(first // GRANULE, (first + run - 1) // GRANULE + 1):
                merged[i][write].add((space, core, granule))
    assert merged == touched(code)


def test_pipeline_of_one_tile_waits_stage_by_stage() -> None:
    code = encode(
        [load(0, 0, WEIGHTS), load(0, 512, 0), matmul(0, 0, 0, 512), vector(0, 1024, 0), store(0, 4096, 1024)]
    )
    text = [str(decode(row)) for row in insert_semaphores(code)]
    assert [line.split("wait=")[1] if "wait=" in line else "-" for line in text] == [
        "-",
        "-",
        "core0.dma_in>=1 signal",
        "core0.matrix>=1 signal",
        "core0.vector>=1",
    ]
    assert text[1].endswith("signal")
    assert not text[0].endswith("signal")  # the second load completes after it


def test_scratchpads_of_two_cores_do_not_conflict_but_dram_does() -> None:
    apart = insert_semaphores(encode([load(0, 0, WEIGHTS), vector(1, 0, 0, space=Space.SPAD)]))
    assert not apart[:, word.WAITS].any()
    shared = insert_semaphores(encode([store(0, 0, 0), load(1, 0, 0)]))
    assert decode(shared[1]).waits == ((queue_index(0, Engine.DMA_OUT), 1),)


def test_weights_cost_no_memory_and_written_dram_is_found_inside_them() -> None:
    big = [load(0, 0, WEIGHTS * slot, rows=64, run=64, stride=1 << 20) for slot in range(8)]
    result = hazards(encode([*big, store(0, WEIGHTS + (5 << 20), 8192), load(0, 0, WEIGHTS, 64, 64, 1 << 20)]), 5)
    assert result.need[8, 0] == 1  # the strided load that passes over the stored granule
    assert result.need[9, 1] == 8


def test_more_waits_than_an_instruction_holds_is_an_error_with_a_remedy() -> None:
    producers = [store(core, core * 64, 0) for core in range(1, 7)]
    with pytest.raises(ProgramError, match=r"instruction 6 on core0.dma_in .* more than 4 .*use fewer cores"):
        insert_semaphores(encode([*producers, load(0, 0, 0, run=1024)]))


def fence(core: int, op: int) -> np.ndarray:
    return replace(load(core, 1 << 20, WEIGHTS), op=op).encode()


def test_fences_wait_for_what_an_instruction_cannot_hold() -> None:
    """A load that reads what six cores wrote; a store over what they read, which waits for the fence itself."""
    producers = [store(core, core * 64, 0) for core in range(1, 7)]
    readers = [load(core, 0, core * 64) for core in range(1, 7)]
    code = encode([*producers, load(0, 0, 0, run=1024), *readers, store(0, 0, 4096, run=1024)])
    synced = insert_semaphores(code, fence=fence)
    fences = np.flatnonzero(synced[:, word.operand_column(0) + 1] == 1 << 20)
    assert len(fences) == 2
    assert set(synced[fences, word.QUEUE].tolist()) == {queue_index(0, Engine.DMA_IN)}
    assert np.array_equal(without_semaphores(np.delete(synced, fences, axis=0)), without_semaphores(code))
    assert ordered(synced, conflicts(synced))
    pairs = {(i, j) for i, j in conflicts(synced) if j in (7, len(synced) - 1)}
    assert len(pairs) >= 12  # all stores before the load, and all loads before the last store


@settings(max_examples=100, deadline=None)
@given(codes(cores=4))
def test_fences_order_every_conflict_of_four_cores(code: np.ndarray) -> None:
    synced = insert_semaphores(code, fence=fence)
    assert ordered(synced, conflicts(synced))
    kept = synced[synced[:, word.operand_column(0) + 1] != 1 << 20]
    assert np.array_equal(without_semaphores(kept), without_semaphores(code))


def without_semaphores(code: np.ndarray) -> np.ndarray:
    bare = code.copy()
    bare[:, word.WAITS : word.WAITS + 2 * word.MAX_WAITS] = 0
    bare[:, word.SIGNAL] = 0
    return bare


@pytest.mark.parametrize("address", [-64, 1 << 34])
def test_impossible_scratchpad_address_is_refused(address: int) -> None:
    with pytest.raises(ProgramError, match="check the operand addresses"):
        insert_semaphores(encode([load(0, address, 0)]))


def test_empty_program() -> None:
    assert insert_semaphores(np.zeros((0, word.WIDTH), np.int64)).shape == (0, word.WIDTH)


def test_forty_thousand_instructions_take_less_than_two_seconds() -> None:
    tile = []
    for step in range(8000):
        half = step % 2
        w, a, acc, out = half * 65536, 131072 + half * 32768, half * 32768, 262144 + half * 16384
        tile += [load(0, w, WEIGHTS + step * 65536, 1024), load(0, a, step % 50 * 65536, 64, 512, 2048)]
        tile += [
            matmul(0, acc, a, w, 64, 128, 512),
            vector(0, out, acc, 8192),
            store(0, step % 50 * 8192, out, 64, 128),
        ]
    code = encode(tile)
    insert_semaphores(code[:10])  # compiles
    begin = time.process_time()
    insert_semaphores(code)
    seconds = time.process_time() - begin
    print(f"expected < 2 s, measured {seconds:.2f} s for {len(code)} instructions")
    assert seconds < 2
