"""Open dimensions that only one value fits: the width and number of heads of a cache, from the nodes that read it."""

from collections.abc import Iterable, Mapping
from typing import Any

from firsttoken_compiler.errors import StudentError
from firsttoken_compiler.frontend.bind import bound, symbols
from firsttoken_compiler.frontend.infer import Types
from firsttoken_compiler.frontend.inline import inline
from firsttoken_compiler.frontend.onnx_file import OnnxStudent
from firsttoken_compiler.frontend.specialise import Walk


def implied_dims(student: OnnxStudent, bindings: Mapping[str, int], wanted: Iterable[str]) -> dict[str, int]:
    """Values of those open dimensions that the graph decides, given the others."""
    walk = Walk(bound(inline(student), bindings))
    try:
        walk.result()
    except StudentError:  # said again, and better, when everything is bound
        return {}
    readers: dict[str, list[Any]] = {}
    for node in student.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found: dict[str, int] = {}
    open_dims = symbols(student)
    for name in wanted:
        for value, axis, rank in open_dims[name].places:
            sizes = [
                size for node in readers.get(value, ()) if (size := _extent(node, value, axis, rank, walk.types))
            ]  # fmt: skip
            if sizes:
                found[name] = sizes[0]
                break
    return found


def _extent(node: Any, value: str, axis: int, rank: int, types: Types) -> int | None:
    """What a reader of an input says about one of its axes; None where it says nothing."""
    if node.op_type == "Concat":
        along = next((a.i for a in node.attribute if a.name == "axis"), 0) % rank
        if axis == along:
            return None
        others = [_known_extent(types, other, axis, rank) for other in node.input if other != value]
        return next((extent for extent in others if extent), None)
    if node.op_type == "GroupQueryAttention" and rank == 4:
        numbers = {a.name: a.i for a in node.attribute}
        heads, kv = numbers.get("num_heads", 0), numbers.get("kv_num_heads", 0)
        if axis == 1:
            return kv or None
        packed = len(node.input) < 2 or not node.input[1]
        width = _known_extent(types, node.input[0], 2, 3)
        parts = heads + 2 * kv if packed else heads
        return width // parts if axis == 3 and width and parts else None
    if node.op_type == "MultiHeadAttention" and rank == 4:
        heads = next((a.i for a in node.attribute if a.name == "num_heads"), 0)
        width = _known_extent(types, node.input[0], 2, 3)
        return heads or None if axis == 1 else width // heads if axis == 3 and width and heads else None
    return None


def _known_extent(types: Types, name: str, axis: int, rank: int) -> int | None:
    kind = types.kind(name)
    if kind is None or kind[1] is None or len(kind[1]) != rank:
        return None
    return kind[1][axis]
