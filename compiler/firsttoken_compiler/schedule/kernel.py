"""What the schedules share: the result of one, moving operands on and off chip, and the lowering to flat TIR."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from firsttoken_compiler.schedule import intrinsics
from firsttoken_compiler.schedule.layout import Layout, Ragged
from firsttoken_compiler.tvm.api import s_tir, tirx, tvm

PIPELINE: Final = [0, 1, 2, 3]
"""Stages of a software-pipelined loop: load, multiply, vector work, store."""


@dataclass(frozen=True)
class Scheduled:
    """A scheduled kernel: its TIR module, where the elements of its operands lie, and the real extents."""

    module: Any
    layouts: list[Layout]
    ragged: Ragged
    tile: str = ""
    source: Any = None
    """The PrimFunc before its schedule."""
    trace: Any = None
    """TVM's record of the steps that made `module` of it."""

    def lowered(self) -> Any:
        """The PrimFunc with flat buffers and affine addresses."""
        return lowered(self.module)


def lowered(module: Any) -> Any:
    """The PrimFunc of a scheduled module with flat buffers and affine addresses."""
    schedule, tir = s_tir.transform, tirx.transform
    return tvm.transform.Sequential(
        [
            schedule.CanonicalizeLoop(), schedule.LowerInitBlock(), schedule.PlanAndUpdateBufferAllocationLocation(),
            schedule.ConvertBlocksToOpaque(), schedule.CompactBufferAllocation(), schedule.LowerMatchBuffer(),
            schedule.StmtSimplify(), schedule.LowerOpaqueBlock(), tir.FlattenBuffer(), tir.StmtSimplify(),
        ]
    )(module)["main"]  # fmt: skip


def annotate(s: Any, axes: dict[Any, str]) -> None:
    """Names the axis (and, with `:step`, the stride along it) of loops; see `codegen.tir_reader`."""
    for loop, text in axes.items():
        s.annotate(loop, "npu.axis", text)


def demand_slots(s: Any, loops: tuple[Any, ...], slots: dict[str, int]) -> None:
    """Gives the tiles of operands that are fetched inside these loops so many slots each; see `codegen.slots`."""
    for loop in loops if slots else ():
        s.annotate(loop, "npu.slots", ",".join(f"{name}={count}" for name, count in slots.items()))


def fetch(s: Any, reader: Any, name: str, at: Any, axes: str, scope: str = intrinsics.SPAD, align: int = 0) -> Any:
    """Copies what `reader` reads of operand `name` into the scratchpad inside loop `at`, as one DMA transfer.

    Without a loop all of the operand is copied first. `align`: rows start an odd number of so many elements apart, so
    that consecutive ones lie in different banks.
    """
    block = s.cache_read(reader, _operand(s, reader, name), scope)
    if at is not None:
        s.compute_at(block, at, preserve_unit_loops=True)
    _tensorize_copy(s, block, axes, "global", scope, reading=True)
    if align:  # after tensorize, which would forget it
        s.storage_align(s.get_sblock(f"{name}_{scope}_o"), 0, 0, 2 * align, align)
    return block


def spill(s: Any, writer: Any, at: Any, axes: str, dtype: str) -> Any:
    """Stages the result of `writer` in the scratchpad and stores it to DRAM inside loop `at`."""
    block = s.cache_write(writer, 0, intrinsics.SPAD)
    s.reverse_compute_at(block, at, preserve_unit_loops=True)
    _tensorize_copy(s, block, axes, intrinsics.SPAD, "global", reading=False)
    return block


def _operand(s: Any, reader: Any, name: str) -> int:
    reads = s.get(reader).reads
    for index in range(len(reads)):
        if str(reads[index].source.name) == name:
            return index
    raise KeyError(name)


def _tensorize_copy(s: Any, block: Any, axes: str, source: str, destination: str, reading: bool) -> None:
    names = axes.split(",")
    loops = s.get_loops(block)[-len(names) :]
    extents = tuple(int(s.get(loop).extent) for loop in loops)
    if max(extents) == 1:
        return  # one element: TVM has nothing left to match, and the reader knows a bare copy for a DMA
    region = s.get(block).reads[0] if reading else s.get(block).writes[0]
    s.tensorize(loops[0], intrinsics.copy(extents, str(region.source.dtype), source, destination, axes))
