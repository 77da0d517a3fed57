"""A program in the memory of a functional machine: inputs and outputs by their ONNX names, shapes and types."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from firsttoken_compiler.errors import OptionError, StudentError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from firsttoken_compiler.frontend.onnx_file import OnnxStudent
    from firsttoken_compiler.isa.program import Program, Tensor
    from firsttoken_compiler.target.target import Target
    from firsttoken_simulator.functional import FunctionalMachine
    from firsttoken_simulator.memory_pool import DeviceMemory
    from firsttoken_simulator.timeline import Timeline


@dataclass(frozen=True)
class Loaded:
    """A program on a functional machine, and when its instructions complete.

    Its weights are in the machine's memory, or are stored there again after another program had it.
    """

    program: Program
    timeline: Timeline
    machine: FunctionalMachine
    fill: Callable[[Sequence[Tensor]], None]
    """Stores these weights."""

    def enter(self) -> None:
        """Makes the machine's memory the program's, with all its weights."""
        if self.machine.enter():
            self.fill(self.machine.memory.missing(self.program))

    def run(self, feeds: Mapping[str, NDArray[Any]], *, as_stored: bool = False) -> dict[str, NDArray[Any]]:
        """Executes the graph; inputs and outputs have the names, shapes and element types of the ONNX graph.

        A cache that the graph appends to has no input of its own: its rows go into the first rows of what it becomes.
        Int8 caches come and go as the rows that they stand for; with `as_stored` as integers, and scales
        [1, heads, rows, 1] under the cache's name and `.scales`.
        Raises OptionError naming an input that is missing or has another shape.
        """
        import numpy as np

        from firsttoken.kv_cache import SCALES, dequantise_rows
        from firsttoken_compiler.isa.host_call import is_bits
        from firsttoken_compiler.isa.types import Dtype

        self.enter()
        for tensor in self.program.of_kind("input"):
            array = self._feed(feeds, tensor.name)
            if is_bits(array.dtype.name) and tensor.dtype in (Dtype.U8, Dtype.U16):
                array = np.asarray(array).copy().view(tensor.dtype.numpy)
            with np.errstate(over="ignore"):  # beyond float16 is infinite, as on the machine
                stored = array.reshape(tensor.shape).astype(tensor.dtype.numpy)
            self.machine.write_tensor(tensor.name, stored)
        self._fill_caches(feeds, as_stored)
        self.machine.run(self.timeline.completion_order)
        results = {tensor.name: self.machine.read_tensor(tensor.name) for tensor in self.program.of_kind("output")}
        caches = {tensor.name: self.machine.read_tensor(tensor.name)[None] for tensor in self.program.of_kind("kv")}
        if as_stored:
            return {name: self._as_declared(name, array) for name, array in results.items()} | caches
        for name in self._quantised():
            caches[name] = dequantise_rows(caches[name], caches.pop(name + SCALES))
        return {name: self._as_declared(name, array) for name, array in (results | caches).items()}

    def _fill_caches(self, feeds: Mapping[str, NDArray[Any]], as_stored: bool) -> None:
        from firsttoken.kv_cache import SCALES, quantise_rows

        quantised = self._quantised()
        scales = {name + SCALES for name in quantised}
        for past, present in self.program.meta.get("kv", {}).items():
            if as_stored or present not in quantised | scales:
                self._write_rows(present, self._feed(feeds, past)[0])
            elif present in quantised:
                integers, steps = quantise_rows(self._feed(feeds, past)[0])
                self._write_rows(present, integers)
                self._write_rows(present + SCALES, steps)

    def _quantised(self) -> set[str]:
        """Caches whose rows are integers."""
        from firsttoken_compiler.isa.types import Dtype

        return {tensor.name for tensor in self.program.of_kind("kv") if tensor.dtype is Dtype.I8}

    def _feed(self, feeds: Mapping[str, NDArray[Any]], name: str) -> NDArray[Any]:
        import numpy as np

        if name not in feeds:
            raise OptionError(f"input {name!r} is not given; the graph has the inputs {', '.join(self.inputs)}")
        array = np.asarray(feeds[name])
        shape = self.inputs.get(name, ("", array.shape))[1]
        if array.shape != tuple(shape):
            raise OptionError(f"input {name!r} has shape {list(array.shape)}, the program is for {list(shape)}")
        return array

    def _as_declared(self, name: str, array: NDArray[Any]) -> NDArray[Any]:
        from firsttoken_compiler.isa.host_call import is_bits

        dtype, shape = self.outputs.get(name, (array.dtype.name, array.shape))
        return array.reshape(shape).view(dtype) if is_bits(dtype) else array.reshape(shape).astype(dtype)

    @property
    def inputs(self) -> dict[str, tuple[str, list[int]]]:
        """Numpy type and shape of every graph input."""
        return dict(self.program.meta.get("inputs", {}))

    @property
    def outputs(self) -> dict[str, tuple[str, list[int]]]:
        """Numpy type and shape of every graph output."""
        return dict(self.program.meta.get("outputs", {}))

    def _write_rows(self, name: str, rows: NDArray[Any]) -> None:
        import numpy as np

        tensor = self.program.tensor(name)
        whole = np.zeros(tensor.shape, tensor.dtype.numpy)
        whole[:, : rows.shape[1]] = rows
        self.machine.write_tensor(name, whole)


def load(
    program: Program, timeline: Timeline, student: OnnxStudent, target: Target, memory: DeviceMemory | None = None
) -> Loaded:
    """A program with its weights in the memory of a functional machine; raises StudentError where data is missing.

    `memory` may hold weights of other programs of the student; by default the program gets one of its own.
    """
    from firsttoken_compiler.codegen.weights import materialise
    from firsttoken_compiler.frontend.specialise import specialise
    from firsttoken_simulator.functional import FunctionalMachine

    student = specialise(student)  # constants that it computes are weights of the program

    def array(name: str) -> NDArray[np.generic]:
        if name not in student.initializers:
            raise StudentError(f"{student.name}: the program wants weight {name!r}, which the graph does not have")
        return student.array(name)

    def fill(tensors: Sequence[Tensor]) -> None:
        materialise(replace(program, tensors=tuple(tensors)), array, machine.write_bytes)

    machine = FunctionalMachine(program, target, memory=memory)
    fill(machine.memory.missing(program))
    return Loaded(program, timeline, machine, fill)
