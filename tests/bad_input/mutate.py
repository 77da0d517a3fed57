"""Random damage to ONNX models: to their bytes, and to any field of any message in them."""

import random
from collections.abc import Iterator
from typing import Any, Final

from google.protobuf.message import DecodeError
from onnx import ModelProto, TensorProto

INTEGERS: Final = (
    0, 1, 2, 3, 4, 5, 7, 8, 16, 31, 32, 33, 64, 127, 128, 255, 1000, 4096, 65536, 2**31 - 1, 2**31, 2**32, 2**40, 2**62,
    2**63 - 1, -1, -2, -3, -8, -33, -(2**31), -(2**40), -(2**63),
)  # fmt: skip
FLOATS: Final = (0.0, -0.0, 1.0, -1.0, 1e-45, 1e38, -1e38, float("inf"), float("-inf"), float("nan"))
TEXTS: Final = ("", "x", "\x1b[31m", "a\nb", "ai.onnx", "com.microsoft", "../../w.bin", "/etc/passwd", "n" * 2000)
OPERATORS: Final = (
    "Add", "MatMul", "Gather", "Reshape", "Transpose", "Softmax", "Concat", "Slice", "Expand", "Where", "Cast", "Split",
    "ReduceMean", "Pad", "Tile", "Conv", "Gemm", "LayerNormalization", "RMSNormalization", "Attention", "If", "Loop",
    "Scan", "Range", "ConstantOfShape", "Constant", "Identity", "Unsqueeze", "Squeeze", "QuantizeLinear",
    "DequantizeLinear", "MatMulNBits", "GroupQueryAttention", "TopK", "NonZero", "OneHot", "Resize", "CumSum", "Einsum",
    "ScatterND", "GatherND", "Trilu", "RotaryEmbedding", "Dropout", "BatchNormalization", "MaxPool", "Shape", "Size",
)  # fmt: skip
SMALL_ARRAY: Final = 4096
"""Bytes of a tensor up to which its values are damaged too."""


def damaged(data: bytes, chance: random.Random) -> bytes:
    """The file with one to four pieces of damage."""
    for _ in range(chance.choice((1, 1, 1, 2, 3, 4))):
        data = _bytes(data, chance) if chance.random() < 0.2 else _fields(data, chance)
    return data


def _bytes(data: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(data) + 1)
    kind = chance.randrange(6)
    if kind == 0:
        return data[:at]
    if kind == 1 and at < len(data):
        return data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]
    if kind == 2:
        return data[:at] + chance.randbytes(chance.randrange(1, 9)) + data[at:]
    if kind == 3:
        return data[:at] + data[at + chance.randrange(1, 60) :]
    if kind == 4:
        other = chance.randrange(len(data) + 1)
        return data[:at] + data[other : other + chance.randrange(1, 200)] + data[at:]
    return data[:at] + b"\xff" * chance.randrange(1, 12) + data[at + chance.randrange(3) :]


def _fields(data: bytes, chance: random.Random) -> bytes:
    model = ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError:
        return _bytes(data, chance)
    places = list(_places(model, 0))
    if not places:
        return _bytes(data, chance)
    for _ in range(8):
        message, field = chance.choice(places)
        try:
            _change(model, message, field, chance)
            return model.SerializeToString()
        except (ValueError, TypeError, IndexError, OverflowError):  # a value that the field cannot have
            continue
    return data


def _places(message: Any, depth: int) -> Iterator[tuple[Any, Any]]:
    """Every field of every message, set or not; messages that are not there count once."""
    for field in message.DESCRIPTOR.fields:
        yield message, field
        if field.message_type is None or depth > 12:
            continue
        if field.is_repeated:
            for inner in getattr(message, field.name):
                yield from _places(inner, depth + 1)
        elif message.HasField(field.name):
            yield from _places(getattr(message, field.name), depth + 1)


def _change(model: ModelProto, message: Any, field: Any, chance: random.Random) -> None:
    if field.is_repeated:
        _change_list(model, message, field, chance)
    elif field.message_type is not None:
        if message.HasField(field.name) and chance.random() < 0.5:
            message.ClearField(field.name)
        else:
            getattr(message, field.name).SetInParent()
    elif isinstance(message, TensorProto) and field.name == "raw_data" and len(message.raw_data) <= SMALL_ARRAY:
        message.raw_data = _array(message.raw_data, chance)
    elif chance.random() < 0.1:
        message.ClearField(field.name)
    else:
        setattr(message, field.name, _value(model, field, chance))


def _change_list(model: ModelProto, message: Any, field: Any, chance: random.Random) -> None:
    values = getattr(message, field.name)
    kind = chance.randrange(5)
    at = chance.randrange(len(values)) if len(values) else 0
    if kind == 0 and len(values):
        del values[at]
    elif field.message_type is not None:
        if kind == 1 and len(values):
            values.append(values[at])
        elif kind == 2 and len(values) > 1:
            other = chance.randrange(len(values))
            first, second = type(values[at])(), type(values[at])()
            first.CopyFrom(values[at])
            second.CopyFrom(values[other])
            values[at].CopyFrom(second)
            values[other].CopyFrom(first)
        else:
            values.add()
    elif kind == 1 or not len(values):
        values.append(_value(model, field, chance))
    else:
        values[at] = _value(model, field, chance)


def _value(model: ModelProto, field: Any, chance: random.Random) -> Any:
    if field.enum_type is not None:
        return chance.choice([value.number for value in field.enum_type.values])
    if field.cpp_type == field.CPPTYPE_STRING:
        text = _text(model, field, chance)
        return text.encode() if field.type == field.TYPE_BYTES else text
    if field.cpp_type in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):
        return chance.choice(FLOATS)
    if field.name in ("data_type", "elem_type"):
        return chance.randrange(30)
    return chance.choice(INTEGERS)


def _text(model: ModelProto, field: Any, chance: random.Random) -> str:
    if field.name == "op_type":
        return chance.choice(OPERATORS)
    graph = model.graph
    names = [value.name for value in (*graph.input, *graph.output, *graph.initializer)]
    names += [name for node in graph.node for name in (*node.input, *node.output)]
    return chance.choice(names) if names and chance.random() < 0.8 else chance.choice(TEXTS)


def _array(data: bytes, chance: random.Random) -> bytes:
    """Values of a tensor: one of them becomes an extreme one."""
    if len(data) < 8:
        return chance.randbytes(len(data))
    at = chance.randrange(len(data) // 8) * 8
    return data[:at] + (chance.choice(INTEGERS) % 2**64).to_bytes(8, "little") + data[at + 8 :]
