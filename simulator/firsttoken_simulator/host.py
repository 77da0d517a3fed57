"""The host CPU of the functional machine: runs the ONNX subgraphs that a program calls, by onnxruntime.

What this onnxruntime lacks is run by ONNX's reference evaluator. Subgraphs refer to nothing outside themselves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from firsttoken_compiler.errors import ProgramError
from firsttoken_compiler.isa.host_call import AS_BITS, HostCall, HostValue
from firsttoken_compiler.isa.types import PACKED, Dtype, pack, unpack
from firsttoken_simulator.host_runner import Runner, load


@dataclass
class HostRuntime:
    """All calls of a program; a subgraph is loaded when it first runs, equal ones once."""

    calls: tuple[HostCall, ...]
    _states: dict[int, CallState] = field(default_factory=dict)
    _runners: dict[tuple[bytes, ...], Runner] = field(default_factory=dict)

    def call(self, index: int) -> CallState:
        """The state of a call; raises ProgramError when the program has none of that number."""
        if not 0 <= index < len(self.calls):
            raise ProgramError(f"call {index} of the host, the program has {len(self.calls)}")
        if index not in self._states:
            self._states[index] = CallState(self.calls[index], self)
        return self._states[index]

    def runner(self, model: bytes, packed: dict[str, np.ndarray]) -> Runner:
        """What executes a subgraph; raises ProgramError when nothing here can.

        `packed` operands become part of the subgraph: onnxruntime takes no arrays of four-bit numbers from outside.
        """
        key = (model, *(part for name in sorted(packed) for part in (name.encode(), packed[name].tobytes())))
        if key not in self._runners:
            self._runners[key] = load(model, packed)
        return self._runners[key]


@dataclass
class CallState:
    """See `isa.instruction.HostCallState`."""

    entry: HostCall
    runtime: HostRuntime
    operands: dict[int, np.ndarray] = field(default_factory=dict)
    results: list[np.ndarray] = field(default_factory=list)

    def load(self, slot: int, data: np.ndarray) -> None:
        """See `isa.instruction.HostCallState`."""
        if not 0 <= slot < len(self.entry.inputs):
            raise ProgramError(f"operand {slot} of call {self.entry.name}, which has {len(self.entry.inputs)}")
        self.operands[slot] = _tensor(self.entry.inputs[slot], data)

    def run(self) -> None:
        """See `isa.instruction.HostCallState`."""
        missing = [v.name for i, v in enumerate(self.entry.inputs) if i not in self.operands]
        if missing:
            raise ProgramError(f"call {self.entry.name} runs before its operands {', '.join(missing)} are loaded")
        feeds = {value.name: self.operands[slot] for slot, value in enumerate(self.entry.inputs)}
        self.operands = {}
        try:
            packed = {name: array for name, array in feeds.items() if array.dtype.kind == "V"}
            plain = {name: array for name, array in feeds.items() if name not in packed}
            self.results = self.runtime.runner(self.entry.model, packed)(plain)
        except ProgramError:
            raise
        except Exception as error:  # onnxruntime's errors derive from nothing narrower
            raise ProgramError(f"the host cannot compute {self.entry.name}: {str(error).strip()[-300:]}") from error

    def result(self, slot: int) -> np.ndarray:
        """See `isa.instruction.HostCallState`."""
        if not 0 <= slot < min(len(self.results), len(self.entry.outputs)):
            raise ProgramError(f"result {slot} of call {self.entry.name}, which has {len(self.results)}")
        value, found = self.entry.outputs[slot], self.results[slot]
        if tuple(found.shape) != value.shape:
            raise ProgramError(
                f"call {self.entry.name} makes {value.name} of shape {list(found.shape)}, expected {list(value.shape)}"
            )
        if value.elem_type in AS_BITS:
            return np.ascontiguousarray(found).reshape(-1).view(np.uint8)
        flat = _narrow(found, value.dtype).reshape(-1)
        if value.dtype in PACKED:
            flat = pack(flat, value.dtype.bits)
        return np.ascontiguousarray(flat).view(np.uint8)


def _narrow(values: np.ndarray, dtype: Dtype) -> np.ndarray:
    """In the type of the memory; finite numbers beyond float16, as in masks, become its largest."""
    if dtype is Dtype.F16 and values.dtype != np.float16:
        largest = float(np.finfo(np.float16).max)
        values = np.where(np.isfinite(values), np.clip(values, -largest, largest), values)
    return values.astype(dtype.numpy)


def _tensor(value: HostValue, data: np.ndarray) -> np.ndarray:
    """The tensor of the subgraph out of an operand's bytes."""
    from onnx import helper

    flat = unpack(data, value.dtype) if value.dtype in PACKED else data.view(value.dtype.numpy)
    last = sum((extent - 1) * stride for extent, stride in zip(value.shape, value.strides, strict=True))
    if (math.prod(value.shape) and not 0 <= last < flat.size) or min(value.strides, default=0) < 0:
        raise ProgramError(f"operand {value.name} of shape {list(value.shape)} reaches beyond its {flat.size} elements")
    steps = tuple(stride * flat.itemsize for stride in value.strides)
    view = np.lib.stride_tricks.as_strided(flat, value.shape, steps, writeable=False)
    dtype = helper.tensor_dtype_to_np_dtype(value.elem_type)
    if value.elem_type in AS_BITS:
        return np.asarray(view.copy(order="C").view(dtype))
    return np.asarray(view.astype(dtype, order="C"))
