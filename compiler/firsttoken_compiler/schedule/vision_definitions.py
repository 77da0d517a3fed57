"""TE of the operators on images: windows, pools, transposition. An image is a matrix `[height * width, channels]`.

They say what TVM plans memory for and what the kernels of `codegen.images` compute; these know the padding and are
not lowered from here.
"""

from collections.abc import Callable
from typing import Any, Final

from firsttoken_compiler.schedule.spec import NAMES, KernelSpec
from firsttoken_compiler.schedule.windows import Windows
from firsttoken_compiler.tvm.api import te, tirx


def _pixel(shape: Windows, x: Any, i: Any, ky: Any, kx: Any, c: Any, outside: float) -> Any:
    """What a tap of output pixel i meets, in fp32; `outside` in the padding."""
    y = i // shape.out[1] * shape.stride[0] + ky * shape.dilation[0] - shape.before[0]
    z = i % shape.out[1] * shape.stride[1] + kx * shape.dilation[1] - shape.before[1]
    inside = tirx.all(y >= 0, y < shape.height, z >= 0, z < shape.width)
    return te.if_then_else(inside, x[y * shape.width + z, c].astype("float32"), tirx.const(outside, "float32"))


def _windows(spec: KernelSpec, p: list[Any]) -> list[Any]:
    """Row i: the pixels under the kernel for output pixel i, tap by tap; in the padding zero, or `outside`."""
    shape = Windows.of(spec)
    across = shape.kernel[1] * shape.channels

    def element(i: Any, f: Any) -> Any:
        tap = f // across, f % across // shape.channels
        met = _pixel(shape, p[0], i, *tap, f % shape.channels, float(spec.get("outside")))
        return met.astype(NAMES[spec.outs[0].dtype])

    return [te.compute(spec.outs[0].shape, element, name="out")]


def _pool(spec: KernelSpec, p: list[Any]) -> list[Any]:
    """What mode says of the pixels under the kernel; see `npu.pool` in `tvm.dialect`."""
    shape, mode = Windows.of(spec), spec["mode"]
    ky, kx = (te.reduce_axis((0, extent), name) for extent, name in zip(shape.kernel, ("ky", "kx"), strict=True))
    fold, outside = (te.max, float("-inf")) if mode == "max" else (te.sum, 0.0)

    def met(i: Any, c: Any) -> Any:
        value = _pixel(shape, p[0], i, ky, kx, c, outside)
        return value * p[1][ky * shape.kernel[1] + kx, c] if mode == "depthwise" else value

    folded = te.compute(spec.outs[0].shape, lambda i, c: fold(met(i, c), axis=[ky, kx]), name="folded")

    def element(i: Any, c: Any) -> Any:
        value = folded[i, c]
        if mode == "average":
            value = value * (p[1][i, 0] if len(p) > 1 else float(spec["scale"]))
        if mode == "depthwise":
            value = value + p[1][shape.kernel[0] * shape.kernel[1], c]
        return value.astype(NAMES[spec.outs[0].dtype])

    return [te.compute(spec.outs[0].shape, element, name="out")]


def _transpose(spec: KernelSpec, p: list[Any]) -> list[Any]:
    return [te.compute(spec.outs[0].shape, lambda i, j: p[0][j, i].astype(NAMES[spec.outs[0].dtype]), name="out")]


def _concat(spec: KernelSpec, p: list[Any]) -> list[Any]:
    """Operands below one another (axis 0) or side by side (axis 1)."""
    axis, dtype = int(spec["axis"]), NAMES[spec.outs[0].dtype]

    def element(*at: Any) -> Any:
        value, end = tirx.const(0, dtype), spec.outs[0].shape[axis]
        for operand, arg in zip(p[::-1], spec.args[::-1], strict=True):
            first = end - arg.shape[axis]
            inner = list(at)
            inner[axis] = te.max(te.min(at[axis] - first, arg.shape[axis] - 1), 0)
            value = te.if_then_else(at[axis] >= end, value, operand[tuple(inner)].astype(dtype))
            end = first
        return value

    return [te.compute(spec.outs[0].shape, element, name="out")]


DEFINITIONS: Final[dict[str, Callable[[KernelSpec, list[Any]], list[Any]]]] = {
    "windows": _windows, "pool": _pool, "transpose": _transpose, "concat": _concat,
}  # fmt: skip
