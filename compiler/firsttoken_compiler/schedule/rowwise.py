"""Kernels that work row by row (norms, SwiGLU, RoPE, quantisation, sums, copies, gathers) and their schedule.

A kernel is scheduled for one block of rows in the scratchpad: elementwise intermediates are computed where they are
used, numbers per row stay on chip. `codegen.staging` repeats it over all blocks and moves what lies in DRAM.
"""

from __future__ import annotations

from typing import Any, Final

from firsttoken_compiler.isa.types import Dtype, Space
from firsttoken_compiler.schedule import layout, norm_definitions, vector_definitions
from firsttoken_compiler.schedule.definitions import element_definition, in_floats
from firsttoken_compiler.schedule.intrinsics import SPAD
from firsttoken_compiler.schedule.kernel import Scheduled, annotate
from firsttoken_compiler.schedule.layout import Layout, Ragged
from firsttoken_compiler.schedule.spec import NAMES, Arg, KernelSpec
from firsttoken_compiler.target.target import Target
from firsttoken_compiler.tvm.api import Schedule, te

BY_ROWS: Final[dict[str, tuple[int, ...]]] = {
    "rms_norm": (0,), "swiglu": (0, 1), "quantise": (0,), "add": (0, 1), "rope": (0, 1, 2), "gather": (1,), "row": (),
    "kv_append": (0,), "columns": (0,), "layer_norm": (0,), "softmax": (0,), "reduce": (0,), "group_sums": (0,),
    "unpack": (0,), "norm_stats": (0,), "kv_quantise": (0,),
}  # fmt: skip
"""Operands that have a row per row of the result; of an elementwise operator their shapes say which they are."""
KINDS_IN_PLACE: Final = ("kv_append", "kv_quantise")
"""Kernels whose results grow out of their operands but the first one, in the same memory."""
COPIES: Final = ("gather", "row", "kv_append", "columns")
"""Kernels that only move data: they read DRAM themselves."""


