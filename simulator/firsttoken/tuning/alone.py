"""A program of one kernel alone: several launches in a row, as an operator of a network meets the next ones.

Each launch has weights and other operands in DRAM of its own, so that the next launch's weights are fetched while one
still computes. What a launch reads first lies where the launch before wrote its result, as far as they share a memory:
it must wait for it, as it would for the operator before. Values that the scratchpad keeps are loaded once, first.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np

from firsttoken_compiler.errors import AllocationError
from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.types import Dtype, Engine, Operand, Space, queue_index

if TYPE_CHECKING:
    from collections.abc import Sequence

    from firsttoken_compiler.codegen.template import Template
    from firsttoken_compiler.isa.program import OpInfo, Program, Tensor
    from firsttoken_compiler.isa.vector_kernel import VectorKernel
    from firsttoken_compiler.schedule.spec import Arg, KernelSpec
    from firsttoken_compiler.schedule.tiling import Room
    from firsttoken_compiler.target.target import Target

LAUNCHES: Final = 4
"""Launches in a row. The first has nothing before it, so its time does not count."""
_SLACK: Final = 1 << 12
"""Bytes beyond twice an operand's own, at least what weights take in panels and rows with their pitch."""


def alone(spec: KernelSpec, spaces: tuple[Space, ...], template: Template, target: Target, room: Room) -> Program:
    """The synchronised program: operator 0 loads what the scratchpad keeps, the others are the launches.

    Raises AllocationError when the template needs more of the scratchpad than `room.limit`.
    """
    from firsttoken_compiler.schedule.rowwise import kernel_operands

    if template.scratch_bytes > room.limit:
        raise AllocationError(
            f"kernel {spec.kind} works in {template.scratch_bytes} bytes of scratchpad, target {target.name} has "
            f"{room.limit} free: choose a smaller tile, or raise scratchpad.bytes"
        )
    args = kernel_operands(spec, (*spec.args, *spec.outs))
    memory = _Memory(target, room, args, spaces, len(spec.outs))
    memory.place()
    if memory.base + template.scratch_bytes > target.scratchpad.bytes:
        raise AllocationError(
            f"kernel {spec.kind} works in {template.scratch_bytes} bytes of scratchpad and keeps {memory.local}; "
            f"target {target.name} has {target.scratchpad.bytes}: choose a smaller tile, or raise scratchpad.bytes"
        )
    return _program(spec, memory, template, target)


