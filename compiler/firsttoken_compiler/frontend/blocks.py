"""`DequantizeBlocks` of the domain "firsttoken": weights in blocks as GGUF files have them, which only the NPU reads.

Its input is an initialiser uint8 `[n, bytes of a row]`, its attributes `type`, a key of `formats.types.BLOCK_TYPES`,
and `k`, the weights of a row; it makes float32 `[n, k]`. No runtime knows it, so it is never left to the host.
"""

from collections.abc import Mapping
from typing import Any, Final

from firsttoken_compiler.errors import StudentError
from firsttoken_compiler.formats.types import BLOCK_TYPES
from firsttoken_compiler.frontend.check_graph import all_nodes, bodies, label, shown

DOMAIN: Final = "firsttoken"
OPERATOR: Final = "DequantizeBlocks"
UINT8: Final = 2


def is_blocks(node: Any) -> bool:
    """Whether a node makes floats of blocks."""
    return bool(node.domain == DOMAIN and node.op_type == OPERATOR)


def check_blocks(student: Any) -> None:
    """Raises StudentError for such a node whose type is unknown, or whose input is no initialiser that fits it."""
    inner = [node for body in bodies(student.model) for node in all_nodes(body.node) if is_blocks(node)]
    top = [node for node in student.graph.node if is_blocks(node)]
    if len(inner) > len(top):
        raise StudentError(
            f"{student.name}: node {label(next(node for node in inner if node not in top))} ({OPERATOR}) is inside a "
            "subgraph or a function: blocks are read by the graph itself"
        )
    made = {name for node in student.graph.node for name in node.output}
    sources = {n.output[0]: n.input[0] for n in student.graph.node if n.op_type in MOVES and n.input and n.output}
    for node in top:
        _check(student, node, sources, made)


MOVES: Final = ("Identity", "Reshape", "Transpose")
"""What may stand between an initialiser and the node: rows in another order."""


def _check(student: Any, node: Any, sources: Mapping[str, str], made: set[str]) -> None:
    where = f"{student.name}: node {label(node)} ({OPERATOR})"
    attributes = {a.name: (a.s.decode("utf-8", "replace"), a.i) for a in node.attribute}
    kind, (_, k) = attributes.get("type", ("", 0))[0], attributes.get("k", ("", 0))
    if kind not in BLOCK_TYPES:
        raise StudentError(f"{where} has type {shown(kind)}, known are {', '.join(BLOCK_TYPES)}")
    blocks = BLOCK_TYPES[kind]
    if k < 1 or k % blocks.block:
        raise StudentError(f"{where} has k {k}, rows of {kind} hold a multiple of {blocks.block} weights")
    if len(node.input) != 1 or len(node.output) != 1:
        raise StudentError(f"{where} has {len(node.input)} inputs and {len(node.output)} results, it takes one of each")
    name = node.input[0]
    for _ in range(len(MOVES) + 1):
        name = sources.get(name, name)
    entry = student.initializers.get(name)
    if entry is None or entry.onnx_type != UINT8 or name in made:
        raise StudentError(f"{where} reads {shown(node.input[0])}: blocks are an initialiser of uint8")
    wanted = (entry.shape[0] if entry.shape else 0, blocks.row_bytes(k))
    if entry.shape != wanted or not entry.shape[0]:
        raise StudentError(
            f"{where} reads {shown(name)} of shape {list(entry.shape)}, rows of {k} weights in {kind} are "
            f"[n, {blocks.row_bytes(k)}]: export the model again"
        )


def refuse_left(student: Any, left: Mapping[str, str]) -> None:
    """Raises StudentError where nodes that are left to the host make, or read, floats out of blocks."""
    for node in student.graph.node:
        if not is_blocks(node) or node.name not in left:
            continue
        reader = _reader(student, node, left)
        raise StudentError(
            f"{student.name}: the blocks of node {label(node)} go to {reader.op_type} {label(reader)}, and the NPU "
            f"reads blocks in products and in gathers of rows ({left.get(reader.name, left[node.name])}): store that "
            "weight as a float, or change the graph"
        )


def _reader(student: Any, node: Any, left: Mapping[str, str]) -> Any:
    """The node behind one, transpositions and the like passed over, that is at fault: one that is left too, or another.

    Where every node behind it may read blocks, the node itself.
    """
    values, others = set(node.output), []
    for other in student.graph.node:
        if values.intersection(other.input):
            if other.name in left:
                return other
            if other.op_type in MOVES:
                values.update(other.output)
            elif other.op_type not in ("MatMul", "Gather"):
                others.append(other)
    return others[0] if others else node
