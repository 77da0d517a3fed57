"""Image networks that come quantised (QDQ, QLinearConv): on the NPU in int8, within a step of onnxruntime."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from firsttoken.api import simulate
from firsttoken.execution import load
from firsttoken_compiler.frontend.onnx_file import from_model
from firsttoken_compiler.isa.program import Program
from firsttoken_compiler.isa.types import Dtype
from firsttoken_compiler.options import resolve
from firsttoken_compiler.pipeline import compile_onnx
from firsttoken_compiler.target.target import Target

Array = np.ndarray[Any, Any]
Nodes = list[tuple[str, list[str], str, dict[str, Any]]]
FORMATS = [QuantFormat.QDQ, QuantFormat.QOperator]
TYPES = [QuantType.QUInt8, QuantType.QInt8]


def random(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def graph(nodes: Nodes, weights: dict[str, tuple[int, ...]], shape: tuple[int, ...]) -> onnx.ModelProto:
    """A float model from `x` to `y`."""
    made = [helper.make_node(kind, inputs, [out], name=out, **attributes) for kind, inputs, out, attributes in nodes]
    arrays = {name: random(*of, seed=i) * 0.3 for i, (name, of) in enumerate(weights.items())}
    whole = helper.make_graph(
        made, "net", [helper.make_tensor_value_info("x", 1, shape)], [helper.make_tensor_value_info("y", 1, None)],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )  # fmt: skip
    model = helper.make_model(whole, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return onnx.shape_inference.infer_shapes(model)


class _Images(CalibrationDataReader):
    def __init__(self, shape: tuple[int, ...]) -> None:
        self.images: Iterator[dict[str, Array]] = iter([{"x": random(*shape, seed=seed)} for seed in range(3)])

    def get_next(self) -> dict[str, Array] | None:
        return next(self.images, None)


def quantised(model: onnx.ModelProto, folder: Path, form: Any, acts: Any, **options: Any) -> onnx.ModelProto:
    """The model with static scales, as onnxruntime's quantiser writes it."""
    logging.getLogger().setLevel(logging.ERROR)
    shape = tuple(d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim)
    onnx.save(model, folder / "float.onnx")
    quantize_static(
        folder / "float.onnx", folder / "int8.onnx", _Images(shape), quant_format=form, activation_type=acts,
        weight_type=QuantType.QInt8, **{"per_channel": True, **options},
    )  # fmt: skip
    return onnx.load(folder / "int8.onnx")


def compare(model: onnx.ModelProto, x: Array, target: str = "nvdla-full", steps: float = 1.0) -> Program:
    """Within so many steps of the last scale of onnxruntime's result; returns the program."""
    student, machine = from_model(model, Path(), "net"), Target.load(target)
    program = compile_onnx(student, machine, replace(resolve("int8", "int8", "channel", None), storage="fp32"))
    assert program is not None
    expected = onnxruntime.InferenceSession(model.SerializeToString()).run(["y"], {"x": x})[0]
    got = load(program, simulate(program, machine), student, machine).run({"x": x})["y"]
    assert got.shape == expected.shape
    scales = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    last = next(node for node in model.graph.node if "y" in node.output)
    step = 1.0 if got.dtype != np.float32 else float(scales[last.input[1]])
    difference = np.abs(got.astype(np.float64) - expected.astype(np.float64)).max()
    assert difference <= steps * step * 1.001, (difference, step)
    assert np.abs(expected.astype(np.float64)).max() > 20 * step  # not all of it rounds to nothing
    return program


CONVOLUTIONS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "1x1": ((10, 4, 1, 1), {}),
    "1x1 stride": ((10, 4, 1, 1), {"strides": [2, 2]}),
    "3x3": ((9, 4, 3, 3), {"pads": [1, 1, 1, 1]}),
    "3x3 stride": ((9, 4, 3, 3), {"pads": [1, 1, 1, 1], "strides": [2, 2]}),
    "3x3 uneven padding": ((9, 4, 3, 3), {"pads": [0, 2, 1, 0]}),
    "7x7 stride": ((8, 4, 7, 7), {"pads": [3, 3, 3, 3], "strides": [2, 2]}),
    "3x3 dilated": ((8, 4, 3, 3), {"pads": [2, 2, 2, 2], "dilations": [2, 2]}),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize(("form", "acts"), list(zip(FORMATS, TYPES, strict=True)))
@pytest.mark.parametrize("after", ["Relu", ""])
def test_a_convolution_writes_integers(name: str, form: Any, acts: Any, after: str, tmp_path: Path) -> None:
    kernel, attributes = CONVOLUTIONS[name]
    nodes: Nodes = [("Conv", ["x", "w", "b"], "c" if after else "y", attributes)]
    nodes += [(after, ["c"], "y", {})] if after else []
    model = quantised(graph(nodes, {"w": kernel, "b": (kernel[0],)}, (1, 4, 13, 11)), tmp_path, form, acts)
    program = compare(model, random(1, 4, 13, 11, seed=9))
    assert not program.hosts
    turned, entered, product, left, back = program.ops
    assert (turned.kind, entered.kind, left.kind, back.kind) == ("transpose", "map", "map", "transpose")
    assert product.kind == ("linear" if name == "1x1" else "conv")
    # The activation and the quantisation of the result are the product's.
    assert len(product.onnx_nodes) >= 2


