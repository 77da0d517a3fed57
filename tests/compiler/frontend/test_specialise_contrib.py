"""Shapes of onnxruntime's own operators, held against what onnxruntime returns."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import helper

from firsttoken_compiler.frontend.contrib_shapes import Operands, contrib_types
from firsttoken_compiler.frontend.onnx_file import from_model
from firsttoken_compiler.frontend.specialise import Walk

MS = "com.microsoft"
Given = Sequence[NDArray[Any] | None]


def f(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32) / 4


def u(*shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(len(shape)).integers(0, 255, shape).astype(np.uint8)


S, Z = np.array(0.5, np.float32), np.array(7, np.uint8)
COS = f(32, 4)
GQA = {"num_heads": 4, "kv_num_heads": 2, "do_rotary": 0}
SEQ, TOTAL = np.array([5], np.int32), np.array(6, np.int32)

CASES: dict[str, tuple[str, Given, dict[str, Any], int]] = {
    "simplified": ("SimplifiedLayerNormalization", [f(2, 3, 8), f(8)], {"axis": -1}, 1),
    "skip simplified": ("SkipSimplifiedLayerNormalization", [f(2, 3, 8), f(2, 3, 8), f(8)], {}, 4),
    "skip": ("SkipLayerNormalization", [f(2, 3, 8), f(2, 3, 8), f(8), f(8), f(8)], {}, 4),
    "embed": ("EmbedLayerNormalization", [
        np.ones((2, 5), np.int32), np.ones((2, 5), np.int32), f(9, 8), f(9, 8), f(2, 8), f(8), f(8),
        np.ones((2, 5), np.int32)], {}, 3),
    "bias gelu": ("BiasGelu", [f(2, 3, 8), f(8)], {}, 1),
    "fast gelu": ("FastGelu", [f(2, 3, 8), f(8)], {}, 1),
    "quick gelu": ("QuickGelu", [f(2, 3, 8)], {}, 1),
    "gelu": ("Gelu", [f(2, 3, 8)], {}, 1),
    "rotary": ("RotaryEmbedding", [f(1, 2, 3, 8), np.array([0], np.int64), COS, COS], {}, 1),
    "fused matmul": ("FusedMatMul", [f(2, 3, 8), f(2, 5, 8)], {"transB": 1, "alpha": 2.0}, 1),
    "transposed batch": ("FusedMatMul", [f(2, 3, 8), f(3, 8, 5)], {"transBatchA": 1}, 1),
    "bits": ("MatMulNBits", [f(2, 3, 64), u(5, 2, 16), f(10)], {"K": 64, "N": 5, "bits": 4, "block_size": 32}, 1),
    "gather": ("GatherBlockQuantized", [u(6, 16), np.array([[1, 2, 5]]), f(6, 2)],
               {"block_size": 16, "quantize_axis": 1, "gather_axis": 0, "bits": 4}, 1),
    "dynamic matmul": ("DynamicQuantizeMatMul", [f(2, 3, 8), u(8, 5), f(1), u(1)], {}, 1),
    "integer to float": ("MatMulIntegerToFloat", [u(2, 3, 8), u(8, 5), S, S, Z, Z], {}, 1),
    "add": ("QLinearAdd", [u(2, 3, 8), S, Z, u(1, 8), S, Z, S, Z], {}, 1),
    "mul": ("QLinearMul", [u(2, 3, 8), S, Z, u(2, 1, 1), S, Z, S, Z], {}, 1),
    "concat": ("QLinearConcat", [S, Z, u(2, 3), S, Z, u(2, 5), S, Z], {"axis": 1}, 1),
    "sigmoid": ("QLinearSigmoid", [u(2, 3), S, Z, S, Z], {}, 1),
    "leaky": ("QLinearLeakyRelu", [u(2, 3), S, Z, S, Z], {"alpha": 0.5}, 1),
    "softmax": ("QLinearSoftmax", [u(2, 3), S, Z, S, Z], {"axis": -1, "opset": 13}, 1),
    "average": ("QLinearAveragePool", [u(1, 2, 6, 7), S, Z, S, Z], {"kernel_shape": [2, 3], "strides": [2, 1]}, 1),
    "global average": ("QLinearGlobalAveragePool", [u(1, 2, 6, 7), S, Z, S, Z], {"channels_last": 0}, 1),
    "last channels": ("QLinearGlobalAveragePool", [u(1, 6, 7, 2), S, Z, S, Z], {"channels_last": 1}, 1),
    "gemm": ("QGemm", [u(3, 8), S, Z, u(5, 8), S, Z, np.zeros(5, np.int32), S, Z], {"transB": 1}, 1),
    "float gemm": ("QGemm", [u(8, 3), S, Z, u(8, 5), S, Z], {"transA": 1}, 1),
    "fused gemm": ("FusedGemm", [f(3, 8), f(8, 5), f(5)], {"activation": "Relu"}, 1),
    "fused conv": ("FusedConv", [f(1, 2, 6, 7), f(3, 2, 3, 3)], {"activation": "Relu", "pads": [1, 0, 1, 0]}, 1),
    "quantise": ("QuantizeLinear", [f(2, 3), S, Z], {}, 1),
    "dequantise": ("DequantizeLinear", [u(2, 3), S, Z], {}, 1),
    "attention": ("Attention", [f(2, 3, 8), f(8, 24), f(24)], {"num_heads": 2}, 1),
    "attention with a cache": ("Attention", [f(2, 3, 8), f(8, 24), f(24), None, f(2, 2, 2, 5, 4)],
                               {"num_heads": 2, "unidirectional": 1}, 2),
    "attention of other sizes": ("Attention", [f(2, 3, 8), f(8, 24), f(24)],
                                 {"num_heads": 2, "qkv_hidden_sizes": [4, 4, 16]}, 1),
    "quantised attention": ("QAttention", [u(2, 3, 8), u(8, 24), f(24), S, S, None, Z, Z], {"num_heads": 2}, 1),
    "heads": ("MultiHeadAttention", [f(2, 3, 8), f(2, 5, 8), f(2, 5, 16)], {"num_heads": 2}, 1),
    "heads of caches": ("MultiHeadAttention", [f(2, 3, 8), f(2, 3, 8), f(2, 3, 8), None, None, None, f(2, 2, 4, 4),
                                               f(2, 2, 4, 4)], {"num_heads": 2}, 3),
    "crossed heads": ("MultiHeadAttention", [f(2, 3, 8), f(2, 2, 5, 4), f(2, 2, 5, 4)], {"num_heads": 2}, 1),
    "grouped": ("GroupQueryAttention", [f(1, 6, 32), f(1, 6, 16), f(1, 6, 16), None, None, SEQ, TOTAL], GQA, 3),
    "grouped and packed": ("GroupQueryAttention", [f(1, 6, 64), None, None, None, None, SEQ, TOTAL], GQA, 3),
    "grouped step": ("GroupQueryAttention", [f(1, 1, 32), f(1, 1, 16), f(1, 1, 16), f(1, 2, 5, 8), f(1, 2, 5, 8), SEQ,
                                             TOTAL], GQA, 3),
    "grouped with room": ("GroupQueryAttention", [f(1, 1, 32), f(1, 1, 16), f(1, 1, 16), f(1, 2, 12, 8),
                                                  f(1, 2, 12, 8), SEQ, TOTAL], GQA, 3),
}  # fmt: skip

GPU_ONLY: dict[str, tuple[str, Given, dict[str, Any], int]] = {
    "packed heads": ("MultiHeadAttention", [f(2, 3, 2, 3, 4)], {"num_heads": 2}, 1),
    "packed pairs": ("MultiHeadAttention", [f(2, 3, 8), f(2, 5, 2, 2, 4)], {"num_heads": 2}, 1),
}
"""What onnxruntime does not run on a CPU."""


@pytest.mark.parametrize("name", CASES)
def test_types_are_those_of_onnxruntime(name: str) -> None:
    op_type, given, attributes, outputs = CASES[name]
    domain = "" if op_type == "SimplifiedLayerNormalization" else MS
    names = [f"i{index}" if array is not None else "" for index, array in enumerate(given)]
    made = [f"o{index}" for index in range(outputs)]
    if op_type in ("SkipSimplifiedLayerNormalization", "SkipLayerNormalization"):
        made = [made[0], "", "", made[3]]  # onnxruntime gives the statistics only in training
    feeds = {key: array for key, array in zip(names, given, strict=True) if array is not None}
    infos = [
        helper.make_tensor_value_info(key, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for key, array in feeds.items()
    ]
    node = helper.make_node(op_type, names, made, name="n", domain=domain, **attributes)
    graph = helper.make_graph([node], "g", infos, [helper.make_empty_tensor_value_info(key) for key in made if key])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(MS, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    values = {key: array for key, array in feeds.items() if array.dtype in (np.int32, np.int64)}
    walk = Walk(from_model(untyped(model), Path(), "m"))
    walk.types.visit(walk.student.graph.node[0], values)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for key, right in zip([key for key in made if key], session.run(None, feeds), strict=True):
        elem = helper.np_dtype_to_tensor_dtype(right.dtype)
        assert (walk.types.elem(key), walk.types.shape(key)) == (elem, right.shape), key


def untyped(model: Any) -> Any:
    """With outputs that say their element type only: nothing but the operator's rule tells the shape."""
    from onnx import ModelProto

    copy = ModelProto.FromString(model.SerializeToString())
    for value in copy.graph.output:
        value.type.tensor_type.elem_type = 1
    return copy


