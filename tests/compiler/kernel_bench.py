"""Runs one kernel's template: operands brought to their spaces, the code executed, results read back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from firsttoken_compiler.codegen.sync import insert_semaphores
from firsttoken_compiler.codegen.template import Template
from firsttoken_compiler.codegen.verify import verify
from firsttoken_compiler.codegen.weights import pack_panels
from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.dma import Load, Store
from firsttoken_compiler.isa.instruction import Instruction
from firsttoken_compiler.isa.program import Program, Tensor
from firsttoken_compiler.isa.types import Dtype, Engine, Operand, Space
from firsttoken_compiler.schedule.layout import pitch_bits, resident_bytes
from firsttoken_compiler.schedule.linear import panel_of
from firsttoken_compiler.schedule.spec import Arg, KernelSpec
from firsttoken_compiler.target.target import Target
from firsttoken_simulator.functional import FunctionalMachine

ALIGN = 64
MAX_FIELD = 1 << 22
Execute = Callable[[FunctionalMachine, Instruction], None]


def small_target(rows: int = 8, columns: int = 8, **matrix: object) -> Target:
    """The textbook array, made small."""
    base = Target.load("systolic-128")
    pairs = dict.fromkeys(
        ("int8xint8", "int8xint4", "int16xint4", "int16xint8", "fp16xfp16", "fp16xint8", "fp16xint4"), 1
    )
    changes = {"rows": rows, "columns": columns, "macs_per_cycle": pairs, **matrix}
    matrix_unit = replace(base.matrix, **changes)  # type: ignore[arg-type]
    return replace(base, name="small", matrix=matrix_unit, provenance={}, not_modelled=())


def with_scratchpad(target: Target, **changes: int) -> Target:
    """The target with another scratchpad."""
    return replace(target, scratchpad=replace(target.scratchpad, **changes))


@dataclass
class Bench:
    """Operands and results of a kernel in order; weights `w` and `w_scale` by name are packed as panels."""

    spec: KernelSpec
    spaces: tuple[Space, ...]
    target: Target
    args: tuple[Arg, ...]
    """What the kernel takes: operands, then results."""
    panels: tuple[int, ...] = ()
    """Positions of operands that are packed in panels."""
    results: int = 1

    def run(self, template: Template, arrays: list[np.ndarray], execute: Execute | None = None) -> list[np.ndarray]:
        """The results; `arrays` are operands (and, for a result that is also read, what it holds before)."""
        program, data = self._program(template, arrays)
        machine = FunctionalMachine(program, self.target)
        for tensor, raw in zip(program.tensors, data, strict=True):
            if raw is not None:
                machine.write_bytes(tensor.address, raw)
        if execute is None:
            machine.run()
        else:
            with np.errstate(all="ignore"):
                for instruction in program.instructions():
                    execute(machine, instruction)
        return [machine.read_tensor(tensor.name) for tensor in program.tensors[-self.results :]]

    def _program(self, template: Template, arrays: list[np.ndarray]) -> tuple[Program, list[np.ndarray | None]]:
        before, after = [], []
        tensors: list[Tensor] = []
        data: list[np.ndarray | None] = []
        addresses: list[int] = []
        dram = spad = 0
        first_result = len(self.args) - self.results
        for index, (arg, space) in enumerate(zip(self.args, self.spaces, strict=True)):
            raw = self._bytes(index, arrays[index]) if index < len(arrays) else None
            nbytes = raw.size if raw is not None else arg.nbytes
            result = index >= first_result
            kind = "output" if result else "input"
            tensors.append(Tensor(f"t{index}", kind, Space.DRAM, dram, nbytes, arg.dtype, arg.shape))
            data.append(raw)
            if space is Space.DRAM:
                addresses.append(dram)
            else:
                addresses.append(spad)
                if raw is not None:
                    before.append(self._transfer(arg, index, dram, spad, nbytes, load=True))
                if result:
                    after.append(self._transfer(arg, index, dram, spad, nbytes, load=False))
                spad = -(-(spad + max(nbytes, resident_bytes(arg, self.target))) // ALIGN) * ALIGN
            align = self.target.alignment(Space.DRAM)
            dram = -(-(dram + nbytes) // align) * align
        middle = template.relocated(addresses, spad, list(range(len(template.kernels))), 0)
        code = np.concatenate([np.stack([i.encode() for i in part]) for part in (before,) if part] + [middle])
        if after:
            code = np.concatenate([code, np.stack([i.encode() for i in after])])
        program = Program(
            code=insert_semaphores(code.reshape(-1, word.WIDTH)), kernels=template.kernels, tensors=tuple(tensors),
            ops=(), dram_bytes=dram, spad_bytes=spad + template.scratch_bytes, acc_bytes=template.acc_bytes,
        )  # fmt: skip
        exact = with_scratchpad(
            self.target, bytes=max(64, program.spad_bytes), accumulator_bytes=max(64, template.acc_bytes)
        )
        verify(program, exact)  # the template stays inside what it says it needs
        return program, data

    def _bytes(self, index: int, array: np.ndarray) -> np.ndarray:
        arg = self.args[index]
        if index in self.panels:
            columns = array if array.ndim == 2 else array[None]
            return pack_panels(columns, panel_of(self.target), arg.dtype.bits)
        return np.ascontiguousarray(array.astype(arg.dtype.numpy)).reshape(-1).view(np.uint8)

    def _transfer(self, arg: Arg, index: int, dram: int, spad: int, nbytes: int, *, load: bool) -> Instruction:
        rows, row = (
            (1, nbytes)
            if len(arg.shape) != 2 or index in self.panels
            else (arg.shape[0], arg.dtype.nbytes(arg.shape[1]))
        )
        pitch = pitch_bits(arg, Space.SPAD, self.target) // 8 if rows > 1 else row
        far, near = Operand(Space.DRAM, Dtype.I8, dram, 0, row), Operand(Space.SPAD, Dtype.I8, spad, 0, pitch)
        if load:
            return Load(queue=int(Engine.DMA_IN), dims=(1, rows, row), operands=(near, far))
        return Store(queue=int(Engine.DMA_OUT), dims=(1, rows, row), operands=(far, near))