def residual_block(stride: int) -> tuple[Nodes, dict[str, tuple[int, ...]]]:
    """7x7, largest values, 1x1, 3x3, 1x1 with a shortcut, a second sum, an average and a classifier."""
    nodes: Nodes = [
        ("Conv", ["x", "w1", "b1"], "c1", {"pads": [3, 3, 3, 3], "strides": [2, 2]}), ("Relu", ["c1"], "r1", {}),
        ("MaxPool", ["r1"], "p", {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
        ("Conv", ["p", "w2", "b2"], "c2", {}), ("Relu", ["c2"], "r2", {}),
        ("Conv", ["r2", "w3", "b3"], "c3", {"pads": [1, 1, 1, 1], "strides": [stride, stride]}),
        ("Relu", ["c3"], "r3", {}), ("Conv", ["r3", "w4", "b4"], "c4", {}),
        ("Conv", ["p", "w5", "b5"], "c5", {"strides": [stride, stride]}),
        ("Add", ["c4", "c5"], "s1", {}), ("Relu", ["s1"], "r4", {}),
        ("Conv", ["r4", "w6", "b6"], "c6", {"pads": [1, 1, 1, 1]}),
        ("Add", ["c6", "r4"], "s2", {}), ("Relu", ["s2"], "r5", {}),
        ("GlobalAveragePool", ["r5"], "a", {}), ("Flatten", ["a"], "f", {}),
        ("Gemm", ["f", "w7", "b7"], "y", {"transB": 1}),
    ]  # fmt: skip
    weights = {
        "w1": (8, 3, 7, 7), "b1": (8,), "w2": (6, 8, 1, 1), "b2": (6,), "w3": (6, 6, 3, 3), "b3": (6,),
        "w4": (16, 6, 1, 1), "b4": (16,), "w5": (16, 8, 1, 1), "b5": (16,), "w6": (16, 16, 3, 3), "b6": (16,),
        "w7": (5, 16), "b7": (5,),
    }  # fmt: skip
    return nodes, weights


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("acts", TYPES)
def test_a_residual_network_stays_in_integers(stride: int, form: Any, acts: Any, tmp_path: Path) -> None:
    model = quantised(graph(*residual_block(stride), (1, 3, 30, 26)), tmp_path, form, acts)
    program = compare(model, random(1, 3, 30, 26, seed=9))
    assert not program.hosts, [host.reason for host in program.hosts]
    kinds = [op.kind for op in program.ops]
    body = kinds[2 : kinds.index("reduce")]
    # One operator for each of the file's: 6 convolutions, a pool and 2 sums; then floats for the average.
    assert [kind for kind in body if kind not in ("conv", "linear")] == ["pool", "map", "map", "map"]
    assert body.count("conv") + body.count("linear") == 6


CLIPPED: Nodes = [
    ("Conv", ["x", "w", "b"], "c", {"pads": [1, 1, 1, 1]}), ("Clip", ["c", "low", "high"], "r", {}),
    ("Conv", ["r", "d", "e"], "k", {"pads": [1, 1, 1, 1], "group": 8}), ("Clip", ["k", "low", "high"], "l", {}),
    ("Conv", ["l", "v", "g"], "y", {}),
]  # fmt: skip


@pytest.mark.parametrize("form", FORMATS)
def test_each_channel_for_itself_and_clips(form: Any, tmp_path: Path) -> None:
    """The vector unit convolves single channels in floats, which are quantised where the file says so."""
    sizes = {"w": (8, 3, 3, 3), "b": (8,), "d": (8, 1, 3, 3), "e": (8,), "v": (5, 8, 1, 1), "g": (5,)}
    model = graph(CLIPPED, sizes, (1, 3, 12, 12))
    model.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in (("low", 0), ("high", 1.5))
    )
    program = compare(quantised(model, tmp_path, form, QuantType.QInt8), random(1, 3, 12, 12, seed=9))
    assert not program.hosts
    assert [op.kind for op in program.ops].count("pool") == 1


def chain(dtype: type, zero: int, weight_zero: int = 0, weights: type = np.int8) -> onnx.ModelProto:
    """QLinearConv on integers that come in and go out."""
    node, random_ = helper.make_node, np.random.default_rng(3)
    low, high = np.iinfo(weights).min, np.iinfo(weights).max
    constants = {
        "s": np.float32(0.05), "z": dtype(zero), "w": random_.integers(low, high, (6, 4, 3, 3)).astype(weights),
        "ws": (0.002 + 0.001 * random_.random(6)).astype(np.float32), "wz": np.full(6, weight_zero, weights),
        "t": np.float32(0.1), "b": random_.integers(-900, 900, 6).astype(np.int32),
    }  # fmt: skip
    made = node("QLinearConv", ["x", "s", "z", "w", "ws", "wz", "t", "z", "b"], ["y"], name="conv", pads=[1, 1, 1, 1])
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    whole = helper.make_graph(
        [made], "net", [helper.make_tensor_value_info("x", kind, (1, 4, 9, 8))],
        [helper.make_tensor_value_info("y", kind, (1, 6, 9, 8))],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )  # fmt: skip
    return helper.make_model(whole, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize(("dtype", "zero"), [(np.uint8, 120), (np.uint8, 128), (np.int8, 0), (np.int8, -7)])
def test_integers_come_in_and_go_out(dtype: type, zero: int) -> None:
    info = np.iinfo(dtype)
    x = np.random.default_rng(1).integers(info.min, info.max, (1, 4, 9, 8)).astype(dtype)
    program = compare(chain(dtype, zero), x)
    assert not program.hosts


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (chain(np.uint8, 128, 3), "zero points other than 0"),
        (chain(np.uint8, 128, 100, np.uint8), "zero points other than 128"),
    ],
)
def test_what_products_do_not_take_is_left_to_the_host(model: onnx.ModelProto, reason: str) -> None:
    x = np.random.default_rng(1).integers(0, 255, (1, 4, 9, 8)).astype(np.uint8)
    program = compare(model, x)
    assert any(reason in host.reason for host in program.hosts)


