"""Kernels over images as loops: windows (im2col), pools and transpositions.

A block is some lines of the result. The lines of the image that it needs come into a frame of padding in the
scratchpad, the vector unit moves or folds them tap by tap, and the block leaves in one transfer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from firsttoken_compiler.codegen.loops import Access, Alloc, Buffer, Computed, Loop, Nest, Statement, Value
from firsttoken_compiler.codegen.template import Template
from firsttoken_compiler.codegen.unroll import Place, unroll
from firsttoken_compiler.isa.types import Dtype, Space
from firsttoken_compiler.schedule import layout, windows
from firsttoken_compiler.schedule.kernel import PIPELINE
from firsttoken_compiler.schedule.layout import Ragged
from firsttoken_compiler.schedule.spec import Arg, KernelSpec
from firsttoken_compiler.schedule.windows import Rect, Windows
from firsttoken_compiler.target.target import Target

LOWEST = float("-inf")


@dataclass(frozen=True)
class Lines:
    """Lines of an image in a buffer, all pixels of a line side by side; its first pixel is (`first`, `left`)."""

    buffer: Buffer
    width: int
    """Pixels of a line."""
    channels: int
    first: int = 0
    left: int = 0

    def access(self, line: int, pixel: int, channel: int, steps: tuple[int, ...]) -> Access:
        """From a pixel's channel on, in steps of elements."""
        at = ((line - self.first) * self.width + pixel - self.left) * self.channels + channel
        return Access(self.buffer, lambda _env: at, steps)


@dataclass(frozen=True)
class Rows:
    """Rows of a matrix in a buffer, a row per output pixel, `pitch` elements apart; its first is (`first`, `left`)."""

    buffer: Buffer
    pitch: int
    first: int = 0
    left: int = 0

    def access(self, row: int, column: int, steps: tuple[int, ...]) -> Access:
        """From a row's column on, in steps of elements."""
        at = (row - self.first) * self.pitch + column - self.left
        return Access(self.buffer, lambda _env: at, steps)


def build(spec: KernelSpec, spaces: tuple[Space, ...], target: Target, limits: tuple[int, ...]) -> Template:
    """The template of a kernel of `windows.KINDS`; `limits` are the bytes of scratchpad it should and may use.

    Raises AllocationError when no block fits.
    """
    args = (*spec.args, *spec.outs)
    layouts = [
        layout.matrix(arg.shape[0], arg, layout.pitch_bits(arg, space, target))
        for arg, space in zip(args, spaces, strict=True)
    ]
    places = [Place(space, made) for space, made in zip(spaces, layouts, strict=True)]
    params = [_param(index, arg) for index, arg in enumerate(args)]
    if spec.kind == "transpose":
        block = windows.choose_block(spec, spaces, target, limits)
        body, text = _transpose(spec, params, spaces, block), f"{block[0]}x{block[1]}"
    else:
        lines, pixels = windows.choose_lines(spec, spaces, target, limits)
        whole = pixels == spec["out_x"]
        body = _by_lines(spec, params, spaces, lines, 0 if whole else pixels)
        text = f"{lines} lines" if whole else f"{pixels} pixels"
    return unroll(body, places, Ragged({}), target.scratchpad.alignment_bytes, text)


def _param(index: int, arg: Arg) -> Buffer:
    return Buffer(f"p{index}", "param", arg.dtype, _elements(arg), index)


def _elements(arg: Arg) -> int:
    return arg.shape[0] * arg.shape[1]


def local(name: str, dtype: Dtype, elements: int) -> Buffer:
    """A buffer of the kernel's own in the scratchpad."""
    return Buffer(name, "spad", dtype, elements)


def run(dst: Access, source: Access, *extents: int) -> Nest:
    """A copy over loops without names."""
    return Nest(extents, ("",) * len(extents), dst, ("load", source))


def rows_between(to: Buffer, to_row: int, of: Buffer, of_row: int, rows: int, width: int) -> Nest:
    """A copy of consecutive rows of two matrices of the same width."""
    first, second = to_row * width, of_row * width
    return run(Access(to, lambda _env: first, (width, 1)), Access(of, lambda _env: second, (width, 1)), rows, width)


