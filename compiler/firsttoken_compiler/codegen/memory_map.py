"""The memory map of a program: where every tensor lies, in DRAM or in the scratchpad."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np

from firsttoken_compiler.codegen.weights import packed_bytes
from firsttoken_compiler.errors import StudentError
from firsttoken_compiler.frontend.importer import host_dtype
from firsttoken_compiler.frontend.partition import Segment
from firsttoken_compiler.frontend.values import TensorType
from firsttoken_compiler.isa.program import MATRIX_FORMS, Packing, Tensor
from firsttoken_compiler.isa.types import Dtype, Space
from firsttoken_compiler.passes.canonicalise import Canonical
from firsttoken_compiler.passes.lower import Launches
from firsttoken_compiler.passes.place import Placement
from firsttoken_compiler.passes.quantise import Quantised
from firsttoken_compiler.passes.spread import ON_ONE_CORE, Spread
from firsttoken_compiler.schedule.rowwise import KINDS_IN_PLACE
from firsttoken_compiler.schedule.spec import DTYPES, Arg
from firsttoken_compiler.target.target import Target

FENCE: Final = "fence"
FENCE_BYTES: Final = 64


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
    inline: frozenset[str] = frozenset()
    """Initialisers whose bytes are in the ONNX file itself: tables for its lengths may be among them."""
    spread: Spread = ON_ONE_CORE
    """Which cores compute what."""
    norm_ways: tuple[tuple[str, str], ...] = ()
    """(name, way) of norms whose rows products read; see `codegen.norm_choice`."""


@dataclass
class MemoryMap:
    """The memory map: every tensor once, in DRAM or resident in the scratchpad."""

    compiled: Compiled
    target: Target
    tensors: list[Tensor] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    address: dict[tuple[str, str], int] = field(default_factory=dict)
    """(kind, name) of a value → address."""
    kv: dict[str, str] = field(default_factory=dict)
    end: int = 0
    _sums: int = -1
    """Where partial sums begin, once there are any."""

    def plan(self) -> None:
        """What programs of one student share comes first, at the same addresses in all: external weights, caches."""
        past, params = self._caches(), self.compiled.launches.params
        given = {name: arg for name, arg in params.items() if name in self.compiled.inputs}
        constants = self.compiled.canonical.constants
        weights = [name for name in params if name not in given and name not in constants]
        inline = {name for name in weights if self._packing(name).source in self.compiled.inline}
        for name in weights:
            if name not in inline:
                self._weight(name, params[name])
        self._outputs(caches=True)
        for name in weights:
            if name in inline:
                self._weight(name, params[name])
        for segment in self.compiled.segments:
            for name in segment.weights:
                self._host_weight(name, segment.types[name])
        for name, arg in params.items():
            if name not in given and name in constants:
                self._constant(name, arg)
        for name, arg in given.items():
            if name not in past:
                self._dram(("param", name), self.compiled.inputs[name], "input", arg)
        self._outputs(caches=False)
        self._storages()

    def _caches(self) -> set[str]:
        """Past caches share the tensor of the present one; returns their parameters."""
        past: set[str] = set()
        names = self._output_names()
        for launch in self.compiled.launches.launches:
            if launch.spec.kind in KINDS_IN_PLACE and len(launch.args) > 1:
                for source, present in zip(launch.args[1:], launch.outs, strict=True):
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

    def _outputs(self, caches: bool) -> None:
        """Caches are three-dimensional; one of a single row may have become a view of what its product writes."""
        names = self._output_names()
        returned = {value.name: value.arg for value in self.compiled.launches.outputs}
        for launch in self.compiled.launches.launches:
            for value in launch.outs:
                if value.kind == "output" and ("output", value.name) not in self.address:
                    arg = returned.get(value.name, value.arg)
                    kind = "kv" if len(arg.shape) == 3 else "output"
                    if caches == (kind == "kv"):
                        self._dram(("output", value.name), names.get(value.name, value.name), kind, arg)

    def _storages(self) -> None:
        """Residents of the scratchpad, and a region of DRAM that holds the others."""
        placement = self.compiled.placement
        align = self.target.alignment(Space.DRAM)
        base = -(-self.end // align) * align
        for storage in self.compiled.launches.storages:
            name = storage.name
            space = Space.SPAD if name in placement.resident else Space.DRAM
            at = placement.resident[name] if space is Space.SPAD else base + placement.dram[name]
            nbytes = placement.sizes.get(name, storage.nbytes)
            self.address["storage", name] = at
            self.tensors.append(
                Tensor(name, "activation", space, at, nbytes, Dtype.I8, (nbytes,), None, storage.first, storage.last)
            )
        if placement.dram_bytes:
            self.end = base + placement.dram_bytes

    def scratch(self, number: int, address: int, nbytes: int) -> None:
        """What launch `number` works in."""
        if nbytes:
            name, shape = f"scratch{number}", (nbytes,)
            self.tensors.append(
                Tensor(name, "scratch", Space.SPAD, address, nbytes, Dtype.I8, shape, None, number, number)
            )

    def partial_sums(self, number: int, count: int, nbytes: int) -> list[int]:
        """Where the `count` matrices of partial sums of launch `number` lie; other launches use the same memory."""
        align = self.target.alignment(Space.DRAM)
        if count and self._sums < 0:
            self._sums = -(-self.end // align) * align
        step, shape = -(-nbytes // align) * align, (nbytes,)
        found = [self._sums + index * step for index in range(count)]
        for index, at in enumerate(found):
            name = f"sums{number}.{index}"
            self.tensors.append(
                Tensor(name, "scratch", Space.DRAM, at, nbytes, Dtype.I8, shape, None, number, number)
            )
            self.end = max(self.end, at + nbytes)
        return found

    def fence(self, address: int, operators: int) -> int:
        """What a fence moves: a few bytes of DRAM, whose address is returned, to `address` in its core's scratchpad."""
        unit = self.target.alignment(Space.SPAD, matrix_weights=True)
        self.tensors.append(
            Tensor(FENCE, "scratch", Space.SPAD, address, unit, Dtype.I8, (unit,), None, 0, operators - 1)
        )
        at = -(-self.end // self.target.alignment(Space.DRAM)) * self.target.alignment(Space.DRAM)
        self.tensors.append(
            Tensor(f"{FENCE}.bytes", "constant", Space.DRAM, at, FENCE_BYTES, Dtype.I8, (FENCE_BYTES,), None)
        )
        self.constants[f"{FENCE}.bytes"] = np.zeros(FENCE_BYTES, np.uint8)
        self.end = at + FENCE_BYTES
        return at

    def _packing(self, name: str) -> Packing:
        """The recipe of a weight."""
        bits = self.compiled.launches.params[name].dtype.bits
        known = self.compiled.quantised.packings.get(name)
        return known or Packing(self.compiled.weights[name], "plain", 0, 0, 0, bits, 0, False)

    def _weight(self, name: str, arg: Arg) -> None:
        packing = self._packing(name)
        nbytes = 0 if packing.form == "plain" else packed_bytes(packing)
        self._dram(("param", name), name, "weight", arg, packing, nbytes)

    def _constant(self, name: str, arg: Arg) -> None:
        constant = self.compiled.canonical.constants[name]
        self.constants[name] = np.ascontiguousarray(constant.astype(arg.dtype.numpy)).reshape(-1).view(np.uint8)
        self._dram(("param", name), name, "constant", arg)

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
        tiled = packing is not None and packing.form in MATRIX_FORMS
        align = self.target.alignment(Space.DRAM, matrix_weights=tiled)
        at = -(-self.end // align) * align
        nbytes = nbytes or arg.nbytes
        self.address[key] = at
        self.end = at + nbytes
        self.tensors.append(Tensor(name, kind, Space.DRAM, at, nbytes, arg.dtype, arg.shape, packing))
