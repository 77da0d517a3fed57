"""Half-precision graphs read as float32: same operators as a float32 export, same numbers, declared types kept."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from cases import random, whole, written
from onnx import TensorProto, helper, numpy_helper

from firsttoken_compiler.frontend.onnx_file import OnnxStudent, from_model
from firsttoken_compiler.frontend.widen import declared_types, widen

NORM = (
    "h = Cast<to=1>(x) s = Pow(h, two) m = ReduceMean<keepdims=1>(s, axes) a = Add(m, eps) r = Sqrt(a) d = Div(h, r)"
    " n = Cast<to=10>(d) g = Mul(gamma, n) y = MatMul(g, w)"
)
"""RMSNorm and a product as exporters of float16 write them."""


def half_model() -> onnx.ModelProto:
    arrays = {
        "two": np.float32(2), "axes": np.array([-1]), "eps": np.float32(1e-5), "gamma": random(8).astype(np.float16),
        "w": random(8, 6).astype(np.float16),
    }  # fmt: skip
    model = written("(float16[1,4,8] x) => (float16[1,4,6] y)", NORM, **arrays)
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def opened(model: onnx.ModelProto) -> OnnxStudent:
    return from_model(model, Path(), "written")


def results(model: onnx.ModelProto, feeds: dict[str, Any]) -> list[Any]:
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, feeds)


def test_the_casts_are_gone_and_the_numbers_stay() -> None:
    student = opened(half_model())
    wide = widen(student)
    assert [node.op_type for node in wide.graph.node] == [
        "Pow", "ReduceMean", "Add", "Sqrt", "Div", "Mul", "MatMul",
    ]  # fmt: skip
    onnx.checker.check_model(whole(wide), full_check=True)
    x = random(1, 4, 8)
    (expected,) = results(half_model(), {"x": x.astype(np.float16)})
    (actual,) = results(whole(wide), {"x": x.astype(np.float16).astype(np.float32)})
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, rtol=0, atol=4e-3 * np.abs(expected).max())


def test_what_the_file_declares_is_remembered_and_the_file_untouched() -> None:
    model = half_model()
    student = opened(model)
    before = model.SerializeToString()
    wide = widen(student)
    assert declared_types(wide) == {"x": TensorProto.FLOAT16, "y": TensorProto.FLOAT16}
    values = (*wide.graph.input, *wide.graph.output)
    assert {value.type.tensor_type.elem_type for value in values} == {TensorProto.FLOAT}
    assert model.SerializeToString() == before


def test_a_float32_graph_is_left_alone() -> None:
    student = opened(written("(float[1,4,8] x) => (float[1,4,6] y)", "y = MatMul(x, w)", w=random(8, 6)))
    assert widen(student) is student


def test_bfloat16_keeps_every_bit_of_its_weights() -> None:
    w = random(8, 6).astype(ml_dtypes.bfloat16)
    tensor = helper.make_tensor("w", TensorProto.BFLOAT16, w.shape, w.tobytes(), raw=True)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "g",
        [helper.make_tensor_value_info("x", TensorProto.BFLOAT16, [1, 4, 8])],
        [helper.make_tensor_value_info("y", TensorProto.BFLOAT16, [1, 4, 6])], [tensor],
    )  # fmt: skip
    wide = widen(opened(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])))
    assert wide.initializers["w"].onnx_type == TensorProto.FLOAT
    np.testing.assert_array_equal(wide.array("w"), w.astype(np.float32))


@pytest.mark.parametrize("output", [True, False])
def test_a_cast_that_is_an_output_stays_as_a_node(output: bool) -> None:
    signature = "(float16[1,4,8] x) => (float[1,4,8] y)" if output else "(float16[1,4,8] x) => (float[1,4,8] z)"
    model = written(signature, "y = Cast<to=1>(x)" + ("" if output else " z = Neg(y)"))
    kinds = [node.op_type for node in widen(opened(model)).graph.node]
    assert kinds == (["Identity"] if output else ["Neg"])


def test_tensors_in_attributes_and_subgraphs_are_widened() -> None:
    half = numpy_helper.from_array(np.float16([1.5]).reshape(()), "c")
    branch = helper.make_graph(
        [helper.make_node("Constant", [], ["c"], value=half), helper.make_node("Add", ["x", "c"], ["b"])], "branch", [],
        [helper.make_tensor_value_info("b", TensorProto.FLOAT16, [2])],
    )  # fmt: skip
    node = helper.make_node("If", ["p"], ["y"], then_branch=branch, else_branch=branch)
    graph = helper.make_graph(
        [node], "g",
        [helper.make_tensor_value_info("p", TensorProto.BOOL, []),
         helper.make_tensor_value_info("x", TensorProto.FLOAT16, [2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, [2])],
    )  # fmt: skip
    wide = widen(opened(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)))
    onnx.checker.check_model(whole(wide), full_check=True)
    (y,) = results(whole(wide), {"p": np.array(True), "x": np.float32([1, 2])})
    np.testing.assert_array_equal(y, [2.5, 3.5])
