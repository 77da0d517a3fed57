"""Weights in blocks: the planes of a product come back out of the panels, of blocks and of floats made blocks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firsttoken_compiler.codegen.weights import materialise, packed_bytes
from firsttoken_compiler.errors import ProgramError
from firsttoken_compiler.formats.planes import split
from firsttoken_compiler.formats.quantise import quantise
from firsttoken_compiler.formats.types import BLOCK_TYPES
from firsttoken_compiler.isa.program import Packing, Program, Tensor
from firsttoken_compiler.isa.types import PACKED, Dtype, Space, unpack
from firsttoken_compiler.passes.stored import Part, block_parts
from firsttoken_compiler.schedule.spec import DTYPES


def images(parts: dict[str, Part], array: np.ndarray) -> dict[str, np.ndarray]:
    """The bytes of all planes, made at once."""
    tensors, at = [], 0
    for name, part in parts.items():
        nbytes = packed_bytes(part.packing)
        tensors.append(Tensor(name, "weight", Space.DRAM, at, nbytes, DTYPES[part.dtype], part.shape, part.packing))
        at += nbytes
    out = np.full(at, 0xEE, np.uint8)

    def write(address: int, data: np.ndarray) -> None:
        out[address : address + data.size] = data

    materialise(Program(np.zeros((0, 0), np.int64), (), tuple(tensors), ()), lambda _name: array, write)
    return {tensor.name: out[tensor.address : tensor.address + tensor.nbytes] for tensor in tensors}


def read(part: Part, data: np.ndarray) -> np.ndarray:
    """`[rows, n]` out of panels, as the units read them."""
    dtype, (rows, n), panel = DTYPES[part.dtype], part.shape, part.packing.panel
    columns, at = [], 0
    for first in range(0, n, panel):
        width = min(panel, n - first)
        row = dtype.nbytes(width)
        block = data[at : at + rows * row].reshape(rows, row)
        columns.append(unpack(block, dtype)[:, :width] if dtype in PACKED else block.view(dtype.numpy))
        at += rows * row
    assert at == data.size
    return np.concatenate(columns, axis=1)


@pytest.mark.parametrize("name", BLOCK_TYPES)
@settings(max_examples=6, deadline=None)
@given(st.integers(1, 2), st.integers(1, 40), st.sampled_from([8, 16]), st.sampled_from(["blocks", "nk", "kn"]))
def test_planes_come_back(name: str, blocks: int, n: int, panel: int, source: str) -> None:
    kind = BLOCK_TYPES[name]
    k = blocks * kind.block
    rows = np.random.default_rng(n).standard_normal((n, k), np.float32)
    made = quantise(rows, kind)
    array = {"blocks": made, "nk": rows, "kn": np.ascontiguousarray(rows.T)}[source]
    parts = block_parts("w", name, k, n, panel, stored=source == "blocks", transposed=source == "nk")
    expected = split(made, kind)
    found = images(parts, array)
    for plane, part in parts.items():
        shift = part.packing.shift
        np.testing.assert_array_equal(read(part, found[plane]), expected[plane].astype(part_type(part)) - shift)
    if n % 8 == 0:
        assert sum(data.size for data in found.values()) == made.size


def part_type(part: Part) -> type:
    return np.float16 if part.dtype == "float16" else np.int16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": "q9_k:low"}, "names no plane of blocks"), ({"layout": "q4_k:none"}, "names no plane of blocks"),
        ({"bits": 8}, "is no recipe of plane low of q4_k"), ({"group": 2}, "is no recipe of plane low"),
        ({"k": 255}, "is no recipe of plane low"), ({"panel": 6}, "is no recipe of plane low"),
        ({"n": 0}, "is no recipe of plane low"), ({"n": 9}, "the tensor has"),
        ({"shift": 3}, "is no recipe of plane low"),
    ],
)  # fmt: skip
def test_recipes_that_cannot_be(change: dict[str, object], message: str) -> None:
    good = Packing("w", "planes", 256, 8, 8, 4, 1, False, "q4_k:low")
    packing = replace(good, **change)  # type: ignore[arg-type]
    tensor = Tensor("w", "weight", Space.DRAM, 0, packed_bytes(good), Dtype.U4, (256, 8), packing)
    program = Program(np.zeros((0, 0), np.int64), (), (tensor,), ())
    with pytest.raises(ProgramError, match=message):
        materialise(program, lambda _name: np.zeros((8, 144), np.uint8), lambda _address, _data: None)


@pytest.mark.parametrize(
    ("stored", "array", "message"),
    [
        (True, np.zeros((8, 143), np.uint8), r"expects blocks uint8\[8, 144\]"),
        (True, np.zeros((8, 144), np.int8), "int8"),
        (False, np.zeros((255, 8), np.float32), r"its packing expects \(256, 8\)"),
        (False, np.full((256, 8), np.nan, np.float32), "not finite"),
    ],
)
def test_sources_that_do_not_fit(stored: bool, array: np.ndarray, message: str) -> None:
    with pytest.raises(ProgramError, match=message):
        images(block_parts("w", "q4_k", 256, 8, 8, stored=stored), array)
