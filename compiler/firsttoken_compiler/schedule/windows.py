"""Windows over an image: which pixels meet which tap of the kernel, and how many output lines a block of work takes.

An image is a matrix `[height * width, channels]`. A tap is one position of the kernel; the pixel that a tap meets may
lie in the padding, outside of the image.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from firsttoken_compiler.errors import AllocationError
from firsttoken_compiler.isa.types import Dtype, Space
from firsttoken_compiler.schedule.spec import KernelSpec
from firsttoken_compiler.target.target import Target

KINDS: Final = ("windows", "pool", "transpose")
"""Kernels that `codegen.images` writes."""


@dataclass(frozen=True)
class Rect:
    """Output pixels `[top, bottom) x [left, right)`."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def empty(self) -> bool:
        """Whether no pixel is in it."""
        return self.top >= self.bottom or self.left >= self.right

    def within(self, other: Rect) -> Rect:
        """The pixels of both."""
        return Rect(
            max(self.top, other.top), min(self.bottom, other.bottom), max(self.left, other.left),
            min(self.right, other.right),
        )  # fmt: skip

    def without(self, inner: Rect) -> Iterator[Rect]:
        """The pixels outside of `inner`, as up to four rectangles."""
        if inner.empty:
            yield from (self,) if not self.empty else ()
            return
        parts = (
            Rect(self.top, inner.top, self.left, self.right), Rect(inner.bottom, self.bottom, self.left, self.right),
            Rect(inner.top, inner.bottom, self.left, inner.left),
            Rect(inner.top, inner.bottom, inner.right, self.right),
        )  # fmt: skip
        yield from (part for part in parts if not part.empty)


@dataclass(frozen=True)
class Windows:
    """Extents of an image, of the kernel that slides over it, and of what comes out."""

    height: int
    width: int
    channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    before: tuple[int, int]
    """Padding above and to the left; what is below and to the right follows from `out`."""
    dilation: tuple[int, int]
    out: tuple[int, int]

    @staticmethod
    def of(spec: KernelSpec) -> Windows:
        """The windows of a spec whose first operand is the image."""
        rows, channels = spec.args[0].shape
        width = int(spec["width"])

        def pair(name: str) -> tuple[int, int]:
            return int(spec[f"{name}_y"]), int(spec[f"{name}_x"])

        return Windows(
            rows // width, width, channels, pair("kernel"), pair("stride"), pair("pad"), pair("dilation"), pair("out")
        )

    @property
    def pixels(self) -> int:
        """Output pixels."""
        return self.out[0] * self.out[1]

    def taps(self) -> Iterator[tuple[int, int]]:
        """Positions of the kernel, row by row."""
        return ((ky, kx) for ky in range(self.kernel[0]) for kx in range(self.kernel[1]))

    def origin(self, tap: tuple[int, int]) -> tuple[int, int]:
        """The input pixel, possibly in the padding, that a tap meets for the first output pixel."""
        y, x = (k * d - p for k, d, p in zip(tap, self.dilation, self.before, strict=True))
        return y, x

    def valid(self, tap: tuple[int, int]) -> Rect:
        """Output pixels whose tap lies inside of the image."""
        y, x = self.origin(tap)
        top, bottom = _reach(y, self.stride[0], self.height, self.out[0])
        return Rect(top, bottom, *_reach(x, self.stride[1], self.width, self.out[1]))

    def whole(self, first: int, last: int) -> Rect:
        """The output lines `[first, last)`."""
        return Rect(first, last, 0, self.out[1])

    def lines(self, first: int, last: int) -> tuple[int, int]:
        """Input lines `[first, last)` that output lines `[first, last)` need: at least one, all inside of the image."""
        top = first * self.stride[0] - self.before[0]
        bottom = (last - 1) * self.stride[0] - self.before[0] + (self.kernel[0] - 1) * self.dilation[0] + 1
        top = min(max(0, top), self.height - 1)
        return top, max(top + 1, min(self.height, bottom))

    def most_lines(self, lines: int) -> int:
        """Input lines that a block of so many output lines needs at most."""
        return min(self.height, (lines - 1) * self.stride[0] + (self.kernel[0] - 1) * self.dilation[0] + 1)


def _reach(origin: int, stride: int, extent: int, count: int) -> tuple[int, int]:
    """Range of i < count with 0 <= origin + i * stride < extent."""
    first = max(0, -(origin // stride))
    last = min(count, (extent - 1 - origin) // stride + 1)
    return (first, last) if first < last else (0, 0)


def choose_lines(spec: KernelSpec, spaces: tuple[Space, ...], target: Target, limits: tuple[int, ...]) -> int:
    """Output lines of a block of `windows` or `pool`; raises AllocationError when not even one fits."""
    shape = Windows.of(spec)
    for limit in limits:
        for parts in range(1, shape.out[0] + 1):
            lines = -(-shape.out[0] // parts)
            if _block_bytes(spec, spaces, shape, lines, target) <= limit:
                return lines
    raise AllocationError(
        f"target {target.name}: one line of {spec.kind} over an image of {shape.width} x {shape.channels} needs "
        f"{_block_bytes(spec, spaces, shape, 1, target)} bytes of scratchpad, {limits[-1]} are free: raise "
        "scratchpad.bytes"
    )


def _block_bytes(spec: KernelSpec, spaces: tuple[Space, ...], shape: Windows, lines: int, target: Target) -> int:
    """Scratchpad of a block with all its slots."""
    band = spec.args[0].dtype.nbytes(shape.most_lines(lines) * shape.width * shape.channels)
    made = lines * shape.out[1] * spec.outs[0].shape[1]
    total = 8 * target.scratchpad.alignment_bytes
    total += 3 * band * (spaces[0] is Space.DRAM) + 2 * spec.outs[0].dtype.nbytes(made) * (spaces[-1] is Space.DRAM)
    if sums(spec):
        total += Dtype.F32.nbytes(made)
    if len(spec.args) > 1:
        total += 3 * spec.args[1].nbytes
    return total


def sums(spec: KernelSpec) -> bool:
    """Whether a pool adds up in fp32 before it scales and stores."""
    return spec.kind == "pool" and spec["mode"] == "average"


def choose_block(
    spec: KernelSpec, spaces: tuple[Space, ...], target: Target, limits: tuple[int, ...]
) -> tuple[int, int]:
    """(rows, columns) of the source that a transposition turns at a time."""
    rows, columns = spec.args[0].shape
    each = 3 * spec.args[0].dtype.bits * (spaces[0] is Space.DRAM)
    each += 2 * spec.outs[0].dtype.bits * (spaces[1] is Space.DRAM)
    limit = limits[0] - 8 * target.scratchpad.alignment_bytes
    while rows * columns * each // 8 > limit and rows * columns > 1:
        if rows > columns:
            rows = -(-rows // 2)
        else:
            columns = -(-columns // 2)
    return rows, columns
