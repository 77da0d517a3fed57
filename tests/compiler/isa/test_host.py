"""Host instructions: flags, footprints, and what they move between memory and a call."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from firsttoken_compiler.isa.dma import dram
from firsttoken_compiler.isa.host import SLOT_BITS, HostLoad, HostRun, HostStore, host_flags
from firsttoken_compiler.isa.instruction import REGION_COLUMNS
from firsttoken_compiler.isa.opcodes import decode, parse, regions
from firsttoken_compiler.isa.types import Dtype, Engine, Space, queue_index

QUEUE = queue_index(0, Engine.HOST)


@dataclass
class Call:
    """Remembers what it was told, and returns its results."""

    results: list[np.ndarray] = field(default_factory=list)
    loaded: dict[int, np.ndarray] = field(default_factory=dict)
    runs: int = 0

    def load(self, slot: int, data: np.ndarray) -> None:
        self.loaded[slot] = data

    def run(self) -> None:
        self.runs += 1

    def result(self, slot: int) -> np.ndarray:
        return self.results[slot]


class Machine:
    """256 bytes of DRAM that count up, and calls by number."""

    def __init__(self, **calls: Call) -> None:
        self.dram = np.arange(256, dtype=np.uint8)
        self.calls = calls

    def bytes(self, space: Space, core: int) -> np.ndarray:
        assert (space, core) == (Space.DRAM, 0)
        return self.dram

    def kernel(self, index: int) -> Any:
        raise AssertionError("host instructions have no microprogram")

    def host_call(self, index: int) -> Call:
        return self.calls[f"c{index}"]


def transfer(kind: type[HostLoad] | type[HostStore], address: int, nbytes: int, call: int = 0, slot: int = 0) -> Any:
    return kind(
        queue=QUEUE, flags=host_flags(call, slot), dims=(1, 1, 1), operands=(dram(Dtype.I8, address, nbytes),)
    )


def run(call: int = 0) -> HostRun:
    return HostRun(queue=QUEUE, flags=host_flags(call), dims=(1, 1, 1), operands=())


@given(st.integers(0, 1 << 40), st.integers(0, (1 << SLOT_BITS) - 1))
def test_flags_hold_call_and_slot(call: int, slot: int) -> None:
    instruction = decode(transfer(HostLoad, 0, 4, call, slot).encode())
    assert isinstance(instruction, HostLoad)
    assert (instruction.call, instruction.slot) == (call, slot)
    assert parse(str(instruction)) == instruction


def test_text_form_is_the_documented_one() -> None:
    assert str(transfer(HostLoad, 64, 32, call=1, slot=2)) == (
        "core0.host host_load op=0 n0=1 n1=1 n2=1 flags=65538 src=dram:i8@0x40+32,0,0"
    )
    assert str(transfer(HostStore, 64, 32)) == (
        "core0.host host_store op=0 n0=1 n1=1 n2=1 flags=0 dst=dram:i8@0x40+32,0,0"
    )
    assert str(run(3)) == "core0.host host_run op=0 n0=1 n1=1 n2=1 flags=196608"


def test_footprints_are_the_bytes_of_loads_and_stores_and_nothing_of_runs() -> None:
    code = np.stack([transfer(HostLoad, 10, 7).encode(), run().encode(), transfer(HostStore, 99, 3).encode()])
    table = regions(code)
    at = {name: REGION_COLUMNS.index(name) for name in ("instruction", "write", "space", "address", "run")}
    touched = table[table[:, at["run"]] > 0][:, list(at.values())]
    assert touched.tolist() == [[0, 0, Space.DRAM, 10, 7], [2, 1, Space.DRAM, 99, 3]]


def test_a_load_takes_its_operand_as_it_is_at_that_moment() -> None:
    call = Call()
    machine = Machine(c0=Call(), c2=call)
    transfer(HostLoad, 16, 4, call=2, slot=1).execute(machine)
    machine.dram[:] = 0
    assert call.loaded[1].tolist() == [16, 17, 18, 19]
    assert not machine.calls["c0"].loaded
    run(2).execute(machine)
    assert (call.runs, machine.calls["c0"].runs) == (1, 0)


def test_a_store_writes_its_result_and_nothing_else() -> None:
    machine = Machine(c0=Call(results=[np.zeros(2, np.uint8), np.full(3, 200, np.uint8)]))
    transfer(HostStore, 8, 3, slot=1).execute(machine)
    expected = np.arange(256, dtype=np.uint8)
    expected[8:11] = 200
    np.testing.assert_array_equal(machine.dram, expected)


def test_a_result_of_another_size_is_an_error() -> None:
    machine = Machine(c0=Call(results=[np.zeros(2, np.uint8)]))
    with pytest.raises(ValueError, match="result has 2 bytes, the program expects 3"):
        transfer(HostStore, 0, 3).execute(machine)
    np.testing.assert_array_equal(machine.dram, np.arange(256, dtype=np.uint8))


@pytest.mark.parametrize("kind", [HostLoad, HostStore])
@pytest.mark.parametrize(("address", "nbytes"), [(-1, 4), (253, 4), (256, 1), (0, 257), (8, -4), (1 << 60, 1)])
def test_accesses_outside_the_memory_are_errors(kind: Any, address: int, nbytes: int) -> None:
    machine = Machine(c0=Call(results=[np.zeros(4, np.uint8)]))
    with pytest.raises(ValueError, match="of a memory of 256 bytes"):
        transfer(kind, address, nbytes).execute(machine)


def test_a_transfer_without_its_operand_is_an_error() -> None:
    bare = HostLoad(queue=QUEUE, dims=(1, 1, 1), operands=())
    with pytest.raises(ValueError, match="host_load lacks its operand 'src'"):
        bare.execute(Machine(c0=Call()))
