"""ONNX's standard interface to a runtime: the functional machine as an `onnx.backend.base.Backend`.

`prepare(model).run(inputs)` compiles a graph, executes its program instruction by instruction in the order in which the
timing machine completes them, and returns what the graph returns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from onnx import ModelProto, NodeProto, helper
from onnx.backend.base import Backend, BackendRep

from firsttoken_compiler.errors import OptionError, StudentError
from firsttoken_compiler.options import Precision

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from firsttoken.execution import Loaded
    from firsttoken_compiler.frontend.onnx_file import OnnxStudent
    from firsttoken_compiler.target.target import Target
    from firsttoken_simulator.timeline import Timeline

DEVICES: Final = ("NPU", "CPU")
"""What `supports_device` says yes to. ONNX's own test suite asks for "CPU", and gets the same machine."""
EXACT: Final = Precision("fp16", "fp16", "128", "fp16", storage="fp32")
"""Values between operators stay float32, so that only operands of the matrix unit are rounded (to float16)."""
NPU, HOST, FOLDED = "NPU", "host", "folded"
"""Where a node runs; a folded one is computed by the compiler, or is a change of shape that moves no data."""


@dataclass(frozen=True)
class Compiled:
    """A program for one set of shapes in the memory of a functional machine, and where the graph's nodes run.

    Attributes:
        loaded: the program and its memory.
        placement: where each ONNX node runs: "NPU", "host" or "folded".
        reasons: why the nodes of the host are there.
    """

    loaded: Loaded
    placement: dict[str, str]
    reasons: dict[str, str]

    @property
    def products(self) -> bool:
        """Whether the matrix unit computes any of the graph."""
        return any(op.macs for op in self.loaded.program.ops)

    @property
    def timeline(self) -> Timeline:
        """When each instruction of a run completes."""
        return self.loaded.timeline


@dataclass
class NpuRep(BackendRep):
    """A graph made ready. One with open dimensions is compiled when it first runs, once for each set of shapes.

    Attributes:
        student: the graph.
        target: what it is compiled for.
        precision: number formats.
        fallback: whether the host computes what the NPU cannot.
        inputs: names of the graph's inputs, without initialisers, in order.
        outputs: names and ONNX element types of the graph's outputs, in order.
    """

    student: OnnxStudent
    target: Target
    precision: Precision
    fallback: bool
    inputs: tuple[str, ...]
    outputs: dict[str, int]
    _made: dict[tuple[tuple[str, int], ...], Compiled] = field(default_factory=dict)

    def compiled(self, bindings: Mapping[str, int] | None = None) -> Compiled:
        """The program for these values of the open dimensions, by name; raises FirsttokenError."""
        key = tuple(sorted((bindings or {}).items()))
        made = self._made.pop(key, None) or _compiled(self, dict(key))
        self._made[key] = made
        return made

    @property
    def latest(self) -> Compiled:
        """What ran last, or was compiled at once; raises OptionError when dimensions are open and nothing ran."""
        if not self._made:
            raise OptionError("the graph has open dimensions: it is compiled when it first runs")
        return next(reversed(self._made.values()))

    def run(self, inputs: Any, **_unused: Any) -> tuple[NDArray[Any], ...]:
        """The graph's outputs in its order; `inputs` is a list in the graph's order, a dictionary, or one array.

        Raises OptionError when an input is missing, is not of the graph, or has another shape; StudentError when values
        beyond float16 made NaN of a product.
        """
        feeds = self._feeds(inputs)
        made = self.compiled(self._bindings(feeds))
        results = made.loaded.run(feeds)
        if made.products and any(map(_has_nan, results.values())) and not any(map(_has_nan, feeds.values())):
            raise StudentError(
                f"{self.student.name}: a result is not a number, as products take float16: values beyond 65504 are "
                "infinite to the matrix unit: scale the graph, or choose integer activations"
            )
        return tuple(
            np.asarray(results[name]).astype(helper.tensor_dtype_to_np_dtype(kind), copy=False)
            for name, kind in self.outputs.items()
        )

    def _bindings(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, int]:
        """The open dimensions as these arrays have them."""
        from firsttoken_compiler.frontend.bind import symbols

        found: dict[str, int] = {}
        for symbol in symbols(self.student).values():
            for name, axis, rank in symbol.places:
                shape = feeds[name].shape if name in feeds else ()
                if len(shape) != rank:
                    raise OptionError(f"input {name!r} is not given with {rank} dimensions, but as {list(shape)}")
                if found.setdefault(symbol.name, shape[axis]) != shape[axis]:
                    raise OptionError(
                        f"dimension {symbol.name!r} is {found[symbol.name]} in one input and {shape[axis]} in {name!r}"
                    )
        return found

    def _feeds(self, inputs: Any) -> dict[str, NDArray[Any]]:
        if isinstance(inputs, Mapping):
            unknown = [name for name in inputs if name not in self.inputs]
            if unknown:
                raise OptionError(f"the graph has no input {unknown[0]!r}; it has {', '.join(self.inputs) or 'none'}")
            return {name: np.asarray(array) for name, array in inputs.items()}
        given = list(inputs) if isinstance(inputs, Sequence) else [inputs]
        if len(given) != len(self.inputs):
            raise OptionError(f"{len(given)} inputs are given; the graph has {', '.join(self.inputs) or 'none'}")
        return {name: np.asarray(array) for name, array in zip(self.inputs, given, strict=True)}


