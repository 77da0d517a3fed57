"""ONNX nodes and constants that are added to a student, with the types of their results."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from firsttoken_compiler.frontend.onnx_file import Initializer, OnnxStudent, with_nodes
from firsttoken_compiler.frontend.values import TensorType


@dataclass
class Additions:
    """Nodes that are being added; `nodes` is where `node` appends."""

    types: dict[str, TensorType]
    """Of all values, those that are added included."""
    nodes: list[Any] = field(default_factory=list)
    tensors: dict[str, Any] = field(default_factory=dict)
    infos: list[Any] = field(default_factory=list)
    made: dict[Any, str] = field(default_factory=dict)
    """Values that serve several nodes, by what they are."""

    def node(
        self, kind: str, inputs: list[str], name: str, shape: tuple[int, ...], elem_type: int, label: str = "",
        **attributes: object,
    ) -> str:  # fmt: skip
        """Appends a node, named `label` or as its result; returns the result's name."""
        from onnx import helper

        self.nodes.append(helper.make_node(kind, inputs, [name], name=label or name, **attributes))
        self.infos.append(helper.make_tensor_value_info(name, elem_type, shape))
        self.types[name] = TensorType(elem_type, shape)
        return name

    def constant(self, hint: str, array: Any) -> str:
        """The name of an initialiser that holds the array; equal ones share one."""
        from onnx import numpy_helper

        array = np.asarray(array)
        for name, tensor in self.tensors.items():
            held = numpy_helper.to_array(tensor)
            if held.dtype == array.dtype and held.shape == array.shape and np.array_equal(held, array):
                return name
        name = f"{hint}.{len(self.tensors)}"
        self.tensors[name] = numpy_helper.from_array(array, name)
        return name

    def applied(self, student: OnnxStudent) -> OnnxStudent:
        """The student with `nodes` for its nodes."""
        entries = {
            name: Initializer(name, tuple(tensor.dims), tensor.data_type, None) for name, tensor in self.tensors.items()
        }
        changed = with_nodes(student, self.nodes).with_initializers(entries, self.tensors)
        changed.graph.value_info.extend(self.infos)
        return changed
