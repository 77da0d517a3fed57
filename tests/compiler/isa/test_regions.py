"""Footprints are the truth: exactly the bytes that executing an instruction writes, and exactly those it depends on.

Written bytes are found by comparing memory, read ones by flipping every byte of a small memory alone.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import SmallMemory, changed, places, read

from firsttoken_compiler.isa.dma import Gather, Load, Store, dram, spad
from firsttoken_compiler.isa.instruction import REGION_COLUMNS
from firsttoken_compiler.isa.matmul import ACCUMULATE, TRANSPOSED, Matmul
from firsttoken_compiler.isa.opcodes import regions
from firsttoken_compiler.isa.types import COMPUTED, PACKED, Dtype, Operand, Space
from firsttoken_compiler.isa.vector import INITIALISE, KERNEL_SHIFT, Vector
from firsttoken_compiler.isa.vector_kernel import VectorKernel

SMALL = settings(max_examples=8, deadline=None)


@pytest.mark.parametrize("cls", [Load, Store], ids=["load", "store"])
@SMALL
@given(data=st.data())
def test_copies(cls: type[Load] | type[Store], data: st.DataObject) -> None:
    n0, n1, run = (data.draw(st.integers(1, limit)) for limit in (3, 3, 9))
    inner = data.draw(st.integers(run, 12))
    outer = data.draw(st.integers(inner * n1, 40))
    local, remote = spad(Dtype.I8, 5, outer, inner), dram(Dtype.I8, 130, data.draw(st.sampled_from([-40, 0, 44])), 14)
    if cls is Store and n0 > 1 and remote.s0 == 0:
        n0 = 1  # rows stored over each other
    operands = (local, remote) if cls is Load else (remote, local)
    instruction = cls(queue=0, dims=(n0, n1, run), operands=operands)
    memory = SmallMemory(256, seed=n0)
    assert changed(instruction, memory) == places(instruction, write=True)
    assert read(instruction, memory) == places(instruction, write=False)


@SMALL
@given(st.integers(1, 4), st.integers(1, 8), st.integers(1, 5), st.integers(0, 3), st.sampled_from([8, 24]))
def test_gather(rows: int, run: int, table_rows: int, spare: int, step: int) -> None:
    memory = SmallMemory(256, seed=rows)
    which = np.arange(rows) % table_rows
    memory.spaces[Space.DRAM][:128].view(np.int64)[: rows * step // 8 : step // 8] = which
    instruction = Gather(
        queue=0, dims=(rows, 1, run),
        operands=(spad(Dtype.I8, 3, run + 1), dram(Dtype.I64, 0, step), dram(Dtype.I8, 160, run + spare, table_rows)),
    )  # fmt: skip
    assert changed(instruction, memory) == places(instruction, write=True)
    depends = read(instruction, memory)
    footprint = places(instruction, write=False)
    assert depends <= footprint
    # Which rows are read is data: the rest of the footprint is the table, its unread columns, and clamped indices.
    table = {(Space.DRAM, 160 + i) for i in range((run + spare) * table_rows)}
    indices = {(Space.DRAM, row * step + i) for row in range(rows) for i in range(8)}
    assert footprint == table | indices
    assert {(Space.DRAM, 160 + (run + spare) * int(w) + i) for w in which for i in range(run)} <= depends


def matmul(m: int, n: int, k: int, a: Dtype, w: Dtype, width: int, flags: int) -> Matmul:
    """Padded rows everywhere, so that no stride is by accident the dense one."""
    row = (k if flags & TRANSPOSED else width) * w.bits // 8 + (4 if w is Dtype.F32 else 2)
    accumulator = Dtype.F32 if a in (Dtype.F16, Dtype.F32) else Dtype.I32
    return Matmul(
        queue=2, flags=flags, dims=(m, n, k),
        operands=(Operand(Space.ACC, accumulator, 8, n * 4 + 4), spad(a, 16, k * a.bits // 8 + 4),
                  spad(w, 256, row * k + 8, row, width)),
    )  # fmt: skip


@pytest.mark.parametrize("flags", [0, ACCUMULATE, TRANSPOSED, ACCUMULATE | TRANSPOSED])
@pytest.mark.parametrize("w", [Dtype.I8, Dtype.I4, Dtype.I16])
@settings(max_examples=4, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.sampled_from([2, 4]), st.booleans())
def test_matmul(w: Dtype, flags: int, m: int, n: int, k: int, width: int, wide: bool) -> None:
    if flags & TRANSPOSED and w is Dtype.I4:
        return  # the verifier rejects it: int4 packs along the columns
    instruction = matmul(m, n, k, Dtype.I16 if wide else Dtype.I8, w, width, flags)
    memory = SmallMemory(512, seed=n)
    memory.spaces[Space.SPAD][16:256] = np.random.default_rng(k).integers(1, 120, 240)  # no activation is 0
    written = places(instruction, write=True)
    if flags & ACCUMULATE:  # adding may leave a byte as it was
        assert changed(instruction, memory) <= written
    else:
        assert changed(instruction, memory) == written
    depends, footprint = read(instruction, memory), places(instruction, write=False)
    assert depends <= footprint
    if n % width == 0 or flags & TRANSPOSED or (n < width and n % 2 == 0):
        assert depends == footprint
    else:  # the last panel is read at the width of the others
        unused = {place for place in footprint - depends if place[0] is Space.SPAD and place[1] >= 256}
        assert footprint - depends == unused


def test_a_narrow_panel_reads_no_more_than_its_columns() -> None:
    instruction = matmul(2, 3, 2, Dtype.I8, Dtype.I4, 8, 0)
    weights = {byte for space, byte in places(instruction, write=False) if byte >= 256}
    assert weights == {256, 257, 262, 263}  # two rows of 3 nibbles, 6 bytes apart


@pytest.mark.parametrize("flags", [0, ACCUMULATE])
def test_float_matmul(flags: int) -> None:
    instruction = matmul(2, 4, 3, Dtype.F16, Dtype.F16, 2, flags)
    memory = SmallMemory(512)
    memory.view(Space.SPAD, "f2", 16, 120)[...] = np.linspace(1, 2, 120)
    memory.view(Space.SPAD, "f2", 256, 128)[...] = np.linspace(2, 3, 128)
    memory.view(Space.ACC, "f4", 8, 126)[...] = 1.0
    assert changed(instruction, memory) == places(instruction, write=True)
    assert read(instruction, memory, flip=0x04) == places(instruction, write=False)


def vector(text: str, dims: tuple[int, int, int], flags: int, *operands: Operand) -> tuple[Vector, SmallMemory]:
    """The instruction, and a memory of small integers that every kernel of these tests keeps exact in fp32."""
    memory = SmallMemory(512, seed=sum(dims), kernels=(VectorKernel.parse("0.0"), VectorKernel.parse(text)))
    instruction = Vector(queue=3, flags=(1 << KERNEL_SHIFT) | flags, dims=dims, operands=operands)
    return instruction, memory


def strides(data: st.DataObject, dims: tuple[int, int, int], element: int, zero: bool) -> tuple[int, int, int]:
    """Strides of a view of `dims` elements without overlap; with `zero`, some are 0."""
    inner = element * data.draw(st.integers(1, 2))
    middle = inner * dims[2] + element * data.draw(st.integers(0, 1))
    outer = middle * dims[1] + element * data.draw(st.integers(0, 1))
    mask = data.draw(st.tuples(st.booleans(), st.booleans(), st.booleans())) if zero else (True, True, True)
    return tuple(s if keep else 0 for s, keep in zip((outer, middle, inner), mask, strict=True))  # type: ignore[return-value]


@SMALL
@given(data=st.data())
def test_vector_maps(data: st.DataObject) -> None:
    dims = tuple(data.draw(st.integers(1, 3)) for _ in range(3))
    assert len(dims) == 3
    wide, narrow = strides(data, dims, 4, zero=False), strides(data, dims, 1, zero=True)
    dst, s0, s1 = spad(Dtype.I32, 8, *wide), spad(Dtype.I8, 300, *narrow), Operand(Space.ACC, Dtype.I16, 64, *wide)
    instruction, memory = vector("add(s0, mul(s1, 3.0))", dims, 0, dst, s0, s1)
    assert changed(instruction, memory) == places(instruction, write=True)
    assert read(instruction, memory) == places(instruction, write=False)


@pytest.mark.parametrize("flags", [0, INITIALISE])
@SMALL
@given(data=st.data())
def test_vector_reductions(flags: int, data: st.DataObject) -> None:
    dims = tuple(data.draw(st.integers(2, 3)) for _ in range(3))
    assert len(dims) == 3
    folded = data.draw(st.sampled_from([(0, 16, 4), (96, 0, 4), (96, 16, 0), (0, 0, 4), (96, 0, 0), (0, 0, 0)]))
    dst, source = spad(Dtype.I32, 8, *folded), spad(Dtype.I8, 400, *strides(data, dims, 1, zero=False))
    instruction, memory = vector("add<- mul(s0, 5.0)", dims, flags, dst, source)
    memory.view(Space.SPAD, "i4", 0, 100)[...] = np.arange(100) * 1000  # sums stay exact in fp32
    assert changed(instruction, memory) <= places(instruction, write=True)
    found = read(instruction, memory, flip=0x01)
    footprint = places(instruction, write=False)
    assert {p for p in found if p[1] >= 400} == {p for p in footprint if p[1] >= 400}
    low_bytes = {p for p in footprint if p[1] < 400}
    assert {p for p in found if p[1] < 400} <= low_bytes
    assert bool(low_bytes) == (flags == 0)
    assert low_bytes in (set(), places(instruction, write=True))


@pytest.mark.parametrize("dtype", PACKED)
@pytest.mark.parametrize("step", [0, 1])
@SMALL
@given(data=st.data())
def test_packed_sources(dtype: Dtype, step: int, data: st.DataObject) -> None:
    dims = (data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 8 // dtype.bits)))
    row = dtype.nbytes(dims[2])
    source = spad(dtype, 300, data.draw(st.sampled_from([0, 4 * row])), data.draw(st.sampled_from([0, row + 1])), step)
    instruction, memory = vector("mul(s0, 3.0)", dims, 0, spad(Dtype.I32, 8, 96, 32, 4), source)
    low = read(instruction, memory, flip=0x01)
    assert low == places(instruction, write=False)
    bits = np.unpackbits(memory.spaces[Space.SPAD][300:], bitorder="little")
    after = memory.copy()
    instruction.execute(after)
    for index in np.ndindex(*dims):
        at = 8 * (index[0] * source.s0 + index[1] * source.s1) + index[2] * step * dtype.bits
        value = int(bits[at : at + dtype.bits] @ (1 << np.arange(dtype.bits)))
        value -= 16 * (dtype is Dtype.I4 and value > 7)
        written = after.view(Space.SPAD, "i4", 8 + 96 * index[0] + 32 * index[1] + 4 * index[2], 1)[0]
        assert written == 3 * value


@pytest.mark.parametrize("dtype", [d for d in COMPUTED if d is not Dtype.I4])
def test_elements_have_their_width(dtype: Dtype) -> None:
    element = dtype.bits // 8
    operands = (spad(dtype, 0, 0, 64, element), spad(dtype, 256, 0, 64, 2 * element))
    instruction, _ = vector("s0", (1, 2, 3), 0, *operands)
    expected = {(Space.SPAD, 64 * j + b) for j in range(2) for b in range(3 * element)}
    assert places(instruction, write=True) == expected
    expected = {
        (Space.SPAD, 256 + 64 * i + 2 * element * j + b) for i in range(2) for j in range(3) for b in range(element)
    }
    assert places(instruction, write=False) == expected


def test_table_is_ordered_by_instruction_and_empty_for_none() -> None:
    one = Load(queue=0, dims=(1, 1, 8), operands=(spad(Dtype.I8, 0), dram(Dtype.I8, 0)))
    two = matmul(2, 2, 2, Dtype.I8, Dtype.I8, 2, ACCUMULATE)
    table = regions(np.stack([i.encode() for i in (two, one, two, one)]))
    assert table[:, 0].tolist() == [0] * 4 + [1] * 2 + [2] * 4 + [3] * 2
    assert regions(np.zeros((0, len(one.encode())), np.int64)).shape == (0, len(REGION_COLUMNS))


@pytest.mark.parametrize(
    "instruction",
    [
        Load(queue=0, dims=(1, 2, 9), operands=(spad(Dtype.I8, 240, 0, 8), dram(Dtype.I8, 0))),
        Load(queue=0, dims=(1, 2, 9), operands=(spad(Dtype.I8, 0, 0, 16), dram(Dtype.I8, 4, 0, -8))),
        Store(queue=1, dims=(1, 1, 300), operands=(dram(Dtype.I8, 0), spad(Dtype.I8, 0))),
        Gather(
            queue=0, dims=(2, 1, 8), operands=(spad(Dtype.I8, 0, 8), dram(Dtype.I64, 248, 8), dram(Dtype.I8, 0, 8, 4))
        ),
        matmul(40, 2, 2, Dtype.I8, Dtype.I8, 2, 0),
    ],
    ids=["above", "below", "long", "indices", "rows"],
)
def test_accesses_outside_the_memory_raise(instruction: Load | Store | Gather | Matmul) -> None:
    memory = SmallMemory(256)
    before = memory.copy()
    with pytest.raises(ValueError, match=r"access to bytes -?\d+ to \d+ of a memory of 256 bytes"):
        instruction.execute(memory)
    for space in Space:
        np.testing.assert_array_equal(memory.spaces[space], before.spaces[space])
