"""The verifier on calls of the host: one call between NPU instructions is accepted, every single mistake rejected."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from firsttoken_compiler.codegen.sync import insert_semaphores
from firsttoken_compiler.codegen.verify import verify
from firsttoken_compiler.codegen.verify_host import needed_bytes
from firsttoken_compiler.errors import ProgramError
from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.host_call import HostCall, HostValue
from firsttoken_compiler.isa.program import Program, Tensor, parse_listing
from firsttoken_compiler.isa.types import Dtype, Space
from firsttoken_compiler.target.target import Scratchpad, Target

SCRATCHPAD = Scratchpad(bytes=4096, banks=4, bank_bytes=16, alignment_bytes=64, accumulator_bytes=1024)
TARGET = replace(Target.load("systolic-128"), scratchpad=SCRATCHPAD, cores=2)
TENSORS = (
    Tensor("x", "input", Space.DRAM, 0, 256, Dtype.I8, (256,)),
    Tensor("w", "weight", Space.DRAM, 256, 64, Dtype.I4, (128,)),
    Tensor("t", "activation", Space.DRAM, 320, 256, Dtype.I8, (256,)),
    Tensor("u", "activation", Space.DRAM, 576, 128, Dtype.I8, (128,)),
    Tensor("y", "output", Space.DRAM, 704, 192, Dtype.I8, (192,)),
)
CALL = HostCall(
    "host.0", ("erf",), "no NPU operator for Erf",
    (HostValue("a", 1, (4, 8), Dtype.F16, (1, 4)), HostValue("b", 21, (3, 5), Dtype.U4, (5, 1))),
    (HostValue("r", 1, (2, 16), Dtype.F16, (16, 1)), HostValue("s", 7, (), Dtype.I64, ())), 64, 128,
)  # fmt: skip
FLAGS = "n0=1 n1=1 n2=1 flags="
LISTING = """
core0.dma_in load n0=1 n1=1 bytes=64 dst=spad:i8@0x0+0,0,0 src=dram:i8@0x0+0,0,0
core0.dma_out store n0=1 n1=1 bytes=64 dst=dram:i8@0x140+0,0,0 src=spad:i8@0x0+0,0,0
core0.host host_load n0=1 n1=1 n2=1 flags=0 src=dram:f16@0x140+64,0,0
core0.host host_load n0=1 n1=1 n2=1 flags=1 src=dram:u4@0x100+8,0,0
core0.host host_run n0=1 n1=1 n2=1 flags=0
core0.host host_store n0=1 n1=1 n2=1 flags=0 dst=dram:f16@0x240+64,0,0
core0.host host_store n0=1 n1=1 n2=1 flags=1 dst=dram:i64@0x280+8,0,0
core0.dma_in load n0=1 n1=1 bytes=64 dst=spad:i8@0x400+0,0,0 src=dram:i8@0x240+0,0,0
core0.dma_out store n0=1 n1=1 bytes=64 dst=dram:i8@0x2c0+0,0,0 src=spad:i8@0x400+0,0,0
"""


def program(*edits: tuple[str, str], hosts: tuple[HostCall, ...] = (CALL,)) -> Program:
    """The call with textual edits, synchronised."""
    text = LISTING
    for old, new in edits:
        assert old in text, old
        text = text.replace(old, new)
    code = insert_semaphores(parse_listing(text)[0])
    return Program(code=code, kernels=(), tensors=TENSORS, ops=(), dram_bytes=896, cores=2, hosts=hosts)


def without(*lines: str) -> list[tuple[str, str]]:
    found = [next(text for text in LISTING.splitlines() if start in text) for start in lines]
    return [(text + "\n", "") for text in found]


def rejected(bad: Program) -> str:
    with pytest.raises(ProgramError) as caught:
        verify(bad, TARGET)
    return str(caught.value)


def test_a_call_is_accepted() -> None:
    verify(program(), TARGET)
    verify(program(hosts=(CALL, CALL)), TARGET)
    load = "core0.dma_in load n0=1 n1=1 bytes=64 dst=spad:i8@0x400"
    again = LISTING[LISTING.index("core0.host") : LISTING.index(load)]
    verify(program((load, again + load)), TARGET)


def test_waits_hold_the_host_and_its_neighbours_together() -> None:
    """Whatever wait is lost around the call, the verifier names both ends."""
    good = program()
    waits = list(zip(*np.nonzero(good.code[:, word.WAITS : word.WAITS + 2 * word.MAX_WAITS : 2]), strict=True))
    assert {2, 7} <= {int(i) for i, _ in waits}  # the first load of the call, and the load of its result
    for i, slot in waits:
        code = good.code.copy()
        code[i, word.WAITS + 2 * slot : word.WAITS + 2 * slot + 2] = 0
        assert f"instruction {i}: is not ordered after instruction" in rejected(good.with_code(code))
    for i in np.flatnonzero(good.code[:, word.SIGNAL]):
        code = good.code.copy()
        code[i, word.SIGNAL] = 0
        assert "deadlock" in rejected(good.with_code(code))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (f"host_load {FLAGS}1 ", f"host_load {FLAGS}65537 ", "call 1 of the host, the program has 1"),
        (f"host_run {FLAGS}0", f"host_run {FLAGS}-1", "call -1 of the host, the program has 1"),
        (f"host_run {FLAGS}0", f"host_run {FLAGS}1", "slot 1 of a run, which has none"),
        (f"host_load {FLAGS}1 ", f"host_load {FLAGS}2 ", "operand 2 of call 'host.0', which has 2"),
        (f"host_store {FLAGS}1 ", f"host_store {FLAGS}9 ", "result 9 of call 'host.0', which has 2"),
        ("src=dram:f16@0x140+64", "src=dram:f16@0x140+62", "moves 62 bytes, 'a' of call 'host.0' needs 64"),
        ("src=dram:f16@0x140+64", "src=dram:f16@0x140+66", "moves 66 bytes, 'a' of call 'host.0' needs 64"),
        ("src=dram:u4@0x100+8", "src=dram:u4@0x100+15", "moves 15 bytes, 'b' of call 'host.0' needs 8"),
        ("dst=dram:f16@0x240+64", "dst=dram:f16@0x240+32", "moves 32 bytes, 'r' of call 'host.0' needs 64"),
        ("dst=dram:i64@0x280+8", "dst=dram:i64@0x280+4", "moves 4 bytes, 's' of call 'host.0' needs 8"),
        ("src=dram:f16@0x140", "src=dram:f32@0x140", "'a' of call 'host.0' is f16 in memory"),
        ("dst=dram:i64@0x280", "dst=dram:f64@0x280", "'s' of call 'host.0' is i64 in memory"),
        ("src=dram:f16@0x140+64", "src=spad:f16@0x140+64", "src is spad:f16, allowed: dram of"),
        (" src=dram:u4@0x100+8,0,0", "", "lacks operand 0 of 1"),
        ("core0.host host_run", "core0.vector host_run", "belongs on a host queue, is on queue 3"),
        ("dst=dram:f16@0x240", "dst=dram:f16@0x100", "writes weight tensor 'w'"),
        ("dst=dram:f16@0x240", "dst=dram:f16@0x360", "touches dram bytes 864 to 928, limit 896"),
        ("core0.host host_run", "core1.host host_run", "call 'host.0' of the host is on queue 4 and on queue 9"),
    ],
)  # fmt: skip
def test_each_mistake_of_an_instruction_is_named(old: str, new: str, message: str) -> None:
    assert message in rejected(program((old, new)))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["host_load n0=1 n1=1 n2=1 flags=0"], "call 'host.0' runs before its operands [0] are loaded"),
        (["host_load n0=1 n1=1 n2=1 flags=0", "host_load n0=1 n1=1 n2=1 flags=1"], "operands [0, 1] are loaded"),
        (["host_run"], "result 0 of call 'host.0' is stored before it runs"),
    ],
)
def test_a_call_runs_between_its_loads_and_its_stores(lines: list[str], message: str) -> None:
    assert message in rejected(program(*without(*lines)))


def test_a_second_run_needs_its_operands_again() -> None:
    line = "core0.host host_run n0=1 n1=1 n2=1 flags=0\n"
    assert "runs before its operands [0, 1] are loaded" in rejected(program((line, line * 2)))


def test_a_store_before_the_run_is_rejected_although_the_queue_is_in_order() -> None:
    run = "core0.host host_run n0=1 n1=1 n2=1 flags=0\n"
    store = "core0.host host_store n0=1 n1=1 n2=1 flags=0 dst=dram:f16@0x240+64,0,0\n"
    assert "result 0 of call 'host.0' is stored before it runs" in rejected(program((run + store, store + run)))


@pytest.mark.parametrize(
    ("side", "change", "message"),
    [
        ("inputs", {"strides": (1,)}, "value 'a' has shape [4, 8] and strides [1]"),
        ("inputs", {"strides": (-1, 4)}, "value 'a' has shape [4, 8] and strides [-1, 4]"),
        ("inputs", {"shape": (-4, 8)}, "value 'a' has shape [-4, 8]"),
        ("outputs", {"strides": (1, 2)}, "value 'r' of shape [2, 16] has strides [1, 2]; results are row-major"),
        ("outputs", {"strides": (0, 1)}, "results are row-major"),
        ("inputs", {"shape": (1 << 40, 1 << 40)}, "needs "),
    ],
)
def test_each_mistake_of_an_entry_is_named(side: str, change: dict[str, Any], message: str) -> None:
    values = getattr(CALL, side)
    bad = replace(CALL, **{side: (replace(values[0], **change), *values[1:])})
    assert message in rejected(program(hosts=(bad,)))


@pytest.mark.parametrize(
    ("shape", "strides", "dtype", "expected"),
    [
        ((), (), Dtype.F64, 8), ((3, 4), (4, 1), Dtype.F32, 48), ((3, 4), (1, 3), Dtype.F32, 48),
        ((2, 3, 4), (0, 4, 1), Dtype.I8, 12), ((5,), (0,), Dtype.I64, 8), ((3, 0), (1, 1), Dtype.F32, 0),
        ((3,), (1,), Dtype.I4, 2), ((2, 2), (10, 1), Dtype.U8, 12), ((1, 7), (9, 1), Dtype.BOOL, 7),
    ],
)  # fmt: skip
def test_bytes_reach_from_the_first_to_the_last_element(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: Dtype, expected: int
) -> None:
    assert needed_bytes(HostValue("v", 1, shape, dtype, strides)) == expected
