"""The vector instruction: one microprogram over up to six strided operands."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.instruction import BITS, Instruction, Memory, columns, region, strided
from firsttoken_compiler.isa.types import ENGINES_PER_CORE, PACKED, Dtype, Operand, unpack
from firsttoken_compiler.isa.vector_kernel import REDUCTIONS

KERNEL_SHIFT = 1
"""`flags >> KERNEL_SHIFT` is the microprogram's number."""
INITIALISE = 1
"""Flag: a reduction starts from its neutral element instead of from what the destination holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Vector(Instruction):
    """dst[i0, i1, i2] = kernel(s0.., s1.., ...), or a reduction into dst along the axes where dst has stride 0.

    Arithmetic is fp32 in the lanes; sources widen to it exactly (int32 rounds to nearest), the destination narrows:
    fp16 rounds to nearest even, integers truncate and saturate, a truth value is whether the number is not 0.
    Rows of a source of less than a byte per element start at whole bytes; its s2 is 1, or 0 for one element.
    """

    OPCODE: ClassVar[int] = 5
    MNEMONIC: ClassVar[str] = "vector"
    DIM_NAMES: ClassVar[tuple[str, str, str]] = ("n0", "n1", "n2")
    OPERAND_NAMES: ClassVar[tuple[str, ...]] = ("dst", "s0", "s1", "s2", "s3", "s4", "s5")

    @classmethod
    def regions(cls, index: np.ndarray, code: np.ndarray) -> np.ndarray:
        """See `Instruction.regions`. A reduction that accumulates also reads its destination (a map need not)."""
        n0, n1, n2 = (code[:, word.DIMS + i] for i in range(3))
        parts = []
        for operand in range(word.MAX_OPERANDS):
            kind, address, s0, s1, s2 = columns(code, operand)
            bits = BITS[word.dtype_of(kind)]
            element = np.maximum(bits // 8, 1)
            whole = s2 == element
            rows = np.where(whole, 1, n2)
            run = np.where(whole, (n2 * bits + 7) // 8, element)
            parts.append(region(index, operand == 0, kind, address, n0, s0, n1, s1, rows, np.where(whole, 0, s2), run))
        _, _, d0, d1, d2 = columns(code, 0)
        reduces = (n0 > 1) & (d0 == 0) | (n1 > 1) & (d1 == 0) | (n2 > 1) & (d2 == 0)
        reads = parts[0][reduces & ((code[:, word.FLAGS] & INITIALISE) == 0)].copy()
        reads[:, 1] = 0
        return np.concatenate([*parts, reads])

    def execute(self, memory: Memory) -> None:
        """See `Instruction.execute`."""
        kernel = memory.kernel(self.flags >> KERNEL_SHIFT)
        sources = [self._read(memory, self.operand(1 + i)) for i in range(kernel.sources)]
        values = kernel.evaluate(sources, self.dims)
        dst = self.operand(0)
        out = self._view(memory, dst)
        if kernel.reduction is None:
            out[...] = _narrow(values, dst.dtype)
            return
        ufunc, neutral = REDUCTIONS[kernel.reduction]
        folded = tuple(axis for axis, stride in enumerate((dst.s0, dst.s1, dst.s2)) if stride == 0)
        result = np.asarray(ufunc.reduce(values, axis=folded, keepdims=True), np.float32)
        kept = tuple(slice(0, 1) if axis in folded else slice(None) for axis in range(3))
        before = np.float32(neutral) if self.flags & INITIALISE else out[kept].astype(np.float32)
        out[kept] = _narrow(np.asarray(ufunc(before, result)), dst.dtype)

    def _read(self, memory: Memory, operand: Operand) -> np.ndarray:
        if operand.dtype not in PACKED:
            return self._view(memory, operand).astype(np.float32)
        n0, n1, n2 = self.dims
        used = n2 if operand.s2 else 1
        data = memory.bytes(operand.space, self.queue // ENGINES_PER_CORE)
        shape = (n0, n1, operand.dtype.nbytes(used))
        rows = strided(data, Dtype.U8, operand.address, shape, (operand.s0, operand.s1, 1))
        return unpack(rows, operand.dtype)[..., :used].astype(np.float32)

    def _view(self, memory: Memory, operand: Operand) -> np.ndarray:
        core = self.queue // ENGINES_PER_CORE
        strides = (operand.s0, operand.s1, operand.s2)
        return strided(memory.bytes(operand.space, core), operand.dtype, operand.address, self.dims, strides)


def _narrow(values: np.ndarray, dtype: Dtype) -> np.ndarray:
    if dtype in (Dtype.F32, Dtype.F16):
        with np.errstate(over="ignore"):
            return values.astype(dtype.numpy)
    if dtype is Dtype.BOOL:
        return values != 0
    limits = np.iinfo(dtype.numpy)
    clean = np.nan_to_num(np.trunc(values.astype(np.float64)), nan=0.0)
    return np.clip(clean, limits.min, limits.max).astype(dtype.numpy)
