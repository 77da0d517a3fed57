"""Every way known to us in which an ONNX file can be bad: what makes it, and what must be said about it."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import making as m
import numpy as np
from onnx import ModelProto, StringStringEntryProto, TensorProto, helper

Maker = Callable[[Path], ModelProto | bytes]


@dataclass(frozen=True)
class Case:
    """A bad file. `message` is part of what the one error says."""

    name: str
    message: str
    make: Maker
    file: str = "bad.onnx"

    def write(self, folder: Path) -> Path:
        """Writes the file, and what it refers to, into the folder."""
        return m.save(self.make(folder), folder).rename(folder / self.file)


CASES: list[Case] = []


def case(name: str, message: str, make: Callable[[], ModelProto | bytes]) -> None:
    CASES.append(Case(name, message, lambda _folder: make()))


def with_files(name: str, message: str, make: Maker) -> None:
    """`make` also writes what the model refers to into the folder."""
    CASES.append(Case(name, message, make))


def damage(name: str, message: str, change: Callable[[ModelProto], Any]) -> None:
    """The product after a change."""

    def make(_folder: Path) -> ModelProto:
        model = m.product()
        change(model)
        return model

    CASES.append(Case(name, message, make))


def _files() -> None:
    whole = m.product().SerializeToString()
    case("empty file", "0 bytes", lambda: b"")
    case("truncated by one byte", "not a readable ONNX file", lambda: whole[:-1])
    case("truncated in the weights", "not a readable ONNX file", lambda: whole[: len(whole) // 2])
    case("zip archive", "not a readable ONNX file", lambda: b"PK\x03\x04" + bytes(200))
    case("text", "not a readable ONNX file", lambda: b"This is not a model.\n" * 50)
    case("zeros", "not a readable ONNX file", lambda: bytes(4096))
    case(
        "a field that claims 2^60 bytes",
        "not a readable ONNX file",
        lambda: b"\x3a\x80\x80\x80\x80\x80\x80\x80\x80\x10",
    )
    case("no graph", "holds no graph", lambda: ModelProto(ir_version=10))
    case("20,000 nested subgraphs", "not a readable ONNX file", lambda: m.nested(20_000))
    case("30 nested subgraphs", "nested more than 16 deep", lambda: m.nested(30))
    damage("IR version 99", "IR version 99", lambda x: setattr(x, "ir_version", 99))
    case("a name that is not UTF-8", "not UTF-8", lambda: whole.replace(b"MatMul", b"Mat\xff\xfel"))
    for opset in (0, 1, 99, 2**40):
        damage(f"opset {opset}", f"ONNX opset {opset}", lambda x, o=opset: setattr(x.opset_import[0], "version", o))
    damage("no opset", "ONNX opset none", lambda x: x.ClearField("opset_import"))
    damage("two opsets", "opset 18 and 23", lambda x: x.opset_import.add(domain="ai.onnx", version=23))
    case("3,000,000 empty nodes", "over 1000000 fields", lambda: b"\x08\x0a" + m.field(7, b"\x0a\x00" * 3_000_000))


def _graphs() -> None:
    for name, body, message in (
        ("cycle of two nodes", "a = Add(b, x) b = Add(a, x) y = Add(b, b)", "reads 'b', which no earlier node"),
        ("node that reads itself", "y = Add(y, x)", "reads 'y', which no earlier node"),
        ("missing initialiser", "y = MatMul(x, w)", "reads 'w', which no earlier node"),
        ("value made twice", "a = Add(x, x) a = Mul(x, x) y = Add(a, a)", "makes 'a', which is made before it"),
        ("input made again", "x = Add(x, x) y = Add(x, x)", "makes 'x', which is made before it"),
        ("dangling output", "a = Add(x, x)", "graph output 'y' is made by no node"),
        ("too few inputs", "y = Add(x)", "has input size 1 not in range"),
        ("unknown attribute", "y = Add<bogus=1>(x, x)", "Unrecognized attribute: bogus"),
        ("absent attribute", "y = Concat(x, x)", "Required attribute 'axis' is missing"),
        ("unknown operator", "y = Frobnicate(x)", "operator Frobnicate of node 'Frobnicate#0' is unknown"),
        ("operator of a later opset", "y = Swish(x)", "operator Swish of node 'Swish#0' is unknown to ONNX opset 18"),
        ("unknown operator of a known domain", "y = com.microsoft.Frobnicate(x)", "com.microsoft::Frobnicate"),
    ):
        case(name, message, lambda b=body: m.written(b))
    damage("unknown domain", "evil::MatMul", lambda x: setattr(x.graph.node[0], "domain", "evil"))
    damage("duplicate outputs", "two graph outputs are named 'y'", lambda x: x.graph.output.append(x.graph.output[0]))
    damage("duplicate inputs", "two graph inputs are named 'x'", lambda x: x.graph.input.append(x.graph.input[0]))
    damage(
        "duplicate initialisers", "initialisers are named", lambda x: x.graph.initializer.append(x.graph.initializer[0])
    )
    damage("node without outputs", "has no output", lambda x: x.graph.node.add(op_type="Add", input=["x", "x"]))
    case("100,000 nodes in a chain", "100000 nodes, the limit is 50000", lambda: m.chain(100_000))
    damage("sparse initialiser", "is sparse", lambda x: x.graph.sparse_initializer.add(dims=[9]))
    for kind in ("sequence", "optional", "map"):
        damage(f"{kind} input", f"input 's' is a {kind}", lambda x, k=kind: _add_input(x, k))
    damage("input without shape", "known rank", lambda x: x.graph.input[0].type.tensor_type.ClearField("shape"))
    damage("input without type", "known rank", lambda x: x.graph.input[0].ClearField("type"))
    damage("string input", "no numbers", lambda x: x.graph.input.append(helper.make_tensor_value_info("s", 8, [2])))
    damage("attribute that refers to a function", "no function around it has", _refer)
    _types()


def _refer(model: ModelProto) -> None:
    model.graph.node[0].attribute.add(name="alpha", type=1, ref_attr_name="alpha")


def _add_input(model: ModelProto, kind: str) -> None:
    value = model.graph.input.add(name="s")
    if kind == "map":
        value.type.map_type.key_type = 7
        value.type.map_type.value_type.tensor_type.elem_type = 1
    else:
        getattr(value.type, f"{kind}_type").elem_type.tensor_type.elem_type = 1


def _types() -> None:
    square = m.weight(32, 32)
    case("shapes that do not multiply", "contradict", lambda: m.written("y = MatMul(x, w)", w=m.weight(31, 32)))
    case("shapes that do not add", "contradict", lambda: m.written("y = Add(x, w)", w=m.weight(5)))
    case("float plus int64", "contradict", lambda: m.written("y = Add(x, w)", w=np.ones(32, np.int64)))
    case("float product with float16", "contradict", lambda: m.written("y = MatMul(x, w)", w=square.astype(np.float16)))
    case(
        "reshape to another size",
        "contradict",
        lambda: m.written("y = Reshape(x, s)", w=square, s=np.array([1, 4, 31])),
    )
    case("output declared otherwise", "contradict", lambda: m.written(
        "y = MatMul(x, w)", "(float[1,4,32] x) => (float[1,4,33] y)", w=square))  # fmt: skip
    case("output of another type", "contradict", lambda: m.written(
        "y = MatMul(x, w)", "(float[1,4,32] x) => (int64[1,4,32] y)", w=square))  # fmt: skip
    case("permutation of another rank", "contradict", lambda: m.written("y = Transpose<perm=[0, 1, 2, 3]>(x)"))
    case("axis out of range", "contradict", lambda: m.written("y = Concat<axis=7>(x, x)"))
    for index in (32, -33, 2**40, -(2**63)):
        case(f"constant Gather index {index}", f"gathers index {index}", lambda i=index: _gather(i))


def _gather(index: int) -> ModelProto:
    signature = "(float[1] x) => (float[1,4] y)"
    return m.written("y = Gather<axis=0>(w, i)", signature, w=m.weight(32, 4), i=np.array([index]))


def _dims() -> None:
    for extent in (2**40, 2**62, -1, -(2**63)):
        damage(f"input of {extent} rows", "declares shape", lambda x, e=extent: _extent(x.graph.input[0], e))
        damage(
            f"weight of {extent} rows",
            "declares shape",
            lambda x, e=extent: x.graph.initializer[0].dims.__setitem__(0, e),
        )
    damage("input of 0 rows", "input 'x'", lambda x: [_extent(value, 0) for value in (*x.graph.input, *x.graph.output)])
    damage("weight of 9 dimensions", "limits are 8 dimensions", lambda x: x.graph.initializer[0].dims.extend([1] * 7))
    damage(
        "weight of 100,000 dimensions",
        "limits are 8 dimensions",
        lambda x: x.graph.initializer[0].dims.extend([1] * 100_000),
    )
    for name, body, arrays in (
        ("ConstantOfShape", "y = ConstantOfShape(s)", {"s": np.array([2**40])}),
        ("ConstantOfShape squared", "y = ConstantOfShape(s)", {"s": np.array([2**31, 2**31])}),
        ("Expand", "y = Expand(one, s)", {"one": np.ones(1, np.float32), "s": np.array([2**40])}),
        ("Tile", "y = Tile(one, s)", {"one": np.ones(1, np.float32), "s": np.array([2**40])}),
        ("Range", "y = Range(a, b, c)", {"a": np.float32(0), "b": np.float32(2**40), "c": np.float32(1)}),
        ("Pad", "y = Pad(one, s)", {"one": np.ones(1, np.float32), "s": np.array([0, 2**40])}),
        ("OneHot", "y = OneHot(i, d, v)", {"i": np.array([3]), "d": np.array(2**40), "v": np.float32([0, 1])}),
        ("Resize", "y = Resize(one, , , s)", {"one": np.ones(1, np.float32), "s": np.array([2**40])}),
    ):
        case(f"constant of 2^40 elements by {name}", "limit", lambda b=body, a=arrays: _bomb(b, a))


def _bomb(body: str, arrays: dict[str, Any]) -> ModelProto:
    body = body.replace("y =", "big =").replace(", , ,", ', "", "",')
    return m.written(f"{body} r = ReduceMax<keepdims=0>(big) y = Add(x, r)", **arrays)


def _extent(value: Any, extent: int) -> None:
    value.type.tensor_type.shape.dim[1].dim_value = extent


def _tensors() -> None:
    for count in (0, 1, 4095, 4097, 8192):
        damage(f"{count} bytes for 4096", "does not fit its data", lambda x, c=count: _raw(x, bytes(c)))
    damage("raw data and typed data", "raw_data", lambda x: x.graph.initializer[0].float_data.append(1.0))
    damage("typed data of another type", "int64_data", _typed)
    damage("too many entries", "does not fit its data", lambda x: _retype(x, 1, float_data=[0.0] * 1025))
    damage(
        "int8 entries beyond a byte", "entries from 0 to 300", lambda x: _retype(x, 3, int32_data=[300] + [0] * 1023)
    )
    for kind in (0, 99):
        damage(
            f"element type {kind}",
            f"element type {kind}",
            lambda x, k=kind: setattr(x.graph.initializer[0], "data_type", k),
        )
    damage("strings", "holds strings", lambda x: _retype(x, 8, string_data=[b"a"] * 1024))
    damage("one segment of a tensor", "segment", lambda x: setattr(x.graph.initializer[0].segment, "end", 3))
    case("33 int4 values in 16 bytes", "does not fit its data: 16 bytes, needed are 17", lambda: m.written(
        "y = Identity(x)", opset=21, w=TensorProto(data_type=22, dims=[33], raw_data=bytes(16))))  # fmt: skip
    case("33 int4 values in 33 bytes", "needed are 17", lambda: m.written(
        "y = Identity(x)", opset=21, w=TensorProto(data_type=22, dims=[33], raw_data=bytes(33))))  # fmt: skip
    case("constant with contradictory data", "attribute 'value' of node", _constant)
    damage("attribute with 5,000,000 numbers", "over 1000000 fields", lambda x: x.graph.node[0].attribute.add(
        name="axes", type=7).ints.extend([1] * 5_000_000))  # fmt: skip


def _raw(model: ModelProto, data: bytes) -> None:
    model.graph.initializer[0].raw_data = data


def _typed(model: ModelProto) -> None:
    _retype(model, 1, int64_data=[0] * 1024)


def _retype(model: ModelProto, kind: int, **data: Any) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_type = kind
    for field, values in data.items():
        getattr(tensor, field).extend(values)


def _constant() -> ModelProto:
    value = TensorProto(data_type=1, dims=[4], raw_data=bytes(12))
    return m.of_nodes(
        [helper.make_node("Constant", [], ["c"], value=value), helper.make_node("Add", ["x", "c"], ["y"])]
    )


def _external() -> None:
    for name, location, message in (
        ("absolute", "/etc/passwd", "outside the model's folder"),
        ("escaping by ..", "../secret.bin", "outside the model's folder"),
        ("escaping after a folder", "a/../../secret.bin", "outside the model's folder"),
        ("the folder itself", ".", "outside the model's folder"),
        ("with NUL", "nul\0byte", "is no file name"),
        ("with 5000 letters", "x" * 5000, "is no file name"),
    ):
        case(f"external data {name}", message, lambda at=location: m.external(at))
    with_files("external data behind a link", "outside the model's folder", _link)
    with_files("external data in a loop of links", "is no file name", _link_loop)
    with_files("external data in a link to a device", "outside the model's folder", _device)
    case("external data is absent", "w.bin, which is not beside the model", m.external)
    for offset, length in ((1, 4096), (-1, 4096), (2**62, 4096), (0, 4095), (0, 2**62), (0, -1), (2**63, 1)):
        with_files(
            f"external range {offset}+{length}", "needs 4096 bytes", lambda f, o=offset, n=length: _range(f, o, n)
        )
    for offset, length in (("x", 1), (0, "many"), ("0x10", 1), ("9" * 5000, 1)):
        with_files(
            f"external range {str(offset)[:8]}+{length}",
            "malformed external data",
            lambda f, o=offset, n=length: _range(f, o, n),
        )
    case("external data of a branch elsewhere", "outside the model's folder", lambda: _inner("/etc/passwd"))
    case("external data of a branch is absent", "not beside the model", lambda: _inner("w.bin"))
    case("external data without a place", "malformed external data", lambda: _no_place())
    case("external data and data", "raw_data and external data", lambda: _both())


def _inner(location: str) -> ModelProto:
    """External data in an initialiser of a branch, and in a Constant."""
    model = _branch("z = Relu(given)", "given")
    branch = next(a.g for a in model.graph.node[0].attribute if a.name == "then_branch")
    tensor = branch.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return model


def _link(folder: Path) -> ModelProto:
    (folder / "w.bin").symlink_to("/etc/passwd")
    return m.external()


def _link_loop(folder: Path) -> ModelProto:
    (folder / "w.bin").symlink_to("w.bin")
    return m.external()


def _device(folder: Path) -> ModelProto:
    os.symlink("/dev/zero", folder / "w.bin")
    return m.external()


def _range(folder: Path, offset: Any, length: Any) -> ModelProto:
    (folder / "w.bin").write_bytes(bytes(4096))
    return m.external("w.bin", offset, length)


def _no_place() -> ModelProto:
    model = m.external()
    del model.graph.initializer[0].external_data[:]
    return model


def _both() -> ModelProto:
    model = m.external()
    model.graph.initializer[0].raw_data = bytes(4096)
    return model


def _quantised() -> None:
    ones, zeros = np.ones(32, np.float32), np.zeros(32, np.int8)
    for name, value in (("NaN", np.nan), ("infinite", np.inf)):
        case(
            f"{name} scale",
            "scales are finite",
            lambda v=value: m.dequantised(np.where(np.arange(32) == 7, v, ones).astype(np.float32)),
        )
        case(
            f"{name} scale of a block",
            "scales are finite",
            lambda v=value: m.nbits(s=np.where(np.arange(32) == 7, v, ones).astype(np.float32)),
        )
    case("zero scale", "is 0, which loses", lambda: m.dequantised(np.zeros(32, np.float32)))
    case(
        "zero scale of a block",
        "is 0, which loses",
        lambda: m.nbits(s=np.zeros(32, np.float32), b=np.ones((32, 1, 16), np.uint8)),
    )
    case("zero scale of activations", "must be above 0", lambda: m.written(
        "q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z)", s=np.float32(0), z=np.int8(0)))  # fmt: skip
    case("negative scale of activations", "must be above 0", lambda: m.written(
        "q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z)", s=np.float32(-1), z=np.int8(0)))  # fmt: skip
    case("scales that do not fit the axis", "have shape [31]", lambda: m.dequantised(ones[:31]))
    case(
        "zero points that do not fit their scales",
        "zero points 'z' have shape [31]",
        lambda: m.dequantised(ones, zeros[:31]),
    )
    case("zero points of another type", "contradict", lambda: m.dequantised(ones, zeros.astype(np.uint8)))
    case("axis of no dimension", "axis 5 does not exist", lambda: m.dequantised(ones, axis=5))
    case("blocks that do not divide", "blocks of 5 along axis 0", lambda: m.dequantised(
        np.ones((6, 32), np.float32), axis=0, block_size=5))  # fmt: skip
    case(
        "negative block size",
        "block_size -4",
        lambda: m.dequantised(np.ones((8, 32), np.float32), axis=0, block_size=-4),
    )
    for block in (0, -16, 8, 24, 2**40):
        case(f"MatMulNBits blocks of {block}", "block_size" if block < 2**40 else "needed are",
             lambda b=block: _attribute("block_size", b))  # fmt: skip
    case(
        "MatMulNBits weights of another size",
        "needed are 512 elements",
        lambda: m.nbits(b=np.zeros((32, 1, 15), np.uint8)),
    )
    case("MatMulNBits scales of another size", "needed are 32 elements", lambda: m.nbits(s=ones[:31]))
    case("MatMulNBits zero points of another size", "zero points 'z'", lambda: m.nbits(z=np.zeros((32, 2), np.uint8)))
    case("MatMulNBits K of 0", "K 0", lambda: _attribute("K", 0))
    case("MatMulNBits N of 2^62", "needed are", lambda: _attribute("N", 2**62))
    case("MatMulNBits of 9 bits", "bits 9", lambda: _attribute("bits", 9))


def _attribute(name: str, value: int) -> ModelProto:
    model = m.nbits()
    next(a for a in model.graph.node[0].attribute if a.name == name).i = value
    return model


def _control() -> None:
    case("Loop of 2^62", "runs 4611686018427387904 times", lambda: m.loop(2**62))
    case("Loop without a count", "no constant trip count", lambda: m.loop(None))
    case("Loop whose count is an input", "no constant trip count", _loop_of_input)
    case("Loops inside a Loop", "runs 1000000000000 times", _loops)
    case("Scan of 2^27 rows", "runs 134217728 times", lambda: m.scan(2**27))
    case("recursive function", "calls itself", lambda: m.functions({"f": ["f"]}))
    case("mutually recursive functions", "calls itself", lambda: m.functions({"f": ["g"], "g": ["h"], "h": ["f"]}))
    case("functions that double 60 times", "over 1,000,000,000 nodes", lambda: m.functions(
        {f"f{i}": [f"f{i + 1}"] * 2 for i in range(60)} | {"f60": ["Relu", "Relu"]}))  # fmt: skip
    case("20,000 nested functions", "calls others more than 64 deep", lambda: m.functions(
        {f"f{i}": [f"f{i + 1}"] for i in range(20_000)} | {"f20000": ["Relu"]}))  # fmt: skip
    case("infinite scale inside a function", "scales are finite", _inside)
    case("two functions of one name", "two model-local functions", _twice)
    case(
        "subgraph that hides a value",
        "'x' of the subgraph of node 'If#0' hides",
        lambda: _branch("x = Relu(x) z = Relu(x)", "x"),
    )
    case(
        "subgraph that makes an outer value",
        "makes 'x', which is made before it",
        lambda: _branch("x = Relu(x) z = Relu(x)"),
    )
    case("subgraph that reads nothing known", "reads 'nowhere'", lambda: _branch("z = Relu(nowhere)"))


def _loop_of_input() -> ModelProto:
    model = m.loop(3)
    del model.graph.initializer[1]
    model.graph.input.append(helper.make_tensor_value_info("m", 7, []))
    return model


def _loops() -> ModelProto:
    """Three loops inside one another, of 10,000 trips each."""
    inner = m.loop(10_000)
    for level in "ab":
        outer = m.loop(10_000)
        body = outer.graph.node[0].attribute[0].g
        nest, again = inner.graph.node[0], body.node[0]
        for value in (*body.input, *body.output):
            value.name += level
        again.input[0], again.output[0] = f"c{level}", f"d{level}"
        nest.input[2], nest.output[0] = f"v{level}", f"w{level}"
        body.node[1].CopyFrom(nest)
        inner = outer
    return inner


def _inside() -> ModelProto:
    """A function whose scales are given from outside, and are not finite."""
    model = m.of_nodes(
        [
            helper.make_node("dequantise", ["q", "s"], ["w"], domain="own"),
            helper.make_node("MatMul", ["x", "w"], ["y"]),
        ],
        q=np.ones((32, 32), np.int8),
        s=np.full(32, np.inf, np.float32),
    )
    opsets = [helper.make_opsetid("", 18)]
    body = [helper.make_node("DequantizeLinear", ["a", "b"], ["c"])]
    model.opset_import.append(helper.make_opsetid("own", 1))
    model.functions.append(helper.make_function("own", "dequantise", ["a", "b"], ["c"], body, opsets))
    return model


def _twice() -> ModelProto:
    model = m.functions({"f": ["Relu"]})
    model.functions.append(model.functions[0])
    return model


def _branch(body: str, given: str = "") -> ModelProto:
    import onnx

    branch = onnx.parser.parse_graph(f"g () => (float[1,4,32] z) {{ {body} }}")
    if given:
        branch.initializer.append(onnx.numpy_helper.from_array(m.weight(1, 4, 32), given))
    other = onnx.parser.parse_graph("g () => (float[1,4,32] e) { e = Relu(x) }")
    node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=other)
    model = m.of_nodes([node])
    model.graph.input.append(helper.make_tensor_value_info("c", 9, []))
    return model


def _names() -> None:
    long = "n" * 100_000
    damage("node name of 100 kB", "has 100000 characters", lambda x: setattr(x.graph.node[0], "name", long))
    damage("value name of 100 kB", "has 100000 characters", lambda x: _rename(x, long))
    damage("operator of 100 kB", "has 100000 characters", lambda x: setattr(x.graph.node[0], "op_type", long))
    damage("dimension of 100 kB", "has 100000 characters", lambda x: setattr(
        x.graph.input[0].type.tensor_type.shape.dim[1], "dim_param", long))  # fmt: skip
    damage("metadata of 100 kB", "has 100000 characters", lambda x: x.metadata_props.append(
        StringStringEntryProto(key=long, value="v")))  # fmt: skip


def _rename(model: ModelProto, name: str) -> None:
    model.graph.input[0].name = model.graph.node[0].input[0] = name


for group in (_files, _graphs, _dims, _tensors, _external, _quantised, _control, _names):
    group()
assert len({entry.name for entry in CASES}) == len(CASES), "names of cases repeat"
