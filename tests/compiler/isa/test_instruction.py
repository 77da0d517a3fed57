"""Instructions: encoding and text form are inverse to each other, and malformed rows and lines are ProgramErrors."""

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firsttoken_compiler.errors import ProgramError
from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.dma import Gather, Load, Store, dram, spad
from firsttoken_compiler.isa.host import HostLoad, HostRun, HostStore
from firsttoken_compiler.isa.instruction import Instruction
from firsttoken_compiler.isa.matmul import Matmul
from firsttoken_compiler.isa.opcodes import BY_MNEMONIC, BY_OPCODE, INSTRUCTIONS, decode, parse
from firsttoken_compiler.isa.types import (
    ENGINES_PER_CORE,
    PACKED,
    Dtype,
    Engine,
    Operand,
    Space,
    pack,
    parse_queue,
    queue_index,
    queue_name,
    unpack,
    unpack_int4,
)
from firsttoken_compiler.isa.vector import Vector

NUMBER = st.integers(-(2**63), 2**63 - 1)
OPERAND = st.builds(Operand, st.sampled_from(Space), st.sampled_from(Dtype), NUMBER, NUMBER, NUMBER, NUMBER)
QUEUE = st.integers(0, 16 * ENGINES_PER_CORE - 1)
LINE = "core0.dma_in load n0=1 n1=2 bytes=64 dst=spad:i8@0x0+0,64,0 src=dram:i8@0x40+0,128,0"


@st.composite
def instructions(draw: st.DrawFn, cls: type[Instruction]) -> Instruction:
    """Any instruction that can be written down: absent operands in the middle, the last one present."""
    count = draw(st.integers(0, len(cls.OPERAND_NAMES)))
    operands = draw(st.lists(st.none() | OPERAND, min_size=count, max_size=count))
    if operands and operands[-1] is None:
        operands[-1] = draw(OPERAND)
    return cls(
        queue=draw(QUEUE),
        op=draw(st.integers(0, 2**31)),
        signal=draw(st.booleans()),
        waits=tuple(draw(st.lists(st.tuples(QUEUE, st.integers(1, 2**40)), max_size=word.MAX_WAITS))),
        flags=draw(NUMBER),
        dims=(draw(NUMBER), draw(NUMBER), draw(NUMBER)),
        operands=tuple(operands),
    )


@pytest.mark.parametrize("cls", INSTRUCTIONS, ids=lambda cls: cls.MNEMONIC)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_row_and_text_give_the_instruction_back(cls: type[Instruction], data: st.DataObject) -> None:
    instruction = data.draw(instructions(cls))
    row = instruction.encode()
    assert row.shape == (word.WIDTH,)
    assert row.dtype == np.int64
    assert decode(row) == instruction
    assert parse(str(instruction)) == instruction
    np.testing.assert_array_equal(parse(str(instruction)).encode(), row)


def test_opcodes_and_mnemonics_are_distinct() -> None:
    assert len(BY_OPCODE) == len(BY_MNEMONIC) == len(INSTRUCTIONS)
    assert 0 not in BY_OPCODE  # an empty row is no instruction


def test_fields_lie_in_the_documented_columns() -> None:
    instruction = Load(
        queue=7, op=9, signal=True, waits=((2, 5), (8, 1)), flags=3, dims=(4, 5, 6),
        operands=(spad(Dtype.I8, 64, 1, 2, 3), dram(Dtype.F16, 128, 7, 8)),
    )  # fmt: skip
    row = instruction.encode()
    assert row[: word.DIMS + 3].tolist() == [1, 7, 9, 1, 3, 5, 9, 1, 0, 0, 0, 0, 3, 4, 5, 6]
    assert row[word.OPERANDS : word.OPERANDS + 10].tolist() == [2 << 8 | 5, 64, 1, 2, 3, 1 << 8 | 2, 128, 7, 8, 0]
    assert not row[word.OPERANDS + 10 :].any()


def test_text_form_is_the_documented_one() -> None:
    instruction = Matmul(
        queue=queue_index(1, Engine.MATRIX), op=3, signal=True, waits=((5, 12),), flags=1, dims=(64, 128, 512),
        operands=(Operand(Space.ACC, Dtype.I32, 0, 512), spad(Dtype.I8, 0x40, 512), spad(Dtype.I4, 0x8000, 0, 64, 128)),
    )  # fmt: skip
    assert str(instruction) == (
        "core1.matrix matmul op=3 m=64 n=128 k=512 flags=1 acc=acc:i32@0x0+512,0,0 a=spad:i8@0x40+512,0,0 "
        "w=spad:i4@0x8000+0,64,128 wait=core1.dma_in>=12 signal"
    )


def test_an_absent_operand_in_the_middle_stays_absent() -> None:
    instruction = Vector(queue=3, dims=(1, 1, 1), operands=(spad(Dtype.F16, 0), None, spad(Dtype.F16, 64)))
    assert decode(instruction.encode()).operands[1] is None
    assert parse(str(instruction)) == instruction
    with pytest.raises(ValueError, match=r"vector lacks its operand 's0'"):
        instruction.operand(1)
    with pytest.raises(ValueError, match=r"vector lacks its operand 's2'"):
        instruction.operand(3)


def test_absent_operands_at_the_end_do_not_count() -> None:
    with_tail = Load(queue=0, dims=(1, 1, 1), operands=(spad(Dtype.I8, 0), None))
    assert decode(with_tail.encode()) == with_tail
    assert parse(str(with_tail)) == with_tail
    assert with_tail.operands == (spad(Dtype.I8, 0),)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"waits": ((0, 1),) * 5}, r"load: 5 waits, an instruction has 4"),
        ({"operands": (spad(Dtype.I8, 0),) * 3}, r"load: 3 operands, it has dst, src"),
        ({"queue": -1}, r"load: queue -1"),
        ({"waits": ((-1, 1),)}, r"load: waits for queue -1"),
    ],
)
def test_what_a_word_has_no_room_for_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Load(**{"queue": 0, "dims": (1, 1, 1), "operands": (), **fields})  # type: ignore[arg-type]


