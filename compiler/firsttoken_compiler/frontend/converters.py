"""ONNX operators that TVM's importer lacks or gets wrong, as raw npu calls or plain Relax.

Each converter has the signature of TVM's: (block builder, inputs, attributes, [values, parameters]).
"""

import math
from typing import Any

import numpy as np

from firsttoken_compiler.frontend import (
    contrib_converters,
    index_converters,
    quantised_converters,
    vector_converters,
    vision_converters,
)
from firsttoken_compiler.frontend.conversion import Converter, given, refused
from firsttoken_compiler.tvm import dialect
from firsttoken_compiler.tvm.api import GenericConst, dtype_of, is_static, onnx_frontend, relax, shape_of


def rotary_embedding(_builder: Any, inputs: Any, attrs: dict[str, Any], _params: Any) -> Any:
    """ai.onnx RotaryEmbedding (opset 23): half-rotate, whole head, 3-D or 4-D input."""
    if attrs.get("interleaved", 0) or attrs.get("rotary_embedding_dim", 0):
        raise refused(attrs, "RotaryEmbedding interleaved or partial is not supported: export half-rotate RoPE")
    positions = given(inputs, 3)
    heads = int(attrs.get("num_heads", 0)) if len(shape_of(inputs[0])) == 3 else 0
    return dialect.raw_rope(inputs[0], inputs[1], inputs[2], positions, heads)


def attention(builder: Any, inputs: Any, attrs: dict[str, Any], _params: Any) -> Any:
    """ai.onnx Attention (opset 23, 24): 3-D with head counts or 4-D; mask, past and present optional; GQA."""
    for key in ("softcap", "qk_matmul_output_mode"):
        if attrs.get(key, 0):
            raise refused(attrs, f"Attention with {key}={attrs[key]} is not supported")
    for key in ("left_window_size", "right_window_size"):
        if int(attrs.get(key, -1)) >= 0:
            raise refused(attrs, f"Attention with {key}={attrs[key]} is not supported")
    query, key_, value, mask, past_key, past_value, lengths = (given(inputs, i) for i in range(7))
    if lengths is not None:
        raise refused(attrs, "Attention with nonpad_kv_seqlen is not supported: use a static KV cache")
    call = dialect.raw_attention(
        query, key_, value, mask, past_key, past_value,
        heads=int(attrs.get("q_num_heads", 0)), kv_heads=int(attrs.get("kv_num_heads", 0)),
        scale=float(attrs.get("scale", 0.0) or 0.0), causal=int(attrs.get("is_causal", 0)),
    )  # fmt: skip
    result = builder.emit(call)
    return relax.Tuple([builder.emit(relax.TupleGetItem(result, i)) for i in range(3)])


def softmax(builder: Any, inputs: Any, attrs: dict[str, Any], params: Any) -> Any:
    """Softmax; over the last axis it is the same in all operator sets, which TVM spells with reshapes before 13."""
    old = int(attrs["tvm_custom"]["opset"]) < 13
    rank = len(shape_of(inputs[0]))
    if int(attrs.get("axis", 1 if old else -1)) in (-1, rank - 1):
        return relax.op.nn.softmax(inputs[0], -1)
    stock = onnx_frontend.Softmax
    return (stock._impl_v1 if old else stock._impl_v13)(builder, inputs, attrs, params)


def swish(builder: Any, inputs: Any, attrs: dict[str, Any], _params: Any) -> Any:
    """ai.onnx Swish (opset 24): x * sigmoid(alpha x), SiLU where alpha is 1."""
    x, alpha = inputs[0], float(attrs.get("alpha", 1.0))
    inner = x if alpha == 1.0 else builder.emit(relax.op.multiply(x, relax.const(alpha, dtype_of(x))))
    return relax.op.multiply(x, builder.emit(relax.op.sigmoid(inner)))


def rms_normalization(_builder: Any, inputs: Any, attrs: dict[str, Any], _params: Any) -> Any:
    """ai.onnx RMSNormalization (opset 23) over the last axis."""
    rank = len(inputs[0].ty.shape)
    if int(attrs.get("axis", -1)) not in (-1, rank - 1):
        raise refused(attrs, "RMSNormalization over more than the last axis")
    return relax.op.nn.rms_norm(inputs[0], inputs[1], [-1], float(attrs.get("epsilon", 1e-5)))


def gather(builder: Any, inputs: Any, attrs: dict[str, Any], params: Any) -> Any:
    """Gather of rows by run-time indices as a plain take; TVM's own adds arithmetic for negative indices."""
    table, ids = inputs[0], inputs[1]
    variable = isinstance(table, relax.Var) and isinstance(ids, relax.Var) and isinstance(ids.ty, relax.TensorType)
    if variable and int(attrs.get("axis", 0)) == 0 and len(table.ty.shape) == 2:
        return relax.op.take(table, ids, axis=0)
    if index_converters.is_whole(table, ids, attrs):
        return relax.op.reshape(table, (*shape_of(ids), *shape_of(table)[1:]))
    rows = _row_numbers(table, ids, attrs)
    if rows is not None:
        return relax.op.take(table, relax.const(rows), axis=0)
    index = _one_index(ids)
    if index is not None and isinstance(table, relax.Var) and is_float_tensor(table):
        axis = int(attrs.get("axis", 0)) % len(table.ty.shape)
        extent = shape_of(table)[axis]
        if not -extent <= index < extent:
            raise refused(attrs, f"index {index} of an axis of {extent}")
        first = index % extent
        part = builder.emit(relax.op.strided_slice(table, [axis], [first], [first + 1]))
        return part if len(shape_of(ids)) == 1 else relax.op.squeeze(part, [axis])
    return onnx_frontend.Gather._impl_v13(builder, inputs, attrs, params)


def _row_numbers(table: Any, ids: Any, attrs: dict[str, Any]) -> np.ndarray | None:
    """Constant numbers of several rows of a matrix, counted from the front; None for anything else, or beyond it."""
    if not isinstance(table, relax.Var) or len(table.ty.shape) != 2 or int(attrs.get("axis", 0)) != 0:
        return None
    if not isinstance(ids, GenericConst) or math.prod(shape_of(ids)) < 2:
        return None
    array, extent = ids.value.numpy().astype(np.int64), shape_of(table)[0]
    return array % extent if array.min() >= -extent and array.max() < extent else None


def _one_index(ids: Any) -> int | None:
    """A constant index, alone or in a list of one."""
    if not isinstance(ids, GenericConst) or len(shape_of(ids)) > 1:
        return None
    array = ids.value.numpy()
    return int(array.reshape(-1)[0]) if array.size == 1 else None


def is_float_tensor(value: Any) -> bool:
    """Whether a value is a tensor of floats whose shape is known."""
    known = isinstance(value.ty, relax.TensorType) and is_static(value)
    return known and dtype_of(value) in ("float16", "float32")


CONVERTERS: dict[str, Converter] = {
    **contrib_converters.CONVERTERS,
    **index_converters.CONVERTERS,
    **quantised_converters.CONVERTERS,
    **vector_converters.CONVERTERS,
    **vision_converters.CONVERTERS,
    "Attention": attention,
    "Gather": gather,
    "MaxPool": quantised_converters.max_pool,
    "RMSNormalization": rms_normalization,
    "RotaryEmbedding": rotary_embedding,
    "Softmax": softmax,
    "Swish": swish,
}
