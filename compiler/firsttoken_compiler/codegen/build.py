"""One kernel: tile chosen, scheduled, lowered, read back, unrolled into a template."""

from __future__ import annotations

from firsttoken_compiler.codegen import block_products, concat, convolve, images, normed
from firsttoken_compiler.codegen.staging import over_rows
from firsttoken_compiler.codegen.template import Template
from firsttoken_compiler.codegen.tir_reader import read
from firsttoken_compiler.codegen.unroll import Place, unroll
from firsttoken_compiler.isa.types import Space
from firsttoken_compiler.schedule import attention, linear, rowwise, windows
from firsttoken_compiler.schedule.kernel import Scheduled
from firsttoken_compiler.schedule.spec import KernelSpec
from firsttoken_compiler.schedule.tiling import Room, choose_attention, choose_linear, choose_rows
from firsttoken_compiler.target.target import Target


def build(spec: KernelSpec, spaces: tuple[Space, ...], target: Target, room: Room) -> Template:
    """The template of a kernel whose operands and results lie in `spaces`; raises AllocationError when nothing fits."""
    if spec.kind == "linear" and spec.get("blocks"):
        return block_products.build(spec, spaces, target, room)
    if spec.kind == "linear":
        tile = choose_linear(spec, spaces, target, room)
        return _template(linear.schedule(spec, spaces, tile, target), spaces, target)
    if spec.kind == "attention":
        chosen = choose_attention(spec, spaces, target, room)
        return _template(attention.schedule(spec, spaces, chosen, target), spaces, target)
    if spec.kind == "conv":
        return convolve.build(spec, spaces, target, room)
    if spec.kind == "normed":
        return normed.build(spec, spaces, target, room)
    if spec.kind == "concat":
        return concat.build(spec, spaces, target, (room.preferred, room.limit))
    if spec.kind in windows.KINDS:
        return images.build(spec, spaces, target, (room.preferred, room.limit))
    rows = choose_rows(spec, spaces, target, room)
    scheduled = rowwise.schedule(spec, spaces, rows, target)
    body, params = read(scheduled.lowered(), outer=1)
    copies = spec.kind in rowwise.COPIES
    body = over_rows(
        body, params, list(spaces), rowwise.row_elements(spec), rows, rowwise.rows_of(spec), len(spec.outs), copies,
        rowwise.row_parts(spec),
    )  # fmt: skip
    places = [Place(space, layout) for space, layout in zip(spaces, scheduled.layouts, strict=True)]
    return unroll(body, places, scheduled.ragged, target.scratchpad.alignment_bytes, scheduled.tile)


def _template(scheduled: Scheduled, spaces: tuple[Space, ...], target: Target) -> Template:
    body, _ = read(scheduled.lowered())
    places = [Place(space, layout) for space, layout in zip(spaces, scheduled.layouts, strict=True)]
    align, tiles = target.alignment(Space.SPAD), target.matrix.tile_bytes
    return unroll(body, places, scheduled.ragged, align, scheduled.tile, tiles)
