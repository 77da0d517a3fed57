"""Operators of an ONNX file: they exist, their operands fit, and no loop among them can run for ever."""

import functools
import math
import re
from collections.abc import Iterator
from typing import Any, Final

from firsttoken_compiler.errors import StudentError
from firsttoken_compiler.frontend.blocks import DOMAIN, OPERATOR
from firsttoken_compiler.frontend.check_graph import all_nodes, bodies, label, shown, subgraphs
from firsttoken_compiler.frontend.check_tensors import MAX_RANK, MAX_TENSOR_BYTES, NUMBERS, STRING

MAX_TRIPS: Final = 10_000
"""Iterations of a loop, those of loops inside it multiplied."""
KEPT_ELEMENTS: Final = 1024
"""Initialisers up to this size are seen by shape inference with their values."""


def check_operators(model: Any, name: str, opset: int) -> None:
    """Raises StudentError for operators that neither ONNX, onnxruntime nor the file itself defines."""
    from onnx import defs

    own = {(function.domain, function.name) for function in model.functions}
    own |= {("", name) for domain, name in own if domain == "ai.onnx"}
    unknown: dict[str, list[str]] = {}
    for body in bodies(model):
        for node in all_nodes(body.node):
            domain = "" if node.domain == "ai.onnx" else node.domain
            known = defs.has(node.op_type, domain) if domain else defs.has(node.op_type, opset)
            if not known and (domain, node.op_type) not in own and (domain, node.op_type) not in _contributed():
                unknown.setdefault(f"{domain}::{node.op_type}".removeprefix("::"), []).append(label(node))
    if unknown:
        first, nodes = next(iter(unknown.items()))
        others = f" (and {len(unknown) - 1} other operators)" if len(unknown) > 1 else ""
        raise StudentError(
            f"{name}: operator {shown(first)[1:-1]} of node {nodes[0]} is unknown to ONNX opset {opset} and to "
            f"onnxruntime{others}: export with standard operators, or put a function of that name into the file"
        )


def check_nodes(student: Any, skipped: str = "") -> None:
    """Raises StudentError for a node with inputs, outputs or attributes that its operator does not have.

    TVM follows an absent input, of those that must be there, into a segmentation fault. Nodes of type `skipped` are
    not looked at.
    """
    from onnx import checker, defs

    context = checker.C.CheckerContext()
    context.ir_version, context.opset_imports = student.model.ir_version, {"": student.opset}
    own = {function.name for function in student.model.functions if function.domain in ("", "ai.onnx")}
    for node in all_nodes(student.graph.node):
        if node.op_type == skipped or node.domain or node.op_type in own or not defs.has(node.op_type, student.opset):
            continue
        try:
            checker.check_node(_without_subgraphs(node), context)
        except Exception as error:  # the checker's own error derives from nothing narrower
            reason = shown(next(iter(str(error).strip().splitlines()), ""), 300)[1:-1]
            raise StudentError(f"{student.name}: node {label(node)} is malformed: {reason}: export again") from error
        formal = defs.get_schema(node.op_type, student.opset).inputs
        variadic = formal and formal[-1].option == defs.OpSchema.FormalParameterOption.Variadic
        if variadic and "" in node.input and not any(True for _ in subgraphs(node)):
            raise StudentError(f"{student.name}: node {label(node)} is malformed: one of its inputs has no name")


def _without_subgraphs(node: Any) -> Any:
    """The node itself, or a copy whose subgraphs are empty: they read values that the checker would not find."""
    if not any(True for _ in subgraphs(node)):
        return node
    copy = type(node)(op_type=node.op_type, name=node.name, domain=node.domain, input=node.input, output=node.output)
    for attribute in node.attribute:
        if attribute.HasField("g"):
            made = copy.attribute.add(name=attribute.name, type=attribute.type)
            made.g.name = "graph"
        else:
            copy.attribute.append(attribute)
    return copy


@functools.cache
def _contributed() -> frozenset[tuple[str, str]]:
    """Operators that onnxruntime, and this project, add to ONNX's: (domain, name)."""
    import onnxruntime.capi.onnxruntime_pybind11_state as state
    from onnx import defs

    schemas = {(schema.domain, schema.name) for schema in state.get_all_operator_schema()}
    return frozenset(key for key in schemas if key[0] or not defs.has(key[1])) | {(DOMAIN, OPERATOR)}


