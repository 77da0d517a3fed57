"""How long a piece of a program takes, about: its queues in order, its hazards, and the rates of the target's units.

The rates are those that tiles are chosen by (`target.rates`, `schedule.tiling.DRAM_SHARE`). The DRAM is one server of a
fixed rate; its banks, and conflicts of scratchpad banks, are the timing machine's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from firsttoken_compiler.codegen.hazards import hazards
from firsttoken_compiler.codegen.template import Template
from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.dma import Gather, Load, Store
from firsttoken_compiler.isa.instruction import BITS
from firsttoken_compiler.isa.types import ENGINES_PER_CORE, Dtype, Space
from firsttoken_compiler.isa.vector import KERNEL_SHIFT, Vector
from firsttoken_compiler.isa.vector_kernel import VectorKernel
from firsttoken_compiler.passes.lower import Launch, Value
from firsttoken_compiler.schedule.rowwise import kernel_operands
from firsttoken_compiler.schedule.spec import KernelSpec
from firsttoken_compiler.schedule.tiling import DRAM_SHARE
from firsttoken_compiler.target.rates import matmul_cost, matmul_scratchpad_bytes, pair_name, vector_cycles
from firsttoken_compiler.target.target import Target

Spaces = Callable[[Value], Space]
"""Where a value lies."""
DMA = (Load.OPCODE, Store.OPCODE, Gather.OPCODE)


@dataclass(frozen=True, slots=True)
class Estimate:
    """Cycles until the last instruction is done, and bytes to and from the DRAM."""

    cycles: int
    dram_bytes: int


@dataclass
class Estimator:
    """Estimates launches that follow one another, with `free` bytes of scratchpad to work in.

    `template` makes the template of a kernel whose operands and results lie in the given spaces.
    """

    target: Target
    free: int
    template: Callable[[KernelSpec, tuple[Space, ...]], Template]
    durations: dict[tuple[Any, ...], float] = field(default_factory=dict)

    def run(self, launches: Sequence[Launch], space: Spaces) -> Estimate:
        """Raises AllocationError when a kernel does not fit."""
        code, kernels = self._code(launches, space)
        need = hazards(code, ENGINES_PER_CORE).need.tolist()
        queues, opcodes = code[:, word.QUEUE].tolist(), code[:, word.OPCODE].tolist()
        lasting = [self._duration(row, kernels) for row in code.tolist()]
        free_at, end = [0.0] * ENGINES_PER_CORE, [0.0] * len(code)
        dram = 0.0
        for index, (queue, opcode) in enumerate(zip(queues, opcodes, strict=True)):
            start = max([free_at[queue], *(end[i] for i in need[index] if i >= 0)])
            if opcode in DMA:
                start = max(start + self.target.dma.setup_cycles, dram)
                dram = free_at[queue] = start + lasting[index]
                end[index] = dram + self.target.dma.bus_latency_cycles
            else:
                free_at[queue] = end[index] = start + lasting[index]
        moved = code[np.isin(code[:, word.OPCODE], DMA), word.DIMS : word.DIMS + 3]
        return Estimate(math.ceil(max(end, default=0.0)), int(moved.prod(axis=1).sum()))

    def _code(self, launches: Sequence[Launch], space: Spaces) -> tuple[np.ndarray, list[VectorKernel]]:
        """The launches' code: values lie one behind the other, above what kernels work in."""
        at = {Space.SPAD: self.free, Space.DRAM: 0}
        address: dict[tuple[str, str], int] = {}
        kernels: dict[VectorKernel, int] = {}
        parts, cursor = [], 0
        for number, launch in enumerate(launches):
            values = kernel_operands(launch.spec, (*launch.args, *launch.outs))
            for value in values:
                if (value.kind, value.name) not in address:
                    where = space(value)
                    address[value.kind, value.name] = at[where]
                    at[where] += 2 * value.arg.nbytes + (1 << 12)  # at least what rows take with their pitch
            template = self.template(launch.spec, tuple(space(value) for value in values))
            cursor = 0 if cursor + template.scratch_bytes > self.free else cursor
            operands = [address[value.kind, value.name] for value in values]
            numbers = [kernels.setdefault(kernel, len(kernels)) for kernel in template.kernels]
            parts.append(template.relocated(operands, cursor, numbers, number))
            cursor += template.scratch_bytes
        return np.concatenate(parts), list(kernels)

    def _duration(self, row: list[int], kernels: list[VectorKernel]) -> float:
        """Cycles that an instruction holds its unit, or the DRAM."""
        opcode, dims = row[word.OPCODE], tuple(row[word.DIMS : word.DIMS + 3])
        if opcode in DMA:
            target = self.target
            rate = min(target.dram.peak_bytes_per_s * DRAM_SHARE / target.clock_hz, target.dma.bus_bytes_per_cycle)
            return math.prod(dims) / rate
        end = word.OPERANDS + word.OPERAND_WIDTH * word.MAX_OPERANDS
        kinds = row[word.OPERANDS : end : word.OPERAND_WIDTH]
        steps = row[word.OPERANDS + word.OPERAND_WIDTH - 1 : end : word.OPERAND_WIDTH]
        kernel = kernels[row[word.FLAGS] >> KERNEL_SHIFT] if opcode == Vector.OPCODE else None
        key = (opcode, kernel, dims, tuple(kinds), tuple(step != 0 for step in steps))
        if key not in self.durations:
            streams = [kind for kind, step in zip(kinds, steps, strict=True) if step]
            self.durations[key] = self._matmul(dims, kinds) if kernel is None else self._vector(kernel, dims, streams)
        return self.durations[key]

    def _matmul(self, dims: tuple[int, ...], kinds: list[int]) -> float:
        m, n, k = dims
        a, w = Dtype(word.dtype_of(kinds[1])), Dtype(word.dtype_of(kinds[2]))
        read, _ = matmul_scratchpad_bytes(self.target, m, n, k, a.bits, w.bits)
        cycles = matmul_cost(self.target, m, n, k, pair_name(a, w)).cycles
        return max(cycles, self._ports(read)) + self.target.matrix.issue_cycles

    def _vector(self, kernel: VectorKernel, dims: tuple[int, ...], kinds: list[int]) -> float:
        """`kinds`: of the operands that go on along the innermost axis; others take a word per row."""
        n0, n1, n2 = dims
        bits = sum(int(BITS[word.dtype_of(kind)]) for kind in kinds if word.space_of(kind) == Space.SPAD)
        return max(vector_cycles(self.target, kernel, (n0, n1, n2)), self._ports(n0 * n1 * n2 * bits / 8))

    def _ports(self, nbytes: float) -> float:
        return nbytes / (self.target.scratchpad.banks * self.target.scratchpad.bank_bytes)
