"""Types of what a Loop carries from round to round, where every round keeps them."""

from collections.abc import Callable
from typing import Any, Final

from firsttoken_compiler.frontend.onnx_file import OnnxStudent
from firsttoken_compiler.frontend.values import read_names

INT64, BOOL = 7, 9
COUNTERS: Final = 2
"""Inputs of a body before what is carried: the number of the round, and whether to go on."""


def carried_types(node: Any, student: OnnxStudent, proto: Callable[[str], Any]) -> list[Any]:
    """Types of the carried results; empty unless one round, on the types of the initial values, gives the same types.

    `proto` is the type of a value outside, None where it is not known.
    """
    from onnx import ModelProto, helper, shape_inference

    body = next(attribute.g for attribute in node.attribute if attribute.name == "body")
    initial = [proto(name) for name in node.input[COUNTERS:]]
    captured = [name for name in dict.fromkeys(read_names(node)) if name not in node.input]
    outside = {name: proto(name) for name in (*captured, *node.input) if name}
    if None in initial or None in outside.values() or len(body.input) != COUNTERS + len(initial):
        return []
    counters = [helper.make_tensor_type_proto(kind, ()) for kind in (INT64, BOOL)]
    model = ModelProto(ir_version=student.model.ir_version)
    model.opset_import.extend(student.model.opset_import)
    model.graph.name = "body"
    model.graph.node.extend(body.node)
    model.graph.initializer.extend(body.initializer)
    given = dict(zip((value.name for value in body.input), (*counters, *initial), strict=True))
    for name, kind in {**outside, **given}.items():
        model.graph.input.add(name=name, type=kind)
    try:
        inferred = shape_inference.infer_shapes(model).graph
    except (shape_inference.InferenceError, ValueError, RuntimeError):
        return []
    found = {value.name: value.type for value in (*inferred.value_info, *inferred.input)}
    after = [found.get(value.name) for value in body.output[1 : 1 + len(initial)]]
    return initial if after == initial else []
