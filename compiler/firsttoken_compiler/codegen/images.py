"""Kernels over images as loops: windows (im2col), pools and transpositions, with the padding cut out of every access.

A block is some lines of the result. The lines of the image that it needs come into the scratchpad in one transfer,
the vector unit moves or folds them tap by tap, and the block leaves in one transfer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

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
    """Lines `[first, ...)` of an image in a buffer, all of its pixels side by side."""

    buffer: Buffer
    width: int
    """Pixels of a line."""
    channels: int
    first: int = 0

    def access(self, line: int, pixel: int, channel: int, steps: tuple[int, ...]) -> Access:
        """From a pixel's channel on, in steps of elements."""
        at = ((line - self.first) * self.width + pixel) * self.channels + channel
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
        lines = windows.choose_lines(spec, spaces, target, limits)
        body, text = _by_lines(spec, params, spaces, lines), f"{lines} lines"
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


def _by_lines(spec: KernelSpec, params: list[Buffer], spaces: tuple[Space, ...], lines: int) -> list[Statement]:
    """The loop over blocks of output lines."""
    shape = Windows.of(spec)
    out_width = spec.outs[0].shape[1]
    image, out = params[0], params[-1]
    band = local("band", image.dtype, shape.most_lines(lines) * shape.width * shape.channels)
    stage = local("block", out.dtype, lines * shape.out[1] * out_width)
    sums = local("sums", Dtype.F32, lines * shape.out[1] * out_width)
    factors = local("factors", Dtype.F32, _elements(spec.args[1])) if len(spec.args) > 1 else None

    def block(env: list[int]) -> tuple[int, int]:
        return env[0] * lines, min(shape.out[0], (env[0] + 1) * lines)

    def fetch(env: list[int]) -> list[Nest]:
        top, bottom = shape.lines(*block(env))
        count = (bottom - top) * shape.width
        return [rows_between(band, 0, image, top * shape.width, count, shape.channels)]

    def work(env: list[int]) -> list[Nest]:
        first, last = block(env)
        staged = spaces[0] is Space.DRAM
        source = Lines(
            band if staged else image, shape.width, shape.channels, shape.lines(first, last)[0] if staged else 0
        )
        into = Lines(out, shape.out[1], out_width)
        if spaces[-1] is Space.DRAM:
            into = Lines(stage, shape.out[1], out_width, first)
        if spec.kind == "windows":
            return list(gather(shape, source, into, shape.whole(first, last)))
        made = Lines(sums, shape.out[1], out_width, first) if windows.sums(spec) else into
        nests = list(_folded(shape, source, made, shape.whole(first, last), average=windows.sums(spec)))
        return nests + ([_scaled(spec, made, into, factors, (first, last))] if made is not into else [])

    def put(env: list[int]) -> list[Nest]:
        first, last = block(env)
        return [rows_between(out, first * shape.out[1], stage, 0, (last - first) * shape.out[1], out_width)]

    body: list[Statement] = [Alloc(band), Computed(fetch)] if spaces[0] is Space.DRAM else []
    body += [Alloc(stage)] if spaces[-1] is Space.DRAM else []
    body += [Alloc(sums)] if windows.sums(spec) else []
    body += [Computed(work)] + ([Computed(put)] if spaces[-1] is Space.DRAM else [])
    loop = Loop(0, -(-shape.out[0] // lines), "", 0, tuple(PIPELINE), body)
    if factors is None:
        return [loop]
    return [Alloc(factors), rows_between(factors, 0, params[1], 0, spec.args[1].shape[0], 1), loop]


def gather(shape: Windows, source: Lines, into: Lines, rect: Rect) -> Iterator[Nest]:
    """Fills the windows of the output pixels of `rect`: zeros where a tap lies in the padding, else what it meets."""
    for number, tap in enumerate(shape.taps()):
        yield from gather_tap(shape, source, into, rect, tap, number * shape.channels)


def gather_tap(
    shape: Windows, source: Lines, into: Lines, rect: Rect, tap: tuple[int, int], column: int,
    channels: tuple[int, int] | None = None,
) -> Iterator[Nest]:  # fmt: skip
    """One tap's columns, from `column` on; `channels` are the first of them and how many, by default all."""
    start, count = channels or (0, shape.channels)
    steps = (into.width * into.channels, into.channels, 1)
    valid = shape.valid(tap).within(rect)
    for part in rect.without(valid):
        extents = (part.bottom - part.top, part.right - part.left, count)
        yield Nest(extents, ("",) * 3, into.access(part.top, part.left, column, steps), ("fill", 0.0))
    if not valid.empty:
        dst, met = into.access(valid.top, valid.left, column, steps), _met(shape, source, valid, tap, start)
        yield run(dst, met, valid.bottom - valid.top, valid.right - valid.left, count)


def _met(shape: Windows, source: Lines, rect: Rect, tap: tuple[int, int], channel: int = 0) -> Access:
    """The pixels that a tap meets over a rectangle of output pixels."""
    y, x = shape.origin(tap)
    steps = (shape.stride[0] * source.width * source.channels, shape.stride[1] * source.channels, 1)
    return source.access(rect.top * shape.stride[0] + y, rect.left * shape.stride[1] + x, channel, steps)


def _folded(shape: Windows, source: Lines, into: Lines, rect: Rect, *, average: bool) -> Iterator[Nest]:
    """Adds up, or takes the largest of, what all taps meet."""
    steps = (into.width * into.channels, into.channels, 1)
    extents = (rect.bottom - rect.top, rect.right - rect.left, into.channels)
    yield Nest(extents, ("",) * 3, into.access(rect.top, 0, 0, steps), ("fill", 0.0 if average else LOWEST))
    for tap in shape.taps():
        valid = shape.valid(tap).within(rect)
        if valid.empty:
            continue
        dst = into.access(valid.top, valid.left, 0, steps)
        value: Value = ("add" if average else "max", ("load", dst), ("load", _met(shape, source, valid, tap)))
        yield Nest((valid.bottom - valid.top, valid.right - valid.left, into.channels), ("",) * 3, dst, value)


def _scaled(spec: KernelSpec, sums: Lines, into: Lines, factors: Buffer | None, lines: tuple[int, int]) -> Nest:
    """The sums of a block times the scale, or the factor of each pixel, in the result's type."""
    first, last = lines
    channels, pixels = sums.channels, (last - first) * sums.width
    at = first * sums.width
    factor: Value = ("const", float(spec["scale"]))
    if factors is not None:
        factor = ("load", Access(factors, lambda _env: at, (1, 0)))
    value: Value = ("mul", ("load", sums.access(first, 0, 0, (channels, 1))), factor)
    return Nest((pixels, channels), ("",) * 2, into.access(first, 0, 0, (channels, 1)), value)


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
        return [run(to, of, wide, high)]

    def put(env: list[int]) -> list[Nest]:
        top, left, high, wide = part(env)
        return [run(at(out, left, top, rows, (rows, 1)), at(after, 0, 0, high, (high, 1)), wide, high)]

    body: list[Statement] = [Alloc(before), Computed(fetch)] if spaces[0] is Space.DRAM else []
    body += [Alloc(after), Computed(turn), Computed(put)] if spaces[1] is Space.DRAM else [Computed(turn)]
    return [Loop(0, across * -(-rows // block[0]), "", 0, tuple(PIPELINE), body)]
