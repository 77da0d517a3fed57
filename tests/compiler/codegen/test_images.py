"""Windows, pools and transpositions of images: random shapes, padding and places of operands, against numpy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_case import padded_taps, shapes, windows_spec
from kernel_bench import Bench, small_target

from firsttoken_compiler.codegen import images
from firsttoken_compiler.errors import AllocationError
from firsttoken_compiler.isa.types import Dtype, Space
from firsttoken_compiler.schedule.spec import Arg, KernelSpec
from firsttoken_compiler.schedule.windows import Rect, Windows

TARGET = small_target()
PLACES = st.sampled_from((Space.DRAM, Space.SPAD))


def image(shape: Windows, seed: int, dtype: Dtype) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal((shape.height * shape.width, shape.channels))
    return values.astype(dtype.numpy)


def executed(spec: KernelSpec, spaces: tuple[Space, ...], arrays: list[np.ndarray], limit: int) -> np.ndarray:
    try:
        template = images.build(spec, spaces, TARGET, (limit,))
    except AllocationError:
        template = images.build(spec, spaces, TARGET, (1 << 20,))
    else:
        assert template.scratch_bytes <= limit
    return Bench(spec, spaces, TARGET, (*spec.args, *spec.outs)).run(template, arrays)[0].astype(np.float64)


MODES = st.sampled_from(("max", "average", "factors", "depthwise"))
LIMITS = st.sampled_from((2048, 4096, 1 << 20))


@settings(max_examples=40, deadline=None)
@given(shapes(), st.tuples(PLACES, PLACES), st.sampled_from((Dtype.F16, Dtype.F32)), LIMITS, st.integers(0, 99))
def test_windows(shape: Windows, spaces: tuple[Space, Space], dtype: Dtype, limit: int, seed: int) -> None:
    spec = windows_spec("windows", shape, Dtype.F16, dtype=dtype)
    x = image(shape, seed, dtype)
    expected = padded_taps(x.reshape(shape.height, shape.width, -1), shape, 0.0).reshape(shape.pixels, -1)
    np.testing.assert_array_equal(executed(spec, spaces, [x], limit), expected.astype(np.float16))


@settings(max_examples=40, deadline=None)
@given(shapes(), st.tuples(PLACES, PLACES, PLACES), MODES, LIMITS, st.integers(0, 99))
def test_pools(shape: Windows, spaces: tuple[Space, ...], mode: str, limit: int, seed: int) -> None:
    x = image(shape, seed, Dtype.F16)
    taps = padded_taps(x.reshape(shape.height, shape.width, -1), shape, -np.inf if mode == "max" else 0.0)
    rows = (taps.shape[1] + 1, shape.channels) if mode == "depthwise" else (shape.pixels, 1)
    factors = np.random.default_rng(seed).uniform(0.1, 1, rows).astype(np.float32)
    more = (Arg(factors.shape, Dtype.F32),) if mode in ("factors", "depthwise") else ()
    name = "average" if mode == "factors" else mode
    spec = windows_spec("pool", shape, Dtype.F16, *more, mode=name, scale=0.25)
    expected = {
        "max": lambda: taps.max(axis=1), "average": lambda: taps.sum(axis=1) * 0.25,
        "factors": lambda: taps.sum(axis=1) * factors,
        "depthwise": lambda: (taps * factors[:-1]).sum(axis=1) + factors[-1],
    }[mode]()  # fmt: skip
    got = executed(spec, spaces if more else spaces[:2], [x, factors][: len(spec.args)], limit)
    np.testing.assert_allclose(got, expected, rtol=2**-10, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.tuples(PLACES, PLACES), LIMITS, st.booleans())
def test_transposition(rows: int, columns: int, spaces: tuple[Space, Space], limit: int, wide: bool) -> None:
    dtype = Dtype.F32 if wide else Dtype.F16
    spec = KernelSpec("transpose", (), (Arg((rows, columns), dtype),), (Arg((columns, rows), Dtype.F16),))
    x = np.random.default_rng(rows).standard_normal((rows, columns)).astype(dtype.numpy)
    np.testing.assert_array_equal(executed(spec, spaces, [x], limit), x.T.astype(np.float16))


def test_a_rectangle_without_its_inside_is_every_other_pixel_once() -> None:
    outer, inner = Rect(0, 5, 0, 6), Rect(1, 3, 2, 6)
    pixels = [
        (y, x) for r in outer.without(inner) for y in range(r.top, r.bottom) for x in range(r.left, r.right)
    ]
    assert len(pixels) == len(set(pixels)) == 30 - 8
    assert not any(1 <= y < 3 and x >= 2 for y, x in pixels)


def test_an_image_of_which_no_pixel_fits_names_the_remedy() -> None:
    shape = Windows(4, 64, 2048, (3, 3), (1, 1), (1, 1), (1, 1), (4, 64))
    with pytest.raises(AllocationError, match=r"one pixel of windows .* raise scratchpad\.bytes"):
        images.build(windows_spec("windows", shape, Dtype.F16), (Space.DRAM, Space.DRAM), TARGET, (4096,))


@pytest.mark.parametrize("kind", ["windows", "pool"])
def test_a_line_that_does_not_fit_is_cut_into_even_parts(kind: str) -> None:
    shape = Windows(4, 96, 8, (3, 3), (1, 1), (1, 1), (1, 1), (4, 96))
    more = {} if kind == "windows" else {"mode": "max", "scale": 1.0}
    spec, limit = windows_spec(kind, shape, Dtype.F16, **more), 12_000
    template = images.build(spec, (Space.DRAM, Space.DRAM), TARGET, (limit,))
    pixels = int(template.tile.removesuffix(" pixels"))
    assert 1 < pixels < 96
    assert 96 % pixels == 0
    assert template.scratch_bytes <= limit
    x = image(shape, 1, Dtype.F16)
    taps = padded_taps(x.reshape(4, 96, -1), shape, 0.0 if kind == "windows" else -np.inf)
    expected = taps.reshape(shape.pixels, -1) if kind == "windows" else taps.max(axis=1)
    got = Bench(spec, (Space.DRAM, Space.DRAM), TARGET, (*spec.args, *spec.outs)).run(template, [x])[0]
    np.testing.assert_array_equal(got, expected.astype(np.float16))


@given(st.integers(1, 7), st.integers(0, 40), st.integers(0, 40))
def test_pixels_in_a_row_are_few_rectangles(line: int, first: int, count: int) -> None:
    shape = Windows(99, line, 1, (1, 1), (1, 1), (0, 0), (1, 1), (99, line))
    rects = list(shape.rows(first, first + count))
    pixels = [y * line + x for r in rects for y in range(r.top, r.bottom) for x in range(r.left, r.right)]
    assert pixels == list(range(first, first + count))
    assert len(rects) <= 3
