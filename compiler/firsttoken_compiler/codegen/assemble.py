"""Launches → a program: memory map, templates relocated launch by launch, operators with their provenance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from firsttoken_compiler.codegen.build import build
from firsttoken_compiler.codegen.host import host_call, host_code
from firsttoken_compiler.codegen.names import OperatorNames
from firsttoken_compiler.codegen.sync import insert_semaphores
from firsttoken_compiler.codegen.template import Template
from firsttoken_compiler.codegen.weights import packed_bytes
from firsttoken_compiler.errors import AllocationError, StudentError
from firsttoken_compiler.frontend.importer import host_dtype
from firsttoken_compiler.frontend.partition import Segment
from firsttoken_compiler.frontend.values import TensorType
from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.host_call import HostCall
from firsttoken_compiler.isa.program import OpInfo, Packing, Program, Tensor
from firsttoken_compiler.isa.types import Dtype, Space
from firsttoken_compiler.isa.vector_kernel import VectorKernel
from firsttoken_compiler.passes.canonicalise import Canonical
from firsttoken_compiler.passes.lower import Launch, Launches, Value
from firsttoken_compiler.passes.place import Placement
from firsttoken_compiler.passes.quantise import Quantised
from firsttoken_compiler.schedule.rowwise import KINDS_IN_PLACE, kernel_operands
from firsttoken_compiler.schedule.spec import DTYPES, Arg, KernelSpec
from firsttoken_compiler.target.target import Target


@dataclass(frozen=True)
class Compiled:
    """What the passes before assembly made."""

    canonical: Canonical
    quantised: Quantised
    launches: Launches
    placement: Placement
    weights: dict[str, str]
    """Parameter → initialiser."""
    inputs: dict[str, str]
    """Parameter → ONNX input."""
    segments: tuple[Segment, ...] = ()
    """What the host computes."""


Templates = dict[tuple[KernelSpec, tuple[Space, ...]], Template]


def kernel_key(launch: Launch, placement: Placement) -> tuple[KernelSpec, tuple[Space, ...]]:
    """What decides a launch's template: its spec and where its operands lie."""
    values = kernel_operands(launch.spec, (*launch.args, *launch.outs))
    return launch.spec, tuple(placement.space(value) for value in values)


def schedule_all(compiled: Compiled, target: Target, progress: Callable[[float], None]) -> Templates:
    """One template per distinct kernel."""
    kernels = [launch for launch in compiled.launches.launches if launch.spec.kind != "host"]
    keys = list(dict.fromkeys(kernel_key(launch, compiled.placement) for launch in kernels))
    templates: Templates = {}
    for index, (spec, spaces) in enumerate(keys):
        templates[spec, spaces] = build(spec, spaces, target, compiled.placement.room)
        progress((index + 1) / len(keys))
    return templates


def assemble(compiled: Compiled, templates: Templates, target: Target, meta: dict[str, Any]) -> Program:
    """The synchronised program; not yet verified."""
    memory = _Memory(compiled, target)
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
        meta={**meta, "kv": memory.kv},
        hosts=tuple(emitter.hosts),
    )


