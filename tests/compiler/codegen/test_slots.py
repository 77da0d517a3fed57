"""How many slots a buffer gets: one more than the pipeline stages between the engine that fills it and its reader."""

from __future__ import annotations

import pytest

from firsttoken_compiler.codegen.loops import Access, Alloc, Buffer, GatherNest, Loop, MatmulCall, Nest, Statement
from firsttoken_compiler.codegen.slots import assign, engine_of, loads
from firsttoken_compiler.isa.types import Dtype, Engine, Space

D, S = Space.DRAM, Space.SPAD
STAGES = (0, 1, 2, 3)
FAR = Buffer("x", "param", Dtype.F16, 64, 0)
RESULT = Buffer("y", "param", Dtype.F16, 64, 1)
W = Buffer("w", "spad", Dtype.I8, 100, -1)
STAGE = Buffer("stage", "spad", Dtype.F16, 33, -1)
ACC = Buffer("acc", "acc", Dtype.I32, 10, -1)


def at(buffer: Buffer) -> Access:
    return Access(buffer, lambda _env: 0, (1,))


def move(to: Buffer, source: Buffer) -> Nest:
    return Nest((8,), ("",), at(to), ("load", at(source)))


def multiply() -> MatmulCall:
    return MatmulCall(1, 1, 1, ("m", "p", "k"), at(ACC), at(STAGE), at(W), 1, 1, 1, 1, 8)


def loop(*body: Statement, extent: int = 4, stages: tuple[int, ...] = STAGES) -> Loop:
    return Loop(0, extent, "m", 1, stages, list(body))


def depths(body: list[Statement], spaces: list[Space]) -> dict[str, int]:
    return {buffer.name: room.depth for buffer, room in assign(body, spaces, 64).rooms.items()}


def test_stages_between_producer_and_consumer_become_slots() -> None:
    total = Nest((8,), ("",), at(RESULT), ("add", ("load", at(ACC)), ("load", at(W))))
    filled = [Alloc(STAGE), move(STAGE, FAR), Alloc(W), move(W, FAR), Alloc(ACC)]
    body: list[Statement] = [loop(*filled, multiply(), total)]
    # stage: load → matrix; w: load → matrix and vector; acc: matrix → vector.
    assert depths(body, [D, S]) == {"stage": 2, "w": 3, "acc": 2}


def test_what_leaves_through_dma_is_written_one_stage_earlier() -> None:
    work = Nest((8,), ("",), at(STAGE), ("exp", ("load", at(FAR))))
    body: list[Statement] = [loop(Alloc(STAGE), work, move(RESULT, STAGE))]
    assert depths(body, [S, D]) == {"stage": 2}
    assert depths([loop(Alloc(STAGE), move(STAGE, FAR), move(RESULT, STAGE))], [D, D]) == {"stage": 4}


@pytest.mark.parametrize("outer", [loop, lambda *body: loop(*body, extent=1), lambda *body: loop(*body, stages=())])
def test_without_a_pipeline_there_is_one_slot(outer) -> None:
    body = [outer(Alloc(STAGE), move(STAGE, FAR), Nest((8,), ("",), at(RESULT), ("load", at(STAGE))))]
    assert depths(body, [D, S]) == {"stage": 3 if outer is loop else 1}


def test_the_innermost_pipelined_loop_that_repeats_decides() -> None:
    work = Nest((8,), ("",), at(RESULT), ("load", at(STAGE)))
    inner = loop(Alloc(STAGE), move(STAGE, FAR), work, stages=(0, 0, 0, 0))
    assert depths([loop(inner)], [D, S]) == {"stage": 1}
    inner.extent = 1
    assert depths([loop(inner)], [D, S]) == {"stage": 3}


def test_slots_are_aligned_and_do_not_overlap() -> None:
    body: list[Statement] = [loop(Alloc(STAGE), move(STAGE, FAR), Alloc(W), move(W, FAR), Alloc(ACC), multiply())]
    memory = assign(body, [D, S], 64)
    spad = sorted((r.address, r.nbytes * r.depth) for r in memory.rooms.values() if r.space is S)
    assert spad == [(0, 2 * 128), (256, 2 * 128)]  # 66 and 100 bytes, rounded up
    assert memory.scratch_bytes == 512
    assert memory.acc_bytes == 64


def test_engines() -> None:
    assert engine_of(move(STAGE, FAR), [D, D]) is Engine.DMA_IN
    assert engine_of(move(RESULT, STAGE), [D, D]) is Engine.DMA_OUT
    assert engine_of(move(STAGE, FAR), [S, D]) is Engine.VECTOR
    assert engine_of(GatherNest(1, 1, "m", at(STAGE), at(FAR), FAR, 3), [D, D]) is Engine.DMA_IN
    assert engine_of(Nest((1,), ("",), at(STAGE), ("const", 0.0)), [D, D]) is None
    accesses = list(loads(("add", ("load", at(W)), ("mul", ("const", 2.0), ("load", at(ACC))))))
    assert [access.buffer for access in accesses] == [W, ACC]
