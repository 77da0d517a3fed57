"""Footprints by form against those that the instructions themselves say."""

from __future__ import annotations

import numpy as np
import pytest

from firsttoken_compiler.codegen.footprints import ADDRESS, INSTRUCTION, SPACE, WRITE, bounds, footprints
from firsttoken_compiler.codegen.hazards import footprints_of, hazards
from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.dma import Gather, Load
from firsttoken_compiler.isa.instruction import Instruction
from firsttoken_compiler.isa.matmul import Matmul
from firsttoken_compiler.isa.opcodes import regions
from firsttoken_compiler.isa.types import Dtype, Engine, Operand, Space
from firsttoken_compiler.isa.vector import Vector

SPAD, DRAM, ACC = Space.SPAD, Space.DRAM, Space.ACC


def instructions(at: int) -> list[Instruction]:
    """One of each kind with footprints beside its operands: last panels, sums that are read, strides downwards."""
    table = Operand(DRAM, Dtype.F16, 4096 + at, 256, 40)
    indices = Operand(SPAD, Dtype.I64, 512 + at, 8)
    product = (
        Operand(ACC, Dtype.F32, at, 512), Operand(SPAD, Dtype.F16, 8192 + at, 300),
        Operand(SPAD, Dtype.F16, 64 * at, 6400, 64, 32),
    )  # fmt: skip
    return [
        Load(queue=Engine.DMA_IN, dims=(3, 2, 100), operands=(
            Operand(SPAD, Dtype.I8, at, -640, 100), Operand(DRAM, Dtype.I8, 9000 + at, 200, 4000),
        )),
        Gather(queue=Engine.DMA_IN, dims=(5, 1, 200), operands=(Operand(SPAD, Dtype.F16, at, 256), indices, table)),
        Matmul(queue=Engine.MATRIX, dims=(8, 80, 100), flags=1, operands=product),
        Vector(queue=Engine.VECTOR, dims=(4, 6, 70), operands=(
            Operand(SPAD, Dtype.F32, 10_000 + at, 4, 0, 0), Operand(SPAD, Dtype.I4, 3 * at, 200, 40, 1),
        )),
    ]  # fmt: skip


def granules(table: np.ndarray) -> set[tuple[int, ...]]:
    """(instruction, write, space, granule) of all footprints."""
    found = set()
    for i, write, space, at, c0, s0, c1, s1, c2, s2, run in table.tolist():
        starts = [at + a * s0 + b * s1 + c * s2 for a in range(c0) for b in range(c1) for c in range(c2)]
        found |= {(i, write, space, g) for s in starts for g in range(s // 64, (s + run - 1) // 64 + 1)}
    return found


def test_footprints_of_a_form_lie_where_the_operands_do() -> None:
    code = np.stack([one.encode() for at in (0, 6400, 128, 64) for one in instructions(at)])
    table = footprints(code)
    assert granules(table) == granules(regions(code))
    assert (np.diff(table[:, INSTRUCTION]) >= 0).all()
    low, high = bounds(table)
    assert (low == table[:, ADDRESS]).all()
    assert (high > low).all()
    for number in range(len(code)):
        writes = table[table[:, INSTRUCTION] == number, WRITE]
        assert writes.tolist() == sorted(writes.tolist())


def test_footprints_of_the_last_code_are_those_that_its_hazards_were_found_by() -> None:
    code = np.stack([one.encode() for one in instructions(6400)])
    hazards(code, 5)
    kept = footprints_of(code, 5)
    assert kept is footprints_of(code.copy(), 5)
    assert (kept == footprints(code)).all()
    with pytest.raises(ValueError, match="read-only"):
        kept[0, 0] = 1
    code[0, word.operand_column(0) + 1] += 64
    other = footprints_of(code, 5)
    assert other is not kept
    assert (other == footprints(code)).all()


def test_footprints_of_what_has_no_hazards_are_found_too() -> None:
    """Addresses that no scratchpad has are an error of hazards, which the verifier says in its own words."""
    code = np.stack([instructions(0)[0].encode()])
    code[0, word.operand_column(0) + 1] = 1 << 37
    assert footprints_of(code, 5)[:, SPACE].tolist() == [DRAM, SPAD]
