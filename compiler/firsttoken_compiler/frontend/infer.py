"""Types and shapes of ONNX values, node by node, from ONNX's own definitions of the operators."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Final

from numpy.typing import NDArray

from firsttoken_compiler.errors import StudentError
from firsttoken_compiler.frontend.check_graph import label
from firsttoken_compiler.frontend.contrib_shapes import STANDARD, Kind, Operands, Shape, contrib_types
from firsttoken_compiler.frontend.loops import carried_types
from firsttoken_compiler.frontend.onnx_file import OnnxStudent
from firsttoken_compiler.frontend.values import read_names

DATA_ELEMENTS: Final = 256
"""Known values up to this size may decide shapes."""
MAX_EXTENT: Final = 1 << 62
_FLOAT: Final = 1


class Types:
    """Types of the values of one graph; grows as its nodes are visited."""

    def __init__(self, student: OnnxStudent) -> None:
        from onnx.helper import make_opsetid

        self.student = student
        self._protos: dict[str, Any] = {}
        self._shapes: dict[str, tuple[int, ...] | None] = {}
        self._declared = {value.name: value.type for value in (*student.graph.output, *student.graph.value_info)}
        self._versions = {entry.domain: entry.version for entry in student.model.opset_import}
        self._versions[""] = student.opset
        self._opsets = [make_opsetid(domain, version) for domain, version in self._versions.items()]
        for value in student.graph.input:
            self.set(value.name, value.type)
        for name, entry in student.initializers.items():
            self.put(name, entry.onnx_type, entry.shape)

    def put(self, name: str, elem_type: int, shape: Shape | None) -> None:
        """Records a tensor."""
        from onnx import helper

        self.set(name, helper.make_tensor_type_proto(elem_type, shape))

    def set(self, name: str, proto: Any) -> None:
        """Records a type as ONNX writes it."""
        self._protos[name] = proto
        self._shapes[name] = _static(proto)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The static shape of a tensor; None where any extent is not known."""
        return self._shapes.get(name)

    def elem(self, name: str) -> int:
        """Element type of a tensor, 0 where it is not known."""
        proto = self._protos.get(name)
        return int(proto.tensor_type.elem_type) if proto is not None and proto.HasField("tensor_type") else 0

    def proto(self, name: str) -> Any:
        """The type as ONNX writes it; None where there is none."""
        return self._protos.get(name)

    def kind(self, name: str) -> Kind | None:
        """Element type and shape as far as known; None for no tensor."""
        proto = self._protos.get(name)
        if proto is None or not proto.HasField("tensor_type"):
            return None
        tensor = proto.tensor_type
        dims = [dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.shape.dim]
        return int(tensor.elem_type), tuple(dims) if tensor.HasField("shape") else None

    def visit(self, node: Any, known: Mapping[str, NDArray[Any]]) -> None:
        """Records the results of a node whose inputs were recorded.

        Raises StudentError when its operator's definition does not admit the shapes of its inputs.
        """
        if not self._visit_defined(node, known):
            self._visit_contrib(node, known)
        if node.op_type == "Loop" and not node.domain:
            for name, proto in zip(node.output, carried_types(node, self.student, self.proto), strict=False):
                self.set(name, proto)
        for name in node.output:
            if name and self._shapes.get(name) is None and name in self._declared:
                declared = self._declared[name]
                if name not in self._protos or (_static(declared) is not None and _rank(self._protos[name]) is None):
                    self.set(name, declared)

    def _visit_defined(self, node: Any, known: Mapping[str, NDArray[Any]]) -> bool:
        """By ONNX's definition; False where it has none."""
        schema = self._schema(node.op_type, node.domain)
        if schema is None:
            return False
        inferred = self._inferred(schema, node, known)
        for name, proto in inferred.items():
            if proto.WhichOneof("value") is not None:
                self.set(name, proto)
        return bool(inferred)

    def _schema(self, op_type: str, domain: str) -> Any:
        from onnx import defs

        version = self._versions.get(domain)
        if version is None or not defs.has(op_type, domain):
            return None
        try:
            return defs.get_schema(op_type, version, domain)
        except defs.SchemaError:
            return None

    def _inferred(self, schema: Any, node: Any, known: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
        from onnx import numpy_helper

        names = set(read_names(node))
        protos = {name: self._protos[name] for name in names if name in self._protos}
        if any(name not in protos for name in node.input if name):
            return {}
        data = {
            name: numpy_helper.from_array(known[name], name)
            for name in names if name in known and known[name].size <= DATA_ELEMENTS
        }  # fmt: skip
        return self._asked(schema, node, protos, data)

    def _asked(self, schema: Any, node: Any, protos: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
        """Types of the results by a definition; raises StudentError where it does not admit the inputs."""
        from onnx import checker, shape_inference

        try:
            return dict(
                shape_inference.infer_node_outputs(
                    schema, node, protos, data, opset_imports=self._opsets, ir_version=self.student.model.ir_version
                )
            )
        except (
            shape_inference.InferenceError, checker.ValidationError, ValueError, RuntimeError, TypeError
        ) as error:  # fmt: skip
            reason = str(error).strip().splitlines()[-1][-200:] if str(error).strip() else type(error).__name__
            shapes = ", ".join(self._text(name) for name in node.input if name)
            raise StudentError(
                f"{self.student.name}: node {label(node)} ({node.op_type}) cannot take inputs of the shapes {shapes}: "
                f"{reason}: check the lengths, or export the model again"
            ) from error

    def _text(self, name: str) -> str:
        kind = self.kind(name)
        if kind is None or kind[1] is None:
            return "unknown"
        return "[" + ", ".join("?" if extent is None else str(extent) for extent in kind[1]) + "]"

    def _visit_contrib(self, node: Any, known: Mapping[str, NDArray[Any]]) -> None:
        """By our own rules for onnxruntime's operators."""
        from onnx import helper

        if node.op_type in STANDARD and node.domain:
            self._visit_alike(node, *STANDARD[node.op_type])
            return
        given = Operands(
            [self.kind(name) if name else None for name in node.input], [known.get(name) for name in node.input],
            {a.name: helper.get_attribute_value(a) for a in node.attribute}, len(node.output),
        )  # fmt: skip
        for name, kind in zip(node.output, contrib_types(node.op_type, given) or (), strict=False):
            if name:
                self.put(name, *kind)

    def _visit_alike(self, node: Any, op_type: str, inputs: Iterable[int]) -> None:
        from onnx import helper

        schema = self._schema(op_type, "")
        if schema is None or any(index >= len(node.input) for index in inputs):
            return
        kinds = [self.kind(node.input[index]) for index in inputs]
        if any(kind is None for kind in kinds):
            return
        like = helper.make_node(op_type, [f"i{index}" for index in inputs], [node.output[0]], node.name)
        like.attribute.extend(a for a in node.attribute if a.name in schema.attributes)
        floats = {
            name: helper.make_tensor_type_proto(_FLOAT, kind[1])  # the standard operator may know no other type
            for name, kind in zip(like.input, kinds, strict=True) if kind is not None
        }  # fmt: skip
        for name, proto in self._asked(schema, like, floats, {}).items():
            self.set(name, proto)
            self._protos[name].tensor_type.elem_type = self.elem(node.input[0])


def _static(proto: Any) -> tuple[int, ...] | None:
    if not proto.HasField("tensor_type"):
        return None
    tensor = proto.tensor_type
    if not tensor.HasField("shape"):
        return None
    extents = tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in tensor.shape.dim)
    return extents if min(extents, default=0) >= 0 and math.prod(extents) < MAX_EXTENT else None


def _rank(proto: Any) -> int | None:
    tensor = proto.tensor_type
    return len(tensor.shape.dim) if proto.HasField("tensor_type") and tensor.HasField("shape") else None
