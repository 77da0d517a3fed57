"""Element types, address spaces and engines: the small integers that instruction words are made of."""

import re
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np


class Dtype(IntEnum):
    """Element type of an operand. Those of less than a byte (`PACKED`) fill bytes from the lowest bits on.

    Matrix and vector unit compute on `F32` to `I4`, the lanes also on `I64`, `BOOL`, `U8` and `U16`, and they read
    `U4`, `U2` and `U1`; the others are stored, copied, and read by the host.
    """

    F32 = 1
    F16 = 2
    I32 = 3
    I16 = 4
    I8 = 5
    I4 = 6
    I64 = 7
    U8 = 8
    BOOL = 9
    F64 = 10
    U16 = 11
    U32 = 12
    U64 = 13
    U4 = 14
    U2 = 15
    U1 = 16

    @property
    def bits(self) -> int:
        """Width of one element in bits."""
        return _BITS[self]

    @property
    def text(self) -> str:
        """Name in program listings and reports, e.g. `f16`."""
        return self.name.lower()

    @property
    def numpy(self) -> np.dtype[Any]:
        """The numpy element type; for a type of `PACKED` the byte that it is widened to."""
        return _NUMPY[self]

    def nbytes(self, elements: int) -> int:
        """Bytes that `elements` packed elements occupy, rounded up to a whole byte."""
        return (elements * self.bits + 7) // 8


_NUMPY: dict[Dtype, np.dtype[Any]] = {
    Dtype.F32: np.dtype(np.float32),
    Dtype.F16: np.dtype(np.float16),
    Dtype.I32: np.dtype(np.int32),
    Dtype.I16: np.dtype(np.int16),
    Dtype.I8: np.dtype(np.int8),
    Dtype.I4: np.dtype(np.int8),
    Dtype.I64: np.dtype(np.int64),
    Dtype.U8: np.dtype(np.uint8),
    Dtype.BOOL: np.dtype(np.bool_),
    Dtype.F64: np.dtype(np.float64),
    Dtype.U16: np.dtype(np.uint16),
    Dtype.U32: np.dtype(np.uint32),
    Dtype.U64: np.dtype(np.uint64),
    Dtype.U4: np.dtype(np.uint8),
    Dtype.U2: np.dtype(np.uint8),
    Dtype.U1: np.dtype(np.uint8),
}
PACKED = (Dtype.I4, Dtype.U4, Dtype.U2, Dtype.U1)
"""Several elements to a byte."""
COMPUTED = (Dtype.F32, Dtype.F16, Dtype.I32, Dtype.I16, Dtype.I8, Dtype.I4, Dtype.I64)
"""What the NPU's units read and write."""
_BITS = {
    **{dtype: 8 * kind.itemsize for dtype, kind in _NUMPY.items()},
    Dtype.I4: 4, Dtype.U4: 4, Dtype.U2: 2, Dtype.U1: 1,
}  # fmt: skip


class Space(IntEnum):
    """Address space: DRAM is shared by all cores, scratchpad and accumulator belong to one core."""

    DRAM = 1
    SPAD = 2
    ACC = 3

    @property
    def text(self) -> str:
        """Name in program listings."""
        return self.name.lower()


class Engine(IntEnum):
    """In-order instruction queue of a core; the queue's semaphore counts its signalling instructions that completed."""

    DMA_IN = 0
    DMA_OUT = 1
    MATRIX = 2
    VECTOR = 3
    HOST = 4

    @property
    def text(self) -> str:
        """Name in program listings and traces."""
        return self.name.lower()


ENGINES_PER_CORE = len(Engine)
_QUEUE = re.compile(r"core([0-9]{1,9})\.([a-z_]+)")


def queue_index(core: int, engine: Engine) -> int:
    """Index of a queue (and of its semaphore) over all cores."""
    return core * ENGINES_PER_CORE + int(engine)


def queue_name(index: int) -> str:
    """Name of a queue, e.g. `core0.matrix`."""
    return f"core{index // ENGINES_PER_CORE}.{Engine(index % ENGINES_PER_CORE).text}"


def parse_queue(text: str) -> int:
    """Inverse of `queue_name`; raises ValueError on anything else."""
    match = _QUEUE.fullmatch(text)
    if match is None or match[2].upper() not in Engine.__members__:
        raise ValueError(f"no such queue: {text!r}")
    return queue_index(int(match[1]), Engine[match[2].upper()])


@dataclass(frozen=True, slots=True)
class Operand:
    """A strided view: element (i, j, l) lies at `address + i*s0 + j*s1 + l*s2` (bytes).

    What the three axes mean is the instruction's business; see each class. Of a type of `PACKED` s2 counts elements.
    """

    space: Space
    dtype: Dtype
    address: int
    s0: int = 0
    s1: int = 0
    s2: int = 0


def unpack_int4(packed: np.ndarray) -> np.ndarray:
    """Bytes `[..., n]` to signed int4 values as int8 `[..., 2n]`, low nibble first."""
    low = (packed << 4).astype(np.int8) >> 4
    high = packed.astype(np.int8) >> 4
    return np.stack([low, high], axis=-1).reshape(*packed.shape[:-1], packed.shape[-1] * 2)


def unpack(packed: np.ndarray, dtype: Dtype) -> np.ndarray:
    """Bytes `[..., n]` to the elements of a type of `PACKED`, one to a byte `[..., 8 n / bits]`."""
    if dtype is Dtype.I4:
        return unpack_int4(packed)
    shifts = np.arange(0, 8, dtype.bits, dtype=np.uint8)
    values = (packed.view(np.uint8)[..., None] >> shifts) & np.uint8((1 << dtype.bits) - 1)
    return values.reshape(*packed.shape[:-1], -1)


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Integers of 1, 2 or 4 bits `[..., n]` to bytes along the last axis, which is filled up with zeros."""
    each = 8 // bits
    low = values.astype(np.int8).view(np.uint8) & np.uint8((1 << bits) - 1)
    if low.shape[-1] % each:
        low = np.concatenate([low, np.zeros((*low.shape[:-1], -low.shape[-1] % each), np.uint8)], axis=-1)
    packed = low[..., 0::each].copy()
    for index in range(1, each):
        packed |= low[..., index::each] << np.uint8(index * bits)
    return packed
