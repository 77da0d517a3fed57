"""Instruction templates: a kernel's code with operand addresses relative to its operands and its working memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.types import ENGINES_PER_CORE
from firsttoken_compiler.isa.vector import KERNEL_SHIFT, Vector
from firsttoken_compiler.isa.vector_kernel import VectorKernel

ABSOLUTE = -1
"""Symbol of an address that is final (accumulators)."""
SCRATCH = 100
"""Symbol of the kernel's working memory in the scratchpad; smaller ones number its operands."""


@dataclass(frozen=True)
class Template:
    """Code of one kernel shape; `relocated` places it."""

    code: np.ndarray
    """int64 `[instructions, word.WIDTH]`."""
    symbols: np.ndarray
    """int16 `[instructions, word.MAX_OPERANDS]`: what each operand's address is relative to."""
    kernels: tuple[VectorKernel, ...]
    scratch_bytes: int
    acc_bytes: int
    tile: str = ""

    def relocated(self, operands: list[int], scratch: int, kernels: list[int], op: int, core: int = 0) -> np.ndarray:
        """The code with addresses of operands and working memory, program-wide microprogram numbers and operator."""
        code = self.code.copy()
        bases = np.zeros(SCRATCH + 2, np.int64)
        bases[: len(operands)] = operands
        bases[SCRATCH] = scratch
        columns = [word.operand_column(i) + 1 for i in range(word.MAX_OPERANDS)]
        code[:, columns] += bases[np.where(self.symbols == ABSOLUTE, SCRATCH + 1, self.symbols)]
        code[:, word.OP] = op
        code[:, word.QUEUE] += core * ENGINES_PER_CORE
        vector = code[:, word.OPCODE] == Vector.OPCODE
        flags = code[vector, word.FLAGS]
        numbers = np.array([*kernels, 0], np.int64)
        code[vector, word.FLAGS] = (numbers[flags >> KERNEL_SHIFT] << KERNEL_SHIFT) | (flags & 1)
        return code
