"""Launches → a program: memory map, templates relocated launch by launch, operators with their provenance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from firsttoken_compiler.codegen.build import build
from firsttoken_compiler.codegen.host import host_call, host_code
from firsttoken_compiler.codegen.kernels import kernels_of, parts_of, spaces_of
from firsttoken_compiler.codegen.memory_map import FENCE_BYTES, Compiled, MemoryMap
from firsttoken_compiler.codegen.names import OperatorNames
from firsttoken_compiler.codegen.sync import Fence, insert_semaphores
from firsttoken_compiler.codegen.template import Template
from firsttoken_compiler.errors import AllocationError
from firsttoken_compiler.frontend.importer import host_dtype
from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.dma import Load
from firsttoken_compiler.isa.host_call import HostCall
from firsttoken_compiler.isa.program import OpInfo, Program
from firsttoken_compiler.isa.types import Dtype, Engine, Operand, Space, queue_index
from firsttoken_compiler.isa.vector_kernel import VectorKernel
from firsttoken_compiler.passes.lower import Launch, Value
from firsttoken_compiler.schedule.choice import NO_SCHEDULES, CoreSplit, Schedules
from firsttoken_compiler.schedule.parts import partial_bytes, partial_count
from firsttoken_compiler.schedule.rowwise import kernel_operands
from firsttoken_compiler.schedule.spec import DTYPES, Arg, KernelSpec
from firsttoken_compiler.target.target import Target

Templates = dict[tuple[KernelSpec, tuple[Space, ...]], Template]


def schedule_all(
    compiled: Compiled, target: Target, progress: Callable[[float], None], known: Templates | None = None,
    schedules: Schedules = NO_SCHEDULES,
) -> Templates:  # fmt: skip
    """One template per distinct kernel; `known` ones were made for the same room and schedules."""
    kernels = kernels_of(compiled, target)
    templates: Templates = {}
    for index, kernel in enumerate(kernels):
        of = kernel.spec, kernel.spaces
        templates[of] = (known or {}).get(of) or build(*of, kernel.target, kernel.room, schedules.get(*of))
        progress((index + 1) / len(kernels))
    return templates


def assemble(compiled: Compiled, templates: Templates, target: Target, meta: dict[str, Any]) -> Program:
    """The synchronised program; not yet verified."""
    memory = MemoryMap(compiled, target)
    memory.plan()
    emitter = _Emitter(compiled, templates, target, memory)
    emitter.run()
    code = np.concatenate(emitter.code) if emitter.code else np.zeros((0, word.WIDTH), np.int64)
    code = insert_semaphores(code, fence=emitter.fence() if compiled.spread.cores > 1 else None)
    spread = {"cores": list(compiled.spread.lines)} if compiled.spread.lines else {}
    return Program(
        code=code,
        kernels=tuple(emitter.kernels),
        tensors=tuple(memory.tensors),
        ops=_ranges(emitter.ops, code),
        constants=memory.constants,
        dram_bytes=memory.end,
        spad_bytes=emitter.spad_bytes,
        acc_bytes=max((template.acc_bytes for template in templates.values()), default=0),
        cores=compiled.spread.cores,
        meta={**meta, "kv": memory.kv, "spilled": dict(compiled.placement.spilled), **spread},
        hosts=tuple(emitter.hosts),
    )


def _ranges(ops: list[OpInfo], code: np.ndarray) -> tuple[OpInfo, ...]:
    """Operators with the ranges that they have among fences."""
    if not ops or ops[-1].last == len(code):
        return tuple(ops)
    edges = np.searchsorted(code[:, word.OP], np.arange(len(ops) + 1)).tolist()
    return tuple(replace(op, first=edges[i], last=edges[i + 1]) for i, op in enumerate(ops))


def _given_first(code: np.ndarray, symbols: np.ndarray, made: list[bool]) -> np.ndarray:
    """A part's code with those of its first loads in front that wait for no other core; `made`: by operand.

    Loads of a queue run in order: behind one of what another core has not made yet, weights would wait with it. The
    loads before all other instructions go to different places, so that their order is free.
    """
    first = int(np.argmax(np.append(code[:, word.OPCODE] != Load.OPCODE, True)))
    waits = [bool(0 <= source < len(made) and made[source]) for source in symbols[:first, 1].tolist()]
    return code[[*np.argsort(waits, kind="stable"), *range(first, len(code))]]


@dataclass
class _Emitter:
    """Relocates templates launch by launch; consecutive kernels work in different parts of the free scratchpad."""

    compiled: Compiled
    templates: Templates
    target: Target
    memory: MemoryMap
    code: list[np.ndarray] = field(default_factory=list)
    ops: list[OpInfo] = field(default_factory=list)
    kernels: dict[VectorKernel, int] = field(default_factory=dict)
    hosts: list[HostCall] = field(default_factory=list)
    spad_bytes: int = 0
    cursor: int = 0
    """Where the next kernel works in the scratchpads, on all cores alike."""
    emitted: int = 0
    """Instructions."""

    def run(self) -> None:
        """Emits every launch."""
        names = OperatorNames(self.compiled.canonical.nodes)
        self.cursor = self.spad_bytes = self.compiled.placement.resident_bytes
        for number, launch in enumerate(self.compiled.launches.launches):
            if launch.spec.kind == "host":
                self._host(launch, names, number, self.emitted)
                self.emitted += len(self.code[-1])
            else:
                self._launch(launch, names, number)

    def fence(self) -> Fence:
        """What makes fences: loads of some bytes to where nothing else lies."""
        unit = self.target.alignment(Space.SPAD, matrix_weights=True)
        near = self.compiled.placement.resident_bytes - unit
        far = self.memory.fence(near, len(self.ops))

        def made(core: int, op: int) -> np.ndarray:
            operands = (Operand(Space.SPAD, Dtype.I8, near), Operand(Space.DRAM, Dtype.I8, far))
            load = Load(queue=queue_index(core, Engine.DMA_IN), op=op, dims=(1, 1, FENCE_BYTES), operands=operands)
            return load.encode()

        return made

    def _launch(self, launch: Launch, names: OperatorNames, number: int) -> None:
        """The parts of a launch, which work at the same addresses of their cores' scratchpads."""
        placement = self.compiled.placement
        spaces, parts = spaces_of(launch, placement), parts_of(self.compiled, number)
        templates = [self.templates[part.spec, part.spaces(spaces)] for part in parts]
        scratch = self._room(launch, max(template.scratch_bytes for template in templates))
        values = kernel_operands(launch.spec, (*launch.args, *launch.outs))
        sums = self.memory.partial_sums(number, partial_count(parts), partial_bytes(parts))
        first = self.emitted
        for part, template in zip(parts, templates, strict=True):
            operands = []
            for index, at in zip(part.operands, part.at, strict=True):
                begin = self._address(values[index]) if index >= 0 else sums[-1 - index]
                apart = index < 0 or spaces[index] is Space.DRAM
                operands.append(begin + (at if apart else 0))
            kernels = [self.kernels.setdefault(kernel, len(self.kernels)) for kernel in template.kernels]
            code = template.relocated(operands, scratch, kernels, number, part.core)
            if self.compiled.spread.cores > 1:
                made = [i < 0 or values[i].kind != "param" for i in part.operands]
                code = _given_first(code, template.symbols, made)
            self.code.append(code)
            self.emitted += len(template.code)
        split = self.compiled.spread.splits[number] if self.compiled.spread.splits else CoreSplit()
        tile = templates[0].tile + (f", {split.text()}" if len(parts) > 1 else "")
        self.ops.append(names.describe(launch, tile, first, self.emitted))

    def _room(self, launch: Launch, nbytes: int) -> int:
        """Where a launch works; raises AllocationError when the scratchpad has no such room."""
        placement = self.compiled.placement
        if self.cursor + nbytes > placement.scratchpad_bytes:
            self.cursor = placement.resident_bytes
        if self.cursor + nbytes > placement.scratchpad_bytes:
            raise AllocationError(
                f"kernel {launch.spec.kind} works in {nbytes} bytes of scratchpad, target "
                f"{self.target.name} has {placement.scratchpad_bytes - self.cursor} free: raise scratchpad.bytes"
            )
        found, unit = self.cursor, self.target.alignment(Space.SPAD, matrix_weights=True)
        self.memory.scratch(len(self.ops), found, nbytes)
        self.spad_bytes = max(self.spad_bytes, found + nbytes)
        self.cursor = -(-(found + nbytes) // unit) * unit
        return found

    def _host(self, launch: Launch, names: OperatorNames, number: int, first: int) -> None:
        """A call of the host: loads, run, stores."""
        segment = self.compiled.segments[int(launch.spec["segment"])]
        site = self.compiled.canonical.hosts[int(launch.spec["segment"])]
        loads = [(self._address(value), value.arg.nbytes, value.arg.dtype) for value in launch.args]
        for name in segment.weights:
            arg = Arg(segment.types[name].shape, DTYPES[host_dtype(segment.types[name].elem_type, name)])
            loads.append((self.memory.address["host", name], arg.nbytes, arg.dtype))
        stores = [(self._address(value), value.arg.nbytes, value.arg.dtype) for value in launch.outs]
        self.code.append(host_code(len(self.hosts), number, loads, stores))
        self.hosts.append(host_call(segment, site, [dtype for _, _, dtype in loads], [dtype for _, _, dtype in stores]))
        self.ops.append(names.describe_host(segment, first, first + len(self.code[-1])))

    def _address(self, value: Value) -> int:
        return self.memory.address[value.kind, value.name] + value.at
