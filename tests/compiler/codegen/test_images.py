"""Windows, pools and transpositions of images: random shapes, padding and places of operands, against numpy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_bench import Bench, small_target

from firsttoken_compiler.codegen import images
from firsttoken_compiler.errors import AllocationError
from firsttoken_compiler.isa.types import Dtype, Space
from firsttoken_compiler.schedule.spec import Arg, KernelSpec
from firsttoken_compiler.schedule.windows import Rect, Windows

TARGET = small_target()
PLACES = st.sampled_from((Space.DRAM, Space.SPAD))


def windows_spec(
    kind: str, shape: Windows, out: Dtype, *more: Arg, dtype: Dtype = Dtype.F16, **params: object
) -> KernelSpec:
    width = shape.channels * (shape.kernel[0] * shape.kernel[1] if kind == "windows" else 1)
    params |= {"width": shape.width, "out_y": shape.out[0], "out_x": shape.out[1]}
    pairs = {"kernel": shape.kernel, "stride": shape.stride, "pad": shape.before, "dilation": shape.dilation}
    for name, pair in pairs.items():
        params |= {f"{name}_y": pair[0], f"{name}_x": pair[1]}
    image = Arg((shape.height * shape.width, shape.channels), dtype)
    return KernelSpec(kind, tuple(sorted(params.items())), (image, *more), (Arg((shape.pixels, width), out),))  # type: ignore[arg-type]


def padded_taps(x: np.ndarray, shape: Windows, outside: float) -> np.ndarray:
    """[pixels, taps, channels] of an image [height, width, channels]."""
    (oy, ox), found = shape.out, []
    steps = zip(shape.out, shape.stride, shape.kernel, shape.dilation, strict=True)
    far = [(n - 1) * s + (k - 1) * d + 1 for n, s, k, d in steps]
    room = np.full((far[0] + shape.height, far[1] + shape.width, shape.channels), outside, np.float64)
    top, left = shape.before
    room[top : top + shape.height, left : left + shape.width] = x
    for ky, kx in shape.taps():
        y, z = ky * shape.dilation[0], kx * shape.dilation[1]
        (sy, sx) = shape.stride
        part = room[y : y + (oy - 1) * sy + 1 : sy, z : z + (ox - 1) * sx + 1 : sx]
        found.append(part.reshape(shape.pixels, shape.channels))
    return np.stack(found, axis=1)


@st.composite
def shapes(draw: st.DrawFn) -> Windows:
    number = st.integers
    height, width, channels = draw(number(1, 9)), draw(number(1, 9)), draw(number(1, 9))
    kernel, stride, dilation = ((draw(number(1, n)), draw(number(1, n))) for n in (4, 3, 2))
    before = tuple(draw(number(0, k - 1)) for k in kernel)
    after = tuple(draw(number(0, k - 1)) for k in kernel)
    out = tuple(
        (n + b + a - (k - 1) * d - 1) // s + 1
        for n, b, a, k, d, s in zip((height, width), before, after, kernel, dilation, stride, strict=True)
    )
    if min(out) < 1:
        kernel, before, out = (1, 1), (0, 0), (-(-height // stride[0]), -(-width // stride[1]))
    return Windows(height, width, channels, kernel, stride, before, dilation, out)  # type: ignore[arg-type]


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


MODES = st.sampled_from(("max", "average", "factors"))
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
    factors = np.random.default_rng(seed).uniform(0.1, 1, (shape.pixels, 1)).astype(np.float32)
    more = (Arg(factors.shape, Dtype.F32),) if mode == "factors" else ()
    spec = windows_spec("pool", shape, Dtype.F16, *more, mode="max" if mode == "max" else "average", scale=0.25)
    scaled = taps.sum(axis=1) * (factors if mode == "factors" else 0.25)
    expected = taps.max(axis=1) if mode == "max" else scaled
    places = spaces if mode == "factors" else spaces[:2]
    got = executed(spec, places, [x, factors][: len(spec.args)], limit)
    np.testing.assert_allclose(got, expected, rtol=2**-10, atol=1e-5)


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


def test_an_image_whose_lines_do_not_fit_names_the_remedy() -> None:
    shape = Windows(4, 4096, 8, (3, 3), (1, 1), (1, 1), (1, 1), (4, 4096))
    with pytest.raises(AllocationError, match=r"one line of windows .* raise scratchpad\.bytes"):
        images.build(windows_spec("windows", shape, Dtype.F16), (Space.DRAM, Space.DRAM), TARGET, (4096,))
