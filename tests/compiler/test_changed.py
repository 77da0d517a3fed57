"""A target with other values is held to what a target file may say."""

import pytest

from firsttoken_compiler.errors import TargetError
from firsttoken_compiler.target.changed import checked, path_of, with_values
from firsttoken_compiler.target.target import Target

BASE = Target.load("systolic-128")


def test_paths_in_full_and_with_an_underscore() -> None:
    assert path_of(BASE, "scratchpad.bytes") == "scratchpad.bytes"
    assert path_of(BASE, "scratchpad_bytes") == "scratchpad.bytes"
    assert path_of(BASE, "clock_hz") == "npu.clock_hz"
    assert path_of(BASE, "dram_trcd_ns") == "dram.trcd_ns"
    with pytest.raises(TargetError, match=r"nearest: dma\.outstanding"):
        path_of(BASE, "dma.outstandin")


def test_values_take_the_type_of_what_they_replace() -> None:
    values = {"npu.clock_hz": 2_000_000_000, "dma.decoupled": False, "scratchpad.bytes": 64e6}
    made = checked(BASE, values, "a test")
    assert type(made.clock_hz) is float
    assert type(made.scratchpad.bytes) is int
    assert made.dma.decoupled is False
    assert made.provenance["npu.clock_hz"].grade == "assumed"
    assert made.provenance["npu.clock_hz"].source == "a test"
    assert BASE.scratchpad.bytes != made.scratchpad.bytes
    assert with_values(BASE, {"scratchpad.bytes": BASE.scratchpad.bytes}) == BASE


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("scratchpad.bytes", 100, "must be 1024 to"),
        ("scratchpad.bytes", 2048.5, "must be a whole number"),
        ("scratchpad.banks", 3, "must be a power of two"),
        ("dram.map", "sideways", "must be one of bank-interleaved"),
        ("matrix.dataflow", "xs", "must be one of ws"),
        ("matrix.macs_per_cycle.int8xint8", 1 << 24, "what one issue of the unit holds"),
        ("dma.decoupled", 1, "must be true or false"),
        ("npu.clock_hz", "fast", "must be a number"),
        ("dram.refresh", 3, "must be of the kind of"),
    ],
)
def test_values_that_no_file_may_have(path: str, value: object, said: str) -> None:
    with pytest.raises(TargetError, match=said):
        checked(BASE, {path: value}, "a test")


def test_a_band_that_does_not_hold_the_new_value_is_dropped() -> None:
    path = next(iter(BASE.bounds))
    low, high = BASE.bounds[path]
    assert checked(BASE, {path: (low + high) / 2}, "a test").bounds[path] == (low, high)
    assert path not in checked(BASE, {path: high * 1.01}, "a test").bounds
