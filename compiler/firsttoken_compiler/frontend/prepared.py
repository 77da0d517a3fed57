"""Nodes whose integer logic was spelled out for the NPU: their domain, and the way back to what onnxruntime knows."""

from collections.abc import Iterable
from typing import Any, Final

from firsttoken_compiler.frontend.values import copied

DOMAIN: Final = "firsttoken.prepared"
"""Domain of prepared nodes."""
SOURCE: Final = "com.microsoft"
"""Domain of what they were made of."""
INPUTS: Final = 16
"""More inputs than any of these operators has; those that were added follow."""


def restored(nodes: Iterable[Any]) -> list[Any]:
    """The nodes as onnxruntime knows them, without the inputs that were added."""
    found = []
    for node in nodes:
        if node.domain == DOMAIN:
            copy = copied(node)
            copy.domain = SOURCE
            del copy.input[INPUTS:]
            while copy.input and not copy.input[-1]:
                del copy.input[-1]
            node = copy
        found.append(node)
    return found
