"""Which ONNX nodes the NPU runs and which the host: tried, not guessed.

The graph is imported and canonicalised; the nodes that no converter reads and no rule covers are left to the host as
segments; what remains is tried again until nothing more is left over. What was asked of the host is a segment from the
first attempt on.
"""

from collections.abc import Callable
from dataclasses import replace

from firsttoken_compiler.errors import StudentError
from firsttoken_compiler.frontend.blocks import is_blocks, refuse_left
from firsttoken_compiler.frontend.check_graph import label
from firsttoken_compiler.frontend.importer import Imported, import_onnx, unsupported_message
from firsttoken_compiler.frontend.masks import without_masks
from firsttoken_compiler.frontend.onnx_file import OnnxStudent
from firsttoken_compiler.frontend.partition import Placed, extract
from firsttoken_compiler.passes.canonicalise import Canonical, Canonicalise
from firsttoken_compiler.passes.roles import nodes_of

Done = Callable[[str, object], None]


def split(
    student: OnnxStudent, fallback: bool, done: Done = lambda _name, _made: None, pairs: frozenset[str] | None = None,
    host_roles: tuple[str, ...] = (), host_weight_bits: float = 32,
) -> tuple[Imported, Canonical]:  # fmt: skip
    """The graph as it is imported at last, with its segments, and its canonical form.

    `done` hears of the passes `import` and `canonicalise`. Without `fallback` a StudentError lists what is left over.
    `pairs`: types that the target multiplies. `host_roles`: what the host computes in any case, with weights of
    `host_weight_bits` there.
    """
    placed = Placed(_asked(student, host_roles), host_weight_bits)
    reasons = dict(placed.nodes)
    while True:
        staged, segments = extract(without_masks(student, reasons), reasons, placed)
        imported = replace(import_onnx(staged, segments), pairs=pairs)
        canonical = Canonicalise().attempt(imported)
        own = {segment.name for segment in segments}
        left = {node: reason for node, reason in canonical.left.items() if node not in own}
        refuse_left(student, left)
        if left and not fallback:
            raise StudentError(unsupported_message(student, left))
        if not left:
            if canonical.left:
                raise StudentError(unsupported_message(staged, canonical.left))
            done("import", imported.module)
            done("canonicalise", canonical.module)
            return imported, canonical
        reasons |= left


def _asked(student: OnnxStudent, roles: tuple[str, ...]) -> dict[str, str]:
    """ONNX nodes of these roles, each with the reason why it is the host's; raises StudentError for blocks."""
    if not roles:
        return {}
    nodes = nodes_of(Canonicalise().attempt(import_onnx(student)), roles)
    blocks = next((node for node in student.graph.node if node.name in nodes and is_blocks(node)), None)
    if blocks is not None:
        role = nodes[blocks.name]
        raise StudentError(
            f"{student.name}: --host-roles {role}: weights of node {label(blocks)} are blocks, which the host does not "
            f"read: leave {role} out, or take a student that stores that weight as floats"
        )
    return {node: f"asked for by --host-roles {role}" for node, role in nodes.items()}
