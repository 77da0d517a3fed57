"""Networks over images from ONNX to numbers on the functional machine, against onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from firsttoken.api import simulate
from firsttoken.execution import Loaded, load
from firsttoken_compiler.frontend.onnx_file import from_model
from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.matmul import Matmul
from firsttoken_compiler.isa.program import Program
from firsttoken_compiler.options import Precision, resolve
from firsttoken_compiler.pipeline import compile_onnx
from firsttoken_compiler.target.target import Target

Array = np.ndarray[Any, Any]
EXACT = Precision("fp16", "fp16", "128", "fp16", storage="fp32")


def graph(nodes: list[Any], weights: dict[str, Array], shape: tuple[int, ...], *outputs: str) -> onnx.ModelProto:
    """A model of one input `x` whose nodes are named after their first outputs."""
    for node in nodes:
        node.name = node.output[0]
    inputs = [helper.make_tensor_value_info("x", 1, shape)]
    made = helper.make_graph(
        nodes, "net", inputs, [helper.make_tensor_value_info(name, 1, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(array, np.float32), name) for name, array in weights.items()],
    )  # fmt: skip
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return onnx.shape_inference.infer_shapes(model)


def loaded(model: onnx.ModelProto, precision: Precision = EXACT) -> Loaded:
    """The model's program in the memory of a functional machine."""
    student, target = from_model(model, Path(), "net"), Target.load("systolic-128")
    program = compile_onnx(student, target, precision)
    assert program is not None
    return load(program, simulate(program, target), student, target)


def check(model: onnx.ModelProto, x: Array, tolerance: float = 2e-3, precision: Precision = EXACT) -> Program:
    """Every output within `tolerance` of its range of onnxruntime's, no node on the host; returns the program."""
    ready = loaded(model, precision)
    program = ready.program
    assert not program.hosts, [host.reason for host in program.hosts]
    names = [value.name for value in model.graph.output]
    expected = onnxruntime.InferenceSession(model.SerializeToString()).run(names, {"x": x})
    results = ready.run({"x": x})
    for name, reference in zip(names, expected, strict=True):
        assert results[name].shape == reference.shape
        atol = tolerance * max(1e-3, np.abs(reference).max())
        np.testing.assert_allclose(results[name], reference, rtol=0, atol=atol)
    products = program.code[program.code[:, word.OPCODE] == Matmul.OPCODE][:, word.DIMS : word.DIMS + 3]
    assert int(products.prod(axis=1).sum()) == sum(op.macs for op in program.ops)
    return program


