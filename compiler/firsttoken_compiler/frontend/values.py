"""Values of an ONNX graph: their types, who reads them, and copies of the nodes that make them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from firsttoken_compiler.frontend.check_graph import subgraphs
from firsttoken_compiler.frontend.onnx_file import OnnxStudent


@dataclass(frozen=True)
class TensorType:
    """ONNX element type and static shape."""

    elem_type: int
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes when packed."""
        return self.elements * _BITS.get(self.elem_type, 32) // 8


_BITS: Final = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 13: 64, 16: 16, 21: 4, 22: 4}
"""By ONNX element type; 32 for the rest."""


def value_types(student: OnnxStudent) -> dict[str, TensorType]:
    """Types of all values whose shape is static."""
    found = {name: TensorType(entry.onnx_type, entry.shape) for name, entry in student.initializers.items()}
    graph = student.graph
    for value in (*graph.value_info, *graph.output, *graph.input):
        tensor = value.type.tensor_type
        if not value.type.HasField("tensor_type") or not tensor.HasField("shape"):
            continue
        extents = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in tensor.shape.dim]
        if min(extents, default=0) >= 0:
            found[value.name] = TensorType(tensor.elem_type, tuple(extents))
    return found


def read_names(node: Any) -> Iterator[str]:
    """Values that a node reads, those that its subgraphs take from outside included."""
    yield from (name for name in node.input if name)
    for graph in subgraphs(node):
        inside = {value.name for value in (*graph.input, *graph.initializer)}
        for inner in graph.node:
            yield from (name for name in read_names(inner) if name not in inside)
            inside.update(inner.output)
        yield from (value.name for value in graph.output if value.name not in inside)


def copied(node: Any) -> Any:
    """A node of its own with the same contents."""
    copy = type(node)()
    copy.CopyFrom(node)
    return copy
