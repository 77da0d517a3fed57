"""Which ONNX nodes the NPU runs and which the host: tried, not guessed.

The graph is imported and canonicalised; the nodes that no converter reads and no rule covers are left to the host as
segments; what remains is tried again until nothing more is left over.
"""

from collections.abc import Callable
from dataclasses import replace

from firsttoken_compiler.errors import StudentError
from firsttoken_compiler.frontend.blocks import refuse_left
from firsttoken_compiler.frontend.importer import Imported, import_onnx, unsupported_message
from firsttoken_compiler.frontend.masks import without_masks
from firsttoken_compiler.frontend.onnx_file import OnnxStudent
from firsttoken_compiler.frontend.partition import extract
from firsttoken_compiler.passes.canonicalise import Canonical, Canonicalise

Done = Callable[[str, object], None]


def split(
    student: OnnxStudent, fallback: bool, done: Done = lambda _name, _made: None, pairs: frozenset[str] | None = None
) -> tuple[Imported, Canonical]:
    """The graph as it is imported at last, with its segments, and its canonical form.

    `done` hears of the passes `import` and `canonicalise`. Without `fallback` a StudentError lists what is left over.
    `pairs`: types that the target multiplies.
    """
    reasons: dict[str, str] = {}
    while True:
        staged, segments = extract(without_masks(student, reasons), reasons)
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
