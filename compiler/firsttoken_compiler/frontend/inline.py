"""Model-local functions and subgraphs become nodes of the graph that calls them."""

from collections.abc import Mapping
from typing import Any

from firsttoken_compiler.errors import StudentError
from firsttoken_compiler.frontend.check_graph import subgraphs
from firsttoken_compiler.frontend.onnx_file import OnnxStudent, with_nodes
from firsttoken_compiler.frontend.values import copied


def inline(student: OnnxStudent) -> OnnxStudent:
    """The student without model-local functions; itself if it has none. Raises StudentError where that fails."""
    if not student.model.functions:
        return student
    from dataclasses import replace

    from onnx import inliner

    bare = with_nodes(student, list(student.graph.node))
    try:
        model = inliner.inline_local_functions(bare.model, convert_version=True)
    except Exception as error:  # the inliner's own errors derive from nothing narrower
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise StudentError(
            f"{student.name}: its functions cannot be inlined ({reason}): inline them before, with onnx.inliner"
        ) from error
    taken = {node.name for node in student.graph.node}
    seen: set[str] = set()
    for index, node in enumerate(model.graph.node):
        if not node.name or node.name in seen:
            node.name = fresh(f"{node.name or node.op_type}#{index}", taken)
        node.domain = "" if node.domain == "ai.onnx" else node.domain
        seen.add(node.name)
        taken.add(node.name)
    return replace(student, model=model)


def fresh(name: str, taken: set[str]) -> str:
    """The name, or the first with a number behind it that is not taken."""
    number, found = 1, name
    while found in taken:
        number += 1
        found = f"{name}.{number}"
    return found


def renamed(node: Any, names: Mapping[str, str]) -> Any:
    """A copy of a node in which values have other names, in its subgraphs too; the node itself where none occurs."""
    if not _mentions(node, names):
        return node
    copy = copied(node)
    _rename(copy, names)
    return copy


def _mentions(node: Any, names: Mapping[str, str]) -> bool:
    if any(name in names for name in node.input) or any(name in names for name in node.output):
        return True
    return any(
        any(_mentions(inner, names) for inner in graph.node) or any(v.name in names for v in graph.output)
        for graph in subgraphs(node)
    )


def _rename(node: Any, names: Mapping[str, str]) -> None:
    for index, name in enumerate(node.input):
        if name in names:
            node.input[index] = names[name]
    for index, name in enumerate(node.output):
        if name in names:
            node.output[index] = names[name]
    for graph in subgraphs(node):
        for inner in graph.node:
            _rename(inner, names)
        for value in (*graph.output, *graph.value_info):
            value.name = names.get(value.name, value.name)
