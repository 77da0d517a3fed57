"""Small models to damage: a product in ONNX's text form, and the pieces that damage it."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

SIGNATURE = "(float[1,4,32] x) => (float[1,4,32] y)"
MICROSOFT = "com.microsoft"


def written(body: str, signature: str = SIGNATURE, opset: int = 18, **arrays: Any) -> ModelProto:
    """A model in ONNX's text form with these initialisers (arrays, or tensors as they are)."""
    text = f'<ir_version: 10, opset_import: ["" : {opset}, "{MICROSOFT}" : 1]> bad {signature} {{ {body} }}'
    model: ModelProto = onnx.parser.parse_model(text)
    for name, array in arrays.items():
        tensor = array if isinstance(array, TensorProto) else numpy_helper.from_array(np.asarray(array), name)
        tensor.name = name
        model.graph.initializer.append(tensor)
    return model


def weight(*shape: int) -> Any:
    """Values around 0."""
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def product() -> ModelProto:
    """y = x w with w [32, 32]."""
    return written("y = MatMul(x, w)", w=weight(32, 32))


def external(location: str = "w.bin", offset: Any = 0, length: Any = 4096) -> ModelProto:
    """The product with its weight, 4096 bytes, outside the file."""
    model = product()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))
    return model


def of_nodes(nodes: Sequence[NodeProto], **arrays: Any) -> ModelProto:
    """A model of these nodes with input x, output y."""
    model = written("y = Identity(x)", **arrays)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def chain(length: int, operator: str = "Add") -> ModelProto:
    """`length` nodes, each reading the one before."""
    names = ["x", *(f"v{i}" for i in range(1, length)), "y"]
    again = operator == "Add"
    return of_nodes([helper.make_node(operator, [a] * (1 + again), [b]) for a, b in itertools.pairwise(names)])


def nested(depth: int, data: bytes | None = None) -> bytes:
    """A file with `depth` If nodes inside one another, written byte by byte: no parser makes it."""
    inner = data if data is not None else GraphProto(name="g").SerializeToString()
    for _ in range(depth):
        attribute = field(1, b"then_branch") + field(6, inner) + b"\xa0\x01\x05"
        node = field(1, b"c") + field(2, b"y") + field(4, b"If") + field(5, attribute)
        inner = field(2, b"g") + field(1, node)
    return field(7, inner) + b"\x08\x0a" + field(8, b"\x10\x12")


def field(number: int, data: bytes) -> bytes:
    """A length-delimited field of a protocol buffer."""
    return varint(number << 3 | 2) + varint(len(data)) + data


def varint(value: int) -> bytes:
    out = bytearray()
    while True:
        out.append(value & 127 | (128 if value > 127 else 0))
        value >>= 7
        if not value:
            return bytes(out)


def functions(calls: dict[str, list[str]]) -> ModelProto:
    """Model-local functions f: x -> y that call others in a row; the graph calls the first one."""
    model = of_nodes([helper.make_node(next(iter(calls)), ["x"], ["y"], domain="own")])
    model.opset_import.append(helper.make_opsetid("own", 1))
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    for name, callees in calls.items():
        names = ["x", *(f"v{i}" for i in range(1, len(callees))), "y"]
        pairs = itertools.pairwise(names)
        nodes = [
            helper.make_node(callee, [a], [b], domain="own" if callee in calls else "")
            for callee, (a, b) in zip(callees, pairs, strict=True)
        ]
        model.functions.append(helper.make_function("own", name, ["x"], ["y"], nodes, opsets))
    return model


def loop(trips: int | None, condition: bool = True) -> ModelProto:
    """A Loop that adds x to itself; `trips` None leaves the count away."""
    body = onnx.parser.parse_graph(
        "body (int64 i, bool c, float[1,4,32] v) => (bool d, float[1,4,32] w) { d = Identity(c) w = Add(v, v) }"
    )
    arrays = {"go": np.asarray(condition)} | ({} if trips is None else {"m": np.asarray(trips)})
    node = helper.make_node("Loop", ["" if trips is None else "m", "go", "x"], ["y"], body=body)
    return of_nodes([node], **arrays)


def scan(length: int) -> ModelProto:
    """A Scan over `length` rows."""
    body = onnx.parser.parse_graph("body (float s, float r) => (float t, float o) { t = Add(s, r) o = Identity(t) }")
    model = written("y = Identity(x)", f"(float[{length}] x) => (float[{length}] y)", start=np.float32(0))
    del model.graph.node[:]
    model.graph.node.append(helper.make_node("Scan", ["start", "x"], ["last", "y"], body=body, num_scan_inputs=1))
    return model


def nbits(k: int = 32, n: int = 32, block: int = 32, **changed: Any) -> ModelProto:
    """y = x w with w [k, n] in blocks of 4 bits; `changed` replaces initialisers b, s, z."""
    blocks = max(1, -(-k // max(block, 1)))
    arrays = {
        "b": np.full((n, blocks, max(block, 2) // 2), 0x88, np.uint8), "s": np.ones(n * blocks, np.float32),
        "z": np.full((n, (blocks + 1) // 2), 0x88, np.uint8),
    } | changed  # fmt: skip
    node = helper.make_node(
        "MatMulNBits", ["x", "b", "s", "z"], ["y"], domain=MICROSOFT, K=k, N=n, bits=4, block_size=block
    )
    return of_nodes([node], **arrays)


def dequantised(scale: Any, zero: Any = None, data: Any = None, opset: int = 21, **attributes: int) -> ModelProto:
    """y = x (DequantizeLinear(q)), q [32, 32] int8."""
    arrays = {"q": np.ones((32, 32), np.int8) if data is None else data, "s": scale}
    arrays |= {} if zero is None else {"z": zero}
    text = ", ".join(f"{key}={value}" for key, value in attributes.items())
    return written(f"w = DequantizeLinear<{text or 'axis=1'}>(q, s{', z' if zero is not None else ''}) "
                   "y = MatMul(x, w)", opset=opset, **arrays)  # fmt: skip


def save(model: ModelProto | bytes, folder: Path) -> Path:
    """Writes bad.onnx."""
    path = folder / "bad.onnx"
    path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    return path
