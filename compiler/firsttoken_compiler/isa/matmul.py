"""The matrix instruction."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.instruction import BITS, Instruction, Memory, columns, region, strided
from firsttoken_compiler.isa.types import ENGINES_PER_CORE, PACKED, Dtype, Operand, unpack

ACCUMULATE = 1
"""Flag: add to what the accumulators hold instead of overwriting it."""
TRANSPOSED = 2
"""Flag: the weight operand is stored `[n, k]` (as a key cache is), k contiguous."""

ATTENDS = 4
"""Flag: the product is of a kernel of attention that the target maps in its own way; changes no number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Matmul(Instruction):
    """acc[m, n] (+)= a[m, k] x w[k, n]; integer pairs accumulate in int32 (wrapping), float pairs in fp32.

    acc: fp32 or int32, s0 bytes per row. a: s0 bytes per row, k contiguous.
    w: panels of s2 columns; panel p at `p * s0`, its row k at `k * s1` (rows of four-bit elements are packed).
    With TRANSPOSED: w row n at `n * s1`, k contiguous, s0 and s2 unused.
    """

    OPCODE: ClassVar[int] = 4
    MNEMONIC: ClassVar[str] = "matmul"
    DIM_NAMES: ClassVar[tuple[str, str, str]] = ("m", "n", "k")
    OPERAND_NAMES: ClassVar[tuple[str, ...]] = ("acc", "a", "w")

    @classmethod
    def regions(cls, index: np.ndarray, code: np.ndarray) -> np.ndarray:
        """See `Instruction.regions`."""
        m, n, k = (code[:, word.DIMS + i] for i in range(3))
        kind, address, s0, _, _ = columns(code, 0)
        parts = [region(index, True, kind, address, m, s0, 1, 0, 1, 0, n * 4)]
        accumulates = (code[:, word.FLAGS] & ACCUMULATE) != 0
        parts.append(parts[0][accumulates[kind != 0]].copy())
        parts[1][:, 1] = 0
        kind, address, s0, _, _ = columns(code, 1)
        parts.append(region(index, False, kind, address, m, s0, 1, 0, 1, 0, k * BITS[word.dtype_of(kind)] // 8))
        kind, address, s0, s1, width = columns(code, 2)
        bits = BITS[word.dtype_of(kind)]
        transposed = (code[:, word.FLAGS] & TRANSPOSED) != 0
        full, rest = n // np.maximum(width, 1), n % np.maximum(width, 1)
        panels = np.where(transposed, n, full)
        stride = np.where(transposed, s1, s0)
        rows = np.where(transposed, 1, k)
        run = np.where(transposed, k * bits // 8, -(-width * bits // 8))
        parts.append(region(index, False, kind, address, panels, stride, rows, s1, 1, 0, run))
        last = (rest > 0) & ~transposed  # of the last panel only the columns in use
        run = -(-rest * bits // 8)
        parts.append(region(index, False, kind, address + full * s0, 1, 0, k, s1, 1, 0, run)[last[kind != 0]])
        return np.concatenate(parts)

    def execute(self, memory: Memory) -> None:
        """See `Instruction.execute`."""
        core = self.queue // ENGINES_PER_CORE
        m, n, k = self.dims
        acc, a, w = self.operand(0), self.operand(1), self.operand(2)
        left = strided(memory.bytes(a.space, core), a.dtype, a.address, (m, k), (a.s0, a.dtype.bits // 8))
        product = _multiply(left, self._weights(memory.bytes(w.space, core), w), acc.dtype)
        out = strided(memory.bytes(acc.space, core), acc.dtype, acc.address, (m, n), (acc.s0, 4))
        if self.flags & ACCUMULATE:
            with np.errstate(over="ignore"):
                out += product
        else:
            out[...] = product

    def _weights(self, data: np.ndarray, w: Operand) -> np.ndarray:
        """The weight operand as `[k, n]`, four bits widened to a byte."""
        _, n, k = self.dims
        if self.flags & TRANSPOSED:
            return strided(data, w.dtype, w.address, (n, k), (w.s1, w.dtype.bits // 8)).T
        panels, width = -(-n // w.s2), w.s2
        used = min(n, width)  # a single narrow panel may be shorter than its width
        if w.dtype in PACKED:
            packed = strided(data, Dtype.U8, w.address, (panels, k, w.dtype.nbytes(used)), (w.s0, w.s1, 1))
            block = unpack(packed, w.dtype)[:, :, :used]
        else:
            block = strided(data, w.dtype, w.address, (panels, k, used), (w.s0, w.s1, w.dtype.bits // 8))
        return block.transpose(1, 0, 2).reshape(k, -1)[:, :n]


def _multiply(a: np.ndarray, w: np.ndarray, accumulator: Dtype) -> np.ndarray:
    """Product of `a` and `w` in the accumulator's type; integers exactly, then wrapped to int32."""
    if accumulator is Dtype.F32:
        return a.astype(np.float32) @ w.astype(np.float32)
    # A float matmul is exact while every partial sum stays below the mantissa.
    bound = float(np.iinfo(a.dtype).max + 1) * float(np.iinfo(w.dtype).max + 1) * a.shape[1]
    exact = np.float32 if bound <= 2**24 else np.float64
    wide = a.astype(exact) @ w.astype(exact)
    return wide.astype(np.int64).astype(np.int32)
