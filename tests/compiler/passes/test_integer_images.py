"""What becomes integers, and what stays a float."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from firsttoken_compiler.frontend.onnx_file import from_model
from firsttoken_compiler.isa.program import Program
from firsttoken_compiler.isa.vector_kernel import VectorKernel
from firsttoken_compiler.options import resolve
from firsttoken_compiler.passes.integer_images import Grid, moved
from firsttoken_compiler.pipeline import compile_onnx
from firsttoken_compiler.target.target import Target


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(("max(s0, 0.0)", "min(max(s0, 0.0), 6.0)", "min(max(s0, -1.0), 1.0)", "mul(s0, sigmoid(s0))")),
    st.floats(0.004, 0.2), st.integers(-128, 127), st.floats(-20, 20),
)  # fmt: skip
def test_a_function_of_values_as_one_of_their_integers(text: str, scale: float, zero: int, value: float) -> None:
    def of(kernel: str, x: float) -> float:
        return float(VectorKernel.parse(kernel).evaluate([np.full((1, 1, 1), x, np.float32)], (1, 1, 1)).item())

    wanted = np.clip(np.rint(of(text, value) / scale + zero), -128, 127)
    got = np.clip(np.rint(of(moved(text, Grid(scale, float(zero))), value / scale + zero)), -128, 127)
    assert abs(wanted - got) <= 1


def test_saturation_is_the_bound_of_a_rectifier_whose_zero_is_the_least_integer() -> None:
    assert moved("max(s0, 0.0)", Grid(0.1, -128.0)) == "s0"
    assert moved("min(max(s0, 0.0), 6.0)", Grid(6 / 255, -128.0)) == "s0"
    assert moved("max(s0, 0.0)", Grid(0.1, 3.0)) == "max(s0, 3.0)"


def compiled(outputs: list[str], absent: bool = False) -> Program:
    """Two convolutions of a QDQ graph, `c` the float of the first; `absent`: the data of the weights is not here."""
    node = helper.make_node
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["xq"]), node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        node("DequantizeLinear", ["w", "ws"], ["wd"], axis=0), node("Conv", ["xd", "wd"], ["c"], pads=[1, 1, 1, 1]),
        node("QuantizeLinear", ["c", "t", "z"], ["cq"]), node("DequantizeLinear", ["cq", "t", "z"], ["cd"]),
        node("Conv", ["cd", "wd"], ["y"]),
    ]  # fmt: skip
    for each in nodes:
        each.name = each.output[0]
    arrays: dict[str, Any] = {
        "s": np.float32(0.1), "z": np.int8(5), "t": np.float32(0.2), "ws": np.full(4, 0.01, np.float32),
        "w": np.random.default_rng(0).integers(-99, 99, (4, 4, 3, 3)).astype(np.int8),
    }  # fmt: skip
    items = [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()]
    if absent:
        item = items[-1]
        item.ClearField("raw_data")
        item.data_location = 1
        for key, value in (("location", "none.bin"), ("offset", "0"), ("length", "144")):
            item.external_data.add(key=key, value=value)
    made = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("x", 1, (1, 4, 8, 8))],
        [helper.make_tensor_value_info(name, 1, None) for name in outputs], items,
    )  # fmt: skip
    import onnx

    model = onnx.shape_inference.infer_shapes(
        helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    )
    program = compile_onnx(
        from_model(model, Path(), "net"), Target.load("nvdla-full"), resolve("int8", "int8", "channel", None)
    )
    assert program is not None
    return program


def test_a_product_writes_integers_and_needs_no_zero_points_nor_sums() -> None:
    program = compiled(["y"])
    assert [op.kind for op in program.ops] == ["transpose", "map", "conv", "conv", "transpose"]
    names = {tensor.name for tensor in program.tensors if tensor.kind == "weight"}
    # The second convolution's result stays a float, so that it alone takes a zero point off.
    assert sum("sum" in name for name in names) == 1


@pytest.mark.parametrize(("outputs", "absent"), [(["y", "c"], False), (["y"], True)])
def test_what_is_read_as_a_float_and_what_is_not_known_stays(outputs: list[str], absent: bool) -> None:
    kinds = [op.kind for op in compiled(outputs, absent).ops]
    assert kinds.count("map") == 2  # both images are quantised apart
    assert kinds.count("conv") == 2