def schedule(spec: KernelSpec, spaces: tuple[Space, ...], rows: int, target: Target) -> Scheduled:
    """The scheduled PrimFunc of one block of `rows` rows; layouts and extents are those of the whole kernel."""
    total = rows_of(spec)
    block = _block(spec, rows)
    inputs = [te.placeholder(arg.shape, NAMES[arg.dtype], name=f"p{i}") for i, arg in enumerate(block.args)]
    source = te.create_prim_func([*inputs, *element_definition(block, inputs)])
    s = Schedule(source)
    inline, statistics, results = _stages(spec)
    for name in inline:
        s.compute_inline(s.get_sblock(name))
    for name in (*statistics, *results):
        _block_of_rows(s, spec, name, name in statistics)
    operands = kernel_operands(spec, (*spec.args, *spec.outs))
    pitches = [layout.pitch_bits(arg, space, target) for arg, space in zip(operands, spaces, strict=True)]
    layouts = _layouts(spec, -(-total // rows) * rows, pitches)
    return Scheduled(s.mod, layouts, Ragged({"m": total}), f"{rows} rows", source, s.trace)


def by_rows(spec: KernelSpec) -> tuple[int, ...]:
    """Operands that have a row per row of the result."""
    return vector_definitions.by_rows(spec) if spec.kind in ("map", "normalise") else BY_ROWS[spec.kind]


def rows_of(spec: KernelSpec) -> int:
    """Rows that the kernel makes."""
    return spec.args[0].shape[0] if spec.kind in KINDS_IN_PLACE else spec.outs[0].shape[0]


def row_elements(spec: KernelSpec) -> dict[int, int]:
    """Elements per row of every operand and result that has one row per row (results after the operands)."""
    found = {}
    for index in by_rows(spec):
        found[index] = _row(spec.args[index])
    for position, out in enumerate(spec.outs):
        found[_operands(spec) + position] = out.shape[0] * out.shape[2] if spec.kind in KINDS_IN_PLACE else _row(out)
    return found


def row_parts(spec: KernelSpec) -> int:
    """In how many runs a row of the result lies in memory: one per head of a cache."""
    return spec.outs[0].shape[0] if spec.kind in KINDS_IN_PLACE else 1


def kept_elements(spec: KernelSpec) -> int:
    """fp32 intermediates per row that stay on chip between the kernel's stages, beyond a number per row."""
    if spec.kind == "swiglu":
        return spec.args[0].shape[1] if len(spec.outs) > 1 else 0
    return vector_definitions.kept_elements(spec)


def _row(arg: Arg) -> int:
    elements = 1
    for extent in arg.shape[1:]:
        elements *= extent
    return elements


def _operands(spec: KernelSpec) -> int:
    """Operands of the kernel; a cache that is appended to in place is the result."""
    return 1 if spec.kind in KINDS_IN_PLACE else len(spec.args)


def kernel_operands(spec: KernelSpec, values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Of what a launch names (operands, then results), what the kernel takes."""
    return (values[0], *values[-len(spec.outs) :]) if spec.kind in KINDS_IN_PLACE else values


def _block(spec: KernelSpec, rows: int) -> KernelSpec:
    """The same kernel over one block of rows."""
    args = [Arg((rows, *a.shape[1:]), a.dtype) if i in by_rows(spec) else a for i, a in enumerate(spec.args)]
    outs = spec.outs
    if spec.kind not in (*KINDS_IN_PLACE, "row"):
        outs = tuple(Arg((rows, *out.shape[1:]), out.dtype) for out in spec.outs)
    return KernelSpec(spec.kind, spec.params, tuple(args[: _operands(spec)]), outs)


def _layouts(spec: KernelSpec, padded: int, pitches: list[int]) -> list[Layout]:
    """Layouts over all blocks."""
    out: list[Layout] = []
    for index, arg in enumerate(spec.args[: _operands(spec)]):
        rows = padded if index in by_rows(spec) else arg.shape[0]
        out.append(layout.matrix(rows, arg, pitches[index]))
    for result in spec.outs:  # layouts follow the operands
        bits = result.dtype.bits
        if spec.kind in KINDS_IN_PLACE:
            heads, depth, width = result.shape
            start = int(spec["past"]) * width * bits
            out.append(Layout((padded, heads, width), (width * bits, depth * width * bits, bits), start=start))
        else:
            out.append(layout.matrix(padded if spec.kind != "row" else 1, result, pitches[len(out)]))
    return out


def _stages(spec: KernelSpec) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Names of a kernel's blocks: inlined intermediates, those kept on chip, results."""
    if spec.get("static"):
        inlined, kept, results = _stages(in_floats(spec))
        return (*inlined, *results), kept, ("q",)
    general = vector_definitions.stages(spec) or norm_definitions.stages(spec)
    if general is not None:
        return general
    rows = ("square", "factor") if spec.kind == "rms_norm" else ()
    if len(spec.outs) == 1:
        return (), rows, ("out",)
    if spec.kind == "swiglu":  # an exponential per element: worth keeping
        return (), ("product", "peak", "inverse"), ("scale", "q")
    inline: tuple[str, ...] = {"rms_norm": ("normed",), "quantise": ("wide",)}.get(spec.kind, ())
    if spec.kind == "quantise" and spec.args[0].dtype is Dtype.F32:
        inline = ()
    return inline, (*rows, "peak", "inverse"), ("scale", "q")


def _block_of_rows(s: Any, spec: KernelSpec, name: str, local: bool) -> None:
    """Names the row axis; a reduction starts from its neutral element."""
    block = s.get_sblock(name)
    loops = s.get_loops(block)
    if local:
        s.set_scope(block, 0, SPAD)
    if spec.kind == "rope":
        s.reorder(loops[2], loops[0], loops[1], loops[3])
        annotate(s, {loops[2]: "half:1"})
    if spec.kind != "row":
        annotate(s, {loops[0]: "m"})
    if name == "folded" and int(spec.get("inner")) > 1:
        s.reorder(loops[2], loops[1])  # elements that lie side by side fill the lanes
    if name in vector_definitions.REDUCTIONS:
        s.decompose_reduction(block, loops[0])
