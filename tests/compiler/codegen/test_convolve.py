"""Convolutions whose windows are made tile by tile: random shapes, places of operands and sizes of the scratchpad."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_case import padded_taps, shapes, windows_spec
from kernel_bench import Bench, small_target

from firsttoken_compiler.codegen import convolve
from firsttoken_compiler.codegen.build import build
from firsttoken_compiler.errors import AllocationError
from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.dma import Load
from firsttoken_compiler.isa.matmul import Matmul
from firsttoken_compiler.isa.types import Dtype, Space
from firsttoken_compiler.isa.vector import Vector
from firsttoken_compiler.schedule.conv import part_of
from firsttoken_compiler.schedule.linear import Tile
from firsttoken_compiler.schedule.spec import Arg, KernelSpec
from firsttoken_compiler.schedule.tiling import Room
from firsttoken_compiler.schedule.windows import Windows
from firsttoken_compiler.target.target import Target

TARGET = small_target()
PLACES = st.sampled_from((Space.DRAM, Space.SPAD))


def conv_spec(shape: Windows, n: int, dtype: Dtype = Dtype.F16) -> KernelSpec:
    """With bias and residual."""
    windows = windows_spec("windows", shape, Dtype.F16, dtype=dtype)
    k = windows.outs[0].shape[1]
    product = {"n": n, "k": k, "acts": "fp16", "bits": 16, "group": 0, "bias": 1, "residual": 1}
    args = (*windows.args, Arg((k, n), Dtype.F16), Arg((n,), Dtype.F16), Arg((shape.pixels, n), Dtype.F16))
    params = tuple(sorted({**dict(windows.params), **product}.items()))
    return KernelSpec("conv", params, args, (Arg((shape.pixels, n), Dtype.F32),))


WALKING = replace(TARGET, matrix=replace(TARGET.matrix, windows=True))


def check(
    shape: Windows, n: int, spaces: tuple[Space, ...], dtype: Dtype, limit: int, seed: int, target: Target = TARGET
) -> str:
    """Compares with numpy; returns the tile."""
    spec, random = conv_spec(shape, n, dtype), np.random.default_rng(seed)
    arrays = [random.standard_normal(arg.shape).astype(arg.dtype.numpy) for arg in spec.args]
    template = build(spec, spaces, target, Room(limit, 1 << 20))
    products = template.code[template.code[:, word.OPCODE] == Matmul.OPCODE][:, word.DIMS : word.DIMS + 3]
    assert products.prod(axis=1).sum() == shape.pixels * n * spec["k"]
    bench = Bench(spec, spaces, target, (*spec.args, *spec.outs), panels=(1,))
    (got,) = bench.run(template, arrays)
    x, w, bias, residual = (array.astype(np.float64) for array in arrays)
    x = x.astype(np.float16).astype(np.float64)
    taps = padded_taps(x.reshape(shape.height, shape.width, -1), shape, 0.0).reshape(shape.pixels, -1)
    np.testing.assert_allclose(got, taps @ w + bias + residual, rtol=1e-4, atol=1e-4)
    return template.tile


@settings(max_examples=25, deadline=None)
@given(
    shapes(), st.integers(1, 20), st.tuples(PLACES, st.just(Space.DRAM), st.just(Space.DRAM), PLACES, PLACES),
    st.sampled_from((Dtype.F16, Dtype.F32)), st.sampled_from((6000, 12000, 1 << 20)), st.integers(0, 99),
)  # fmt: skip
def test_convolution(
    shape: Windows, n: int, spaces: tuple[Space, ...], dtype: Dtype, limit: int, seed: int
) -> None:
    check(shape, n, spaces, dtype, limit, seed)


@settings(max_examples=40, deadline=None)
@given(
    shapes(), st.integers(1, 20), st.tuples(PLACES, st.just(Space.DRAM), st.just(Space.DRAM), PLACES, PLACES),
    st.sampled_from((Dtype.F16, Dtype.F32)), st.sampled_from((4000, 9000, 1 << 20)), st.integers(0, 99),
)  # fmt: skip
def test_convolution_whose_windows_the_unit_walks(
    shape: Windows, n: int, spaces: tuple[Space, ...], dtype: Dtype, limit: int, seed: int
) -> None:
    check(shape, n, spaces, dtype, limit, seed, WALKING)


@pytest.mark.parametrize("whole", [False, True])
def test_a_unit_that_walks_windows_needs_no_copies(whole: bool) -> None:
    """Vector instructions fill the padding and finish the sums; the image is read once where it is there at once."""
    shape = Windows(8, 8, 16, (3, 3), (1, 1), (1, 1), (1, 1), (8, 8))
    spec, spaces, tile = conv_spec(shape, 24), (Space.DRAM,) * 5, Tile(16, 1, 144)
    walked = convolve.build(spec, spaces, WALKING, replace(tile, whole=whole)).code
    copied = convolve.build(spec, spaces, TARGET, tile).code
    elements = [
        code[code[:, word.OPCODE] == Vector.OPCODE][:, word.DIMS : word.DIMS + 3].prod(axis=1).sum()
        for code in (walked, copied)
    ]
    finished, windows, columns = 64 * 24, 64 * 144, 3
    padding = (100 - 64) * 16 if whole else columns * (4 * 4 * 10 - 2 * 3 * 8 - 2 * 4 * 8) * 16
    assert elements[0] == finished + padding
    if not whole:
        assert elements[1] == finished + padding + columns * windows
    products = walked[walked[:, word.OPCODE] == Matmul.OPCODE]
    assert len(products) == columns * 8 * 3
    assert set(products[:, word.DIMS].tolist()) == {8}
    assert set(products[:, word.DIMS + 2].tolist()) == {48}
    loads = walked[walked[:, word.OPCODE] == Load.OPCODE]
    assert (loads[:, word.DIMS : word.DIMS + 3].prod(axis=1) == 8 * 8 * 16 * 2).sum() == int(whole)


@pytest.mark.parametrize("limit", [6000, 20000])
def test_tiles_of_lines_and_of_parts_of_lines(limit: int) -> None:
    """Several tiles of pixels, columns and k, with padding all around."""
    shape = Windows(9, 120, 16, (3, 3), (1, 1), (1, 1), (1, 1), (9, 120))
    tile = check(shape, 24, (Space.DRAM,) * 5, Dtype.F16, limit, 1)
    assert int(tile.split("x")[0]) < shape.pixels


@pytest.mark.parametrize("stride", [1, 2])
def test_parts_of_a_line_fetch_the_pixels_that_they_need(stride: int) -> None:
    shape = Windows(4, 240 * stride, 8, (3, 5), (stride, stride), (1, 2), (1, 1), (4 // stride, 240))
    tile = check(shape, 8, (Space.DRAM,) * 5, Dtype.F16, 14000, 2)
    assert part_of(shape, int(tile.split("x")[0])) > 0


def test_no_tile_that_fits_names_the_remedy() -> None:
    shape = Windows(3, 4096, 64, (3, 3), (1, 1), (1, 1), (1, 1), (3, 4096))
    with pytest.raises(AllocationError, match=r"no tile of a convolution .* raise scratchpad\.bytes"):
        build(conv_spec(shape, 8), (Space.DRAM,) * 5, TARGET, Room(4096, 8192))


def integer_spec(shape: Windows, n: int, outside: int) -> KernelSpec:
    """int8 throughout, with bias and residual in units of the result."""
    windows = windows_spec("windows", shape, Dtype.I8, dtype=Dtype.I8, outside=outside)
    k = windows.outs[0].shape[1]
    product = {"n": n, "k": k, "acts": "int8", "bits": 8, "group": k, "bias": 1, "residual": 1, "requantised": 1}
    product["residual_scaled"] = 1
    one, wide = Arg((1, 1), Dtype.F32), Arg((shape.pixels, n), Dtype.I8)
    args = (*windows.args, Arg((k, n), Dtype.I8), one, Arg((1, n), Dtype.F32), Arg((n,), Dtype.F32), wide, one)
    return KernelSpec("conv", tuple(sorted({**dict(windows.params), **product}.items())), args, (wide,))


INTEGER_TARGETS = [TARGET, WALKING]
POINTS = Windows(9, 12, 32, (1, 1), (2, 2), (0, 0), (1, 1), (5, 6))
"""One pixel of four is read."""


def check_integers(
    shape: Windows, n: int, outside: int, spaces: tuple[Space, ...], target: Target, seed: int, tile: Tile | None = None
) -> np.ndarray:
    """Within a step of numpy's; returns the code."""
    spec, random = integer_spec(shape, n, outside), np.random.default_rng(seed)
    shapes_ = [arg.shape for arg in spec.args]
    x, w, residual = (random.integers(-128, 128, shapes_[i]).astype(np.int8) for i in (0, 1, 5))
    scale, r_scale = np.full((1, 1), 0.01, np.float32), np.full((1, 1), 0.3, np.float32)
    scales, bias = (random.random(shapes_[i]).astype(np.float32) for i in (3, 4))
    bench = Bench(spec, spaces, target, (*spec.args, *spec.outs), panels=(1, 3))
    room = Room(20000, 1 << 20)
    template = build(spec, spaces, target, room) if tile is None else convolve.build(spec, spaces, target, tile)
    (got,) = bench.run(template, [x, w, scale, scales, bias, residual, r_scale])
    taps = padded_taps(x.reshape(shape.height, shape.width, -1), shape, outside).reshape(shape.pixels, -1)
    sums = taps @ w.astype(np.float64) * 0.01 * scales + bias + residual * 0.3
    assert np.abs(got.astype(np.int64) - np.clip(np.rint(sums), -128, 127)).max() <= 1
    return template.code