def check_types(model: Any, name: str) -> None:
    """Raises StudentError where types or shapes contradict an operator or one another, or ask for too much memory.

    Shapes that the file claims for values between nodes are not believed: exporters get them wrong, and nothing here
    depends on them.
    """
    from onnx import shape_inference

    # Without propagation of data: that makes the numbers of every Range and sum, however many they are.
    try:
        typed = shape_inference.infer_shapes(_skeleton(model), check_type=True, strict_mode=True)
    except Exception as error:  # the inference's own errors derive from nothing narrower
        own = {function.name for function in model.functions}
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reasons = [line for line in lines if not _inside(line, own)]
        if not reasons:
            return
        raise StudentError(
            f"{name}: types or shapes contradict one another: {shown(reasons[0], 400)[1:-1]}: export the model again"
        ) from error
    _check_extents(typed.graph.value_info, model.graph, name)


def _check_extents(values: Any, graph: Any, name: str) -> None:
    """Raises StudentError for a value between nodes that no memory holds."""
    for value in values:
        extents = [dim.dim_value for dim in value.type.tensor_type.shape.dim if dim.HasField("dim_value")]
        if min(extents, default=0) < 0 or math.prod(extents) * 4 > MAX_TENSOR_BYTES:
            maker = next((label(node) for node in graph.node if value.name in node.output), "?")
            raise StudentError(
                f"{name}: node {maker} makes {shown(value.name)} of shape {extents}, the limit is "
                f"{MAX_TENSOR_BYTES} bytes: make it smaller"
            )


def _inside(line: str, own: set[str]) -> bool:
    """Whether a complaint is about the body that ONNX itself gives to an operator, not about the file."""
    operators = re.findall(r"\(op_type:([^,)]*)", line)
    return len(operators) > 1 and operators[0] not in own


def _skeleton(model: Any) -> Any:
    """The model without large weights and without what it says about inner values."""
    from onnx import ModelProto, helper

    made = ModelProto(ir_version=model.ir_version)
    made.opset_import.extend(model.opset_import)
    made.functions.extend(model.functions)
    graph = made.graph
    graph.name = model.graph.name or "graph"
    graph.node.extend(model.graph.node)
    graph.output.extend(model.graph.output)
    listed = {value.name for value in model.graph.input}
    graph.input.extend(model.graph.input)
    for tensor in model.graph.initializer:
        integer = tensor.data_type in (6, 7)
        if (integer and math.prod(tensor.dims) <= KEPT_ELEMENTS) and not tensor.external_data:
            graph.initializer.append(tensor)
        elif tensor.name not in listed:
            graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    domains = {entry.domain for entry in made.opset_import}
    for domain in sorted({node.domain for node in all_nodes(graph.node)} - domains - {""}):
        made.opset_import.append(helper.make_opsetid(domain, 1))
    return made


def check_values(student: Any, folded: bool = False) -> None:
    """Raises StudentError for loops that do not end soon, and for constant indices out of range.

    `folded`: every constant of the graph is an initialiser by now, so that a trip count that is none is unknown.
    """
    shapes = static_shapes(student)
    if folded:
        _check_extents((*student.graph.value_info, *student.graph.output), student.graph, student.name)
    _check_indices(student, shapes)
    _check_heads(student, shapes)
    constants: dict[str, int] | None = None
    for node in student.graph.node:
        if any(True for _ in subgraphs(node)):
            constants = integer_constants(student) if constants is None else constants
            trips = _trips(node, student.name, constants, shapes, folded)
            if trips > MAX_TRIPS:
                raise StudentError(
                    f"{student.name}: {node.op_type} {label(node)} runs {trips} times, the limit is {MAX_TRIPS}: "
                    "unroll it or make it shorter"
                )


def _trips(
    node: Any, name: str, constants: dict[str, int], shapes: dict[str, tuple[int, ...]], folded: bool
) -> int:
    """Iterations of a node, those of loops inside it multiplied; 1 where they are not known yet."""
    inner = 1
    for graph in subgraphs(node):
        for nested in graph.node:
            inner = max(inner, _trips(nested, name, constants, shapes, folded))
    if node.op_type == "Scan":
        count = next((attribute.i for attribute in node.attribute if attribute.name == "num_scan_inputs"), 1)
        scanned = [shapes.get(value, ()) for value in node.input[len(node.input) - max(count, 0) :]]
        return inner * max((max(shape) for shape in scanned if shape), default=1)
    if node.op_type != "Loop":
        return inner
    limit = node.input[0] if node.input else ""
    if not limit or (folded and limit not in constants):
        raise StudentError(
            f"{name}: Loop {label(node)} has no constant trip count, so it may never end: export the model with the "
            "loop unrolled"
        )
    return max(constants.get(limit, 1), 0) * inner