class NpuBackend(Backend):
    """Graphs on the simulated NPU; what it cannot run, its host does."""

    @classmethod
    def supports_device(cls, device: str) -> bool:
        """Whether `device` is one of `DEVICES`, with or without a number behind a colon."""
        return device.partition(":")[0] in DEVICES

    @classmethod
    def prepare(
        cls, model: ModelProto | str | Path, device: str = "NPU", *, target: str | Path | Target = "systolic-128",
        precision: Precision = EXACT, fallback: bool = True, **_unused: Any,
    ) -> NpuRep:  # fmt: skip
        """Compiles a graph for a target and loads it; the model itself is not changed.

        Args:
            model: a model, or the path of a file (whose external data lies beside it).
            device: see `supports_device`.
            target: a preset's name, a `.toml` file, or a target.
            precision: number formats; the default keeps float32 wherever the matrix unit allows it.
            fallback: whether the host computes what the NPU cannot; without it that is an error.

        Raises:
            FirsttokenError: device, target, precision or graph are not supported; the message names the remedy.
        """
        from firsttoken.api import target_of
        from firsttoken_compiler.frontend.bind import symbols
        from firsttoken_compiler.frontend.onnx_file import from_model, open_student

        if not cls.supports_device(device):
            raise OptionError(f"device {device!r}: this backend has {', '.join(DEVICES)}")
        machine = target_of(target)
        if isinstance(model, ModelProto):
            student = from_model(_readable(model), Path(), model.graph.name or "model")
        else:
            student = open_student(Path(model))
        inputs = tuple(value.name for value in student.graph.input if value.name not in student.initializers)
        outputs = {value.name: int(value.type.tensor_type.elem_type) for value in student.graph.output}
        rep = NpuRep(student, machine, precision, fallback, inputs, outputs)
        if not symbols(student):
            rep.compiled()
        return rep

    @classmethod
    def run_model(cls, model: ModelProto, inputs: Any, device: str = "NPU", **kwargs: Any) -> tuple[Any, ...]:
        """`prepare(model, device, ...)` and one run of it."""
        return cls.prepare(model, device, **kwargs).run(inputs)

    @classmethod
    def run_node(
        cls, node: NodeProto, inputs: Any, device: str = "NPU",
        outputs_info: Sequence[tuple[Any, tuple[int, ...]]] | None = None, **kwargs: Any,
    ) -> tuple[Any, ...]:  # fmt: skip
        """A graph of one node on these inputs, a list in the node's order.

        `outputs_info` are type and shape of its outputs; without it they are inferred. `opset_version` of the keyword
        arguments is the version of the node's operator set, by default the newest that is supported.
        """
        version = int(kwargs.pop("opset_version", 0))
        return cls.run_model(_model_of(node, list(inputs), outputs_info, version), inputs, device, **kwargs)