def random(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[onnx.ModelProto, Array]:
    number = st.integers
    channels, out, seed = draw(number(1, 9)), draw(number(2, 12)), draw(number(0, 99))
    kernel = [draw(number(1, 4)) for _ in range(2)]
    attributes: dict[str, Any] = {"strides": [draw(number(1, 3)) for _ in range(2)]}
    if draw(st.booleans()):
        attributes["dilations"] = [draw(number(1, 2)) for _ in range(2)]
        attributes["pads"] = [draw(number(0, k - 1)) for k in (*kernel, *kernel)]
    else:
        attributes["auto_pad"] = draw(st.sampled_from(("VALID", "SAME_UPPER", "SAME_LOWER")))
    extents = [draw(number(reach, reach + 6)) for reach in ((k - 1) * 2 + 1 for k in kernel)]
    weights = {"w": random(out, channels, *kernel, seed=seed)}
    if draw(st.booleans()):
        weights["b"] = random(out, seed=seed + 1)
    node = helper.make_node("Conv", ["x", *weights], ["y"], **attributes)
    shape = (1, channels, *extents)
    return graph([node], weights, shape, "y"), random(*shape, seed=seed + 2)


@settings(max_examples=10, deadline=None)
@given(convolutions())
def test_any_convolution(case: tuple[onnx.ModelProto, Array]) -> None:
    check(*case)


@settings(max_examples=8, deadline=None)
@given(
    st.sampled_from(("MaxPool", "AveragePool")), st.integers(1, 3), st.integers(1, 3), st.integers(0, 1),
    st.booleans(), st.booleans(), st.integers(5, 9),
)  # fmt: skip
def test_any_pool(kind: str, kernel: int, stride: int, pad: int, ceil: bool, counted: bool, extent: int) -> None:
    pad = min(pad, kernel - 1)
    last = -(-(extent + pad - kernel) // stride) * stride
    assume(not ceil or last < extent + pad)  # shape inference and onnxruntime differ on a window of padding alone
    attributes = {"kernel_shape": [kernel, 2], "strides": [stride, 1], "pads": [pad, 0, 0, 1]}
    attributes |= {"ceil_mode": int(ceil)}
    attributes |= {"count_include_pad": int(counted)} if kind == "AveragePool" else {}
    shape = (1, 5, extent, 7)
    check(graph([helper.make_node(kind, ["x"], ["y"], **attributes)], {}, shape, "y"), random(*shape))


def bottleneck(stride: int) -> tuple[list[Any], dict[str, Array]]:
    """Convolutions with batch normalisation and relu, a shortcut, pooling and a classifier."""
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "w1", "b1"], ["c1"], pads=[3, 3, 3, 3], strides=[2, 2]),
        node("BatchNormalization", ["c1", "g", "be", "mu", "va"], ["n1"]), node("Relu", ["n1"], ["r1"]),
        node("MaxPool", ["r1"], ["p1"], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
        node("Conv", ["p1", "w2", "b2"], ["c2"], pads=[1, 1, 1, 1], strides=[stride, stride]),
        node("Relu", ["c2"], ["r2"]),
        node("Conv", ["r2", "w3"], ["c3"]), node("Conv", ["p1", "w4", "b4"], ["c4"], strides=[stride, stride]),
        node("Add", ["c3", "c4"], ["s"]), node("Relu", ["s"], ["r3"]), node("GlobalAveragePool", ["r3"], ["gap"]),
        node("Flatten", ["gap"], ["f"]), node("Gemm", ["f", "w5", "b5"], ["y"], transB=1),
    ]  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {
        "w1": (8, 3, 7, 7), "b1": (8,), "g": (8,), "be": (8,), "mu": (8,), "w2": (6, 8, 3, 3), "b2": (6,),
        "w3": (12, 6, 1, 1), "w4": (12, 8, 1, 1), "b4": (12,), "w5": (5, 12), "b5": (5,),
    }  # fmt: skip
    weights = {name: 0.3 * random(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    return nodes, {**weights, "va": np.linspace(0.5, 2, 8, dtype=np.float32)}


@pytest.mark.parametrize("stride", [1, 2])
def test_a_bottleneck_runs_on_the_npu_alone(stride: int) -> None:
    nodes, weights = bottleneck(stride)
    program = check(graph(nodes, weights, (1, 3, 24, 20), "y"), random(1, 3, 24, 20))
    kinds = [op.kind for op in program.ops]
    assert kinds.count("transpose") == 1  # the input alone is turned
    # A kernel of one pixel is a product of the image as it lies; the sum is in the last convolution's product.
    assert (kinds.count("conv"), kinds.count("linear")) == ((2, 3) if stride == 1 else (3, 2))
    added = next(op for op in program.ops if "s" in op.onnx_nodes)
    assert added.kind in ("linear", "conv")


def test_integer_weights_and_activations_of_convolutions() -> None:
    nodes, weights = bottleneck(1)
    model = graph(nodes, weights, (1, 3, 16, 16), "y")
    program = check(model, random(1, 3, 16, 16), 0.05, resolve("int8", "int8", "channel", None))
    assert "windows" in [op.kind for op in program.ops]  # a scale per row of windows: they have to be there
    program = check(model, random(1, 3, 16, 16), 0.01, resolve("int8", "fp16", "channel", None))
    assert "windows" not in [op.kind for op in program.ops]
    check(model, random(1, 3, 16, 16), 0.15, resolve("int4", "fp16", "32", None))


def test_patches_become_tokens_without_a_copy() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], strides=[4, 4]),
        helper.make_node("Reshape", ["c", "shape"], ["r"]), helper.make_node("Transpose", ["r"], ["t"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["t", "v"], ["y"]),
    ]  # fmt: skip
    model = graph(nodes, {"w": random(16, 3, 4, 4), "b": random(16), "v": random(16, 8)}, (1, 3, 8, 12), "y")
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, 16, 6]), "shape"))
    program = check(onnx.shape_inference.infer_shapes(model), random(1, 3, 8, 12))
    assert [op.kind for op in program.ops] == ["transpose", "conv", "linear"]


def test_a_class_token_goes_before_the_patches_and_comes_out_alone() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], strides=[2, 2]), helper.make_node("Reshape", ["c", "shape"], ["r"]),
        helper.make_node("Transpose", ["r"], ["t"], perm=[0, 2, 1]),
        helper.make_node("Concat", ["token", "t"], ["k"], axis=1), helper.make_node("Add", ["k", "position"], ["p"]),
        helper.make_node("Gather", ["p", "last"], ["g"], axis=1), helper.make_node("Gemm", ["g", "v"], ["y"]),
    ]  # fmt: skip
    weights = {"w": random(8, 3, 2, 2), "token": random(1, 1, 8), "position": random(1, 7, 8), "v": random(8, 5)}
    model = graph(nodes, weights, (1, 3, 4, 6), "y", "p")
    for name, array in (("shape", np.array([1, 8, 6])), ("last", np.array(-7))):
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    program = check(onnx.shape_inference.infer_shapes(model), random(1, 3, 4, 6))
    assert "concat" in [op.kind for op in program.ops]


