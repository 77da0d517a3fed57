"""Weights stored quantised: the integers, scales and zero points of the file come back out of the panels."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firsttoken_compiler.codegen import weights
from firsttoken_compiler.codegen.weights import materialise, packed_bytes
from firsttoken_compiler.errors import ProgramError
from firsttoken_compiler.isa.program import Packing, Program, Tensor
from firsttoken_compiler.isa.types import Dtype, Space, unpack_int4


def image(packing: Packing, dtype: Dtype, array: np.ndarray) -> np.ndarray:
    """The bytes of one tensor."""
    nbytes = packed_bytes(packing)
    tensor = Tensor("w", "weight", Space.DRAM, 0, nbytes, dtype, (packing.k, packing.n), packing)
    out = np.full(nbytes, 0xEE, np.uint8)

    def write(address: int, data: np.ndarray) -> None:
        out[address : address + data.size] = data

    materialise(Program(np.zeros((0, 0), np.int64), (), (tensor,), ()), lambda _name: array, write)
    return out


def read(packing: Packing, dtype: Dtype, data: np.ndarray, rows: int) -> np.ndarray:
    """`[rows, n]` out of panels, as the units read them."""
    parts, at = [], 0
    for first in range(0, packing.n, packing.panel):
        width = min(packing.panel, packing.n - first)
        row = dtype.nbytes(width)
        block = data[at : at + rows * row].reshape(rows, row)
        parts.append(unpack_int4(block)[:, :width] if dtype is Dtype.I4 else block.view(dtype.numpy)[:, :width])
        at += rows * row
    assert at == data.size
    return np.concatenate(parts, axis=1)


def blob(values: np.ndarray, bits: int, block: int) -> np.ndarray:
    """Unsigned `[k, n]` as MatMulNBits keeps them: `[n, blocks, bytes]`, padded with zeros."""
    k, n = values.shape
    padded = np.zeros((n, -(-k // block) * block), np.uint8)
    padded[:, :k] = values.T
    if bits == 4:
        padded = padded[:, 0::2] | padded[:, 1::2] << 4
    return padded.reshape(n, -(-k // block), -1)


@settings(max_examples=80, deadline=None)
@given(
    st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 12).map(lambda half: 2 * half)),
    st.sampled_from([4, 8]), st.sampled_from(["kn", "nk", "blob"]), st.booleans(), st.integers(0, 999),
    st.sampled_from([1, 1 << 20]),
)  # fmt: skip
def test_the_integers_are_those_of_the_file(
    shape: tuple[int, int, int], bits: int, layout: str, unsigned: bool, seed: int, block: int
) -> None:
    k, n, panel = shape
    unsigned = unsigned or layout == "blob"
    middle = 1 << (bits - 1)
    values = np.random.default_rng(seed).integers(0, 2 * middle, (k, n))
    dtype = {(4, False): ml_dtypes.int4, (4, True): ml_dtypes.uint4, (8, False): np.int8, (8, True): np.uint8}
    stored = (values - (0 if unsigned else middle)).astype(dtype[bits, unsigned])
    array = {"kn": stored, "nk": stored.T, "blob": blob(values, bits, 16)}[layout]
    packing = Packing("w", "stored", k, n, panel, bits, k, False, layout, middle if unsigned else 0)
    kind = {4: Dtype.I4, 8: Dtype.I8}[bits]
    before, weights.BLOCK_ELEMENTS = weights.BLOCK_ELEMENTS, block  # type: ignore[misc]
    try:
        assert np.array_equal(read(packing, kind, image(packing, kind, array), k), values - middle)
    finally:
        weights.BLOCK_ELEMENTS = before  # type: ignore[misc]


@pytest.mark.parametrize("group", [5, 16, 40])
def test_sums_are_those_of_each_group(group: int) -> None:
    values = np.random.default_rng(0).integers(-128, 128, (40, 7)).astype(np.int8)
    packing = Packing("w", "sums", 40, 7, 4, 8, group, False, "kn")
    expected = [values[at : at + group].astype(int).sum(axis=0) for at in range(0, 40, group)]
    assert np.array_equal(read(packing, Dtype.F32, image(packing, Dtype.F32, array=values), len(expected)), expected)


@pytest.mark.parametrize(
    ("layout", "dtype"), [("gn", Dtype.F32), ("ng", Dtype.F16), ("n", Dtype.F32), ("one", Dtype.F32)]
)
def test_scales_are_those_of_the_file(layout: str, dtype: Dtype) -> None:
    k, n, group = 40, 7, 16
    scales = np.random.default_rng(0).uniform(0.1, 1, (3, n)).astype(dtype.numpy)
    array = {"gn": scales, "ng": np.ascontiguousarray(scales.T), "n": scales[0], "one": scales[0, 0]}[layout]
    expected = {"n": np.tile(scales[0], (3, 1)), "one": np.full((3, n), scales[0, 0])}.get(layout, scales)
    packing = Packing("s", "vectors", k, n, 4, dtype.bits, group, False, layout)
    assert np.array_equal(read(packing, dtype, image(packing, dtype, np.asarray(array)), 3), expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_zero_points_lose_the_middle_of_their_range(bits: int) -> None:
    k, n, group = 48, 5, 16
    zeros = np.random.default_rng(1).integers(0, 1 << bits, (3, n)).astype(np.uint8)
    padded = np.concatenate([zeros, np.zeros((1, n), np.uint8)]).T
    packed = padded[:, 0::2] | padded[:, 1::2] << 4 if bits == 4 else np.ascontiguousarray(zeros.T)
    middle = 1 << (bits - 1)
    packing = Packing("z", "vectors", k, n, 4, 8, group, False, f"blob{bits}", middle)
    assert np.array_equal(read(packing, Dtype.I8, image(packing, Dtype.I8, packed), 3), zeros.astype(int) - middle)


def test_parts_of_a_group_share_its_scale() -> None:
    scales = np.random.default_rng(2).uniform(0.1, 1, (2, 5)).astype(np.float32)
    packing = Packing("s", "vectors", 96, 5, 4, 32, 32, False, "gn:64")
    assert np.array_equal(read(packing, Dtype.F32, image(packing, Dtype.F32, scales), 3), scales[[0, 0, 1]])


@pytest.mark.parametrize(
    ("change", "array", "message"),
    [
        ({}, np.zeros((3, 4), np.int8), "has shape (3, 4)"),
        ({"bits": 4}, np.full((4, 4), 9, np.int8), "not of 4 bits"),
        ({"layout": "xy"}, np.zeros((4, 4), np.int8), "unknown layout 'xy'"),
        ({"form": "vectors", "bits": 32, "layout": "gn:6"}, np.zeros((1, 4), np.float32), "no parts of groups of 6"),
        ({"bits": 16}, np.zeros((4, 4), np.int8), "of 16 bits"),
        ({"group": 0}, np.zeros((4, 4), np.int8), "groups of 0 rows"),
        ({"form": "vectors", "layout": "n", "bits": 32}, np.full(4, np.nan, np.float32), "not finite"),
        ({"form": "vectors", "layout": "n", "bits": 32}, np.ones(3, np.float32), "has shape (3,)"),
        ({"layout": "blob"}, np.zeros((4, 1), np.uint8), "4 rows of at least 4 weights"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(change: dict[str, object], array: np.ndarray, message: str) -> None:
    fields: dict[str, object] = {
        "source": "w", "form": "stored", "k": 4, "n": 4, "panel": 4, "bits": 8, "group": 4, "transposed": False,
        "layout": "kn",
    }  # fmt: skip
    packing = Packing(**{**fields, **change})  # type: ignore[arg-type]
    dtype = {4: Dtype.I4, 8: Dtype.I8, 16: Dtype.F16, 32: Dtype.F32}[packing.bits]
    tensor = Tensor("w", "weight", Space.DRAM, 0, 64, dtype, (4, 4), packing)
    with pytest.raises(ProgramError, match=message.replace("(", r"\(").replace(")", r"\)")):
        materialise(Program(np.zeros((0, 0), np.int64), (), (tensor,), ()), lambda _name: array, lambda *_: None)
