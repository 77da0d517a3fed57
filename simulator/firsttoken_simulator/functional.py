"""What a program computes, bit by bit: its instructions executed on byte-addressed memory, in any completion order."""

from collections.abc import Iterable
from typing import Final

import numpy as np

from firsttoken_compiler.errors import ProgramError
from firsttoken_compiler.isa.instruction import HostCallState, Instruction
from firsttoken_compiler.isa.program import Program, Tensor
from firsttoken_compiler.isa.types import ENGINES_PER_CORE, PACKED, Space, pack, unpack
from firsttoken_compiler.isa.vector_kernel import VectorKernel
from firsttoken_compiler.target.target import Target
from firsttoken_simulator.host import HostRuntime
from firsttoken_simulator.memory_pool import DeviceMemory, MemoryPool

DRAM_LIMIT_BYTES: Final = 32 << 30
"""Default bound on the simulated DRAM; untouched pages cost the simulating machine nothing."""
POISON: Final = 0xFF
"""Initial byte of scratchpads and accumulators: NaN as fp16 and fp32, -1 as an integer."""


class FunctionalMachine:
    """DRAM, and scratchpad and accumulator per core; implements `isa.instruction.Memory`.

    Instructions are decoded once. DRAM keeps its contents between runs, so a decode step can follow the one before;
    local memory is poisoned, so that a read that no instruction of the run wrote shows as a wrong number.
    """

    def __init__(
        self, program: Program, target: Target, dram_limit_bytes: int = DRAM_LIMIT_BYTES,
        memory: DeviceMemory | None = None,
    ) -> None:  # fmt: skip
        """Enters `memory`, by default one of its own; raises ProgramError when the program cannot be held."""
        if not 0 <= program.dram_bytes <= dram_limit_bytes:
            raise ProgramError(
                f"the program needs {program.dram_bytes} bytes of DRAM, the limit is {dram_limit_bytes}; "
                "take a smaller student, or raise dram_limit_bytes"
            )
        self.program = program
        self._instructions: list[Instruction] = list(program.instructions())
        used = 1 + max((i.queue for i in self._instructions), default=0) // ENGINES_PER_CORE
        if used > program.cores:
            raise ProgramError(f"the program's queues reach core {used - 1}, it declares {program.cores} cores")
        self._host = HostRuntime(program.hosts)
        self.memory = DeviceMemory(MemoryPool(), target) if memory is None else memory
        self._dram = np.zeros(0, np.uint8)
        self._local: dict[Space, list[np.ndarray]] = {}
        for tensor in program.of_kind("constant"):
            if tensor.name not in program.constants:
                raise ProgramError(f"the program lacks the bytes of constant {tensor.name!r}")
        self.enter()

    def enter(self) -> bool:
        """Makes the memory the program's and stores its constants, unless it is already; says whether it was not.

        Weights that the memory does not keep, and tensors that are read before they are written, are the caller's.
        """
        if self.memory.owner is self:
            return False
        self.memory.fit(self.program)
        self.memory.owner = self
        self._dram = self.memory.dram[: self.program.dram_bytes]
        self._local = {space: blocks[: self.program.cores] for space, blocks in self.memory.views().items()}
        self._forget()
        for tensor in self.program.of_kind("constant"):
            self.write_bytes(tensor.address, self.program.constants[tensor.name])
        return True

    def bytes(self, space: Space, core: int) -> np.ndarray:
        """See `isa.instruction.Memory`."""
        return self._dram if space is Space.DRAM else self._local[space][core]

    def kernel(self, index: int) -> VectorKernel:
        """See `isa.instruction.Memory`; raises ProgramError when the program has no such microprogram."""
        if not 0 <= index < len(self.program.kernels):
            raise ProgramError(f"microprogram {index}, the program has {len(self.program.kernels)}")
        return self.program.kernels[index]

    def host_call(self, index: int) -> HostCallState:
        """See `isa.instruction.Memory`."""
        return self._host.call(index)

    def write_bytes(self, address: int, data: np.ndarray) -> None:
        """Stores bytes in DRAM; what `codegen.weights.materialise` calls. Raises ProgramError outside DRAM."""
        raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        if address < 0 or address + raw.size > self._dram.size:
            raise ProgramError(f"write of bytes {address} to {address + raw.size} of a DRAM of {self._dram.size} bytes")
        self._dram[address : address + raw.size] = raw

    def set_weights(self, blocks: Iterable[tuple[int, np.ndarray]]) -> None:
        """Stores (DRAM address, bytes) blocks of packed weights."""
        for address, data in blocks:
            self.write_bytes(address, data)

    def write_tensor(self, name: str, array: np.ndarray) -> None:
        """Stores a tensor's elements; raises ProgramError unless shape and element type are the tensor's."""
        tensor = self.program.tensor(name)
        if array.shape != tensor.shape or array.dtype != tensor.dtype.numpy:
            raise ProgramError(
                f"tensor {name!r} is {tensor.dtype.text} {list(tensor.shape)}, "
                f"the array is {array.dtype} {list(array.shape)}: convert it first"
            )
        flat = np.ascontiguousarray(array).reshape(-1)
        if tensor.dtype in PACKED:
            flat = pack(flat, tensor.dtype.bits)
        view = self._tensor_bytes(tensor)
        view[...] = flat.view(np.uint8)

    def read_tensor(self, name: str) -> np.ndarray:
        """A copy of a tensor's elements, those of less than a byte widened to one."""
        tensor = self.program.tensor(name)
        raw = self._tensor_bytes(tensor)
        if tensor.dtype in PACKED:
            return unpack(raw, tensor.dtype)[: int(np.prod(tensor.shape))].reshape(tensor.shape)
        return raw.copy().view(tensor.dtype.numpy).reshape(tensor.shape)

    def run(self, order: np.ndarray | None = None, poison: bool = True) -> None:
        """Executes all instructions, in this order of completion (default: program order).

        `poison` forgets local memory first. Raises ProgramError with its text for an instruction that cannot execute,
        and for an order that is not a permutation of the instructions.
        """
        instructions = self._instructions
        if order is not None:
            if not np.array_equal(np.sort(order), np.arange(len(instructions))):
                raise ProgramError(f"the order of completion is not a permutation of {len(instructions)} instructions")
            instructions = [instructions[i] for i in order.tolist()]
        if poison:
            self._forget()
        with np.errstate(all="ignore"):  # inf and nan are values here, as in the hardware
            for position, instruction in enumerate(instructions):
                try:
                    instruction.execute(self)
                except (ValueError, ProgramError) as error:
                    number = position if order is None else int(order[position])
                    raise ProgramError(f"instruction {number}: {error}\n    {instruction}") from error

    def _forget(self) -> None:
        for memory in (*self._local[Space.SPAD], *self._local[Space.ACC]):
            memory.fill(POISON)

    def _tensor_bytes(self, tensor: Tensor) -> np.ndarray:
        """The bytes of the tensor's elements (of core 0, in scratchpad)."""
        memory = self.bytes(tensor.space, 0)
        end = tensor.address + tensor.dtype.nbytes(int(np.prod(tensor.shape)))
        if tensor.address < 0 or end > memory.size:
            limit = f"which has {memory.size}"
            raise ProgramError(
                f"tensor {tensor.name!r} takes bytes {tensor.address} to {end} of {tensor.space.text}, {limit}"
            )
        return memory[tensor.address : end]