def _has_nan(array: NDArray[Any]) -> bool:
    return bool(array.dtype.kind == "f" and np.isnan(array).any())


def _compiled(rep: NpuRep, bindings: Mapping[str, int]) -> Compiled:
    """See `NpuRep.compiled`."""
    from firsttoken.api import simulate
    from firsttoken.execution import load
    from firsttoken_compiler.frontend.specialise import specialise
    from firsttoken_compiler.pipeline import compile_onnx

    student = specialise(rep.student, bindings)
    program = compile_onnx(student, rep.target, rep.precision, fallback=rep.fallback)
    assert program is not None
    loaded = load(program, simulate(program, rep.target), student, rep.target)
    on_host = {node: call.reason for call in program.hosts for node in call.nodes}
    on_npu = {node for op in program.ops for node in op.onnx_nodes} - set(on_host)
    placement = {
        node.name: HOST if node.name in on_host else NPU if node.name in on_npu else FOLDED
        for node in rep.student.graph.node
    }
    return Compiled(loaded, placement, on_host)


def _readable(model: ModelProto) -> ModelProto:
    """A copy of the model; one of an older operator set than the compiler reads is converted by ONNX's converter."""
    from onnx import version_converter

    from firsttoken_compiler.frontend.onnx_file import MIN_OPSET

    copy = ModelProto()
    copy.CopyFrom(model)
    versions = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    if not versions or versions[0] >= MIN_OPSET:
        return copy
    try:
        return version_converter.convert_version(copy, MIN_OPSET)
    except Exception as error:  # the converter's errors derive from nothing narrower
        raise StudentError(
            f"{model.graph.name}: opset {versions[0]} is older than {MIN_OPSET}, and ONNX's version converter fails "
            f"({str(error).strip()[-200:]}): export the model again"
        ) from error


def _model_of(
    node: NodeProto, inputs: list[Any], outputs_info: Sequence[tuple[Any, tuple[int, ...]]] | None, version: int
) -> ModelProto:
    """A model of one node whose inputs have the types and shapes of these arrays."""
    from onnx import shape_inference

    from firsttoken_compiler.frontend.onnx_file import MAX_OPSET

    def described(name: str, dtype: Any, shape: tuple[int, ...]) -> Any:
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)

    names = [name for name in node.input if name]
    arrays = [np.asarray(array) for array in inputs]
    if len(names) != len(arrays):
        raise OptionError(f"node {node.name or node.op_type!r} has {len(names)} inputs, {len(arrays)} are given")
    given = [described(name, a.dtype, a.shape) for name, a in zip(names, arrays, strict=True)]
    made = [name for name in node.output if name]
    if outputs_info is None:
        results = [helper.make_empty_tensor_value_info(name) for name in made]
    else:
        results = [described(name, *info) for name, info in zip(made, outputs_info, strict=True)]
    sets = [helper.make_opsetid("", version or MAX_OPSET)]
    if node.domain:
        sets = [helper.make_opsetid("", MAX_OPSET), helper.make_opsetid(node.domain, version or 1)]
    model = helper.make_model(helper.make_graph([node], node.op_type, given, results), opset_imports=sets)
    return model if outputs_info is not None else shape_inference.infer_shapes(model)


supports_device = NpuBackend.supports_device
prepare = NpuBackend.prepare
run_model = NpuBackend.run_model
run_node = NpuBackend.run_node
