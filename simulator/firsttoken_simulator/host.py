"""The host CPU of the functional machine: runs the ONNX subgraphs that a program calls, by onnxruntime.

What this onnxruntime lacks is run by ONNX's reference evaluator. Subgraphs refer to nothing outside themselves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from firsttoken_compiler.errors import ProgramError
from firsttoken_compiler.isa.host_call import HostCall, HostValue
from firsttoken_compiler.isa.types import PACKED, Dtype


class _Runner(Protocol):
    def __call__(self, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Results in the order of the subgraph's outputs."""


@dataclass
class HostRuntime:
    """All calls of a program; a subgraph is loaded when it first runs, equal ones once."""

    calls: tuple[HostCall, ...]
    _states: dict[int, CallState] = field(default_factory=dict)
    _runners: dict[tuple[bytes, ...], _Runner] = field(default_factory=dict)

    def call(self, index: int) -> CallState:
        """The state of a call; raises ProgramError when the program has none of that number."""
        if not 0 <= index < len(self.calls):
            raise ProgramError(f"call {index} of the host, the program has {len(self.calls)}")
        if index not in self._states:
            self._states[index] = CallState(self.calls[index], self)
        return self._states[index]

    def runner(self, model: bytes, packed: dict[str, np.ndarray]) -> _Runner:
        """What executes a subgraph; raises ProgramError when nothing here can.

        `packed` operands become part of the subgraph: onnxruntime takes no arrays of four-bit numbers from outside.
        """
        key = (model, *(part for name in sorted(packed) for part in (name.encode(), packed[name].tobytes())))
        if key not in self._runners:
            self._runners[key] = _load(_with_constants(model, packed) if packed else model)
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
        if not 0 <= slot < len(self.results):
            raise ProgramError(f"result {slot} of call {self.entry.name}, which has {len(self.results)}")
        value, found = self.entry.outputs[slot], self.results[slot]
        if tuple(found.shape) != value.shape:
            raise ProgramError(
                f"call {self.entry.name} makes {value.name} of shape {list(found.shape)}, expected {list(value.shape)}"
            )
        narrowed = np.ascontiguousarray(_narrow(found, value.dtype))
        return narrowed.reshape(-1).view(np.uint8)


def _narrow(values: np.ndarray, dtype: Dtype) -> np.ndarray:
    """In the type of the memory; finite numbers beyond float16, as in masks, become its largest."""
    if dtype is Dtype.F16 and values.dtype != np.float16:
        largest = float(np.finfo(np.float16).max)
        values = np.where(np.isfinite(values), np.clip(values, -largest, largest), values)
    return values.astype(dtype.numpy)


def _with_constants(model: bytes, constants: dict[str, np.ndarray]) -> bytes:
    """The subgraph with some of its inputs as initialisers."""
    import onnx

    parsed = onnx.load_model_from_string(model)
    inputs = [value for value in parsed.graph.input if value.name not in constants]
    del parsed.graph.input[:]
    parsed.graph.input.extend(inputs)
    parsed.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in constants.items())
    return bytes(parsed.SerializeToString())


def _tensor(value: HostValue, data: np.ndarray) -> np.ndarray:
    """The tensor of the subgraph out of an operand's bytes."""
    from onnx import helper

    if value.dtype in PACKED:
        flat = np.stack([data & 15, data >> 4], axis=-1).reshape(-1)
        if value.dtype is Dtype.I4:
            flat = (flat.astype(np.int8) ^ 8) - 8
    else:
        flat = data.view(value.dtype.numpy)
    last = sum((extent - 1) * stride for extent, stride in zip(value.shape, value.strides, strict=True))
    if (math.prod(value.shape) and not 0 <= last < flat.size) or min(value.strides, default=0) < 0:
        raise ProgramError(f"operand {value.name} of shape {list(value.shape)} reaches beyond its {flat.size} elements")
    steps = tuple(stride * flat.itemsize for stride in value.strides)
    view = np.lib.stride_tricks.as_strided(flat, value.shape, steps, writeable=False)
    return np.ascontiguousarray(view.astype(helper.tensor_dtype_to_np_dtype(value.elem_type)))


def _load(model: bytes) -> _Runner:
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as refused:  # onnxruntime's errors derive from nothing narrower
        try:
            evaluator = onnx.reference.ReferenceEvaluator(onnx.load_model_from_string(model))
        except Exception as error:
            raise ProgramError(
                f"neither onnxruntime ({str(refused).strip()[-200:]}) nor ONNX's reference evaluator "
                f"({str(error).strip()[-200:]}) can run a subgraph of the host"
            ) from refused
        return lambda feeds: _arrays(evaluator.run(None, feeds))
    types = {value.name: value.type for value in session.get_inputs()}
    return lambda feeds: _arrays(session.run(None, {name: array for name, array in feeds.items() if name in types}))


def _arrays(values: list[Any]) -> list[np.ndarray]:
    for value in values:
        if not isinstance(value, (np.ndarray, np.generic)):
            raise ProgramError(f"the host makes a {type(value).__name__}, not a tensor")
    return [np.asarray(value) for value in values]
