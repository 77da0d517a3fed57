"""The memory plan, checked by bytes: lives that overlap, accesses outside of them, reads of nothing, boundaries."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firsttoken_compiler.codegen.sync import insert_semaphores
from firsttoken_compiler.codegen.verify import verify
from firsttoken_compiler.errors import ProgramError
from firsttoken_compiler.isa.program import OpInfo, Packing, Program, Tensor, parse_listing
from firsttoken_compiler.isa.types import Dtype, Space
from firsttoken_compiler.isa.vector_kernel import VectorKernel
from firsttoken_compiler.target.target import Scratchpad, Target

PRESET = Target.load("systolic-128")
TARGET = replace(
    PRESET,
    scratchpad=Scratchpad(bytes=4096, banks=4, bank_bytes=16, alignment_bytes=64, accumulator_bytes=1024),
    matrix=replace(PRESET.matrix, tile_bytes=1024),
)
LISTING = """
core0.dma_in load op=0 n0=1 n1=1 bytes=256 dst=spad:i8@0x0+0,0,0 src=dram:i8@0x0+0,0,0
core0.dma_in load op=1 n0=1 n1=1 bytes=1024 dst=spad:i8@0x400+0,0,0 src=dram:i8@0x1000+0,0,0
core0.matrix matmul op=1 m=4 n=16 k=64 acc=acc:i32@0x0+64,0,0 a=spad:i8@0x0+64,0,0 w=spad:i8@0x400+0,16,16
core0.vector vector op=1 n0=1 n1=1 n2=64 flags=1 dst=spad:i8@0x100+0,0,1 s0=acc:i32@0x0+0,0,4
core0.dma_out store op=2 n0=1 n1=1 bytes=64 dst=dram:i8@0x2000+0,0,0 src=spad:i8@0x100+0,0,0
core0.dma_in load op=3 n0=1 n1=1 bytes=64 dst=spad:i8@0x0+0,0,0 src=dram:i8@0x2000+0,0,0
core0.dma_out store op=4 n0=1 n1=1 bytes=64 dst=dram:i8@0x2040+0,0,0 src=spad:i8@0x0+0,0,0
"""
"""x → a (op 0); a, w → b (op 1); b → c in DRAM (op 2); c → d (op 3); d → y (op 4)."""
PANELS = Packing("w", "panels", 64, 16, 16, 8, 64, False)


def tensor(name: str, kind: str, space: Space, address: int, nbytes: int, *life: int, packing: Packing | None = None):
    return Tensor(name, kind, space, address, nbytes, Dtype.I8, (nbytes,), packing, *life)


TENSORS = {
    t.name: t
    for t in (
        tensor("x", "input", Space.DRAM, 0, 256),
        tensor("w", "weight", Space.DRAM, 4096, 1024, packing=PANELS),
        tensor("c", "activation", Space.DRAM, 8192, 64, 2, 3),
        tensor("y", "output", Space.DRAM, 8256, 64),
        tensor("a", "activation", Space.SPAD, 0, 256, 0, 1),
        tensor("b", "activation", Space.SPAD, 256, 64, 1, 2),
        tensor("d", "activation", Space.SPAD, 0, 64, 3, 4),
        tensor("work", "scratch", Space.SPAD, 1024, 1024, 1, 1),
    )
}


def program(listing: str = LISTING, **changed: dict[str, object] | None) -> Program:
    """The program with fields of some tensors changed, or without them."""
    tensors = [replace(t, **changed.get(n, {})) for n, t in TENSORS.items() if changed.get(n, {}) is not None]
    ops = tuple(OpInfo(f"op{i}", "test", (), "", 0, 0) for i in range(5))
    code = insert_semaphores(parse_listing(listing)[0])
    return Program(code, (VectorKernel.parse("s0"),), tuple(tensors), ops, dram_bytes=8320, cores=1)


def test_bytes_may_be_shared_in_turn() -> None:
    verify(program(), TARGET)


def test_what_one_core_wrote_is_nothing_on_another() -> None:
    """`d` is written on core 0; core 1 has at that place what `a` was, which it wrote itself before."""
    first, *_, last = LISTING.strip().splitlines()
    both = LISTING.replace(first, first + "\n" + first.replace("core0", "core1"))
    elsewhere = both.replace(last, last.replace("core0", "core1"))
    target = replace(TARGET, cores=2)
    verify(replace(program(both), cores=2), target)
    with pytest.raises(ProgramError, match="reads 'd' at byte 0 of spad, which nothing wrote since its life began"):
        verify(replace(program(elsewhere), cores=2), target)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"a": {"last": 3}}, "tensors 'd' and 'a' overlap in spad from 0x0 while both live, at operator 3"),
        ({"d": {"first": 1}}, "tensors 'd' and 'a' overlap in spad from 0x0 while both live, at operator 1"),
        ({"y": {"address": 8192}}, "tensors 'c' and 'y' overlap in dram from 0x2000 while both live, at operator 2"),
        ({"w": {"address": 128}}, "tensors 'x' and 'w' overlap in dram from 0x80$"),
        ({"a": {"nbytes": 320}}, "'a' and 'b' overlap in spad from 0x100 while both live, at operator 1"),
        ({"b": {"address": 264}}, "activation tensor 'b' starts at 0x108, the alignment is 64 bytes"),
        ({"w": {"address": 4096 + 64}}, "weight tensor 'w' starts at 0x1040, the alignment is 1024 bytes"),
        ({"c": {"last": 5}}, "activation tensor 'c' lives from operator 2 to 5 of 5; only activation and scratch may"),
        ({"c": {"first": 4}}, "activation tensor 'c' lives from operator 4 to 3 of 5"),
        ({"x": {"last": 2}}, "input tensor 'x' lives from operator 0 to 2 of 5; only activation and scratch may"),
        ({"d": {"nbytes": 8192}}, "activation tensor 'd' takes bytes 0 to 8192 of spad, which has 4096"),
    ],
)
def test_plans_that_cannot_be_are_named(changed: dict[str, dict[str, object]], message: str) -> None:
    with pytest.raises(ProgramError, match=f"(?m){message}"):
        verify(program(**changed), TARGET)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"a": {"last": 0}}, r"(?s)touches spad bytes 0 to 256, not in one tensor that lives at its operator.*matmul"),
        ({"b": {"first": 2}}, r"(?s)touches spad bytes 256 to 320, not in one tensor that lives.*vector"),
        ({"c": {"last": 2}}, r"(?s)touches dram bytes 8192 to 8256, not in one tensor that lives.*load"),
        ({"a": {"nbytes": 192}}, "touches spad bytes 0 to 256, not in one tensor that lives at its operator"),
        ({"work": None}, "touches spad bytes 1024 to 2048, not in one tensor that lives at its operator"),
        ({"work": {"first": 2, "last": 2}}, "touches spad bytes 1024 to 2048, not in one tensor"),
    ],
)
def test_lives_that_the_instructions_contradict_are_named(
    changed: dict[str, dict[str, object] | None], message: str
) -> None:
    with pytest.raises(ProgramError, match=message):
        verify(program(**changed), TARGET)


@pytest.mark.parametrize("place", ["spad", "dram"])
def test_a_value_is_not_what_lay_there_before(place: str) -> None:
    """The bytes were written, in the life of another tensor."""
    if place == "spad":
        code, changed = LISTING.replace("bytes=64 dst=spad:i8@0x0", "bytes=64 dst=spad:i8@0x200"), {}
        extra = tensor("e", "activation", Space.SPAD, 512, 64, 3, 3)
        message = "reads 'd' at byte 0 of spad, which nothing wrote since its life began"
    else:
        code, changed = LISTING.replace("dst=dram:i8@0x2040", "dst=dram:i8@0x2000"), {"c": {"last": 2}}
        extra = tensor("e", "activation", Space.DRAM, 8192, 64, 3, 4)
        message = "reads 'e' at byte 8192 of dram, which nothing wrote since its life began"
    bad = program(code, **changed)
    with pytest.raises(ProgramError, match=message):
        verify(replace(bad, tensors=(*bad.tensors, extra)), TARGET)


def test_weights_of_the_matrix_unit_begin_on_its_boundary() -> None:
    shifted = LISTING.replace("0x400", "0x440")
    moved = program(shifted, work={"address": 1088})
    with pytest.raises(ProgramError, match="weights in the scratchpad begin at 0x440, the matrix unit's tiles on 1024"):
        verify(moved, TARGET)
    verify(moved, replace(TARGET, matrix=replace(TARGET.matrix, tile_bytes=0)))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_change_of_one_number_is_accepted_only_where_the_plan_still_holds(data: st.DataObject) -> None:
    """A brute-force look at every byte of every access agrees with the verifier's verdict on lives and overlaps."""
    name = data.draw(st.sampled_from(["a", "b", "c", "d", "work"]))
    field = data.draw(st.sampled_from(["address", "nbytes", "first", "last"]))
    value = data.draw(st.integers(0, 4) if field in ("first", "last") else st.integers(0, 40).map(lambda n: n * 64))
    changed = program(**{name: {field: value}})
    try:
        verify(changed, replace(TARGET, matrix=replace(TARGET.matrix, tile_bytes=0)))
        accepted = True
    except ProgramError:
        accepted = False
    assert accepted == _holds(changed)


