"""Concatenation of matrices, by rows or by columns, as transfers; the vector unit converts where types differ."""

from __future__ import annotations

from firsttoken_compiler.codegen.images import local, run
from firsttoken_compiler.codegen.loops import Access, Alloc, Buffer, Computed, Loop, Nest, Statement
from firsttoken_compiler.codegen.template import Template
from firsttoken_compiler.codegen.unroll import Place, unroll
from firsttoken_compiler.errors import AllocationError
from firsttoken_compiler.isa.types import Space
from firsttoken_compiler.schedule import layout
from firsttoken_compiler.schedule.kernel import PIPELINE
from firsttoken_compiler.schedule.layout import Ragged
from firsttoken_compiler.schedule.spec import KernelSpec
from firsttoken_compiler.target.target import Target

SLOTS = 4
"""Slots of a buffer between transfer in and transfer out."""


def build(spec: KernelSpec, spaces: tuple[Space, ...], target: Target, limits: tuple[int, ...]) -> Template:
    """The template; `limits` are the bytes of scratchpad that it should and may use.

    Raises AllocationError when not even one row fits.
    """
    args = (*spec.args, *spec.outs)
    pitches = [layout.pitch_bits(arg, space, target) for arg, space in zip(args, spaces, strict=True)]
    places = [
        Place(space, layout.matrix(arg.shape[0], arg, pitch))
        for arg, space, pitch in zip(args, spaces, pitches, strict=True)
    ]
    params = [Buffer(f"p{i}", "param", arg.dtype, arg.shape[0] * arg.shape[1], i) for i, arg in enumerate(args)]
    body: list[Statement] = []
    row = column = 0
    for index, arg in enumerate(spec.args):
        rows = _rows(spec, arg.shape[0], arg.shape[1], target, limits)
        places_of = (spaces[index], spaces[-1])
        body += _part(params[index], params[-1], places_of, arg.shape, spec.outs[0].shape[1], (row, column), rows)
        if spec["axis"] == 0:
            row += arg.shape[0]
        else:
            column += arg.shape[1]
    return unroll(body, places, Ragged({}), target.scratchpad.alignment_bytes)


def _rows(spec: KernelSpec, rows: int, width: int, target: Target, limits: tuple[int, ...]) -> int:
    """Rows of an operand that move at a time; every operand has buffers of its own."""
    each = 2 * SLOTS * width * 4
    for limit in limits:
        room = limit // len(spec.args) - 16 * target.scratchpad.alignment_bytes
        if room >= each:
            return min(rows, room // each)
    raise AllocationError(
        f"target {target.name}: one row of {width} elements of a concatenation needs {each} bytes of scratchpad, "
        f"{limits[-1] // len(spec.args)} are free: raise scratchpad.bytes"
    )


def _part(
    source: Buffer, out: Buffer, spaces: tuple[Space, Space], shape: tuple[int, ...], width: int, at: tuple[int, int],
    rows: int,
) -> list[Statement]:  # fmt: skip
    """One operand's rows into the result, from row and column `at` on."""
    total, columns = shape
    converts = source.dtype is not out.dtype
    far = [space is Space.DRAM for space in spaces]
    loads, stores = far[0] and (converts or far[1]), far[1] and (converts or far[0])
    before = local(f"in{source.param}", source.dtype, rows * columns)
    after = local(f"out{source.param}", out.dtype, rows * columns) if converts else before

    def rect(env: list[int], side: str) -> tuple[Access, int]:
        first = env[0] * rows
        buffer, base, step = {
            "source": (source, first * columns, columns), "out": (out, (at[0] + first) * width + at[1], width),
            "before": (before, 0, columns), "after": (after, 0, columns),
        }[side]  # fmt: skip
        return Access(buffer, lambda _env: base, (step, 1)), min(rows, total - first)

    def move(to: str, of: str) -> Computed:
        def make(env: list[int]) -> list[Nest]:
            (dst, count), (src, _) = rect(env, to), rect(env, of)
            return [run(dst, src, count, columns)]

        return Computed(make)

    body: list[Statement] = [Alloc(before), move("before", "source")] if loads else []
    if converts and stores:
        body += [Alloc(after), move("after", "before" if loads else "source")]
    if stores:
        body.append(move("out", "after"))
    else:
        body.append(move("out", "before" if loads else "source"))
    return [Loop(0, -(-total // rows), "", 0, tuple(PIPELINE), body)]
