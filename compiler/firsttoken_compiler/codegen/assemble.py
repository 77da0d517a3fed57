"""Launches → a program: memory map, templates relocated launch by launch, operators with their provenance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from firsttoken_compiler.codegen.build import build
from firsttoken_compiler.codegen.host import host_call, host_code
from firsttoken_compiler.codegen.memory_map import Compiled, MemoryMap
from firsttoken_compiler.codegen.names import OperatorNames
from firsttoken_compiler.codegen.sync import insert_semaphores
from firsttoken_compiler.codegen.template import Template
from firsttoken_compiler.errors import AllocationError
from firsttoken_compiler.frontend.importer import host_dtype
from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.host_call import HostCall
from firsttoken_compiler.isa.program import OpInfo, Program
from firsttoken_compiler.isa.types import Space
from firsttoken_compiler.isa.vector_kernel import VectorKernel
from firsttoken_compiler.passes.lower import Launch, Value
from firsttoken_compiler.passes.place import Placement
from firsttoken_compiler.schedule.choice import NO_SCHEDULES, Schedules
from firsttoken_compiler.schedule.rowwise import kernel_operands
from firsttoken_compiler.schedule.spec import DTYPES, Arg, KernelSpec
from firsttoken_compiler.target.target import Target

Templates = dict[tuple[KernelSpec, tuple[Space, ...]], Template]


def kernel_key(launch: Launch, placement: Placement) -> tuple[KernelSpec, tuple[Space, ...]]:
    """What decides a launch's template: its spec and where its operands lie."""
    values = kernel_operands(launch.spec, (*launch.args, *launch.outs))
    return launch.spec, tuple(placement.space(value) for value in values)


def schedule_all(
    compiled: Compiled, target: Target, progress: Callable[[float], None], known: Templates | None = None,
    schedules: Schedules = NO_SCHEDULES,
) -> Templates:  # fmt: skip
    """One template per distinct kernel; `known` ones were made for the same room and schedules."""
    kernels = [launch for launch in compiled.launches.launches if launch.spec.kind != "host"]
    keys = list(dict.fromkeys(kernel_key(launch, compiled.placement) for launch in kernels))
    templates: Templates = {}
    for index, (spec, spaces) in enumerate(keys):
        made, choice = (known or {}).get((spec, spaces)), schedules.get(spec, spaces)
        templates[spec, spaces] = made or build(spec, spaces, target, compiled.placement.room, choice)
        progress((index + 1) / len(keys))
    return templates


def assemble(compiled: Compiled, templates: Templates, target: Target, meta: dict[str, Any]) -> Program:
    """The synchronised program; not yet verified."""
    memory = MemoryMap(compiled, target)
    memory.plan()
    emitter = _Emitter(compiled, templates, target, memory)
    emitter.run()
    code = np.concatenate(emitter.code) if emitter.code else np.zeros((0, word.WIDTH), np.int64)
    return Program(
        code=insert_semaphores(code),
        kernels=tuple(emitter.kernels),
        tensors=tuple(memory.tensors),
        ops=tuple(emitter.ops),
        constants=memory.constants,
        dram_bytes=memory.end,
        spad_bytes=emitter.spad_bytes,
        acc_bytes=max((template.acc_bytes for template in templates.values()), default=0),
        cores=1,
        meta={**meta, "kv": memory.kv, "spilled": compiled.placement.spilled},
        hosts=tuple(emitter.hosts),
    )


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

    def run(self) -> None:
        """Emits every launch."""
        placement = self.compiled.placement
        names = OperatorNames(self.compiled.canonical.nodes)
        unit = self.target.alignment(Space.SPAD, matrix_weights=True)
        first, cursor = 0, placement.resident_bytes
        self.spad_bytes = placement.resident_bytes
        for number, launch in enumerate(self.compiled.launches.launches):
            if launch.spec.kind == "host":
                self._host(launch, names, number, first)
                first += len(self.code[-1])
                continue
            template = self.templates[kernel_key(launch, placement)]
            if cursor + template.scratch_bytes > placement.scratchpad_bytes:
                cursor = placement.resident_bytes
            if cursor + template.scratch_bytes > placement.scratchpad_bytes:
                raise AllocationError(
                    f"kernel {launch.spec.kind} works in {template.scratch_bytes} bytes of scratchpad, target "
                    f"{self.target.name} has {placement.scratchpad_bytes - cursor} free: raise scratchpad.bytes"
                )
            operands = [self._address(v) for v in kernel_operands(launch.spec, (*launch.args, *launch.outs))]
            numbers = [self.kernels.setdefault(kernel, len(self.kernels)) for kernel in template.kernels]
            self.code.append(template.relocated(operands, cursor, numbers, number))
            self.memory.scratch(number, cursor, template.scratch_bytes)
            self.spad_bytes = max(self.spad_bytes, cursor + template.scratch_bytes)
            cursor = -(-(cursor + template.scratch_bytes) // unit) * unit
            self.ops.append(names.describe(launch, template.tile, first, first + len(template.code)))
            first += len(template.code)

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
        return self.memory.address[value.kind, value.name]
