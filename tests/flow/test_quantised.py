"""Graphs that come quantised, through the whole compiler and the functional machine, against onnxruntime.

Inputs are numbers that fp16 holds, so that what is left between both is the order of fp32 sums.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from firsttoken.api import simulate
from firsttoken.execution import Loaded, load
from firsttoken_compiler.frontend.onnx_file import from_model
from firsttoken_compiler.frontend.specialise import specialise
from firsttoken_compiler.options import Precision
from firsttoken_compiler.pipeline import compile_onnx
from firsttoken_compiler.target.load import load_target
from firsttoken_compiler.target.target import Target

TARGET = load_target("systolic-128")
EXACT = Precision("fp16", "fp16", "128", "fp16", storage="fp32")
"""Only what the matrix unit reads is rounded."""
SUMS = 2e-6
"""Of the largest value: fp32 sums in another order."""
TYPES = {
    "int8": TensorProto.INT8, "uint8": TensorProto.UINT8, "int16": TensorProto.INT16, "uint16": TensorProto.UINT16,
    "int4": TensorProto.INT4, "uint4": TensorProto.UINT4, "float": TensorProto.FLOAT,
}  # fmt: skip
NUMPY: dict[str, Any] = {"int4": ml_dtypes.int4, "uint4": ml_dtypes.uint4}


@dataclass
class Graph:
    """A model and what goes in."""

    model: onnx.ModelProto
    feeds: dict[str, np.ndarray]

    def reference(self, *, fused: bool = True) -> list[np.ndarray]:
        """Not `fused`: as the graph is written, without onnxruntime's own rounding of biases."""
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        if not fused:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
        session = onnxruntime.InferenceSession(
            self.model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        return list(session.run(None, self.feeds))

    def prepared(self, precision: Precision | None = None, target: Target = TARGET, fallback: bool = True) -> Loaded:
        student = specialise(from_model(self.model, Path(), "graph"))
        program = compile_onnx(student, target, precision or EXACT, fallback=fallback)
        assert program is not None
        return load(program, simulate(program, target), student, target)

    def run(self, loaded: Loaded) -> np.ndarray:
        """The first output."""
        return loaded.run(self.feeds)[self.model.graph.output[0].name]

    def on_npu(self, **kwargs: Any) -> np.ndarray:
        """The first output, all of it computed by the NPU."""
        return self.run(self.prepared(fallback=False, **kwargs))


def reasons(loaded: Loaded) -> str:
    """Why nodes are on the host."""
    return "; ".join(call.reason for call in loaded.program.hosts)


def graph(nodes: list[Any], given: dict[str, np.ndarray], weights: dict[str, np.ndarray], out: str = "float") -> Graph:
    """A model whose inputs are `given`; results are typed by shape inference in onnxruntime, ranks by `given`."""
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in given.items()
    ]
    initialisers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    shape = [f"d{i}" for i in range(next(iter(given.values())).ndim + int(out == "rows"))]
    result = helper.make_tensor_value_info(nodes[-1].output[0], TYPES.get(out, TensorProto.FLOAT), shape)
    made = helper.make_graph(nodes, "g", inputs, [result], initialisers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return Graph(helper.make_model(made, opset_imports=opsets, ir_version=10), given)


def node(kind: str, inputs: str, output: str, **attrs: Any) -> Any:
    domain = "com.microsoft" if kind in MICROSOFT else ""
    names = ["" if name == "_" else name for name in inputs.split()]
    return helper.make_node(kind, names, output.split(), domain=domain, **attrs)


MICROSOFT = ("MatMulNBits", "GatherBlockQuantized", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QGemm",
             "QLinearAdd", "QLinearSigmoid", "QLinearSoftmax", "QLinearConcat")  # fmt: skip


def halves(r: np.random.Generator, *shape: int) -> np.ndarray:
    """Normal numbers that fp16 holds, as fp32."""
    return r.standard_normal(shape).astype(np.float16).astype(np.float32)


def integers(r: np.random.Generator, dtype: str, *shape: int) -> np.ndarray:
    bits, signed = int(dtype.lstrip("uint")), dtype[0] != "u"
    low = -(1 << (bits - 1)) if signed else 0
    return r.integers(low, low + (1 << bits), shape).astype(NUMPY.get(dtype, dtype))


def assert_near(ours: np.ndarray, graph_: Graph, tolerance: float = SUMS) -> None:
    expected = graph_.reference()[0]
    assert ours.shape == expected.shape
    assert np.abs(ours - expected).max() <= tolerance * np.abs(expected).max()


# Blocks of a few bits.


def nbits(
    k: int, n: int, block: int, bits: int = 4, zeros: str = "", bias: bool = False, m: int = 3, half: bool = False
) -> Graph:
    r = np.random.default_rng(k + n + block)
    blocks = -(-k // block)
    floats = np.float16 if half else np.float32
    weights = {
        "w": integers(r, "uint8", n, blocks, block * bits // 8), "s": r.uniform(0.01, 0.02, (n, blocks)).astype(floats)
    }  # fmt: skip
    if zeros == "packed":
        weights["z"] = integers(r, "uint8", n, -(-blocks * bits // 8))
    elif zeros == "float":
        weights["z"] = r.uniform(6, 10, (n, blocks)).astype(floats)
    if bias:
        weights["b"] = r.standard_normal(n).astype(floats)
    names = f"x w s {'z' if zeros else '_'} _ {'b' if bias else '_'}"
    product = node("MatMulNBits", names, "y", K=k, N=n, bits=bits, block_size=block, accuracy_level=0)
    x = halves(r, 1, m, k).astype(floats)
    made = graph([product], {"x": x}, weights)
    if half:
        made.model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    return made


NBITS = {
    "block 16": nbits(64, 40, 16), "block 32": nbits(64, 40, 32), "block 64": nbits(128, 24, 64),
    "block 128": nbits(128, 24, 128), "block 256": nbits(512, 8, 256), "zero points": nbits(64, 40, 16, zeros="packed"),
    "one block, zero points": nbits(32, 24, 32, zeros="packed", bias=True), "bias": nbits(64, 24, 32, bias=True),
    "float zero points": nbits(128, 24, 32, zeros="float"), "k between blocks": nbits(72, 24, 32, bias=True),
    "8 bits": nbits(64, 24, 32, bits=8), "8 bits, zero points": nbits(64, 24, 32, bits=8, zeros="packed"),
    "zero points, a short last block": nbits(96, 24, 64, zeros="packed"),
    "odd columns": nbits(64, 33, 32, zeros="packed"), "one token": nbits(64, 24, 32, zeros="packed", m=1),
}  # fmt: skip


@pytest.mark.parametrize("name", NBITS)
def test_blocks_of_a_few_bits(name: str) -> None:
    assert_near(NBITS[name].on_npu(), NBITS[name])


def test_half_precision_scales_keep_their_bytes() -> None:
    made = nbits(64, 40, 32, half=True, zeros="packed")
    loaded = made.prepared(fallback=False)
    assert_near(made.run(loaded).astype(np.float32), made, 2e-3)
    scales = [t for t in loaded.program.of_kind("weight") if t.packing and t.packing.source == "s"]
    assert [t.nbytes for t in scales] == [40 * 2 * 2]


def test_weights_take_the_bytes_of_the_file() -> None:
    """Four bits a weight, four bytes a scale, one byte a zero point."""
    program = NBITS["zero points"].prepared(fallback=False).program
    sizes = {t.packing.source: t.nbytes for t in program.of_kind("weight") if t.packing}
    assert sizes == {"w": 64 * 40 // 2, "s": 40 * 4 * 4, "z": 40 * 4}
    line = "int4 (blocks of 16 with zero points) with fp16 activations"
    assert program.meta["stored_weights"] == [f"1 products as the graph stores their weights: {line}"]


@pytest.mark.parametrize("weights", ["int4", "int8", "fp16"])
def test_options_do_not_touch_what_is_quantised(weights: str) -> None:
    acts = "fp16" if weights == "fp16" else "int8"
    precision = Precision(weights, acts, "32", "fp16" if weights == "fp16" else "int8", storage="fp32")
    case = NBITS["zero points"]
    assert np.array_equal(case.on_npu(precision=precision), case.on_npu())


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (nbits(72, 24, 32, zeros="packed"), "last block shorter than 32"),
        (nbits(64, 24, 32, bits=2), "MatMulNBits of 2 bits"),
    ],
)
def test_what_no_product_takes_runs_on_the_host(made: Graph, reason: str) -> None:
    loaded = made.prepared()
    assert {op.kind for op in loaded.program.ops} == {"host"}
    assert reason in reasons(loaded)
    assert_near(made.run(loaded), made)


# DequantizeLinear of weights.


def behind_dequantisation(
    dtype: str, per: str, *, zeros: bool = True, turned: str = "", bias: bool = False, k: int = 64, n: int = 24
) -> Graph:
    """MatMul or Gemm on a weight behind DequantizeLinear; `turned`: `after`, `before` or `gemm` transposes it."""
    r = np.random.default_rng(len(dtype + per))
    shape = (n, k) if turned in ("after", "gemm") else (k, n)
    along = shape.index(k)
    if per == "block":
        scale_shape: tuple[int, ...] = tuple(extent // 16 if i == along else extent for i, extent in enumerate(shape))
    else:
        scale_shape = (n,) if per == "channel" else ()
    weights = {"w": integers(r, dtype, *(shape[::-1] if turned == "before" else shape))}
    weights["s"] = r.uniform(0.01, 0.02, scale_shape).astype(np.float32)
    if zeros:
        weights["z"] = np.asarray(integers(r, dtype, *scale_shape))
    attrs = {"axis": along, "block_size": 16} if per == "block" else {"axis": 1 - along}
    nodes = [node("Transpose", "w", "t", perm=[1, 0])] if turned == "before" else []
    source = "t" if turned == "before" else "w"
    nodes.append(node("DequantizeLinear", f"{source} s z" if zeros else f"{source} s", "d", **attrs))
    if bias:
        weights["b"] = r.standard_normal(n).astype(np.float32)
    if turned == "gemm":
        nodes.append(node("Gemm", "x d b" if bias else "x d", "y", transB=1))
    else:
        if turned == "after":
            nodes.append(node("Transpose", "d", "u", perm=[1, 0]))
        nodes.append(node("MatMul", f"x {'u' if turned == 'after' else 'd'}", "p" if bias else "y"))
        nodes += [node("Add", "p b", "y")] if bias else []
    return graph(nodes, {"x": halves(r, 5, k)}, weights)


@pytest.mark.parametrize(
    "made",
    [
        behind_dequantisation("int8", "tensor"), behind_dequantisation("int8", "channel", zeros=False),
        behind_dequantisation("uint8", "tensor", bias=True), behind_dequantisation("uint8", "channel", turned="gemm"),
        behind_dequantisation("int4", "block", zeros=False), behind_dequantisation("uint4", "block"),
        behind_dequantisation("uint4", "block", turned="after"), behind_dequantisation("int4", "channel"),
        behind_dequantisation("int8", "block", turned="gemm", bias=True),
        behind_dequantisation("uint8", "tensor", turned="before"),
        behind_dequantisation("uint8", "channel", turned="before"), behind_dequantisation("uint4", "tensor", bias=True),
    ],
)  # fmt: skip
def test_weights_behind_dequantisation(made: Graph) -> None:
    assert_near(made.on_npu(), made, 4 * SUMS)


def test_a_tied_head_that_is_quantised_again_keeps_its_integers() -> None:
    r = np.random.default_rng(5)
    weights = {"w": integers(r, "int8", 24, 48), "s": np.asarray(np.float32(0.01)), "z": np.asarray(np.int8(3))}
    nodes = [
        node("DequantizeLinear", "w s z", "f"), node("Transpose", "f", "t", perm=[1, 0]),
        node("QuantizeLinear", "t s z", "q"), node("DequantizeLinear", "q s z", "d"), node("MatMul", "x d", "y"),
    ]  # fmt: skip
    made = graph(nodes, {"x": halves(r, 5, 48)}, weights)
    assert_near(made.on_npu(), made)


# Dynamic quantisation.


def dynamic(dtype: str, channels: bool, spelling: str, *, zero: bool = True, k: int = 48, exact: bool = False) -> Graph:
    """`exact`: all scales are 1, so that the result is the integer product."""
    r, n = np.random.default_rng(k), 20
    x = halves(r, 1, 6, k)
    if exact:
        x = r.integers(-100, 156, (1, 6, k)).astype(np.float32)
        x[0, 0, 0], x[0, 0, 1] = -100, 155
    of = (n,) if channels else ()
    weights = {"w": integers(r, dtype, k, n), "s": np.asarray(r.uniform(0.01, 0.02, of), np.float32)}
    weights["s"] = np.ones_like(weights["s"]) if exact else weights["s"]
    weights["z"] = np.asarray(integers(r, dtype, *of)) if zero else np.zeros(of, dtype)
    weights["b"] = np.zeros(n, np.float32) if exact else r.standard_normal(n).astype(np.float32)
    if spelling == "fused":
        return graph([node("DynamicQuantizeMatMul", "x w s z b", "y")], {"x": x}, weights)
    quantise = node("DynamicQuantizeLinear", "x", "q qs qz")
    if spelling == "to float":
        return graph([quantise, node("MatMulIntegerToFloat", "q w qs s qz z b", "y")], {"x": x}, weights)
    nodes = [
        quantise, node("MatMulInteger", "q w qz z", "i"), node("Cast", "i", "f", to=1), node("Mul", "qs s", "both"),
        node("Mul", "f both", "p"), node("Add", "p b", "y"),
    ]  # fmt: skip
    return graph(nodes, {"x": x}, weights)


@pytest.mark.parametrize("spelling", ["integer", "to float", "fused"])
@pytest.mark.parametrize(("dtype", "channels"), [("int8", False), ("int8", True), ("uint8", False), ("uint8", True)])
def test_dynamic_quantisation(dtype: str, channels: bool, spelling: str) -> None:
    made = dynamic(dtype, channels, spelling)
    assert_near(made.on_npu(), made, 1e-6)


@pytest.mark.parametrize(("dtype", "zero"), [("int8", False), ("uint8", True), ("int8", True)])
@pytest.mark.parametrize("k", [48, 1500])
def test_the_integer_product_is_exact(dtype: str, zero: bool, k: int) -> None:
    made = dynamic(dtype, True, "integer", zero=zero, k=k, exact=True)
    assert np.array_equal(made.on_npu(), made.reference()[0])


# Static quantisation.


def static(activations: str, dtype: str, channels: bool, *, k: int = 48) -> Graph:
    """Q, DQ, MatMul, Add, Q, DQ, as onnxruntime's tools write them."""
    r, n = np.random.default_rng(k), 20
    bits = int(activations.lstrip("uint"))
    middle = 1 << (bits - 1) if activations[0] == "u" else 0
    of = (n,) if channels else ()
    weights = {
        "xs": np.float32(8 / (1 << bits)), "xz": np.asarray(middle + 5).astype(activations),
        "w": integers(r, dtype, k, n), "ws": np.asarray(r.uniform(0.01, 0.02, of), np.float32),
        "wz": np.full(of, 128 if dtype == "uint8" else 0, dtype), "b": r.standard_normal(n).astype(np.float32),
        "ys": np.float32(64 / (1 << bits)), "yz": np.asarray(middle - 3).astype(activations),
    }  # fmt: skip
    nodes = [
        node("QuantizeLinear", "x xs xz", "q"), node("DequantizeLinear", "q xs xz", "a"),
        node("DequantizeLinear", "w ws wz", "d", axis=1), node("MatMul", "a d", "p"), node("Add", "p b", "c"),
        node("QuantizeLinear", "c ys yz", "r"), node("DequantizeLinear", "r ys yz", "y"),
    ]  # fmt: skip
    weights = {name: np.asarray(array) for name, array in weights.items()}
    return graph(nodes, {"x": r.standard_normal((1, 6, k)).astype(np.float32)}, weights)


@pytest.mark.parametrize(
    ("activations", "dtype", "channels"),
    [("uint8", "int8", True), ("int8", "int8", False), ("uint8", "uint8", False), ("int16", "int8", True)],
)
@pytest.mark.parametrize("k", [48, 1100])
def test_static_quantisation_rounds_to_the_same_integers(
    activations: str, dtype: str, channels: bool, k: int
) -> None:
    made = static(activations, dtype, channels, k=k)
    ours, expected = made.on_npu(), made.reference(fused=False)[0]
    step = 64 / (1 << int(activations.lstrip("uint")))
    assert np.abs(ours - expected).max() <= step * 1.001, "one level at most, where a sum lies between two"
    assert (np.abs(ours - expected) > step / 2).mean() <= (0.0 if k == 48 and step == 0.25 else 0.05)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16"])
def test_integers_from_outside_are_multiplied_as_they_are(dtype: str) -> None:
    r = np.random.default_rng(1)
    weights = {
        "s": np.asarray(np.float32(0.01)), "z": np.asarray(9).astype(dtype), "w": integers(r, "int8", 48, 20),
        "ws": np.asarray(np.float32(0.01)),
    }  # fmt: skip
    nodes = [
        node("DequantizeLinear", "x s z", "a"), node("DequantizeLinear", "w ws", "d"), node("MatMul", "a d", "y"),
    ]  # fmt: skip
    made = graph(nodes, {"x": integers(r, dtype, 6, 48)}, weights)
    expected = (made.feeds["x"].astype(np.int64) - 9) @ weights["w"].astype(np.int64)
    assert np.allclose(made.on_npu() * 1e4, expected, rtol=1e-6, atol=0)


def operators(kind: str) -> Graph:
    """One QLinear operator between QuantizeLinear and DequantizeLinear."""
    r = np.random.default_rng(3)
    weights: dict[str, np.ndarray] = {
        "xs": np.float32(0.03), "xz": np.uint8(131), "ys": np.float32(0.05), "yz": np.uint8(120),
        "one": np.float32(1 / 256), "none": np.uint8(0), "w": integers(r, "int8", 32, 16),
        "ws": np.float32(0.01), "wz": np.int8(0), "b": r.integers(-900, 900, 16).astype(np.int32),
        "ws16": r.uniform(0.01, 0.02, 16).astype(np.float32),
        "wz16": np.zeros(16, np.int8),
    }  # fmt: skip
    spelt = {
        "QLinearMatMul": ("q xs xz w ws wz ys yz", {}), "QGemm": ("q xs xz w ws16 wz16 b ys yz", {}),
        "QLinearAdd": ("q xs xz q xs xz ys yz", {}), "QLinearSigmoid": ("q xs xz one none", {}),
        "QLinearSoftmax": ("q xs xz one none", {"axis": 1, "opset": 13}),
        "QLinearConcat": ("ys yz q xs xz q xs xz", {"axis": 1}),
    }  # fmt: skip
    inputs, attrs = spelt[kind]
    scale = "one none" if "one" in inputs else "ys yz"
    nodes = [
        node("QuantizeLinear", "x xs xz", "q"), node(kind, inputs, "r", **attrs),
        node("DequantizeLinear", f"r {scale}", "y"),
    ]  # fmt: skip
    used = {name for n in nodes for name in n.input}
    given = {name: np.asarray(array) for name, array in weights.items() if name in used}
    return graph(nodes, {"x": r.standard_normal((6, 32)).astype(np.float32)}, given)


@pytest.mark.parametrize(
    "kind", ["QLinearMatMul", "QGemm", "QLinearAdd", "QLinearSigmoid", "QLinearSoftmax", "QLinearConcat"]
)
def test_operators_on_integers(kind: str) -> None:
    made = operators(kind)
    ours = made.on_npu() if kind != "QLinearConcat" else made.run(made.prepared())
    expected = made.reference()[0]
    level = 1 / 256 if kind in ("QLinearSigmoid", "QLinearSoftmax") else 0.05
    assert np.abs(ours - expected).max() <= level * 1.001
    assert (np.abs(ours - expected) > level / 2).mean() <= 0.01


def test_a_target_without_the_pair_leaves_the_product_to_the_host() -> None:
    target = load_target("systolic-128")
    pairs = {pair: rate for pair, rate in target.matrix.macs_per_cycle.items() if pair != "int8xint8"}
    poor = replace(target, matrix=replace(target.matrix, macs_per_cycle=pairs))
    made = dynamic("int8", True, "integer")
    loaded = made.prepared(target=poor)
    assert "not int8xint8" in reasons(loaded)
    assert_near(made.run(loaded), made, 1e-6)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16"])
@pytest.mark.parametrize("direction", ["QuantizeLinear", "DequantizeLinear"])
def test_quantisation_on_its_own(direction: str, dtype: str) -> None:
    """Half to even, saturating."""
    given = {"x": np.array([[-40, 0.25, 0.75, 1.25, 1.74, 9e4, -0.25, 2.5, -9e4]], np.float32)}
    if direction == "DequantizeLinear":
        limits = np.iinfo(dtype)
        given = {"x": np.linspace(limits.min, limits.max, 256).astype(dtype).reshape(4, 64)}
    weights = {"s": np.asarray(np.float32(0.5)), "z": np.asarray(3).astype(dtype)}
    made = graph([node(direction, "x s z", "y")], given, weights, dtype if direction == "QuantizeLinear" else "float")
    assert np.array_equal(made.on_npu(), made.reference()[0])


# Tables.


def table(kind: str, dtype: str, *, zeros: bool = True, width: int = 64, block: int = 32) -> Graph:
    r, rows = np.random.default_rng(7), 50
    ids = {"x": r.integers(0, rows, (1, 6))}
    per = () if kind in ("before", "after") else (rows, width // block)
    weights = {"t": integers(r, dtype, rows, width), "s": np.asarray(r.uniform(0.01, 0.02, per), np.float32)}
    if zeros:
        weights["z"] = np.asarray(integers(r, dtype, *per))
    names = "s z" if zeros else "s"
    if kind == "after":
        nodes = [node("Gather", "t x", "g"), node("DequantizeLinear", f"g {names}", "y")]
    elif kind == "packed":
        weights["t"] = integers(r, "uint8", rows, width // 2)
        weights |= {"z": integers(r, "uint8", rows, width // block // 2)} if zeros else {}
        nodes = [node("GatherBlockQuantized", f"t x {names}", "y", bits=4, block_size=block, quantize_axis=1)]
    elif kind == "contrib":
        nodes = [node("GatherBlockQuantized", f"t x {names}", "y", block_size=block, quantize_axis=1)]
    else:
        blocked = {"axis": 1, "block_size": block} if kind == "blocks" else {}
        nodes = [node("DequantizeLinear", f"t {names}", "d", **blocked), node("Gather", "d x", "y")]
    return graph(nodes, ids, weights, "rows")


@pytest.mark.parametrize(
    "made",
    [
        table("before", "int8"), table("before", "uint8"), table("after", "uint8"), table("after", "int8", zeros=False),
        table("blocks", "int8"), table("blocks", "uint4"), table("blocks", "int4", zeros=False),
        table("contrib", "uint4"), table("contrib", "int4", zeros=False), table("packed", "uint4"),
        table("packed", "uint4", zeros=False),
    ],
)  # fmt: skip
def test_rows_of_stored_tables_are_exact(made: Graph) -> None:
    assert np.array_equal(made.on_npu(), made.reference()[0])