@dataclass
class _Memory:
    """Where the operands of every launch lie: kept values below what kernels work in, all others in DRAM."""

    target: Target
    room: Room
    args: Sequence[Arg]
    spaces: tuple[Space, ...]
    results: int
    tensors: list[Tensor] = field(default_factory=list)
    operands: list[list[int]] = field(default_factory=list)
    """Addresses by launch and operand."""
    kept: list[tuple[int, int]] = field(default_factory=list)
    """Address and bytes of what lies in the scratchpad."""
    dram_bytes: int = 0
    local: int = 0

    @property
    def base(self) -> int:
        """First byte of the scratchpad that kernels work in."""
        unit = self.target.alignment(Space.SPAD, matrix_weights=True)
        return -(-max(self.target.scratchpad.bytes - self.room.limit, self.local) // unit) * unit

    def place(self) -> None:
        """Fills tensors and addresses."""
        first = len(self.args) - self.results
        pair = self._pair(0, first)
        shared = {
            index: self._local(f"operand{index}", arg)
            for index, (arg, space) in enumerate(zip(self.args, self.spaces, strict=True))
            if space is Space.SPAD and not (pair and index in (0, first))
        }
        for launch in range(LAUNCHES):
            row = []
            for index, (arg, space) in enumerate(zip(self.args, self.spaces, strict=True)):
                if pair and index in (0, first):
                    row.append(pair[(launch + (index == first)) % 2])
                elif space is Space.SPAD:
                    row.append(shared[index])
                else:
                    kind = "output" if index >= first else "input"
                    row.append(self._dram(f"operand{index}.{launch}", arg, kind))
            self.operands.append(row)

    def _pair(self, source: int, result: int) -> tuple[int, int] | None:
        """Two places that what is read first and the result take in turns.

        None when no launch reads the one before: they lie in different memories, or would take half of the scratchpad.
        """
        if result == 0 or self.spaces[source] is not self.spaces[result]:
            return None
        larger = max((self.args[source], self.args[result]), key=self._bytes)
        if self.spaces[source] is Space.DRAM:
            return self._dram("even", larger, "output"), self._dram("odd", larger, "output")
        if 4 * self._bytes(larger) > self.target.scratchpad.bytes:
            return None
        return self._local("even", larger), self._local("odd", larger)

    def _bytes(self, arg: Arg) -> int:
        from firsttoken_compiler.schedule.layout import resident_bytes

        return resident_bytes(arg, self.target)

    def _local(self, name: str, arg: Arg) -> int:
        """A place in the scratchpad that lives from the first load to the last launch."""
        from firsttoken_compiler.isa.program import Tensor

        unit = self.target.alignment(Space.SPAD, matrix_weights=True)
        at, nbytes = -(-self.local // unit) * unit, self._bytes(arg)
        self.local = at + nbytes
        self.kept.append((at, nbytes))
        self.tensors.append(
            Tensor(name, "activation", Space.SPAD, at, nbytes, Dtype.I8, (nbytes,), None, 0, LAUNCHES)
        )
        return at

    def _dram(self, name: str, arg: Arg, kind: str) -> int:
        from firsttoken_compiler.isa.program import Tensor

        unit = self.target.alignment(Space.DRAM, matrix_weights=True)
        spread = arg.dtype.nbytes(max(arg.shape, default=1) * arg.whole)  # a part, at the strides of what it is part of
        at, nbytes = -(-self.dram_bytes // unit) * unit, 2 * max(arg.nbytes, spread) + _SLACK
        self.dram_bytes = at + nbytes
        self.tensors.append(Tensor(name, kind, Space.DRAM, at, nbytes, arg.dtype, arg.shape))
        return at

    def loads(self) -> list[np.ndarray]:
        """Instructions that fill what lies in the scratchpad, from a tensor of their own."""
        from firsttoken_compiler.isa.dma import Load
        from firsttoken_compiler.isa.program import Tensor

        unit = self.target.alignment(Space.DRAM, matrix_weights=True)
        source = -(-self.dram_bytes // unit) * unit
        most = max((nbytes for _, nbytes in self.kept), default=0)
        self.tensors.append(Tensor("first", "input", Space.DRAM, source, most, Dtype.I8, (most,)))
        self.dram_bytes = source + most
        queue, rows = queue_index(0, Engine.DMA_IN), []
        for at, nbytes in self.kept:
            for done in range(0, nbytes, word.MAX_EXTENT):
                operands = (
                    Operand(Space.SPAD, Dtype.I8, at + done), Operand(Space.DRAM, Dtype.I8, source + done),
                )  # fmt: skip
                dims = (1, 1, min(word.MAX_EXTENT, nbytes - done))
                rows.append(Load(queue=queue, op=0, dims=dims, operands=operands).encode())
        return rows


def _program(spec: KernelSpec, memory: _Memory, template: Template, target: Target) -> Program:
    """Loads, then the launches; consecutive ones work in different parts of the free scratchpad, as in a network."""
    from firsttoken_compiler.codegen.sync import insert_semaphores
    from firsttoken_compiler.isa.program import OpInfo, Program, Tensor

    loads = memory.loads()
    code = [np.stack(loads)] if loads else []
    ops: list[OpInfo] = [OpInfo("first", "first", (), "", 0, len(loads))]
    kernels: dict[VectorKernel, int] = {}
    unit = target.alignment(Space.SPAD, matrix_weights=True)
    cursor, at = memory.base, len(loads)
    for launch in range(LAUNCHES):
        if cursor + template.scratch_bytes > target.scratchpad.bytes:
            cursor = memory.base
        numbers = [kernels.setdefault(kernel, len(kernels)) for kernel in template.kernels]
        code.append(template.relocated(memory.operands[launch], cursor, numbers, launch + 1))
        if template.scratch_bytes:
            shape = (template.scratch_bytes,)
            name, alive = f"scratch{launch}", launch + 1
            scratch = Tensor(
                name, "scratch", Space.SPAD, cursor, template.scratch_bytes, Dtype.I8, shape, None, alive, alive
            )
            memory.tensors.append(scratch)
        ops.append(OpInfo(f"launch{launch}", spec.kind, (), "", at, at + len(template.code), tile=template.tile))
        at += len(template.code)
        cursor = -(-(cursor + template.scratch_bytes) // unit) * unit
    return Program(
        code=insert_semaphores(np.concatenate(code)), kernels=tuple(kernels), tensors=tuple(memory.tensors),
        ops=tuple(ops), dram_bytes=memory.dram_bytes, spad_bytes=target.scratchpad.bytes, acc_bytes=template.acc_bytes,
        meta={"target": target.name},
    )  # fmt: skip
