"""What all instructions share: fields, encoding, text form, and the interface of footprint and meaning."""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

import numpy as np

from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.types import Dtype, Operand, Space, parse_queue, queue_name
from firsttoken_compiler.isa.vector_kernel import VectorKernel

REGION_COLUMNS = ("instruction", "write", "space", "address", "c0", "s0", "c1", "s1", "c2", "s2", "run")
"""Columns of a footprint: `c0*c1*c2` runs of `run` bytes at `address + i*s0 + j*s1 + l*s2`."""


class HostCallState(Protocol):
    """One call of the host while a program executes."""

    def load(self, slot: int, data: np.ndarray) -> None:
        """Takes an operand's bytes; raises ValueError for a slot or size that the call does not have."""

    def run(self) -> None:
        """Computes; raises ValueError when an operand is missing or the host refuses."""

    def result(self, slot: int) -> np.ndarray:
        """A result's bytes (uint8); raises ValueError for a slot that the call does not have."""


class Memory(Protocol):
    """What an instruction sees when it executes: bytes by address space, microprograms, and calls of the host."""

    def bytes(self, space: Space, core: int) -> np.ndarray:
        """The uint8 array of a space (of this core, for scratchpad and accumulator)."""

    def kernel(self, index: int) -> VectorKernel:
        """Microprogram `index` of the program."""

    def host_call(self, index: int) -> HostCallState:
        """Call `index` of the host; raises ValueError when the program has none of that number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Instruction(ABC):
    """One instruction: queue, synchronisation, three extents, flags and named operands.

    `waits` are (queue, value) pairs: the instruction starts when that queue's semaphore has reached the value.
    Semaphores only count up, so a wait can never be missed.
    """

    queue: int
    op: int = 0
    signal: bool = False
    waits: tuple[tuple[int, int], ...] = ()
    flags: int = 0
    dims: tuple[int, int, int]
    operands: tuple[Operand | None, ...]

    OPCODE: ClassVar[int]
    MNEMONIC: ClassVar[str]
    DIM_NAMES: ClassVar[tuple[str, str, str]]
    OPERAND_NAMES: ClassVar[tuple[str, ...]]

    def __post_init__(self) -> None:
        """Raises ValueError for more waits or operands than there are, and for queues that cannot be encoded."""
        if len(self.waits) > word.MAX_WAITS:
            raise ValueError(f"{self.MNEMONIC}: {len(self.waits)} waits, an instruction has {word.MAX_WAITS}")
        if len(self.operands) > len(self.OPERAND_NAMES):
            names = ", ".join(self.OPERAND_NAMES)
            raise ValueError(f"{self.MNEMONIC}: {len(self.operands)} operands, it has {names}")
        if self.queue < 0:
            raise ValueError(f"{self.MNEMONIC}: queue {self.queue}, queues count from 0")
        for queue, _ in self.waits:
            if queue < 0:
                raise ValueError(f"{self.MNEMONIC}: waits for queue {queue}, queues count from 0")
        if self.operands and self.operands[-1] is None:
            object.__setattr__(self, "operands", _without_tail(self.operands))

    def encode(self) -> np.ndarray:
        """The instruction as int64 `[word.WIDTH]`."""
        row = np.zeros(word.WIDTH, np.int64)
        row[word.OPCODE], row[word.QUEUE], row[word.OP] = self.OPCODE, self.queue, self.op
        row[word.SIGNAL], row[word.FLAGS] = int(self.signal), self.flags
        for slot, (queue, value) in enumerate(self.waits):
            row[word.WAITS + 2 * slot : word.WAITS + 2 * slot + 2] = queue + 1, value
        row[word.DIMS : word.DIMS + 3] = self.dims
        for index, operand in enumerate(self.operands):
            if operand is not None:
                column = word.operand_column(index)
                row[column : column + word.OPERAND_WIDTH] = (
                    word.kind(operand.space, operand.dtype), operand.address, operand.s0, operand.s1, operand.s2,
                )  # fmt: skip
        return row

    @classmethod
    def from_row(cls, row: np.ndarray) -> Self:
        """Inverse of `encode` for this class."""
        waits = row[word.WAITS : word.WAITS + 2 * word.MAX_WAITS].reshape(-1, 2).tolist()
        operands: list[Operand | None] = []
        for index in range(word.MAX_OPERANDS):
            column = word.operand_column(index)
            kind, address, s0, s1, s2 = row[column : column + word.OPERAND_WIDTH].tolist()
            operands.append(_operand(kind, address, s0, s1, s2) if kind else None)
        n0, n1, n2 = row[word.DIMS : word.DIMS + 3].tolist()
        return cls(
            queue=int(row[word.QUEUE]),
            op=int(row[word.OP]),
            signal=bool(row[word.SIGNAL]),
            waits=tuple((queue - 1, value) for queue, value in waits if queue),
            flags=int(row[word.FLAGS]),
            dims=(n0, n1, n2),
            operands=_without_tail(operands),
        )

    def __str__(self) -> str:
        """One line: `core0.matrix matmul m=64 n=128 k=512 flags=1 acc=acc:i32@0x0+512,0,0 ... wait=... signal`."""
        parts = [queue_name(self.queue), self.MNEMONIC, f"op={self.op}"]
        parts += [f"{name}={extent}" for name, extent in zip(self.DIM_NAMES, self.dims, strict=True)]
        parts.append(f"flags={self.flags}")
        for name, operand in zip(self.OPERAND_NAMES, self.operands, strict=False):
            if operand is not None:
                strides = f"{operand.s0},{operand.s1},{operand.s2}"
                parts.append(f"{name}={operand.space.text}:{operand.dtype.text}@{operand.address:#x}+{strides}")
        parts += [f"wait={queue_name(queue)}>={value}" for queue, value in self.waits]
        return " ".join(parts + (["signal"] if self.signal else []))

    @classmethod
    def from_text(cls, words: list[str]) -> Self:
        """Inverse of `str` for this class, from the words after the mnemonic; raises ValueError naming the bad word."""
        fields: dict[str, int] = {}
        operands: list[Operand | None] = [None] * len(cls.OPERAND_NAMES)
        waits: list[tuple[int, int]] = []
        signal = False
        for token in words:
            key, _, value = token.partition("=")
            if token == "signal":
                signal = True
            elif key == "wait":
                queue, _, count = value.partition(">=")
                waits.append((parse_queue(queue), _int64(count)))
            elif key in cls.OPERAND_NAMES:
                operands[cls.OPERAND_NAMES.index(key)] = _parse_operand(value)
            elif key in (*cls.DIM_NAMES, "op", "flags", "queue"):
                fields[key] = _int64(value)
            else:
                raise ValueError(f"{cls.MNEMONIC}: unknown word {token!r}")
        n0, n1, n2 = (fields[name] for name in cls.DIM_NAMES)
        return cls(
            queue=fields["queue"], op=fields.get("op", 0), signal=signal, waits=tuple(waits),
            flags=fields.get("flags", 0), dims=(n0, n1, n2), operands=tuple(operands),
        )  # fmt: skip

    def operand(self, index: int) -> Operand:
        """Operand `index`; raises ValueError when the instruction lacks it."""
        found = self.operands[index] if index < len(self.operands) else None
        if found is None:
            raise ValueError(f"{self.MNEMONIC} lacks its operand {self.OPERAND_NAMES[index]!r}")
        return found

    @classmethod
    @abstractmethod
    def regions(cls, index: np.ndarray, code: np.ndarray) -> np.ndarray:
        """Footprints of rows of this opcode: int64 `[regions, len(REGION_COLUMNS)]`; `index` numbers the rows."""

    @abstractmethod
    def execute(self, memory: Memory) -> None:
        """The meaning: reads and writes `memory`."""


_OPERAND = re.compile(r"(\w+):(\w+)@(0x[0-9a-f]+|-0x[0-9a-f]+)\+(-?\d+),(-?\d+),(-?\d+)")


def _parse_operand(text: str) -> Operand:
    match = _OPERAND.fullmatch(text)
    if match is None:
        raise ValueError(f"not an operand: {text!r}")
    space, dtype, address, s0, s1, s2 = match.groups()
    if space.upper() not in Space.__members__ or dtype.upper() not in Dtype.__members__:
        raise ValueError(f"unknown space or element type in {text!r}")
    return Operand(Space[space.upper()], Dtype[dtype.upper()], _int64(address, 16), _int64(s0), _int64(s1), _int64(s2))


def _int64(text: str, base: int = 10) -> int:
    number = int(text, base)
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{text} does not fit in 64 bits")
    return number


def _operand(kind: int, address: int, s0: int, s1: int, s2: int) -> Operand:
    return Operand(Space(word.space_of(kind)), Dtype(word.dtype_of(kind)), address, s0, s1, s2)


def _without_tail(operands: Sequence[Operand | None]) -> tuple[Operand | None, ...]:
    """The operands without the absent ones at the end, which a row cannot tell from none."""
    count = len(operands)
    while count and operands[count - 1] is None:
        count -= 1
    return tuple(operands[:count])


def strided(
    memory: np.ndarray, dtype: Dtype, address: int, shape: tuple[int, ...], strides: tuple[int, ...]
) -> np.ndarray:
    """A typed strided view of a byte array; raises ValueError when any element lies outside it."""
    low = address + sum(min(0, (n - 1) * s) for n, s in zip(shape, strides, strict=True))
    high = address + sum(max(0, (n - 1) * s) for n, s in zip(shape, strides, strict=True)) + dtype.numpy.itemsize
    if low < 0 or high > memory.size:
        raise ValueError(f"access to bytes {low} to {high} of a memory of {memory.size} bytes")
    whole = memory[low:high]
    return np.ndarray(shape, dtype.numpy, buffer=whole.data, offset=address - low, strides=strides)


def columns(code: np.ndarray, operand: int) -> tuple[np.ndarray, ...]:
    """(kind, address, s0, s1, s2) columns of an operand over rows of code."""
    at = word.operand_column(operand)
    return tuple(code[:, at + i] for i in range(word.OPERAND_WIDTH))


def region(index: np.ndarray, write: bool, kind: np.ndarray, address: np.ndarray, *axes: Any) -> np.ndarray:
    """Assembles footprint rows; `axes`: c0, s0, c1, s1, c2, s2, run (arrays or numbers). Absent operands drop out."""
    table = np.zeros((len(index), len(REGION_COLUMNS)), np.int64)
    for column, values in enumerate((index, int(write), word.space_of(kind), address, *axes)):
        table[:, column] = values
    for count, stride in ((4, 5), (6, 7), (8, 9)):
        table[table[:, stride] == 0, count] = 1  # a stride of 0 touches the same bytes again
    return table[kind != 0]


BITS = np.zeros(1 << word.KIND_BITS, np.int64)
for _dtype in Dtype:
    BITS[int(_dtype)] = _dtype.bits
"""Element width in bits by dtype number, for column arithmetic."""
