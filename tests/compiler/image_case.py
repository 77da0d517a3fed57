"""Random windows over images, the spec of a kernel over them, and what their taps meet, in numpy."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from firsttoken_compiler.isa.types import Dtype
from firsttoken_compiler.schedule.spec import Arg, KernelSpec
from firsttoken_compiler.schedule.windows import Windows


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
