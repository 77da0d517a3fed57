"""DMA instructions: strided copies between DRAM and scratchpad, and the gather of table rows."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.instruction import Instruction, Memory, columns, region, strided
from firsttoken_compiler.isa.types import ENGINES_PER_CORE, Dtype, Operand, Space


@dataclass(frozen=True, slots=True, kw_only=True)
class _Copy(Instruction):
    """Copies `n0 * n1` rows of `bytes` bytes: dst[i, j, :] = src[i, j, :] with the strides of either side."""

    DIM_NAMES: ClassVar[tuple[str, str, str]] = ("n0", "n1", "bytes")
    OPERAND_NAMES: ClassVar[tuple[str, ...]] = ("dst", "src")

    @classmethod
    def regions(cls, index: np.ndarray, code: np.ndarray) -> np.ndarray:
        """See `Instruction.regions`."""
        n0, n1, run = (code[:, word.DIMS + i] for i in range(3))
        parts = []
        for operand, write in ((0, True), (1, False)):
            kind, address, s0, s1, _ = columns(code, operand)
            parts.append(region(index, write, kind, address, n0, s0, n1, s1, 1, 0, run))
        return np.concatenate(parts)

    def execute(self, memory: Memory) -> None:
        """See `Instruction.execute`."""
        core = self.queue // ENGINES_PER_CORE
        views = []
        for operand in (self.operand(0), self.operand(1)):
            data = memory.bytes(operand.space, core)
            views.append(strided(data, Dtype.I8, operand.address, self.dims, (operand.s0, operand.s1, 1)))
        views[0][...] = views[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Load(_Copy):
    """DRAM to scratchpad, 2-D strided (`core.dma_in`)."""

    OPCODE: ClassVar[int] = 1
    MNEMONIC: ClassVar[str] = "load"


@dataclass(frozen=True, slots=True, kw_only=True)
class Store(_Copy):
    """Scratchpad to DRAM, 2-D strided (`core.dma_out`)."""

    OPCODE: ClassVar[int] = 2
    MNEMONIC: ClassVar[str] = "store"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gather(Instruction):
    """Table rows to scratchpad: dst[i, :] = table[indices[i], :] for `rows` rows of `bytes` bytes (`core.dma_in`).

    Operands: dst (stride s0 per row), indices (int64 in DRAM or scratchpad, stride s0), table (DRAM, s0 bytes per row,
    s1 rows). An index outside the table is clamped to it. Which rows are read is data, so the footprint
    is the whole table and timing spreads the rows over it by a fixed hash.
    """

    OPCODE: ClassVar[int] = 3
    MNEMONIC: ClassVar[str] = "gather"
    DIM_NAMES: ClassVar[tuple[str, str, str]] = ("rows", "one", "bytes")
    OPERAND_NAMES: ClassVar[tuple[str, ...]] = ("dst", "indices", "table")

    @classmethod
    def regions(cls, index: np.ndarray, code: np.ndarray) -> np.ndarray:
        """See `Instruction.regions`."""
        rows, _, run = (code[:, word.DIMS + i] for i in range(3))
        kind, address, s0, _, _ = columns(code, 0)
        parts = [region(index, True, kind, address, rows, s0, 1, 0, 1, 0, run)]
        kind, address, s0, _, _ = columns(code, 1)
        parts.append(region(index, False, kind, address, rows, s0, 1, 0, 1, 0, 8))
        kind, address, s0, s1, _ = columns(code, 2)
        parts.append(region(index, False, kind, address, 1, 0, 1, 0, 1, 0, s0 * s1))
        return np.concatenate(parts)

    def execute(self, memory: Memory) -> None:
        """See `Instruction.execute`."""
        core = self.queue // ENGINES_PER_CORE
        rows, _, run = self.dims
        dst, indices, table = self.operand(0), self.operand(1), self.operand(2)
        which = strided(memory.bytes(indices.space, core), Dtype.I64, indices.address, (rows,), (indices.s0,))
        source = strided(memory.bytes(table.space, core), Dtype.I8, table.address, (table.s1, run), (table.s0, 1))
        out = strided(memory.bytes(dst.space, core), Dtype.I8, dst.address, (rows, run), (dst.s0, 1))
        out[...] = source[np.clip(which, 0, table.s1 - 1)]


def dram(dtype: Dtype, address: int, s0: int = 0, s1: int = 0) -> Operand:
    """A DRAM operand."""
    return Operand(Space.DRAM, dtype, address, s0, s1)


def spad(dtype: Dtype, address: int, s0: int = 0, s1: int = 0, s2: int = 0) -> Operand:
    """A scratchpad operand."""
    return Operand(Space.SPAD, dtype, address, s0, s1, s2)
