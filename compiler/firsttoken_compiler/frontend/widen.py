"""Graphs of float16 and bfloat16 are read as graphs of float32: the compiler chooses how values are stored.

Exporters cast to float32 and back around every norm and softmax; with one float type these casts are gone, and what is
left is the same operators as in a float32 export. Initialisers keep their bytes and are widened when they are read.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Final

from firsttoken_compiler.frontend.check_graph import all_nodes, subgraphs
from firsttoken_compiler.frontend.onnx_file import Initializer, OnnxStudent, with_nodes
from firsttoken_compiler.frontend.values import copied, read_names, value_types

FLOAT, HALF, BRAIN = 1, 10, 16
NARROW: Final = (HALF, BRAIN)
_TYPED: Final = ("to", "dtype", "output_dtype", "stash_type", "softmax_precision")
"""Attributes that hold an element type."""
_TENSOR: Final = 4
"""The kind of attribute that holds a tensor."""


def widen(student: OnnxStudent) -> OnnxStudent:
    """The student with float32 in place of float16 and bfloat16, without casts between them; itself if it has none."""
    graph = student.graph
    values = [*graph.input, *graph.output, *graph.value_info]
    narrow = any(value.type.tensor_type.elem_type in NARROW for value in values) or any(map(_makes_narrow, graph.node))
    if not narrow and not any(entry.onnx_type in NARROW for entry in student.initializers.values()):
        return student
    initializers = {name: _wide(entry) for name, entry in student.initializers.items()}
    declared = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
    wide = replace(
        with_nodes(student, [_widened(node) for node in graph.node]), initializers=initializers,
        declared={**declared, **student.declared},
    )  # fmt: skip
    _widen_values(wide.graph)
    return _without_casts(wide)


def _makes_narrow(node: Any) -> bool:
    """Whether an attribute asks for float16 or bfloat16: a file need not say what types its values have."""
    return any(
        a.t.data_type in NARROW if a.type == _TENSOR else a.name in _TYPED and a.i in NARROW for a in _attributes(node)
    )


def _wide(entry: Initializer) -> Initializer:
    return replace(entry, onnx_type=FLOAT, stored_type=entry.onnx_type) if entry.onnx_type in NARROW else entry


def _widened(node: Any) -> Any:
    """A copy of a node in which attributes name float32, subgraphs included."""
    copy = copied(node)
    for attribute in _attributes(copy):
        if attribute.name in _TYPED and attribute.i in NARROW:
            attribute.i = FLOAT
        if attribute.type == _TENSOR:
            _widen_tensor(attribute.t)
    for graph in (graph for inner in all_nodes([copy]) for graph in subgraphs(inner)):
        for tensor in graph.initializer:
            _widen_tensor(tensor)
        _widen_values(graph)
    return copy


def _widen_tensor(tensor: Any) -> None:
    from onnx import numpy_helper

    if tensor.data_type in NARROW:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype("float32"), tensor.name))


def _widen_values(graph: Any) -> None:
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type in NARROW:
            value.type.tensor_type.elem_type = FLOAT


def _attributes(node: Any) -> Iterator[Any]:
    """Attributes of a node and of all nodes in its subgraphs."""
    return (attribute for inner in all_nodes([node]) for attribute in inner.attribute)


def _without_casts(student: OnnxStudent) -> OnnxStudent:
    """Casts from float32 to float32 are taken out; one that makes an output of the graph becomes an Identity."""
    from onnx import helper

    types, outputs = value_types(student), {value.name for value in student.graph.output}
    inner = {name for node in student.graph.node if node.attribute for name in _captured(node)}
    same: dict[str, str] = {}
    nodes = []
    for node in student.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = same.get(name, name)
        cast = node.op_type == "Cast" and not node.domain and node.attribute and node.attribute[0].i == FLOAT
        source = types.get(node.input[0]) if cast else None
        if source is None or source.elem_type != FLOAT:
            nodes.append(node)
        elif node.output[0] in outputs or node.output[0] in inner:
            nodes.append(helper.make_node("Identity", [node.input[0]], [node.output[0]], name=node.name))
        else:
            same[node.output[0]] = node.input[0]
    return with_nodes(student, nodes)


def _captured(node: Any) -> Iterator[str]:
    """Values that the subgraphs of a node take from outside."""
    given = set(node.input)
    yield from (name for name in read_names(node) if name not in given)


def declared_types(student: OnnxStudent) -> Mapping[str, int]:
    """Element types that the file declares for its inputs and outputs."""
    graph = student.graph
    return {**{v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)}, **student.declared}