def _holds(checked: Program) -> bool:
    tensors, limit = checked.tensors, {Space.DRAM: 8320, Space.SPAD: 4096}
    if any(t.address + t.nbytes > limit[t.space] for t in tensors):
        return False
    if any(not t.lasting and not t.first <= t.last < 5 for t in tensors):
        return False
    for op in range(5):
        owners: dict[tuple[Space, int], str] = {}
        for t in tensors:
            if t.lasting or t.first <= op <= t.last:
                for byte in range(t.address, t.address + t.nbytes):
                    if owners.setdefault((t.space, byte), t.name) != t.name:
                        return False
        for at, reach, space in ACCESSES[op]:
            found = {owners.get((space, byte)) for byte in range(at, at + reach)}
            if len(found) != 1 or None in found:
                return False
    return all(_written(tensors, *read) for read in READS)


ACCESSES = {
    0: [(0, 256, Space.SPAD)],
    1: [(1024, 1024, Space.SPAD), (0, 256, Space.SPAD), (256, 64, Space.SPAD)],
    2: [(256, 64, Space.SPAD), (8192, 64, Space.DRAM)],
    3: [(8192, 64, Space.DRAM), (0, 64, Space.SPAD)],
    4: [(0, 64, Space.SPAD)],
}
READS = [(1, 0, 0, Space.SPAD), (2, 1, 256, Space.SPAD), (3, 2, 8192, Space.DRAM), (4, 3, 0, Space.SPAD)]
"""(operator that reads, operator that wrote, byte, memory)."""


def _written(tensors: tuple[Tensor, ...], op: int, writer: int, byte: int, space: Space) -> bool:
    """The tensor that is read lived when the bytes were written."""
    owner = next(
        t for t in tensors
        if t.space is space and t.address <= byte < t.address + t.nbytes and (t.lasting or t.first <= op <= t.last)
    )  # fmt: skip
    return owner.lasting or owner.first <= writer
