"""How long a piece of a program takes, about: its queues in order, its hazards, and the rates of the target's units.

The rates are those that tiles are chosen by (`target.rates`, `schedule.tiling.DRAM_SHARE`). The DRAM is one server of a
fixed rate; its banks, and conflicts of scratchpad banks, are the timing machine's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numba import njit

from firsttoken_compiler.codegen.hazards import hazards
from firsttoken_compiler.codegen.template import Template
from firsttoken_compiler.errors import AllocationError
from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.dma import Gather, Load, Store
from firsttoken_compiler.isa.instruction import BITS
from firsttoken_compiler.isa.matmul import ATTENDS
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
ATTENDING = -2
"""In place of a microprogram's number, for products of an attention that the target maps in its own way."""
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
    known: dict[tuple[Any, ...], float] = field(default_factory=dict)

    def run(
        self, launches: Sequence[Launch], space: Spaces, lying: Mapping[str, int] | None = None, start: int = 0
    ) -> Estimate:
        """Raises AllocationError when a kernel does not fit.

        `lying`: addresses of storages that share their memory, in DRAM below `start`; all other values lie one behind
        the other.
        """
        code, kernels = self._code(launches, space, lying or {}, start)
        moves = np.isin(code[:, word.OPCODE], DMA)
        nbytes = code[:, word.DIMS : word.DIMS + 3].prod(axis=1)
        lasting = np.where(moves, nbytes / self._rate, 0.0)
        lasting[~moves] = self._durations(code[~moves], kernels)
        need = hazards(code, ENGINES_PER_CORE).need
        dma = self.target.dma
        queue = np.ascontiguousarray(code[:, word.QUEUE])
        cycles = _last(queue, moves, lasting, need, float(dma.setup_cycles), float(dma.bus_latency_cycles))
        return Estimate(math.ceil(cycles), int(nbytes[moves].sum()))

    @property
    def _rate(self) -> float:
        """Bytes of a cycle from or to the DRAM."""
        dram = self.target.dram.peak_bytes_per_s * DRAM_SHARE / self.target.clock_hz
        return min(dram, self.target.dma.bus_bytes_per_cycle)

    def _code(
        self, launches: Sequence[Launch], space: Spaces, lying: Mapping[str, int], start: int
    ) -> tuple[np.ndarray, list[VectorKernel]]:
        """The launches' code: values lie above what kernels work in."""
        at = {Space.SPAD: self.free, Space.DRAM: start}
        address: dict[tuple[str, str], int] = {}
        kernels: dict[VectorKernel, int] = {}
        parts, cursor = [], 0
        for number, launch in enumerate(launches):
            values = kernel_operands(launch.spec, (*launch.args, *launch.outs))
            for value in values:
                key, where = (value.kind, value.name), space(value)
                if value.kind == "storage" and value.name in lying:
                    address[key] = lying[value.name] + (self.free if where is Space.SPAD else 0)
                elif key not in address:
                    address[key] = at[where]
                    at[where] += 2 * value.arg.nbytes + (1 << 12)  # at least what rows take with their pitch
            template = self.template(launch.spec, tuple(space(value) for value in values))
            if template.scratch_bytes > self.free:
                raise AllocationError(
                    f"kernel {launch.spec.kind} works in {template.scratch_bytes} bytes of scratchpad, target "
                    f"{self.target.name} has {self.free} free: raise scratchpad.bytes"
                )
            cursor = 0 if cursor + template.scratch_bytes > self.free else cursor
            operands = [address[value.kind, value.name] for value in values]
            numbers = [kernels.setdefault(kernel, len(kernels)) for kernel in template.kernels]
            parts.append(template.relocated(operands, cursor, numbers, number))
            cursor += template.scratch_bytes
        return np.concatenate(parts), list(kernels)

    def _durations(self, code: np.ndarray, kernels: list[VectorKernel]) -> np.ndarray:
        """Cycles that instructions hold their unit; each shape is computed once."""
        vector = code[:, word.OPCODE] == Vector.OPCODE
        attends = ~vector & (code[:, word.FLAGS] & ATTENDS != 0)
        number = np.where(vector, code[:, word.FLAGS] >> KERNEL_SHIFT, np.where(attends, ATTENDING, -1))
        end = word.OPERANDS + word.OPERAND_WIDTH * word.MAX_OPERANDS
        steps = code[:, word.OPERANDS + word.OPERAND_WIDTH - 1 : end : word.OPERAND_WIDTH] != 0
        kinds = code[:, word.OPERANDS : end : word.OPERAND_WIDTH]
        shapes = np.column_stack(
            [number, code[:, word.DIMS : word.DIMS + 3], np.where(vector[:, None] & ~steps, 0, kinds)]
        )
        distinct, inverse = np.unique(shapes, axis=0, return_inverse=True)
        return np.array([self._duration(row, kernels) for row in distinct.tolist()])[inverse.ravel()]

    def _duration(self, shape: list[int], kernels: list[VectorKernel]) -> float:
        kernel = kernels[shape[0]] if shape[0] >= 0 else None
        dims, kinds = tuple(shape[1:4]), shape[4:]
        attends = shape[0] == ATTENDING
        key = (kernel, attends, dims, tuple(kinds))
        if key not in self.known:
            self.known[key] = (
                self._matmul(dims, kinds, attends) if kernel is None else self._vector(kernel, dims, kinds)
            )
        return self.known[key]

    def _matmul(self, dims: tuple[int, ...], kinds: list[int], attends: bool) -> float:
        m, n, k = dims
        a, w = Dtype(word.dtype_of(kinds[1])), Dtype(word.dtype_of(kinds[2]))
        read, _ = matmul_scratchpad_bytes(self.target, m, n, k, a.bits, w.bits)
        cycles = matmul_cost(self.target, m, n, k, pair_name(a, w), attends).cycles
        return max(cycles, self._ports(read)) + self.target.matrix.issue_cycles

    def _vector(self, kernel: VectorKernel, dims: tuple[int, ...], kinds: list[int]) -> float:
        """`kinds`: of the operands that go on along the innermost axis; others take a word per row."""
        n0, n1, n2 = dims
        bits = sum(int(BITS[word.dtype_of(kind)]) for kind in kinds if word.space_of(kind) == Space.SPAD)
        dtypes = tuple(Dtype(word.dtype_of(kind)) for kind in kinds if kind)
        sums = any(word.space_of(kind) == Space.ACC for kind in kinds[1:] if kind)
        cycles = vector_cycles(self.target, kernel, (n0, n1, n2), dtypes, sums)
        return max(cycles, self._ports(n0 * n1 * n2 * bits / 8))

    def _ports(self, nbytes: float) -> float:
        return nbytes / (self.target.scratchpad.banks * self.target.scratchpad.bank_bytes)


@njit(cache=True)
def _last(
    queue: np.ndarray, moves: np.ndarray, lasting: np.ndarray, need: np.ndarray, setup: float, latency: float
) -> float:
    """When the last instruction is done: queues in order, hazards kept, the DRAM one transfer at a time."""
    free, end = np.zeros(need.shape[1]), np.zeros(len(queue))
    dram = last = 0.0
    for i in range(len(queue)):
        start = free[queue[i]]
        for other in need[i]:
            if other >= 0:
                start = max(start, end[other])
        if moves[i]:
            dram = max(start + setup, dram) + lasting[i]
            free[queue[i]], end[i] = dram, dram + latency
        else:
            free[queue[i]] = end[i] = start + lasting[i]
        last = max(last, end[i])
    return last
