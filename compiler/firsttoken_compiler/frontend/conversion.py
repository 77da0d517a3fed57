"""What converters share: each has the signature (block builder, inputs, attributes, parameters) of TVM's."""

from collections.abc import Callable
from typing import Any

from firsttoken_compiler.errors import StudentError

Converter = Callable[[Any, Any, dict[str, Any], Any], Any]


def node_name(attrs: dict[str, Any]) -> str:
    """Name of the node that is being converted."""
    return str(attrs["tvm_custom"]["name"])


def refused(attrs: dict[str, Any], why: str) -> StudentError:
    """The error for a node that a converter does not take, which then runs on the host for that reason."""
    return StudentError(f"node {node_name(attrs)}: {why}")


def given(inputs: Any, index: int) -> Any | None:
    """An input, or None where the node does not have it."""
    return inputs[index] if index < len(inputs) else None
