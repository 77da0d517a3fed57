"""ONNX nodes that change nothing: their result is one of their inputs."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from numpy.typing import NDArray

from firsttoken_compiler.frontend.infer import Types

Value = Callable[[str], NDArray[Any] | None]
"""What a value is known to be; None where it is not."""


def unchanged(node: Any, types: Types, value: Value, unread: Callable[[str], bool]) -> str | None:
    """The input that the only result read equals in every element, type and shape; None where it may not."""
    rule = None if node.domain or not node.input else _RULES.get(node.op_type)
    if rule is None or any(not unread(name) for name in node.output[1:] if name):
        return None
    source = rule(node, types, value)
    if not source:
        return None
    if node.op_type == "Identity":
        return source
    result, shape = node.output[0], types.shape(node.output[0])
    same = shape is not None and shape == types.shape(source) and types.elem(result) == types.elem(source)
    return source if same else None


def _first(node: Any, _types: Types, _value: Value) -> str | None:
    """Equal where types and shapes are."""
    return str(node.input[0])


def _single(node: Any, _types: Types, _value: Value) -> str | None:
    """Of one operand."""
    return str(node.input[0]) if len(node.input) == 1 else None


def _dropout(node: Any, _types: Types, value: Value) -> str | None:
    training = value(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    still = len(node.input) < 3 or not node.input[2] or (training is not None and not training.any())
    return str(node.input[0]) if still else None


def _concat(node: Any, types: Types, _value: Value) -> str | None:
    full = [name for name in node.input if 0 not in (types.shape(name) or (1,))]
    return full[0] if len(full) == 1 else None


def _slice(node: Any, _types: Types, value: Value) -> str | None:
    steps = value(node.input[4]) if len(node.input) > 4 and node.input[4] else None
    forward = len(node.input) < 5 or not node.input[4] or (steps is not None and bool((steps > 0).all()))
    return str(node.input[0]) if forward else None


def _transpose(node: Any, _types: Types, _value: Value) -> str | None:
    order = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
    return str(node.input[0]) if order is not None and order == sorted(order) else None


def _where(node: Any, _types: Types, value: Value) -> str | None:
    condition = value(node.input[0])
    if condition is None or not condition.size or condition.min() != condition.max():
        return None
    return str(node.input[1] if condition.reshape(-1)[0] else node.input[2])


_RULES: Final[Mapping[str, Callable[[Any, Types, Value], str | None]]] = {
    "Cast": _first, "CastLike": _first, "Concat": _concat, "Dropout": _dropout, "Expand": _first, "Identity": _first,
    "Max": _single, "Mean": _single, "Min": _single, "Reshape": _first, "Slice": _slice, "Sum": _single,
    "Tile": _first, "Transpose": _transpose, "Where": _where,
}  # fmt: skip