@pytest.mark.parametrize("stride", [1, 2])
def test_each_channel_for_itself_and_then_all_of_a_pixel(stride: int) -> None:
    """MobileNet's block, with its shortcut."""
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], group=6, pads=[1, 1, 1, 1], strides=[stride, stride]),
        helper.make_node("Clip", ["c", "low", "high"], ["a"]), helper.make_node("Conv", ["a", "v"], ["e"]),
        helper.make_node("Conv", ["x", "u"], ["s"], group=6, strides=[stride, stride]),
        helper.make_node("Add", ["e", "s"], ["y"]),
    ]  # fmt: skip
    weights = {"w": random(6, 1, 3, 3), "b": random(6), "v": random(6, 6, 1, 1), "u": random(6, 1, 1, 1)}
    weights |= {"low": np.float32(0), "high": np.float32(6)}
    program = check(graph(nodes, weights, (1, 6, 8, 10), "y"), random(1, 6, 8, 10))
    assert [op.kind for op in program.ops].count("pool") == 2


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_images_are_concatenated_along_any_axis(axis: int) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"]), helper.make_node("Relu", ["x"], ["b"]),
        helper.make_node("Concat", ["a", "b", "a"], ["y"], axis=axis),
    ]  # fmt: skip
    program = check(graph(nodes, {"w": random(4, 4, 1, 1)}, (1, 4, 3, 5), "y"), random(1, 4, 3, 5))
    assert "concat" in [op.kind for op in program.ops]


def test_signals_are_images_of_one_line() -> None:
    nodes = [helper.make_node("Conv", ["x", "w", "b"], ["c"], pads=[1, 1]),
             helper.make_node("MaxPool", ["c"], ["y"], kernel_shape=[2], strides=[2])]  # fmt: skip
    check(graph(nodes, {"w": random(6, 4, 3), "b": random(6)}, (1, 4, 10), "y"), random(1, 4, 10))


def test_a_computed_weight_is_the_reason_to_convolve_on_the_host() -> None:
    nodes = [helper.make_node("Exp", ["w"], ["v"]), helper.make_node("Conv", ["x", "v"], ["y"])]
    model = graph(nodes, {"w": random(2, 3, 2, 2)}, (1, 3, 4, 4), "y")
    model.graph.input.append(helper.make_tensor_value_info("w", 1, [2, 3, 2, 2]))
    model.graph.ClearField("initializer")
    assert "weight or bias is computed" in loaded(model).program.hosts[0].reason


@pytest.mark.parametrize(
    ("attributes", "weight", "shape", "reason"),
    [({"group": 2}, (4, 2, 1, 1), (1, 4, 5, 5), "2 groups of several channels"),
     ({}, (4, 4, 1, 1), (2, 4, 5, 5), "expected one of them"),
     ({}, (4, 4, 1, 1, 1), (1, 4, 5, 5, 5), "over 3 axes")],
)  # fmt: skip
def test_what_the_npu_does_not_convolve_runs_on_the_host(
    attributes: dict[str, Any], weight: tuple[int, ...], shape: tuple[int, ...], reason: str
) -> None:
    node = helper.make_node("Conv", ["x", "w"], ["y"], **attributes)
    model = graph([node], {"w": random(*weight)}, shape, "y")
    ready, x = loaded(model), random(*shape)
    assert reason in ready.program.hosts[0].reason
    (expected,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})
    np.testing.assert_allclose(ready.run({"x": x})["y"], expected, atol=1e-4)


def test_convolutions_of_integers_with_static_scales_have_no_matrix_of_windows() -> None:
    """Two 3 x 3 convolutions, the second of stride 2: int8 images, windows made tile by tile, close to float32."""
    x, shape = random(1, 8, 14, 14), [1, 8, 14, 14]
    weights = {"w": random(16, 8, 3, 3, seed=1) / 8, "b": random(16, seed=2), "v": random(8, 16, 3, 3, seed=3) / 12}
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["h"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Conv", ["r", "v"], ["y"], pads=[1, 1, 1, 1], strides=[2, 2]),
    ]
    model = graph(nodes, weights, tuple(shape), "y")
    session = graph(nodes, weights, tuple(shape), "y", "r")
    _, between = onnxruntime.InferenceSession(session.SerializeToString()).run(["y", "r"], {"x": x})
    ranges = (("r", float(np.abs(between).max())), ("x", float(np.abs(x).max())))
    static = check(model, x, 3e-2, Precision("int8", "int8", "channel", "int8", ranges=ranges))
    dynamic = check(model, x, 3e-2, Precision("int8", "int8", "channel", "int8"))
    assert [op.kind for op in static.ops].count("conv") == 2
    assert "windows" not in {op.kind for op in static.ops}
    assert "windows" in {op.kind for op in dynamic.ops}