@settings(max_examples=300, deadline=None)
@given(st.lists(NUMBER | st.integers(-2, 64), min_size=word.WIDTH, max_size=word.WIDTH), st.integers(-1, 9))
def test_any_row_decodes_or_is_a_program_error(values: list[int], opcode: int) -> None:
    row = np.array(values, np.int64)
    row[word.OPCODE] = opcode
    try:
        instruction = decode(row)
    except ProgramError:
        return
    assert decode(instruction.encode()) == instruction


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        (word.OPCODE, 99, r"unknown opcode 99; known: 1, 2, 3, 4, 5, 6, 7, 8"),
        (word.OPERANDS, word.kind(9, 1), r"malformed load instruction: 9 is not a valid Space"),
        (word.OPERANDS, word.kind(1, 31), r"malformed load instruction: 31 is not a valid Dtype"),
        (word.operand_column(2), word.kind(1, 2), r"malformed load instruction: load: 3 operands"),
        (word.QUEUE, -3, r"malformed load instruction: load: queue -3"),
    ],
)
def test_malformed_rows_name_the_field(column: int, value: int, message: str) -> None:
    row = parse(LINE).encode()
    row[column] = value
    with pytest.raises(ProgramError, match=message):
        decode(row)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("load", "lode", r"expected 'queue mnemonic"),
        ("core0.dma_in", "dma_in", r"no such queue: 'dma_in'"),
        ("core0.dma_in", "core-1.dma_in", r"no such queue: 'core-1.dma_in'"),
        ("core0.dma_in", "core.dma_in", r"no such queue"),
        ("core0.dma_in", "core0.gpu", r"no such queue"),
        ("bytes=64", "", r"bytes"),
        ("bytes=64", "bytes=many", r"many"),
        ("bytes=64", "octets=64", r"unknown word 'octets=64'"),
        ("dst=spad:i8@0x0+0,64,0", "dst=spad:i8@0+0,64,0", r"not an operand"),
        ("dst=spad:i8", "dst=sram:i8", r"unknown space or element type in 'sram:i8"),
        ("dst=spad:i8", "dst=spad:i2", r"unknown space or element type"),
        ("n0=1", "n0=1 wait=core0.matrix", r"cannot parse"),
        ("n0=1", "n0=1 wait=core0.matrix>=1 " * 5, r"5 waits"),
        ("n0=1", f"n0={2**63}", r"does not fit"),
        ("@0x40", f"@{2**64:#x}", r"does not fit"),
    ],
)
def test_malformed_lines_name_the_word(old: str, new: str, message: str) -> None:
    assert old in LINE
    with pytest.raises(ProgramError, match=message):
        parse(LINE.replace(old, new))


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60) | st.lists(st.sampled_from(LINE.split()), max_size=8).map(" ".join))
def test_any_line_parses_or_is_a_program_error(line: str) -> None:
    with contextlib.suppress(ProgramError):
        parse(line)


@given(QUEUE)
def test_queue_names(queue: int) -> None:
    assert parse_queue(queue_name(queue)) == queue


@settings(max_examples=60)
@given(st.lists(st.integers(-8, 7), min_size=2, max_size=64).filter(lambda v: len(v) % 2 == 0))
def test_int4_packs_low_nibble_first_as_ml_dtypes_reads_it(values: list[int]) -> None:
    import ml_dtypes

    packed = pack(np.array(values, np.int8), 4)
    assert packed.dtype == np.uint8
    assert packed.size == len(values) // 2 == Dtype.I4.nbytes(len(values))
    assert unpack_int4(packed).tolist() == values
    assert unpack_int4(packed.view(np.int8)).tolist() == values
    nibbles = np.stack([packed & 0xF, packed >> 4], axis=-1).reshape(-1)
    np.testing.assert_array_equal(nibbles.view(ml_dtypes.int4).astype(np.int8), np.array(values, np.int8))


@pytest.mark.parametrize("dtype", PACKED)
@given(data=st.data())
def test_packed_elements_fill_bytes_from_the_lowest_bits(dtype: Dtype, data: st.DataObject) -> None:
    low = -8 if dtype is Dtype.I4 else 0
    rows, width = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 20))
    values = np.array(
        data.draw(
            st.lists(st.integers(low, low + (1 << dtype.bits) - 1), min_size=rows * width, max_size=rows * width)
        )
    ).reshape(rows, width)
    packed = pack(values, dtype.bits)
    assert packed.shape == (rows, dtype.nbytes(width))
    assert np.array_equal(unpack(packed, dtype)[:, :width], values)
    bits = np.unpackbits(packed, axis=1, bitorder="little")
    assert np.array_equal(bits[:, 0], values[:, 0] & 1)
    assert not bits[:, width * dtype.bits :].any()


def test_int4_packs_along_the_last_axis() -> None:
    values = np.arange(-8, 8, dtype=np.int8).reshape(2, 2, 4)
    packed = pack(values, 4)
    assert packed.shape == (2, 2, 2)
    np.testing.assert_array_equal(unpack_int4(packed), values)
    assert Dtype.I4.nbytes(3) == 2


def test_instruction_classes_are_the_table() -> None:
    classes = (Load, Store, Gather, Matmul, Vector, HostLoad, HostRun, HostStore)
    assert [cls.MNEMONIC for cls in classes] == list(BY_MNEMONIC)
    assert tuple(BY_OPCODE.values()) == classes
