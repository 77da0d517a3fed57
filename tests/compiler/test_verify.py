"""The static verifier: accepts synchronised programs, and rejects every single mutation with the reason."""

import contextlib
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from firsttoken_compiler.codegen.sync import insert_semaphores
from firsttoken_compiler.codegen.verify import verify
from firsttoken_compiler.errors import ProgramError
from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.program import Program, Tensor, parse_listing
from firsttoken_compiler.isa.types import Dtype, Space
from firsttoken_compiler.isa.vector_kernel import VectorKernel
from firsttoken_compiler.target.target import Scratchpad, Target

SCRATCHPAD = Scratchpad(bytes=4096, banks=4, bank_bytes=16, alignment_bytes=64, accumulator_bytes=1024)
TARGET = replace(Target.load("systolic-128"), scratchpad=SCRATCHPAD, cores=2)
KERNELS = (VectorKernel.parse("s0"),)
TENSORS = (
    Tensor("x", "input", Space.DRAM, 0, 4096, Dtype.I8, (4096,)),
    Tensor("w", "weight", Space.DRAM, 4096, 4096, Dtype.I8, (4096,)),
    Tensor("y", "output", Space.DRAM, 8192, 2048, Dtype.I8, (2048,)),
)

TILE = """
core0.dma_in load n0=1 n1=1 bytes=1024 dst=spad:i8@0x0+0,0,0 src=dram:i8@0x1000+0,0,0
core0.dma_in load n0=1 n1=4 bytes=64 dst=spad:i8@0x400+0,64,0 src=dram:i8@0x0+0,128,0
core0.matrix matmul m=4 n=16 k=64 acc=acc:i32@0x0+64,0,0 a=spad:i8@0x400+64,0,0 w=spad:i8@0x0+0,16,16
core0.vector vector n0=1 n1=1 n2=64 flags=1 dst=spad:i8@0x800+0,0,1 s0=acc:i32@0x0+0,0,4
core0.dma_out store n0=1 n1=1 bytes=64 dst=dram:i8@0x2000+0,0,0 src=spad:i8@0x800+0,0,0
"""


def program(code: np.ndarray, cores: int = 1) -> Program:
    return Program(code=code, kernels=KERNELS, tensors=TENSORS, ops=(), dram_bytes=10240, cores=cores)


