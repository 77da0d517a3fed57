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
from firsttoken_compiler.schedule.spec import Arg, KernelSpec
from firsttoken_compiler.target.target import Target

KINDS: Final = ("windows", "pool", "transpose")
"""Kernels that `codegen.images` writes."""
GEOMETRY: Final = (
    "width", "outside", *(f"{name}_{axis}" for name in ("kernel", "stride", "pad", "dilation", "out") for axis in "yx")
)  # fmt: skip
"""Parameters of windows; all others of a convolution are its product's."""


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

    def whole(self, first: int, last: int) -> Rect:
        """The output lines `[first, last)`."""
        return Rect(first, last, 0, self.out[1])

    def band(self, lines: int, pixels: int = 0) -> tuple[int, int]:
        """(lines, pixels of a line) of the padded image that so many output lines need, whether inside or outside.

        `pixels` of each output line, by default all.
        """
        counts = lines, pixels or self.out[1]
        y, x = (
            (count - 1) * s + (k - 1) * d + 1
            for count, s, k, d in zip(counts, self.stride, self.kernel, self.dilation, strict=True)
        )
        return y, x

    @property
    def padded(self) -> bool:
        """Whether a tap ever lies outside of the image."""
        high, wide = self.band(self.out[0])
        return any(self.before) or high > self.height or wide > self.width

    def runs(self) -> Iterator[tuple[tuple[int, int], int]]:
        """(first tap, elements) of the runs that lie side by side in the image, and in a row of windows."""
        if self.dilation[1] == 1:
            return (((ky, 0), self.kernel[1] * self.channels) for ky in range(self.kernel[0]))
        return ((tap, self.channels) for tap in self.taps())

    def column(self, tap: tuple[int, int]) -> int:
        """Where a tap's channels begin in a row of windows."""
        return (tap[0] * self.kernel[1] + tap[1]) * self.channels

    def rows(self, first: int, last: int) -> Iterator[Rect]:
        """Output pixels `[first, last)`, counted line by line, as up to three rectangles."""
        across = self.out[1]
        while first < last:
            line, pixel = divmod(first, across)
            full = (last - first) // across if pixel == 0 else 0
            rect = Rect(line, line + full, 0, across) if full else Rect(
                line, line + 1, pixel, min(across, pixel + last - first)
            )  # fmt: skip
            yield rect
            first += (rect.bottom - rect.top) * (rect.right - rect.left)


def product_of(spec: KernelSpec) -> KernelSpec:
    """A convolution's product of the matrix of windows, floats in fp16 and integers as they are, with the weight."""
    params = tuple((name, value) for name, value in spec.params if name not in GEOMETRY)
    image = spec.args[0].dtype
    matrix = Arg((Windows.of(spec).pixels, int(spec["k"])), Dtype.F16 if image is Dtype.F32 else image)
    return KernelSpec("linear", params, (matrix, *spec.args[1:]), spec.outs)


def windows_of(spec: KernelSpec) -> KernelSpec:
    """A convolution's matrix of windows."""
    params = tuple((name, value) for name, value in spec.params if name in GEOMETRY)
    return KernelSpec("windows", params, spec.args[:1], product_of(spec).args[:1])


def choose_lines(
    spec: KernelSpec, spaces: tuple[Space, ...], target: Target, limits: tuple[int, ...]
) -> tuple[int, int]:
    """(output lines, pixels of a line) of a block of `windows` or `pool`: whole lines, else an even part of one.

    Raises AllocationError when not even one pixel fits.
    """
    shape = Windows.of(spec)
    for limit in limits:
        for parts in range(1, shape.out[0] + 1):
            lines = -(-shape.out[0] // parts)
            if _block_bytes(spec, spaces, shape, (lines, shape.out[1]), target) <= limit:
                return lines, shape.out[1]
    for pixels in sorted((part for part in range(1, shape.out[1]) if shape.out[1] % part == 0), reverse=True):
        if _block_bytes(spec, spaces, shape, (1, pixels), target) <= limits[-1]:
            return 1, pixels
    raise AllocationError(
        f"target {target.name}: one pixel of {spec.kind} over an image of {shape.width} x {shape.channels} needs "
        f"{_block_bytes(spec, spaces, shape, (1, 1), target)} bytes of scratchpad, {limits[-1]} are free: raise "
        "scratchpad.bytes"
    )


def _block_bytes(
    spec: KernelSpec, spaces: tuple[Space, ...], shape: Windows, block: tuple[int, int], target: Target
) -> int:
    """Scratchpad of a block of (lines, pixels of a line) with all its slots."""
    lines, pixels = block
    high, wide = shape.band(lines, pixels)
    band = spec.args[0].dtype.nbytes(high * wide * shape.channels) * staged(shape, spaces[0])
    made = lines * pixels * spec.outs[0].shape[1]
    total = 8 * target.scratchpad.alignment_bytes
    total += 3 * band + 2 * spec.outs[0].dtype.nbytes(made) * (spaces[-1] is Space.DRAM)
    if sums(spec):
        total += Dtype.F32.nbytes(made)
    if len(spec.args) > 1:
        total += 3 * spec.args[1].nbytes
    return total


def staged(shape: Windows, space: Space) -> bool:
    """Whether the lines that a block needs are copied first: out of the DRAM, or into a frame of padding."""
    return space is Space.DRAM or shape.padded


def sums(spec: KernelSpec) -> bool:
    """Whether a pool adds up in fp32 before it stores: an average, or a convolution of each channel for itself."""
    return spec.kind == "pool" and spec["mode"] != "max"


def choose_block(
    spec: KernelSpec, spaces: tuple[Space, ...], target: Target, limits: tuple[int, ...]
) -> tuple[int, int]:
    """(rows, columns) of the source that a transposition turns at a time."""
    rows, columns = spec.args[0].shape
    if columns > 4 * rows or rows > 4 * columns:  # several blocks, so that transfers overlap with the vector unit
        rows, columns = (-(-extent // 8) if extent == max(rows, columns) else extent for extent in (rows, columns))
    each = 3 * spec.args[0].dtype.bits * (spaces[0] is Space.DRAM)
    each += 2 * spec.outs[0].dtype.bits * (spaces[1] is Space.DRAM)
    limit = limits[0] - 8 * target.scratchpad.alignment_bytes
    while rows * columns * each // 8 > limit and rows * columns > 1:
        if rows > columns:
            rows = -(-rows // 2)
        else:
            columns = -(-columns // 2)
    return rows, columns
