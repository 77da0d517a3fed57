"""One kernel: tile chosen, scheduled, lowered, read back, unrolled into a template."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from firsttoken_compiler.codegen import block_products, concat, convolve, images, normed, online_attention
from firsttoken_compiler.codegen.kept_templates import KeptChoices, KeptTemplates
from firsttoken_compiler.codegen.staging import over_rows
from firsttoken_compiler.codegen.template import Template
from firsttoken_compiler.codegen.tir_reader import read
from firsttoken_compiler.codegen.unroll import Place, unroll
from firsttoken_compiler.errors import ProgramError
from firsttoken_compiler.isa.types import Space
from firsttoken_compiler.schedule import attention, block_linear, linear, rowwise, tiling, windows
from firsttoken_compiler.schedule.choice import AttentionChoice, Choice, ProductChoice, RowsChoice
from firsttoken_compiler.schedule.choosing import attention_tile, check, default_choice, tile_of
from firsttoken_compiler.schedule.kernel import Scheduled
from firsttoken_compiler.schedule.spec import KernelSpec
from firsttoken_compiler.schedule.tiling import Room
from firsttoken_compiler.target.target import Target

TILED: Final = (ProductChoice, AttentionChoice, RowsChoice)

KEPT: Final = KeptTemplates()
"""Of this process: prompts of other lengths, decode steps and trials share most kernels with what came before."""
SETTLED: Final = KeptChoices()
"""Of this process: another plan leaves kernels another room, in which most get the same tile."""


def build(
    spec: KernelSpec, spaces: tuple[Space, ...], target: Target, room: Room, choice: Choice | None = None
) -> Template:
    """The template of a kernel whose operands and results lie in `spaces`, by a choice or by the compiler's own.

    Raises AllocationError when nothing fits, or the choice does not, and OptionError for another choice that the kernel
    does not have.
    """
    of = (spec, spaces, target.content_hash)
    settled = SETTLED.get((*of, room, choice), lambda: _settled(spec, spaces, target, room, choice))
    inside = None if isinstance(settled, TILED) else room
    return KEPT.get((*of, inside, settled), lambda: _build(spec, spaces, target, room, settled))


def _settled(
    spec: KernelSpec, spaces: tuple[Space, ...], target: Target, room: Room, choice: Choice | None
) -> Choice | None:  # fmt: skip
    """The choice that a kernel goes by; None for kinds that have none."""
    if choice is None:
        return default_choice(spec, spaces, target, room)
    check(spec, spaces, target, room, choice)
    return choice


def _build(
    spec: KernelSpec, spaces: tuple[Space, ...], target: Target, room: Room, choice: Choice | None
) -> Template:  # fmt: skip
    """Nothing of a kernel that goes by a choice depends on the room."""
    if isinstance(choice, ProductChoice):
        return _product(spec, spaces, target, choice)
    if isinstance(choice, AttentionChoice):
        tile = attention_tile(choice, spec, target)
        if tile.online:
            return online_attention.build(spec, spaces, tile, target)
        own = attention.mapped(spec, target) is not None
        return _template(attention.schedule(spec, spaces, tile, target), spaces, target, own)
    if isinstance(choice, RowsChoice):
        return _rows(spec, spaces, target, choice.rows)
    if spec.kind == "concat":
        return concat.build(spec, spaces, target, (room.preferred, room.limit))
    if spec.kind in windows.KINDS:
        return images.build(spec, spaces, target, (room.preferred, room.limit))
    raise ProgramError(f"internal: no schedule for a kernel of kind {spec.kind}")


def _product(spec: KernelSpec, spaces: tuple[Space, ...], target: Target, choice: ProductChoice) -> Template:
    tile = tile_of(choice, target)
    if spec.kind == "conv":
        return convolve.build(spec, spaces, target, tile)
    if spec.kind == "normed":
        return normed.build(spec, spaces, target, choice.block, tile)
    plan = block_linear.plan(spec, spaces, choice.method, target) if spec.get("blocks") else None
    if plan is not None:
        return block_products.build_choice(spec, replace(plan, tile=tile), target)
    return _template(linear.schedule(spec, spaces, tile, target), spaces, target)


def _rows(spec: KernelSpec, spaces: tuple[Space, ...], target: Target, rows: int) -> Template:
    scheduled = rowwise.schedule(spec, spaces, rows, target)
    body, params = read(scheduled.lowered(), outer=1)
    copies = spec.kind in rowwise.COPIES
    body = over_rows(
        body, params, list(spaces), rowwise.row_elements(spec), rows, rowwise.rows_of(spec), len(spec.outs), copies,
        rowwise.row_parts(spec), 1 if tiling.row_slots(spec, spaces, target) == 1 else 0,
    )  # fmt: skip
    places = [Place(space, layout) for space, layout in zip(spaces, scheduled.layouts, strict=True)]
    return unroll(body, places, scheduled.ragged, target.scratchpad.alignment_bytes, scheduled.tile)


def _template(
    scheduled: Scheduled, spaces: tuple[Space, ...], target: Target, own_attention: bool = False
) -> Template:  # fmt: skip
    body, _ = read(scheduled.lowered())
    places = [Place(space, layout) for space, layout in zip(spaces, scheduled.layouts, strict=True)]
    align, tiles = target.alignment(Space.SPAD), target.matrix.tile_bytes
    marks = attention.MARKS if own_attention else None
    return unroll(body, places, scheduled.ragged, align, scheduled.tile, tiles, marks)