@settings(max_examples=30, deadline=None)
@given(
    shapes(), st.integers(1, 20), st.sampled_from((0, -128, 5)), st.tuples(PLACES, *[st.just(Space.DRAM)] * 4, PLACES),
    PLACES, st.sampled_from(INTEGER_TARGETS), st.integers(0, 99),
)  # fmt: skip
def test_integers_with_a_zero_point_in_the_padding(
    shape: Windows, n: int, outside: int, spaces: tuple[Space, ...], out: Space, target: Target, seed: int
) -> None:
    check_integers(shape, n, outside, (*spaces, Space.DRAM, out), target, seed)


@pytest.mark.parametrize("tile", [Tile(30, 1, 32, whole=True), Tile(12, 2, 16), Tile(4, 1, 32)])
@pytest.mark.parametrize("target", INTEGER_TARGETS)
def test_steps_over_integers_fetch_the_pixels_that_they_read_alone(tile: Tile, target: Target) -> None:
    code = check_integers(POINTS, 40, 0, (Space.DRAM,) * 8, target, 3, tile)
    loads = code[code[:, word.OPCODE] == Load.OPCODE][:, word.DIMS : word.DIMS + 3].tolist()
    lines, width = -(-min(tile.m, 30) // 6), min(tile.m, 6)
    assert loads.count([lines, width, tile.k]) + loads.count([1, width, lines * tile.k]) >= (1 if tile.whole else 3)
    vectors = code[code[:, word.OPCODE] == Vector.OPCODE][:, word.DIMS : word.DIMS + 3].prod(axis=1).sum()
    assert vectors == POINTS.pixels * 40  # nothing is copied, results are finished
