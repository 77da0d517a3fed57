"""Tensors of an ONNX file: types, shapes, and data that is exactly as long as both say; nothing large is read."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

import numpy as np

from firsttoken_compiler.errors import StudentError
from firsttoken_compiler.frontend.check_graph import bodies, label, shown, subgraphs

MAX_TENSOR_BYTES: Final = 16 << 30
MAX_RANK: Final = 8
STRING: Final = 8
TYPED: Final = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")
_BITS: Final = {
    1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64, 15: 128, 16: 16, 17: 8,
    18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4, 24: 8, 25: 2, 26: 2,
}  # fmt: skip
"""Bits of an element, by TensorProto.DataType."""
NUMBERS: Final = frozenset(_BITS)
"""Element types that are numbers."""
_FIELD: Final = {
    1: "float_data", 14: "float_data", 7: "int64_data", 11: "double_data", 15: "double_data", 12: "uint64_data",
    13: "uint64_data",
}  # fmt: skip
"""The typed field of an element type; int32_data for the rest."""
_RANGE: Final = {
    2: (0, 255), 3: (-128, 127), 4: (0, 65535), 5: (-32768, 32767), 9: (0, 1), 10: (0, 65535), 16: (0, 65535),
}  # fmt: skip
"""What an entry of int32_data may be for an element type; a byte for packed types and those of 8 bits."""


@dataclass(frozen=True, slots=True)
class External:
    """Where data lies outside the file."""

    location: str
    offset: int
    length: int | None


def stored_bytes(onnx_type: int, elements: int) -> int:
    """Bytes of that many elements; elements below 8 bits share bytes, the last of which may be part empty."""
    return (elements * _BITS[onnx_type] + 7) // 8


def tensors(model: Any) -> Iterator[tuple[str, Any]]:
    """Every dense tensor of the file with what messages call it."""
    for body in bodies(model):
        yield from _tensors(body)


def inner_tensors(model: Any) -> Iterator[tuple[str, Any]]:
    """The same without the initialisers of the graph itself."""
    return islice(tensors(model), len(model.graph.initializer), None)


def _tensors(body: Any) -> Iterator[tuple[str, Any]]:
    for tensor in getattr(body, "initializer", ()):
        yield f"weight {shown(tensor.name)[1:-1]}", tensor
    for node in body.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield f"attribute {shown(attribute.name)} of node {label(node)}", attribute.t
            for tensor in attribute.tensors:
                yield f"attribute {shown(attribute.name)} of node {label(node)}", tensor
            if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
                raise StudentError(f"node {label(node)} holds a sparse tensor: store it as a dense one")
        for graph in subgraphs(node):
            yield from _tensors(graph)


def check_tensors(model: Any, name: str) -> None:
    """Raises StudentError for a tensor whose type, shape and data contradict one another."""
    for where, tensor in tensors(model):
        check_tensor(tensor, name, where)


def check_tensor(tensor: Any, name: str, where: str) -> None:
    """See `check_tensors`. External data is not looked for here."""
    shape = [int(extent) for extent in tensor.dims]
    if tensor.data_type == STRING:
        raise StudentError(f"{name}: {where} holds strings: only numbers can be computed with; remove text processing")
    if tensor.data_type not in _BITS:
        raise StudentError(f"{name}: {where} has the unknown ONNX element type {tensor.data_type}: export again")
    elements = math.prod(shape)
    if any(extent < 0 for extent in shape) or len(shape) > MAX_RANK or elements * 4 > MAX_TENSOR_BYTES:
        text = f"[{', '.join(map(str, shape[: MAX_RANK + 1]))}{', ...' if len(shape) > MAX_RANK + 1 else ''}]"
        raise StudentError(
            f"{name}: {where} declares shape {text}; limits are {MAX_RANK} dimensions of 0 or more elements, "
            f"{MAX_TENSOR_BYTES} bytes in all"
        )
    if tensor.HasField("segment"):
        raise StudentError(f"{name}: {where} is one segment of a tensor: store the tensor whole")
    given = [field for field in TYPED if len(getattr(tensor, field))] + ["raw_data"] * tensor.HasField("raw_data")
    external = external_of(tensor, name, where)
    if (external is not None and given) or len(given) > 1:
        also = ["external data"] * (external is not None)
        raise StudentError(
            f"{name}: {where} of shape {shape} has data in {' and '.join([*given, *also])}: one of them must go"
        )
    if external is None:
        _check_data(tensor, given[0] if given else "", name, f"{where} of shape {shape}, type {tensor.data_type},")


def _check_data(tensor: Any, field: str, name: str, where: str) -> None:
    kind, elements = tensor.data_type, math.prod(tensor.dims)
    if field == "raw_data" or (not field and not elements):
        found, needed, unit = len(tensor.raw_data), stored_bytes(kind, elements), "bytes"
    else:
        expected = _FIELD.get(kind, "int32_data")
        if field not in ("", expected):
            raise StudentError(f"{name}: {where} has its data in {field}, which is not for this type: export again")
        found, unit = len(getattr(tensor, expected)), "entries"
        needed = stored_bytes(kind, elements) if _BITS[kind] < 8 else elements * (1 + (kind in (14, 15)))
    if found != needed:
        raise StudentError(f"{name}: {where} does not fit its data: {found} {unit}, needed are {needed}: export again")
    if field == "int32_data" and kind != 6:
        entries = np.asarray(tensor.int32_data, np.int64)
        low, high = _RANGE.get(kind, (-128, 255))
        if int(entries.min()) < low or int(entries.max()) > high:
            raise StudentError(
                f"{name}: {where} has entries from {entries.min()} to {entries.max()}, its type has {low} to {high}"
            )


def external_of(tensor: Any, name: str, where: str) -> External | None:
    """Where the data lies if not in the file; raises StudentError when that is malformed."""
    if tensor.data_location != tensor.EXTERNAL:
        if tensor.external_data:
            raise StudentError(f"{name}: {where} names external data, but says that it has none: export again")
        return None
    entry = {e.key: e.value for e in tensor.external_data}
    try:
        length = _number(entry["length"]) if "length" in entry else None
        return External(_text(entry["location"]), _number(entry.get("offset", "0")), length)
    except (KeyError, ValueError) as error:
        raise StudentError(f"{name}: {where} has malformed external data ({str(error)[:80]})") from error


def _number(text: str) -> int:
    if len(text) > 20:
        raise ValueError(f"{len(text)} digits")
    return int(text)


def _text(text: Any) -> str:
    if not isinstance(text, str):
        raise ValueError("a place that is not UTF-8")
    return text