def tile(*edits: tuple[str, str], synchronised: bool = True) -> Program:
    """The five-instruction tile with textual edits made before synchronisation."""
    text = TILE
    for old, new in edits:
        assert old in text, old
        text = text.replace(old, new)
    code = parse_listing(text)[0]
    return program(insert_semaphores(code) if synchronised else code)


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Random synchronised programs on two cores; the first instructions write all local memory."""
    lines = []
    for core in (0, 1):
        lines.append(f"core{core}.dma_in load n0=1 n1=1 bytes=4096 dst=spad:i8@0x0+0,0,0 src=dram:i8@0x1000+0,0,0")
        lines.append(f"core{core}.vector vector n0=1 n1=1 n2=256 flags=1 dst=acc:i32@0x0+0,0,4 s0=spad:i32@0x0+0,0,4")
    slot = st.integers(0, 12).map(lambda at: at * 64)
    for _ in range(draw(st.integers(1, 12))):
        core, x, y, z = draw(st.integers(0, 1)), hex(draw(slot)), draw(slot), hex(draw(slot))
        rows, flags = draw(st.integers(1, 3)), draw(st.integers(0, 1))
        choices = [
            f"dma_in load n0=1 n1={rows} bytes=48 dst=spad:i8@{x}+0,48,0 src=dram:i8@{hex(4096 + y)}+0,200,0",
            f"dma_in load n0=1 n1={rows} bytes=48 dst=spad:i8@{x}+0,96,0 src=dram:i8@{hex(8192 + y)}+0,99,0",
            f"dma_out store n0=1 n1={rows} bytes=50 dst=dram:i8@{hex(8192 + y)}+0,130,0 src=spad:i8@{x}+0,64,0",
            f"matrix matmul m={rows} n=12 k=16 flags={flags} acc=acc:i32@{x}+64,0,0 "
            f"a=spad:i8@{hex(y)}+16,0,0 w=spad:i8@{z}+0,12,12",
            f"vector vector n0=1 n1={rows} n2=16 flags=1 dst=spad:i8@{x}+0,64,1 s0=acc:i32@{z}+0,64,4",
            f"vector vector n0=1 n1={rows} n2=16 flags=1 dst=acc:i32@{x}+0,64,4 s0=spad:i8@{z}+0,64,2",
        ]
        lines.append(f"core{core}.{draw(st.sampled_from(choices))}")
    return program(insert_semaphores(parse_listing("\n".join(lines))[0]), cores=2)


@settings(max_examples=40, deadline=None)
@given(programs())
def test_accepts_synchronised_programs_and_rejects_every_lost_wait_and_signal(good: Program) -> None:
    verify(good, TARGET)
    for i, slot in zip(*np.nonzero(good.code[:, word.WAITS : word.WAITS + 2 * word.MAX_WAITS : 2]), strict=True):
        code = good.code.copy()
        code[i, word.WAITS + 2 * slot : word.WAITS + 2 * slot + 2] = 0
        with pytest.raises(ProgramError, match=f"instruction {i}: is not ordered after"):
            verify(good.with_code(code), TARGET)
    for i in np.flatnonzero(good.code[:, word.SIGNAL]):
        code = good.code.copy()
        code[i, word.SIGNAL] = 0
        with pytest.raises(ProgramError, match="deadlock"):
            verify(good.with_code(code), TARGET)


@settings(max_examples=40, deadline=None)
@given(programs(), st.data())
def test_a_wait_for_one_signal_less_is_rejected(good: Program, data: st.DataObject) -> None:
    waits = np.argwhere(good.code[:, word.WAITS : word.WAITS + 2 * word.MAX_WAITS : 2] > 0)
    assume(len(waits))
    i, slot = data.draw(st.sampled_from(waits.tolist()))
    code = good.code.copy()
    code[i, word.WAITS + 2 * slot + 1] -= 1
    with pytest.raises(ProgramError, match=r"is not ordered after|count below 1"):
        verify(good.with_code(code), TARGET)


def test_tile_is_accepted() -> None:
    verify(tile(), TARGET)


def test_more_synchronisation_than_needed_is_accepted() -> None:
    good = tile()
    code = good.code.copy()
    code[0, word.SIGNAL] = 1
    code[2, word.WAITS + 1] = 2
    verify(good.with_code(code), TARGET)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("core0.matrix matmul", "core0.vector matmul", "belongs on a matrix queue, is on queue 3"),
        ("flags=1 dst", "flags=2 dst", "microprogram 1, the program has 1"),
        ("m=4 ", "m=0 ", "an extent lies outside 1 to"),
        ("dst=spad:i8@0x800+0,0,1", "dst=dram:i8@0x2000+0,0,1", "dst is dram:i8, allowed: spad/acc of"),
        ("src=dram:i8@0x0+0,128,0", "src=spad:i8@0x0+0,64,0", "src is spad:i8, allowed: dram of"),
        ("acc=acc:i32@0x0", "acc=acc:f16@0x0", "acc is acc:f16, allowed: acc/spad of f32/i32"),
        ("s0=acc:i32@0x0+0,0,4", "s0=acc:u64@0x0+0,0,1", "s0 is acc:u64"),
        ("dst=spad:i8@0x800+0,0,1", "dst=spad:i4@0x800+0,0,1", "dst is spad:i4"),
        ("s0=acc:i32@0x0+0,0,4", "s0=acc:u2@0x0+0,0,4", "elements of operand 1 are 4 apart"),
        (" s0=acc:i32@0x0+0,0,4", "", "lacks operand 1"),
        (" w=spad:i8@0x0+0,16,16", "", "lacks operand 2 of 3"),
        ("a=spad:i8@0x400+64,0,0", "a=spad:f16@0x400+64,0,0", "spad:f16 x spad:i8 cannot accumulate in i32"),
        ("w=spad:i8@0x0+0,16,16", "w=spad:i8@0x0+0,16,0", "panels of 0 columns"),
        (
            "k=64 acc=acc:i32@0x0+64,0,0 a=spad:i8@0x400+64,0,0 w=spad:i8",
            "k=64 flags=2 acc=acc:i32@0x0+64,0,0 a=spad:i8@0x400+64,0,0 w=spad:i4",
            "a transposed weight operand cannot be spad:i4",
        ),
        ("bytes=1024", "bytes=4160", "touches spad bytes 0 to 4160, limit 4096"),
        ("acc=acc:i32@0x0+64", "acc=acc:i32@0x3c0+64", "touches acc bytes 960 to 1216, limit 1024"),
        ("dst=spad:i8@0x400+0,64,0", "dst=spad:i8@0x400+0,-1024,0", "touches spad bytes -2048"),
        ("src=dram:i8@0x1000", "src=dram:i8@0xf80", "touches dram bytes 3968 to 4992, not in one tensor"),
        ("dst=dram:i8@0x2000", "dst=dram:i8@0x27f0", "touches dram bytes 10224 to 10288, limit 10240"),
        ("dst=dram:i8@0x2000", "dst=dram:i8@0x1000", "writes weight tensor 'w'; only output/kv/act"),
        (
            "n2=64 flags=1 dst=spad:i8@0x800",
            "n2=64 flags=1 dst=spad:i8@0x840",
            "reads spad at byte 2048, which nothing",
        ),
        (
            "s0=acc:i32@0x0+0,0,4",
            "s0=acc:i32@0x2+0,0,4",
            "address 2 of operand 1 is not a multiple of its element of 4",
        ),
    ],
)
def test_each_rule_is_reported_with_instruction_value_and_limit(old: str, new: str, message: str) -> None:
    with pytest.raises(ProgramError, match=message) as error:
        verify(tile((old, new), synchronised=False), TARGET)
    assert "instruction " in str(error.value)
    assert "core0." in str(error.value)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        (word.OPCODE, 99, "unknown opcode 99"),
        (word.QUEUE, 77, "queue 77, the program has 5"),
        (word.OP, 3, "operator 3 of 1"),
        (word.SIGNAL, 2, "signal field is 2"),
        (word.WAITS, 9, "names none of 5 queues"),
        (word.OPERANDS, word.kind(5, 1), "kind 1024"),
        (word.OPERANDS, word.kind(1, 60), "kind 316"),
        (word.OPERANDS + 1, 1 << 50, "beyond"),
        (word.OPERANDS + 2, -(1 << 62), "beyond"),
        (word.DIMS, 1 << 40, "an extent lies outside"),
    ],
)
def test_malformed_fields_are_rejected_before_anything_reads_memory(column: int, value: int, message: str) -> None:
    good = tile()
    code = good.code.copy()
    code[1, column] = value
    with pytest.raises(ProgramError, match=message):
        verify(good.with_code(code), TARGET)


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 4),
    st.integers(0, word.WIDTH - 1),
    st.one_of(st.integers(-3, 300), st.integers(-(2**63), 2**63 - 1), st.integers(0, 62).map(lambda bit: 1 << bit)),
)
def test_any_single_field_may_hold_anything(row: int, column: int, value: int) -> None:
    good = tile()
    code = good.code.copy()
    code[row, column] = value
    with contextlib.suppress(ProgramError):
        verify(good.with_code(code), TARGET)


def test_deadlock_names_the_blocked_heads() -> None:
    good = tile()
    code = good.code.copy()
    code[0, word.WAITS : word.WAITS + 2] = 3, 1  # the first load waits for the matrix unit, which waits for it
    code[2, word.SIGNAL] = 1
    with pytest.raises(
        ProgramError, match=r"(?s)instruction 0: never starts at the head of core0.dma_in: deadlock.*matrix"
    ):
        verify(good.with_code(code), TARGET)


def test_tensors_that_overlap_stray_or_lack_their_constant_are_rejected() -> None:
    good = tile()
    tensors = (
        *TENSORS,
        Tensor("t", "activation", Space.DRAM, 4160, 64, Dtype.I8, (64,)),
        Tensor("far", "weight", Space.DRAM, 10200, 64, Dtype.I8, (64,)),
        Tensor("c", "constant", Space.DRAM, 10176, 8, Dtype.I8, (8,)),
    )
    with pytest.raises(ProgramError) as error:
        verify(replace(good, tensors=tensors), TARGET)
    for message in (
        "'w' and 't' overlap in dram from 0x1040",
        "bytes 10200 to 10264",
        "alignment is 64",
        "constant of that size",
    ):
        assert message in str(error.value)


def test_reports_the_first_few_and_counts_the_rest() -> None:
    good = tile()
    code = np.concatenate([good.code] * 10)
    code[:, word.OPCODE] = 42
    with pytest.raises(ProgramError, match="breaks 50 rules; the first 5"):
        verify(good.with_code(code), TARGET)


def test_unsynchronised_conflict_names_both_instructions_and_the_place() -> None:
    bare = program(parse_listing(TILE)[0])
    with pytest.raises(
        ProgramError, match=r"instruction 2: is not ordered after instruction 1, RAW on spad 0x400: core0.dma_in"
    ):
        verify(bare, TARGET)


def test_too_many_cores_is_rejected() -> None:
    with pytest.raises(ProgramError, match="uses 3 cores, the target has 2"):
        verify(replace(tile(), cores=3), TARGET)


def test_empty_program_is_accepted() -> None:
    verify(replace(program(np.zeros((0, word.WIDTH), np.int64)), tensors=()), TARGET)


def test_forty_thousand_instructions_take_less_than_three_seconds() -> None:
    rows = parse_listing(
        """
        core0.dma_in load n0=1 n1=1024 bytes=64 dst=spad:i8@0x0+0,64,0 src=dram:i8@0x10000000+0,64,0
        core0.dma_in load n0=1 n1=64 bytes=512 dst=spad:i8@0x20000+0,512,0 src=dram:i8@0x0+0,2048,0
        core0.matrix matmul m=64 n=128 k=512 acc=acc:i32@0x0+512,0,0 a=spad:i8@0x20000+512,0,0 w=spad:i8@0x0+0,128,128
        core0.vector vector n0=1 n1=1 n2=8192 flags=1 dst=spad:i8@0x40000+0,0,1 s0=acc:i32@0x0+0,0,4
        core0.dma_out store n0=1 n1=64 bytes=128 dst=dram:i8@0x8000000+0,128,0 src=spad:i8@0x40000+0,128,0
        """
    )[0]
    code = np.concatenate([rows] * 8000)
    step = np.repeat(np.arange(8000), 5)
    spad = word.space_of(code[:, word.OPERANDS :: word.OPERAND_WIDTH]) == Space.SPAD
    code[:, word.OPERANDS + 1 :: word.OPERAND_WIDTH] += spad * (step % 2 * 0x80000)[:, None]
    tensors = (
        Tensor("x", "input", Space.DRAM, 0, 1 << 20, Dtype.I8, (1 << 20,)),
        Tensor("y", "output", Space.DRAM, 0x8000000, 1 << 20, Dtype.I8, (1 << 20,)),
        Tensor("w", "weight", Space.DRAM, 0x10000000, 1 << 20, Dtype.I8, (1 << 20,)),
    )
    good = replace(program(insert_semaphores(code)), tensors=tensors, dram_bytes=1 << 29)
    target = replace(TARGET, cores=1, scratchpad=replace(SCRATCHPAD, bytes=1 << 20, accumulator_bytes=1 << 16))
    verify(good.with_code(good.code[:10]), target)  # compiles
    begin = time.process_time()
    verify(good, target)
    seconds = time.process_time() - begin
    print(f"expected < 3 s, measured {seconds:.2f} s for {len(code)} instructions")
    assert seconds < 3