@pytest.mark.parametrize("name", [*CASES, *GPU_ONLY])
def test_what_the_inputs_do_not_tell_is_left_open(name: str) -> None:
    """Without shapes, or without inputs, a rule says nothing or leaves extents open; it never fails."""
    op_type, given, attributes, outputs = {**CASES, **GPU_ONLY}[name]
    kinds = [None if array is None else (helper.np_dtype_to_tensor_dtype(array.dtype), None) for array in given]
    for known in (kinds, kinds[:1], []):
        types = contrib_types(op_type, Operands(known, [None] * len(known), attributes, outputs))
        assert types is None or all(shape is None for _, shape in types)
    loose = [
        None if array is None else (helper.np_dtype_to_tensor_dtype(array.dtype), (None,) * array.ndim)
        for array in given
    ]
    types = contrib_types(op_type, Operands(loose, [None] * len(loose), attributes, outputs))
    exact = contrib_types(op_type, Operands(
        [None if a is None else (helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for a in given],
        [a if a is not None and a.size == 1 else None for a in given], attributes, outputs,
    ))  # fmt: skip
    for (_, open_shape), (_, shape) in zip(types or [], exact or [], strict=False):
        assert open_shape is None or shape is None or len(open_shape) == len(shape)
        pairs = zip(open_shape or (), shape or (), strict=False)
        assert all(left is None or left == right for left, right in pairs)


def test_packed_heads() -> None:
    """[batch, tokens, heads, 3, width], and keys with values as [batch, rows, heads, 2, width]."""
    results = {}
    for name, (op_type, given, attributes, _) in GPU_ONLY.items():
        kinds = [(1, array.shape) for array in given if array is not None]
        results[name] = contrib_types(op_type, Operands(kinds, [None] * len(kinds), attributes, 3))
    assert results["packed heads"] == [(1, (2, 3, 8)), (1, (2, 2, 3, 4)), (1, (2, 2, 3, 4))]
    assert results["packed pairs"] == [(1, (2, 3, 8)), (1, (2, 2, 5, 4)), (1, (2, 2, 5, 4))]
