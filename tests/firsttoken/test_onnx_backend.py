"""ONNX's backend interface: its own node tests on the functional machine, and what the interface promises."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx.backend.test.loader import load_model_tests
from onnx.backend.test.runner import Runner

from firsttoken import onnx_backend
from firsttoken.onnx_backend import FOLDED, HOST, NPU
from firsttoken_compiler.errors import OptionError, StudentError

ON_NPU = [
    "abs", "ceil", "exp", "floor", "sqrt", "tanh", "sigmoid", "relu", "neg", "reciprocal", "erf", "log", "elu",
    "leakyrelu", "softplus", "softsign", "hardsigmoid", "hardswish", "add", "sub", "mul", "div", "sum_two_inputs",
    "softmax_axis_2", "softmax_large_number", "logsoftmax_axis_2", "gelu_default_1", "swish", "max_two_inputs",
    "min_two_inputs", "isnan",
]  # fmt: skip
"""Every node that is computed is computed on the NPU, to the tests' own tolerance."""
ON_HOST = [
    "acos", "and2d", "argmax_default_axis_example", "bitshift_left_uint8", "bitwise_and_i32_2d",
    "cast_FLOAT_to_DOUBLE", "cast_FLOAT_to_FLOAT8E4M3FN", "cast_INT4_to_FLOAT", "cast_UINT4_to_FLOAT",
    "compress_0", "constant", "constantofshape_int_zeros", "cumprod_1d", "cumsum_1d", "det_2d", "equal",
    "expand_dim_changed", "eyelike_with_dtype", "gather_elements_0", "hardmax_axis_1", "identity", "if",
    "l2normalization_axis_0", "layer_normalization_2d_axis1_expanded", "matmulinteger", "mod_mixed_sign_int64",
    "not_2d", "onehot_with_axis", "pow", "qlinearmatmul_2D_int8_float32", "quantizelinear", "dequantizelinear",
    "scan9_sum", "reduce_l2_do_not_keepdims_example_expanded", "reduce_sum_empty_set",
    "resize_downsample_scales_linear_align_corners", "maxunpool_export_with_output_shape", "round",
    "scatter_elements_with_axis", "shape", "size", "slice", "slice_start_out_of_bounds", "tile",
    "transpose_default", "where_example", "xor2d", "range_int32_type_negative_delta",
    "attention_23_boolmask_fullymasked_row_nan_robustness", "castlike_FLOAT_to_FLOAT16", "top_k",
    "tril_one_row_neg", "reduce_mean_keepdims_random", "ai_onnx_ml_binarizer", "adagrad",
]  # fmt: skip
"""With the host or on it: integers, booleans, narrow types, empty tensors, control flow, old and new operator sets."""


@cache
def cases() -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {case.name: case for case in load_model_tests(kind="node")}


def checked(name: str) -> dict[str, str]:
    """Runs a node test and compares; where its nodes ran."""
    case = cases()[f"test_{name}"]
    rep = onnx_backend.prepare(case.model, "NPU")
    for inputs, expected in case.data_sets:
        arrays = [[onnx.numpy_helper.to_array(a) if isinstance(a, onnx.TensorProto) else a for a in part]
                  for part in (inputs, expected)]  # fmt: skip
        Runner.assert_similar_outputs(arrays[1], rep.run(arrays[0]), case.rtol, case.atol)
    return dict(rep.latest.placement)


@pytest.mark.parametrize("name", ON_NPU)
def test_nodes_on_the_npu_alone(name: str) -> None:
    places = checked(name)
    assert HOST not in places.values()
    assert NPU in places.values()


@pytest.mark.parametrize("name", ON_HOST)
def test_nodes_with_the_host(name: str) -> None:
    assert set(checked(name).values()) <= {NPU, HOST, FOLDED}


def relu_of_product(rows: int | str = 4) -> onnx.ModelProto:
    weight = onnx.numpy_helper.from_array(np.eye(8, dtype=np.float32) * 2, "w")
    x, y = (helper.make_tensor_value_info(name, 1, [rows, 8]) for name in "xy")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["p"], "product"), helper.make_node("Relu", ["p"], ["y"], "relu")]
    return helper.make_model(
        helper.make_graph(nodes, "g", [x], [y], [weight]), opset_imports=[helper.make_opsetid("", 18)]
    )


def test_inputs_as_list_dictionary_and_array() -> None:
    rep = onnx_backend.prepare(relu_of_product(), target="systolic-128")
    x = np.linspace(-1, 1, 32, dtype=np.float32).reshape(4, 8)
    for inputs in ([x], (x,), {"x": x}, x):
        (y,) = rep.run(inputs)
        np.testing.assert_allclose(y, np.maximum(2 * x, 0), rtol=1e-3)
    assert rep.latest.placement == {"product": NPU, "relu": NPU}
    assert rep.latest.timeline.total_fs > 0
    (again,) = onnx_backend.run_model(relu_of_product(), [x])
    np.testing.assert_array_equal(again, y)


@pytest.mark.parametrize("inputs", [[], {"z": np.zeros((4, 8), np.float32)}, [np.zeros((2, 8), np.float32)]])
def test_wrong_inputs_are_refused(inputs: Any) -> None:
    rep = onnx_backend.prepare(relu_of_product())
    with pytest.raises(OptionError, match="input"):
        rep.run(inputs)


def test_open_dimensions_are_those_of_the_arrays() -> None:
    rep = onnx_backend.prepare(relu_of_product("rows"))
    with pytest.raises(OptionError, match="open dimensions"):
        _ = rep.latest
    for rows in (2, 5, 2):
        x = np.ones((rows, 8), np.float32)
        np.testing.assert_array_equal(rep.run([x])[0], 2 * x)
    assert len(rep._made) == 2


def test_products_beyond_float16_are_an_error_and_no_number() -> None:
    model = relu_of_product()
    model.graph.node.append(helper.make_node("Sub", ["y", "y"], ["z"], "difference"))
    model.graph.node.append(helper.make_node("MatMul", ["z", "w"], ["t"], "again"))
    model.graph.output[0].name = "t"
    rep = onnx_backend.prepare(model)
    np.testing.assert_array_equal(rep.run([np.ones((4, 8), np.float32)])[0], np.zeros((4, 8)))
    with pytest.raises(StudentError, match="not a number"):
        rep.run([np.full((4, 8), 1e30, np.float32)])


def test_devices() -> None:
    assert onnx_backend.supports_device("NPU")
    assert onnx_backend.supports_device("CPU:0")
    assert not onnx_backend.supports_device("CUDA")
    with pytest.raises(OptionError, match="CUDA"):
        onnx_backend.prepare(relu_of_product(), "CUDA")


def test_without_fallback_the_hosts_nodes_are_an_error() -> None:
    with pytest.raises(StudentError, match="cannot run on the NPU"):
        onnx_backend.prepare(cases()["test_acos"].model, fallback=False)


def test_one_node() -> None:
    node = helper.make_node("Exp", ["x"], ["y"])
    x = np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)
    for given in (None, [(np.float32, (2, 4))]):
        (y,) = onnx_backend.run_node(node, [x], outputs_info=given)
        np.testing.assert_allclose(y, np.exp(x), rtol=1e-5)
    (y,) = onnx_backend.run_node(node, [x], opset_version=13)
    np.testing.assert_allclose(y, np.exp(x), rtol=1e-5)