@dataclass
class _Memory:
    """The memory map: every tensor once, in DRAM or resident in the scratchpad."""

    compiled: Compiled
    target: Target
    tensors: list[Tensor] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    address: dict[tuple[str, str], int] = field(default_factory=dict)
    """(kind, name) of a value → address."""
    kv: dict[str, str] = field(default_factory=dict)
    end: int = 0

    def plan(self) -> None:
        """Inputs, caches, outputs and activations, then constants and weights."""
        launches = self.compiled.launches
        past = self._caches()
        for name, arg in launches.params.items():
            if name in self.compiled.inputs and name not in past:
                self._dram(("param", name), self.compiled.inputs[name], "input", arg)
        self._outputs()
        for storage in launches.storages:
            self._storage(storage.name, storage.nbytes)
        for name, arg in launches.params.items():
            if name not in self.compiled.inputs:
                self._weight(name, arg)
        for segment in self.compiled.segments:
            for name in segment.weights:
                self._host_weight(name, segment.types[name])

    def _caches(self) -> set[str]:
        """Past caches share the tensor of the present one; returns their parameters."""
        past: set[str] = set()
        names = self._output_names()
        for launch in self.compiled.launches.launches:
            if launch.spec.kind in KINDS_IN_PLACE and len(launch.args) > 1:
                source, present = launch.args[1], launch.outs[0]
                if source.kind != "param" or present.name not in names:
                    raise StudentError(
                        f"the cache {source.name!r} is appended to, but is no graph input with a matching output"
                    )
                past.add(source.name)
                self.kv[self.compiled.inputs[source.name]] = names[present.name]
        return past

    def _output_names(self) -> dict[str, str]:
        """Planned name of every output value → ONNX output."""
        values, names = self.compiled.launches.outputs, self.compiled.canonical.outputs
        return {value.name: name for value, name in zip(values, names, strict=True)}

    def _outputs(self) -> None:
        """Caches are three-dimensional; one of a single row may have become a view of what its product writes."""
        names = self._output_names()
        returned = {value.name: value.arg for value in self.compiled.launches.outputs}
        for launch in self.compiled.launches.launches:
            for value in launch.outs:
                if value.kind == "output" and ("output", value.name) not in self.address:
                    arg = returned.get(value.name, value.arg)
                    kind = "kv" if len(arg.shape) == 3 else "output"
                    self._dram(("output", value.name), names.get(value.name, value.name), kind, arg)

    def _storage(self, name: str, nbytes: int) -> None:
        placement = self.compiled.placement
        if name in placement.resident:
            at, nbytes = placement.resident[name], placement.sizes[name]
            self.address["storage", name] = at
            self.tensors.append(Tensor(name, "activation", Space.SPAD, at, nbytes, Dtype.I8, (nbytes,)))
        else:
            self._dram(("storage", name), name, "activation", Arg((nbytes,), Dtype.I8))

    def _weight(self, name: str, arg: Arg) -> None:
        packing = self.compiled.quantised.packings.get(name)
        constant = self.compiled.canonical.constants.get(name)
        if packing is not None:
            nbytes = 0 if packing.form == "plain" else packed_bytes(packing)
            self._dram(("param", name), name, "weight", arg, packing, nbytes)
        elif constant is not None:
            data = np.ascontiguousarray(constant.astype(arg.dtype.numpy)).reshape(-1).view(np.uint8)
            self.constants[name] = data
            self._dram(("param", name), name, "constant", arg)
        else:
            plain = Packing(self.compiled.weights[name], "plain", 0, 0, 0, arg.dtype.bits, 0, False)
            self._dram(("param", name), name, "weight", arg, plain)

    def _host_weight(self, name: str, kind: TensorType) -> None:
        """An initialiser as the ONNX file has it, for the host alone."""
        if ("host", name) in self.address:
            return
        arg = Arg(kind.shape, DTYPES[host_dtype(kind.elem_type, name)])
        plain = Packing(name, "plain", 0, 0, 0, arg.dtype.bits, 0, False)
        self._dram(("host", name), f"host:{name}", "weight", arg, plain)

    def _dram(
        self, key: tuple[str, str], name: str, kind: str, arg: Arg, packing: Packing | None = None, nbytes: int = 0
    ) -> None:
        align = self.target.scratchpad.alignment_bytes
        at = -(-self.end // align) * align
        nbytes = nbytes or arg.nbytes
        self.address[key] = at
        self.end = at + nbytes
        self.tensors.append(Tensor(name, kind, Space.DRAM, at, nbytes, arg.dtype, arg.shape, packing))


@dataclass
class _Emitter:
    """Relocates templates launch by launch; consecutive kernels work in different parts of the free scratchpad."""

    compiled: Compiled
    templates: Templates
    target: Target
    memory: _Memory
    code: list[np.ndarray] = field(default_factory=list)
    ops: list[OpInfo] = field(default_factory=list)
    kernels: dict[VectorKernel, int] = field(default_factory=dict)
    hosts: list[HostCall] = field(default_factory=list)
    spad_bytes: int = 0

    def run(self) -> None:
        """Emits every launch."""
        placement = self.compiled.placement
        names = OperatorNames(self.compiled.canonical.nodes)
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
            cursor += template.scratch_bytes
            self.spad_bytes = max(self.spad_bytes, cursor)
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
