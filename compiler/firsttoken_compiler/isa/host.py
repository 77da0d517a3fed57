"""Host instructions: a call of the CPU beside the NPU reads its operands from DRAM, computes, writes its results.

A call is an entry of the program's `hosts`. Its loads take their operands as they are at that moment, so what follows
may overwrite them while the host computes.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from firsttoken_compiler.isa.instruction import Instruction, Memory, columns, region
from firsttoken_compiler.isa.types import ENGINES_PER_CORE

SLOT_BITS = 16
"""`flags` hold the call's number above these bits, the operand's or result's number in them."""


def host_flags(call: int, slot: int = 0) -> int:
    """The `flags` of a host instruction."""
    return call << SLOT_BITS | slot


@dataclass(frozen=True, slots=True, kw_only=True)
class _HostInstruction(Instruction):
    """What the three have in common: no extents, the call and the slot in `flags`."""

    DIM_NAMES: ClassVar[tuple[str, str, str]] = ("n0", "n1", "n2")

    @property
    def call(self) -> int:
        """Number of the call in the program's `hosts`."""
        return self.flags >> SLOT_BITS

    @property
    def slot(self) -> int:
        """Which operand or result of the call."""
        return self.flags & ((1 << SLOT_BITS) - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Transfer(_HostInstruction):
    """Moves operand 0: `s0` contiguous bytes of DRAM."""

    WRITES: ClassVar[bool]

    @classmethod
    def regions(cls, index: np.ndarray, code: np.ndarray) -> np.ndarray:
        """See `Instruction.regions`."""
        kind, address, nbytes, _, _ = columns(code, 0)
        return region(index, cls.WRITES, kind, address, 1, 0, 1, 0, 1, 0, nbytes)

    def _bytes(self, memory: Memory) -> np.ndarray:
        """The operand's bytes; raises ValueError outside the memory."""
        operand = self.operand(0)
        data = memory.bytes(operand.space, self.queue // ENGINES_PER_CORE)
        if not 0 <= operand.address <= operand.address + operand.s0 <= data.size:
            raise ValueError(f"access to {operand.s0} bytes at {operand.address} of a memory of {data.size} bytes")
        return data[operand.address : operand.address + operand.s0]


@dataclass(frozen=True, slots=True, kw_only=True)
class HostLoad(_Transfer):
    """Operand `slot` of a call: `src.s0` bytes of DRAM at `src` (`core.host`)."""

    OPCODE: ClassVar[int] = 6
    MNEMONIC: ClassVar[str] = "host_load"
    OPERAND_NAMES: ClassVar[tuple[str, ...]] = ("src",)
    WRITES: ClassVar[bool] = False

    def execute(self, memory: Memory) -> None:
        """See `Instruction.execute`."""
        memory.host_call(self.call).load(self.slot, self._bytes(memory).copy())


@dataclass(frozen=True, slots=True, kw_only=True)
class HostRun(_HostInstruction):
    """Computes a call on the operands that were loaded for it (`core.host`)."""

    OPCODE: ClassVar[int] = 7
    MNEMONIC: ClassVar[str] = "host_run"
    OPERAND_NAMES: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def regions(cls, index: np.ndarray, code: np.ndarray) -> np.ndarray:
        """See `Instruction.regions`: it touches no memory of the NPU."""
        nothing = np.zeros(len(code), np.int64)
        return region(index, False, nothing, nothing, 1, 0, 1, 0, 1, 0, 0)

    def execute(self, memory: Memory) -> None:
        """See `Instruction.execute`."""
        memory.host_call(self.call).run()


@dataclass(frozen=True, slots=True, kw_only=True)
class HostStore(_Transfer):
    """Result `slot` of a call: `dst.s0` bytes of DRAM at `dst` (`core.host`)."""

    OPCODE: ClassVar[int] = 8
    MNEMONIC: ClassVar[str] = "host_store"
    OPERAND_NAMES: ClassVar[tuple[str, ...]] = ("dst",)
    WRITES: ClassVar[bool] = True

    def execute(self, memory: Memory) -> None:
        """See `Instruction.execute`."""
        target = self._bytes(memory)
        data = memory.host_call(self.call).result(self.slot)
        if data.size != target.size:
            raise ValueError(f"the host's result has {data.size} bytes, the program expects {target.size}")
        target[...] = data
