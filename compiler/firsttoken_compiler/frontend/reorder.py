"""Rows of weights in another order: Reshape, Transpose, Reshape of an initialiser outside the file become its order.

That is how a graph undoes the order in which llama.cpp keeps the rows of queries and keys. The weight stays in its
file, and whoever reads it gets the rows in the graph's order.
"""

from collections import Counter
from dataclasses import replace
from typing import Any

from firsttoken_compiler.frontend.onnx_file import Initializer, OnnxStudent, with_nodes
from firsttoken_compiler.frontend.values import copied, read_names


def in_order(student: OnnxStudent) -> OnnxStudent:
    """The student without such chains of nodes; itself if there is none."""
    readers = Counter(name for node in student.graph.node for name in read_names(node))
    readers.update(value.name for value in student.graph.output)
    by_input = {node.input[0]: node for node in student.graph.node if node.input and not node.domain}
    entries: dict[str, Initializer] = {}
    gone: set[str] = set()
    same: dict[str, str] = {}
    for name, entry in student.initializers.items():
        chain = _chain(name, by_input, readers) if entry.external is not None and entry.shape else []
        order = _order(student, entry, chain) if len(chain) == 3 else None
        if order is not None:
            entries[name] = replace(entry, order=order)
            gone.update(node.output[0] for node in chain)
            same[chain[-1].output[0]] = name
    if not entries:
        return student
    nodes = [node for node in student.graph.node if not node.output or node.output[0] not in gone]
    moved = with_nodes(student, [_renamed(node, same) for node in nodes])
    return replace(moved, initializers={**student.initializers, **entries})


def _chain(name: str, by_input: dict[str, Any], readers: Counter[str]) -> list[Any]:
    """Reshape, Transpose, Reshape from a value on, each the only one that reads what it reads."""
    found: list[Any] = []
    for op_type in ("Reshape", "Transpose", "Reshape"):
        node = by_input.get(name)
        if node is None or node.op_type != op_type or readers[name] != 1 or len(node.output) != 1:
            return []
        found.append(node)
        name = node.output[0]
    return found


def _order(student: OnnxStudent, entry: Initializer, chain: list[Any]) -> tuple[int, int, int] | None:
    """What the chain does, if it turns two axes of rows [a, b, c] and leaves the shape as it was."""
    apart, together = (_numbers(student, node) for node in (chain[0], chain[2]))
    perm = next((list(a.ints) for a in chain[1].attribute if a.name == "perm"), [])
    if apart is None or together != entry.shape or perm != [0, 2, 1, *range(3, len(perm))]:
        return None
    rows = apart[:3]
    fits = len(rows) == 3 and rows[0] * rows[1] * rows[2] == entry.shape[0] and min(rows) > 0
    return (rows[0], rows[1], rows[2]) if fits and apart[3:] == entry.shape[1:] and len(perm) == len(apart) else None


def _numbers(student: OnnxStudent, node: Any) -> tuple[int, ...] | None:
    """The constant shape that a Reshape asks for."""
    entry = student.initializers.get(node.input[1]) if len(node.input) == 2 else None
    if entry is None or entry.external is not None or entry.onnx_type != 7 or entry.elements > 8:
        return None
    return tuple(int(value) for value in student.array(entry.name).reshape(-1))


def _renamed(node: Any, same: dict[str, str]) -> Any:
    if not any(name in same for name in node.input):
        return node
    copy = copied(node)
    for index, name in enumerate(node.input):
        copy.input[index] = same.get(name, name)
    return copy