def _by_lines(
    spec: KernelSpec, params: list[Buffer], spaces: tuple[Space, ...], lines: int, part: int = 0
) -> list[Statement]:
    """The loop over blocks of output lines, or of `part` pixels of one, of which whole numbers make up a line."""
    shape, across = Windows.of(spec), spec.outs[0].shape[1]
    image, out, adds = params[0], params[-1], windows.sums(spec)
    outside = LOWEST if spec.kind == "pool" and not adds else float(spec.get("outside"))
    frame = Frame.of(shape, image, spaces[0], lines, outside, part)
    pixels = part or shape.out[1]
    parts = shape.out[1] // pixels
    elements = lines * pixels * across
    stage, sums = local("block", out.dtype, elements), local("sums", Dtype.F32, elements)
    factors = local("factors", Dtype.F32, _elements(spec.args[1])) if len(spec.args) > 1 else None

    def block(env: list[int]) -> tuple[int, int, int]:
        first = env[0] // parts * lines
        return first, min(shape.out[0], first + lines), env[0] % parts * pixels

    def work(env: list[int]) -> list[Nest]:
        first, last, left = block(env)
        rect, row = Rect(first, last, left, left + pixels), first * shape.out[1] + left
        source = frame.lines(first, left)
        into = Rows(stage, across, row) if spaces[-1] is Space.DRAM else Rows(out, across)
        if spec.kind == "windows":
            return list(gather(shape, source, into, rect, (0, across)))
        made = Rows(sums, across, row) if adds else into
        nests = list(_folded(spec, source, made, rect, factors))
        return nests + ([_scaled(spec, made, into, factors, row, (last - first) * pixels)] if adds else [])

    def put(env: list[int]) -> list[Nest]:
        first, last, left = block(env)
        return [rows_between(out, first * shape.out[1] + left, stage, 0, (last - first) * pixels, across)]

    body: list[Statement] = frame.fetch(block)
    body += [Alloc(stage)] if spaces[-1] is Space.DRAM else []
    body += [Alloc(sums)] if adds else []
    body += [Computed(work)] + ([Computed(put)] if spaces[-1] is Space.DRAM else [])
    loop = Loop(0, -(-shape.out[0] // lines) * parts, "", 0, tuple(PIPELINE), body)
    if factors is None:
        return [loop]
    return [Alloc(factors), rows_between(factors, 0, params[1], 0, *spec.args[1].shape), loop]


@dataclass(frozen=True)
class Frame:
    """The lines that a block of output lines needs, with the padding around them, in the scratchpad.

    An image that lies there already and needs no padding is read where it is: `band` is None.
    """

    shape: Windows
    image: Buffer
    band: Buffer | None
    outside: float
    """What the padding holds."""
    part: int = 0
    """Output pixels of a line that a block has; 0 for whole lines."""

    @staticmethod
    def of(shape: Windows, image: Buffer, space: Space, lines: int, outside: float = 0.0, part: int = 0) -> Frame:
        """The frame for blocks of at most so many output lines, or of a part of one."""
        high, wide = shape.band(lines, part)
        band = local("band", image.dtype, high * wide * shape.channels) if windows.staged(shape, space) else None
        return Frame(shape, image, band, outside, part)

    def lines(self, first: int, pixel: int = 0) -> Lines:
        """The lines of the block that starts at an output line, and at a pixel of it."""
        shape = self.shape
        if self.band is None:
            return Lines(self.image, shape.width, shape.channels)
        top, left = first * shape.stride[0] - shape.before[0], pixel * shape.stride[1] - shape.before[1]
        return Lines(self.band, shape.band(1, self.part)[1], shape.channels, top, left)

    def fetch(self, block: Callable[[list[int]], tuple[int, ...]]) -> list[Statement]:
        """Fills the frame for the output lines of `block`: first, last, and the first pixel of a part of a line."""
        if self.band is None:
            return []
        return [Alloc(self.band), Computed(lambda env: list(self._fill(*block(env))))]

    def _fill(self, first: int, last: int, pixel: int = 0) -> Iterator[Nest]:
        shape, lines = self.shape, self.lines(first, pixel)
        high, wide = shape.band(last - first, self.part)
        frame = Rect(lines.first, lines.first + high, lines.left, lines.left + wide)
        inside = frame.within(Rect(0, shape.height, 0, shape.width))
        steps = (lines.width * lines.channels, lines.channels, 1)
        for part in frame.without(inside):
            extents = (part.bottom - part.top, part.right - part.left, lines.channels)
            yield Nest(extents, ("",) * 3, lines.access(part.top, part.left, 0, steps), ("fill", self.outside))
        if not inside.empty:
            source = Lines(self.image, shape.width, shape.channels)
            of = source.access(inside.top, inside.left, 0, (shape.width * shape.channels, shape.channels, 1))
            extents = (inside.bottom - inside.top, inside.right - inside.left, lines.channels)
            yield run(lines.access(inside.top, inside.left, 0, steps), of, *extents)


def gather(shape: Windows, source: Lines, into: Rows, rect: Rect, columns: tuple[int, int]) -> Iterator[Nest]:
    """Columns `[first, last)` of the windows of the output pixels of `rect`, run by run."""
    for tap, length in shape.runs():
        begin = shape.column(tap)
        first, last = max(begin, columns[0]), min(begin + length, columns[1])
        if first < last:
            dst = into.access(rect.top * shape.out[1] + rect.left, first, (shape.out[1] * into.pitch, into.pitch, 1))
            met = _met(shape, source, rect, tap, first - begin)
            yield run(dst, met, rect.bottom - rect.top, rect.right - rect.left, last - first)


def _met(shape: Windows, source: Lines, rect: Rect, tap: tuple[int, int], channel: int = 0) -> Access:
    """The pixels that a tap meets over a rectangle of output pixels."""
    y, x = shape.origin(tap)
    steps = (shape.stride[0] * source.width * source.channels, shape.stride[1] * source.channels, 1)
    return source.access(rect.top * shape.stride[0] + y, rect.left * shape.stride[1] + x, channel, steps)


def _folded(spec: KernelSpec, source: Lines, into: Rows, rect: Rect, factors: Buffer | None) -> Iterator[Nest]:
    """Adds up, or takes the largest of, what all taps meet; `depthwise` sums are weighted and start from the bias."""
    shape, depthwise = Windows.of(spec), spec["mode"] == "depthwise"
    extents = (rect.bottom - rect.top, rect.right - rect.left, shape.channels)
    dst = into.access(rect.top * shape.out[1] + rect.left, 0, (shape.out[1] * into.pitch, into.pitch, 1))

    def weights(row: int) -> Value:
        at = row * shape.channels
        assert factors is not None
        return ("load", Access(factors, lambda _env: at, (0, 0, 1)))

    taps = list(shape.taps())
    for number, tap in enumerate(taps):
        value: Value = ("load", _met(shape, source, rect, tap))
        before: Value | None = ("load", dst) if number else None
        if depthwise:
            value, before = ("mul", value, weights(number)), before or weights(len(taps))
        if before is not None:
            value = ("max" if spec["mode"] == "max" else "add", before, value)
        yield Nest(extents, ("",) * 3, dst, value)


def _scaled(spec: KernelSpec, sums: Rows, into: Rows, factors: Buffer | None, row: int, pixels: int) -> Nest:
    """The sums of a block times the scale, or the factor of each pixel, in the result's type."""
    value: Value = ("load", sums.access(row, 0, (sums.pitch, 1)))
    if spec["mode"] == "average":
        factor: Value = ("const", float(spec["scale"]))
        if factors is not None:
            factor = ("load", Access(factors, lambda _env: row, (1, 0)))
        value = ("mul", value, factor)
    return Nest((pixels, sums.pitch), ("",) * 2, into.access(row, 0, (into.pitch, 1)), value)


def _transpose(
    spec: KernelSpec, params: list[Buffer], spaces: tuple[Space, ...], block: tuple[int, int]
) -> list[Statement]:
    """Blocks of rows and columns, each turned by the vector unit."""
    (rows, columns), (source, out) = spec.args[0].shape, params
    before, after = (local(name, param.dtype, block[0] * block[1]) for name, param in zip("ab", params, strict=True))
    across = -(-columns // block[1])

    def part(env: list[int]) -> tuple[int, int, int, int]:
        top, left = env[0] // across * block[0], env[0] % across * block[1]
        return top, left, min(block[0], rows - top), min(block[1], columns - left)

    def at(buffer: Buffer, row: int, column: int, width: int, steps: tuple[int, int]) -> Access:
        base = row * width + column
        return Access(buffer, lambda _env: base, steps)

    def fetch(env: list[int]) -> list[Nest]:
        top, left, high, wide = part(env)
        return [run(at(before, 0, 0, wide, (wide, 1)), at(source, top, left, columns, (columns, 1)), high, wide)]

    def turn(env: list[int]) -> list[Nest]:
        top, left, high, wide = part(env)
        near = spaces[0] is not Space.DRAM
        of = at(source, top, left, columns, (1, columns)) if near else at(before, 0, 0, wide, (1, wide))
        to = at(after, 0, 0, high, (high, 1)) if spaces[1] is Space.DRAM else at(out, left, top, rows, (rows, 1))
        if wide <= high:
            return [run(to, of, wide, high)]
        to, of = (replace(access, coefficients=access.coefficients[::-1]) for access in (to, of))
        return [run(to, of, high, wide)]  # the long axis fills the lanes

    def put(env: list[int]) -> list[Nest]:
        top, left, high, wide = part(env)
        return [run(at(out, left, top, rows, (rows, 1)), at(after, 0, 0, high, (high, 1)), wide, high)]

    body: list[Statement] = [Alloc(before), Computed(fetch)] if spaces[0] is Space.DRAM else []
    body += [Alloc(after), Computed(turn), Computed(put)] if spaces[1] is Space.DRAM else [Computed(turn)]
    return [Loop(0, across * -(-rows // block[0]), "", 0, tuple(PIPELINE), body)]
