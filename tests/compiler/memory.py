"""A small memory for instructions to execute on, and the bytes that footprints name."""

from dataclasses import dataclass, field

import numpy as np

from firsttoken_compiler.isa.instruction import REGION_COLUMNS, Instruction
from firsttoken_compiler.isa.opcodes import regions
from firsttoken_compiler.isa.types import Space
from firsttoken_compiler.isa.vector_kernel import VectorKernel

Places = set[tuple[Space, int]]
"""(space, byte address) pairs."""


@dataclass
class SmallMemory:
    """Random bytes in every space of one core; satisfies `isa.instruction.Memory`."""

    size: int = 1024
    seed: int = 0
    kernels: tuple[VectorKernel, ...] = ()
    spaces: dict[Space, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        generator = np.random.default_rng(self.seed)
        for space in Space:
            self.spaces.setdefault(space, generator.integers(0, 256, self.size, np.uint8))

    def bytes(self, space: Space, core: int) -> np.ndarray:
        return self.spaces[space]

    def kernel(self, index: int) -> VectorKernel:
        return self.kernels[index]

    def copy(self) -> "SmallMemory":
        spaces = {space: data.copy() for space, data in self.spaces.items()}
        return SmallMemory(self.size, self.seed, self.kernels, spaces)

    def view(self, space: Space, dtype: str, address: int, *shape: int) -> np.ndarray:
        """A dense typed view."""
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self.spaces[space][address : address + count].view(dtype).reshape(shape)


def places(instruction: Instruction, write: bool) -> Places:
    """The bytes of an instruction's footprint."""
    found: Places = set()
    for row in regions(instruction.encode()[None]):
        region = dict(zip(REGION_COLUMNS, row.tolist(), strict=True))
        if region["write"] != int(write):
            continue
        for i in range(region["c0"]):
            for j in range(region["c1"]):
                for k in range(region["c2"]):
                    start = region["address"] + i * region["s0"] + j * region["s1"] + k * region["s2"]
                    found.update((Space(region["space"]), start + byte) for byte in range(region["run"]))
    return found


def changed(instruction: Instruction, memory: SmallMemory) -> Places:
    """The bytes that executing the instruction changes, from two opposite backgrounds of its written bytes."""
    found: Places = set()
    for background in (0x00, 0xFF):
        before = memory.copy()
        for space, byte in places(instruction, write=True):
            before.spaces[space][byte] = background
        after = before.copy()
        instruction.execute(after)
        for space in Space:
            found |= {(space, int(b)) for b in np.flatnonzero(before.spaces[space] != after.spaces[space])}
    return found


def read(instruction: Instruction, memory: SmallMemory, flip: int = 0xFF) -> Places:
    """The bytes that decide what the instruction writes: each is flipped alone, and something written differs."""
    written = sorted(places(instruction, write=True))

    def result(before: SmallMemory) -> bytes:
        after = before.copy()
        instruction.execute(after)
        return bytes(int(after.spaces[space][byte]) for space, byte in written)

    expected = result(memory)
    found: Places = set()
    for space in Space:
        for byte in range(memory.size):
            other = memory.copy()
            other.spaces[space][byte] ^= flip
            if result(other) != expected:
                found.add((space, byte))
    return found