def rounded(model: onnx.ModelProto, ranges: dict[str, float]) -> onnx.ModelProto:
    """The model with its weights, and values of these ranges, rounded to symmetric int8, in floats."""
    made = onnx.ModelProto.FromString(model.SerializeToString())
    for item in made.graph.initializer:
        if (array := numpy_helper.to_array(item)).ndim > 1:
            peak = np.abs(array).reshape(len(array), -1).max(axis=1).reshape(-1, *[1] * (array.ndim - 1))
            scale = (peak / 127).astype(np.float16).astype(np.float32)
            item.CopyFrom(numpy_helper.from_array((np.rint(array / scale) * scale).astype(np.float32), item.name))
    nodes = list(made.graph.node)
    del made.graph.node[:]
    for name, largest in ranges.items():
        for part, value in (("scale", np.float32(largest / 127)), ("zero", np.int8(0))):
            made.graph.initializer.append(numpy_helper.from_array(np.asarray(value), f"{name}.{part}"))
    for node in (None, *nodes):
        made.graph.node.extend([node] if node is not None else [])
        for name in ("x",) if node is None else node.output:
            if name in ranges:
                ends = [f"{name}.scale", f"{name}.zero"]
                made.graph.node.append(helper.make_node("QuantizeLinear", [name, *ends], [f"{name}.q"]))
                made.graph.node.append(helper.make_node("DequantizeLinear", [f"{name}.q", *ends], [f"{name}.r"]))
    for node in made.graph.node:
        for index, name in enumerate(node.input):
            if name in ranges and node.op_type != "QuantizeLinear":
                node.input[index] = f"{name}.r"
    return made


def test_floats_with_static_scales_are_integers_between_operators(tmp_path: Path) -> None:
    """Residuals and largest values too; what a sum alone reads has the scale that is given for it."""
    model = graph(*residual_block(2), (1, 3, 30, 26))
    x = random(1, 3, 30, 26, seed=9)
    every = onnx.ModelProto.FromString(model.SerializeToString())
    del every.graph.output[:]
    names = [node.output[0] for node in model.graph.node]
    every.graph.output.extend(helper.make_tensor_value_info(name, 1, None) for name in names)
    values = onnxruntime.InferenceSession(every.SerializeToString()).run(names, {"x": x})
    ranges = {name: float(np.abs(value).max()) for name, value in zip(names, values, strict=True)} | {"x": 4.0}
    student, machine = from_model(model, Path(), "net"), Target.load("nvdla-full")
    precision = replace(resolve("int8", "int8", "channel", None), ranges=tuple(ranges.items()))
    seen: list[Any] = []
    program = compile_onnx(student, machine, precision, observe=lambda compiled, _: seen.append(compiled))
    assert program is not None
    assert not program.hosts
    assert [op.kind for op in program.ops].count("add") == 0
    got = load(program, simulate(program, machine), student, machine).run({"x": x})["y"]
    same = rounded(model, {name: ranges[name] for name in ("x", "p", "r2", "r3", "r4", "c5", "f")})
    expected = onnxruntime.InferenceSession(same.SerializeToString()).run(["y"], {"x": x})[0]
    assert np.abs(got - expected).max() < 0.02 * np.abs(expected).max()
    made = [(launch.spec.kind, launch.outs[0].arg.dtype) for launch in seen[0].launches.launches]
    products = [dtype for kind, dtype in made if kind in ("conv", "linear", "pool")]
    assert products == [Dtype.I8] * 6 + [Dtype.F16, Dtype.F32]  # the average reads a float
