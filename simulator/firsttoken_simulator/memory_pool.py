"""Memory of simulated machines that outlives a program: blocks by size class, given back and taken again.

Programs of one student hold their external weights at the same addresses, so that a machine which changes to the
program of another prompt length, or to the one that decodes, keeps them and its block.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np

from firsttoken_compiler.errors import ProgramError
from firsttoken_compiler.isa.program import Packing, Program, Tensor
from firsttoken_compiler.isa.types import Space
from firsttoken_compiler.target.target import Target

SMALLEST: Final = 4096
"""Bytes of the smallest class."""
STEPS: Final = 4
"""Classes from one power of two to the next: a block is at most a quarter larger than what was asked for."""


def size_class(nbytes: int) -> int:
    """Bytes of the smallest class that holds `nbytes`."""
    if nbytes <= SMALLEST:
        return SMALLEST
    step = (1 << (nbytes - 1).bit_length()) // 2 // STEPS
    return -(-nbytes // step) * step


@dataclass(frozen=True, slots=True)
class PoolUse:
    """What a pool has done.

    Attributes:
        requests: how often memory was asked for.
        allocations: how often a new block was made for it.
        requested_bytes: what was asked for, summed.
        allocated_bytes: all blocks.
        peak_bytes: blocks in use at the fullest moment.
        fragmentation: share of these that nobody had asked for.
    """

    requests: int
    allocations: int
    requested_bytes: int
    allocated_bytes: int
    peak_bytes: int
    fragmentation: float

    @property
    def reuse(self) -> float:
        """How often each allocated byte was asked for."""
        return self.requested_bytes / self.allocated_bytes if self.allocated_bytes else 0.0


class MemoryPool:
    """Blocks of bytes; one that is given back serves the next request of its class or a smaller one."""

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []
        self._used: dict[int, tuple[np.ndarray, int]] = {}
        self._requests = self._allocations = self._requested = self._allocated = self._peak = 0
        self._wanted = 0
        """Bytes asked for at the fullest moment."""

    def take(self, nbytes: int) -> np.ndarray:
        """A block of at least `nbytes`: the smallest free one that holds them, else a new one, zeroed."""
        fitting = [block for block in self._free if len(block) >= nbytes]
        if fitting:
            block = min(fitting, key=len)
            self._free = [other for other in self._free if other is not block]
        else:
            block = np.zeros(size_class(nbytes), np.uint8)
            self._allocations += 1
            self._allocated += len(block)
        self._enter(block, nbytes)
        return block

    def give(self, block: np.ndarray) -> None:
        """Takes a block back; raises ProgramError for one that is not in use here."""
        if self._used.pop(id(block), None) is None:
            raise ProgramError(f"a block of {len(block)} bytes is given back to a pool that it is not in use of")
        self._free.append(block)

    def again(self, block: np.ndarray, nbytes: int) -> bool:
        """Whether a block in use serves a request for `nbytes` as it is; if so, that counts as one."""
        if id(block) not in self._used or len(block) < nbytes:
            return False
        self._enter(block, nbytes)
        return True

    @property
    def use(self) -> PoolUse:
        """What has happened so far."""
        lost = 1 - self._wanted / self._peak if self._peak else 0.0
        return PoolUse(self._requests, self._allocations, self._requested, self._allocated, self._peak, lost)

    def _enter(self, block: np.ndarray, nbytes: int) -> None:
        self._requests += 1
        self._requested += nbytes
        self._used[id(block)] = block, nbytes
        held, wanted = sum(len(b) for b, _ in self._used.values()), sum(n for _, n in self._used.values())
        if (held, wanted) > (self._peak, self._wanted):
            self._peak, self._wanted = held, wanted


Weight = tuple[str, int, int, Packing | None]
"""Name, address, bytes and recipe of a weight: what makes the bytes at an address."""


@dataclass
class DeviceMemory:
    """DRAM, and scratchpad and accumulators per core, in blocks of a pool; one program at a time owns them.

    Weights that lie before the first cache are kept from program to program where both have them at one address.
    """

    pool: MemoryPool
    target: Target
    dram: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint8))
    local: dict[Space, list[np.ndarray]] = field(default_factory=dict)
    owner: object = None
    """Whose program's bytes are in the DRAM now."""
    kept: dict[Weight, int] = field(default_factory=dict)
    """Weights that are there whoever owns it, and where they end."""

    def views(self) -> dict[Space, list[np.ndarray]]:
        """The local memories, as long as they are."""
        return {space: [block[: self._sizes[space]] for block in blocks] for space, blocks in self.local.items()}

    @property
    def _sizes(self) -> dict[Space, int]:
        return {Space.SPAD: self.target.scratchpad.bytes, Space.ACC: self.target.scratchpad.accumulator_bytes}

    def fit(self, program: Program) -> None:
        """Makes room for a program; the weights that are kept stay."""
        for space, nbytes in self._sizes.items():
            blocks = self.local.setdefault(space, [])
            for index in range(program.cores):
                if index == len(blocks):
                    blocks.append(self.pool.take(nbytes))
                else:
                    self.pool.again(blocks[index], nbytes)
        if not self.pool.again(self.dram, program.dram_bytes):
            larger = self.pool.take(program.dram_bytes)
            end = max(self.kept.values(), default=0)
            larger[:end] = self.dram[:end]
            if len(self.dram):
                self.pool.give(self.dram)
            self.dram = larger

    def missing(self, program: Program) -> tuple[Tensor, ...]:
        """The program's weights that are not kept; those that lie where other weights are kept push these out."""
        first = min((t.address for t in program.of_kind("kv")), default=program.dram_bytes)
        wanted = {_weight(t): t for t in program.of_kind("weight")}
        shared = {weight for weight, tensor in wanted.items() if tensor.address + tensor.nbytes <= first}
        self.kept = {weight: end for weight, end in self.kept.items() if weight in shared}
        found = tuple(tensor for weight, tensor in wanted.items() if weight not in self.kept)
        self.kept |= {weight: wanted[weight].address + wanted[weight].nbytes for weight in shared}
        return found


def _weight(tensor: Tensor) -> Weight:
    return tensor.name, tensor.address, tensor.nbytes, tensor.packing