def check_interface(student: Any) -> None:
    """Raises StudentError for inputs and outputs that are no tensors of numbers, or too large for any memory."""
    for kind, values in (("input", student.graph.input), ("output", student.graph.output)):
        for value in values:
            where = f"{student.name}: {kind} {shown(value.name)}"
            which = next((f.name for f, _ in value.type.ListFields() if f.name.endswith("_type")), "untyped")
            tensor = value.type.tensor_type
            if which not in ("tensor_type", "untyped"):
                raise StudentError(
                    f"{where} is a {which.removesuffix('_type')}, not a tensor: export the model with tensors only"
                )
            if kind == "input" and value.name not in student.initializers and not tensor.HasField("shape"):
                raise StudentError(f"{where} is no tensor of known rank: declare its shape")
            if tensor.elem_type == STRING or (tensor.elem_type and tensor.elem_type not in NUMBERS):
                raise StudentError(f"{where} holds no numbers (type {tensor.elem_type}): remove text processing")
            extents = [dim.dim_value for dim in tensor.shape.dim if dim.HasField("dim_value")]
            known = math.prod(extent for extent in extents if extent)
            rank = len(tensor.shape.dim)
            if min(extents, default=0) < 0 or rank > MAX_RANK or known * 4 > MAX_TENSOR_BYTES:
                raise StudentError(
                    f"{where} declares shape {extents[: MAX_RANK + 1]} in {rank} dimensions; limits are {MAX_RANK} "
                    f"dimensions of 0 or more elements, {MAX_TENSOR_BYTES} bytes in all"
                )


def _check_heads(student: Any, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises StudentError for numbers of heads that do not divide the features of the input that they are of."""
    for node in student.graph.node:
        numbers = {a.name: int(a.i) for a in node.attribute}
        for name, index in _HEADS.get(node.op_type, ()):
            shape = shapes.get(node.input[index]) if index < len(node.input) else None
            heads = numbers.get(name, 0)
            if heads < 0 or (heads and shape is not None and len(shape) == 3 and shape[2] % heads):
                raise StudentError(
                    f"{student.name}: node {label(node)} has {name} {heads}, which must divide the features of its "
                    f"input {shown(node.input[index])} of shape {list(shape or ())}: export the model again"
                )


_HEADS: Final = {
    "RotaryEmbedding": (("num_heads", 0),),
    "Attention": (("q_num_heads", 0), ("kv_num_heads", 1)),
    "MultiHeadAttention": (("num_heads", 0),),
}
"""Attributes that are numbers of heads, and the input whose last axis they divide."""


def _check_indices(student: Any, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises StudentError for constant indices of Gather that lie outside what they index."""
    import numpy as np

    for node in student.graph.node:
        if node.op_type not in ("Gather", "GatherElements") or node.domain or len(node.input) < 2:
            continue
        shape, entry = shapes.get(node.input[0]), student.initializers.get(node.input[1])
        if shape is None or entry is None or not entry.elements or not student.has_data(node.input[1]):
            continue
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
        if not -len(shape) <= axis < len(shape):
            raise StudentError(f"{student.name}: node {label(node)} gathers along axis {axis} of shape {list(shape)}")
        indices = np.asarray(student.array(node.input[1]))
        low, high, extent = int(indices.min()), int(indices.max()), shape[axis]
        if low < -extent or high >= extent:
            raise StudentError(
                f"{student.name}: node {label(node)} gathers index {low if low < -extent else high} of axis {axis}, "
                f"which has {extent} elements: indices are {-extent} to {extent - 1}"
            )


def static_shapes(student: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of initialisers, and of inputs and inner values where the file says them whole."""
    found = {name: entry.shape for name, entry in student.initializers.items()}
    for value in _typed(student.graph):
        tensor = value.type.tensor_type
        if value.type.HasField("tensor_type") and tensor.HasField("shape"):
            extents = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in tensor.shape.dim]
            if min(extents, default=0) >= 0:
                found.setdefault(value.name, tuple(extents))
    return found


def _typed(graph: Any) -> Iterator[Any]:
    yield from graph.input
    yield from graph.value_info


def integer_constants(student: Any) -> dict[str, int]:
    """Scalar integers among initialisers and Constant nodes, those of subgraphs included."""
    from onnx import numpy_helper

    found: dict[str, int] = {}
    for name, entry in student.initializers.items():
        if entry.onnx_type in (6, 7) and entry.elements == 1 and student.has_data(name):
            found[name] = int(student.array(name).reshape(-1)[0])
    for node in all_nodes(student.graph.node):
        tensors = [(tensor.name, tensor) for graph in subgraphs(node) for tensor in graph.initializer]
        if node.op_type == "Constant" and not node.domain and node.output:
            tensors += [(node.output[0], attribute.t) for attribute in node.attribute if attribute.HasField("t")]
            found.update((node.output[0], int(a.i)) for a in node.attribute if a.name == "value_int")
        for name, tensor in tensors:
            if tensor.data_type in (6, 7) and math.prod(tensor.dims) == 1 and not tensor.external_data:
                found[name] = int(numpy_helper.to_array(tensor).reshape(-1)[0])
    return found
