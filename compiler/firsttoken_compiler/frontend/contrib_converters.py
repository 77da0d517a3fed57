"""Operators of com.microsoft, and of onnxruntime in the default domain, as raw npu calls or plain Relax.

Keys are as TVM's importer sees them: `domain.Operator`. What a converter refuses runs on the host, for the reason that
it gives.
"""

import itertools
from typing import Any, Final

import numpy as np

from firsttoken_compiler.frontend.contrib import (
    ADDED,
    ATTENTION,
    EMBEDDING,
    GROUP_QUERY_ATTENTION,
    MULTI_HEAD_ATTENTION,
)
from firsttoken_compiler.frontend.conversion import given, refused
from firsttoken_compiler.tvm import dialect
from firsttoken_compiler.tvm.api import dtype_of, relax, shape_of


def _last_axis(attrs: dict[str, Any], rank: int) -> None:
    if int(attrs.get("axis", -1)) not in (-1, rank - 1):
        raise refused(attrs, f"normalisation from axis {attrs['axis']} on, expected the last axis")


def simplified_layer_norm(_builder: Any, inputs: Any, attrs: dict[str, Any], _params: Any) -> Any:
    """RMSNorm over the last axis."""
    _last_axis(attrs, len(shape_of(inputs[0])))
    return relax.op.nn.rms_norm(inputs[0], inputs[1], [-1], float(attrs.get("epsilon", 1e-5)))


def _skip_sum(builder: Any, inputs: Any, bias_at: int) -> Any:
    total = builder.emit(relax.op.add(inputs[0], inputs[1]))
    bias = given(inputs, bias_at)
    return total if bias is None else builder.emit(relax.op.add(total, bias))


def skip_simplified_layer_norm(builder: Any, inputs: Any, attrs: dict[str, Any], _params: Any) -> Any:
    """RMSNorm of a sum; results: the norm, two that are only there in training, the sum."""
    total = _skip_sum(builder, inputs, 3)
    norm = builder.emit(relax.op.nn.rms_norm(total, inputs[2], [-1], float(attrs.get("epsilon", 1e-5))))
    return relax.Tuple([norm, total, total, total])


def skip_layer_norm(builder: Any, inputs: Any, attrs: dict[str, Any], _params: Any) -> Any:
    """LayerNorm of a sum; results as above."""
    total = _skip_sum(builder, inputs, 4)
    norm = builder.emit(_layer_norm(total, inputs[2], given(inputs, 3), float(attrs.get("epsilon", 1e-5))))
    return relax.Tuple([norm, total, total, total])


def _layer_norm(x: Any, gamma: Any, beta: Any | None, epsilon: float) -> Any:
    if beta is None:
        beta = relax.const(np.zeros(shape_of(gamma), dtype_of(gamma)))
    return relax.op.nn.layer_norm(x, gamma, beta, [-1], epsilon)


def bias_gelu(builder: Any, inputs: Any, _attrs: dict[str, Any], _params: Any) -> Any:
    """GELU by the error function, of a sum."""
    return relax.op.nn.gelu(builder.emit(relax.op.add(inputs[0], inputs[1])))


def gelu(_builder: Any, inputs: Any, _attrs: dict[str, Any], _params: Any) -> Any:
    """GELU by the error function."""
    return relax.op.nn.gelu(inputs[0])


def fast_gelu(builder: Any, inputs: Any, _attrs: dict[str, Any], _params: Any) -> Any:
    """GELU by the hyperbolic tangent, of a sum where a bias is given."""
    bias = given(inputs, 1)
    return relax.op.nn.gelu_tanh(inputs[0] if bias is None else builder.emit(relax.op.add(inputs[0], bias)))


def quick_gelu(builder: Any, inputs: Any, attrs: dict[str, Any], _params: Any) -> Any:
    """Swish: x * sigmoid(alpha * x)."""
    alpha = relax.const(float(attrs.get("alpha", 1.702)), dtype_of(inputs[0]))
    scaled = builder.emit(relax.op.multiply(inputs[0], alpha))
    return relax.op.multiply(inputs[0], builder.emit(relax.op.sigmoid(scaled)))


def fused_matmul(builder: Any, inputs: Any, attrs: dict[str, Any], _params: Any) -> Any:
    """A product with the second operand transposed or not, without any other of its options."""
    for key, plain in (("alpha", 1.0), ("transA", 0), ("transBatchA", 0), ("transBatchB", 0)):
        if float(attrs.get(key, plain)) != plain:
            raise refused(attrs, f"FusedMatMul with {key} {attrs[key]}")
    right = inputs[1]
    if int(attrs.get("transB", 0)):
        rank = len(shape_of(right))
        right = builder.emit(relax.op.permute_dims(right, [*range(rank - 2), rank - 1, rank - 2]))
    return relax.op.matmul(inputs[0], right)


def rotary_embedding(_builder: Any, inputs: Any, attrs: dict[str, Any], _params: Any) -> Any:
    """com.microsoft RotaryEmbedding: half-rotate, whole head, a position per token."""
    x, positions, cos, sin = inputs[:4]
    width = 2 * shape_of(cos)[1]
    shape = shape_of(x)
    if int(attrs.get("interleaved", 0)) or int(attrs.get("rotary_embedding_dim", 0)) not in (0, width):
        raise refused(attrs, "RotaryEmbedding interleaved or of a part of the head")
    if float(attrs.get("scale", 1.0)) != 1.0 or len(shape_of(positions)) != 2:
        raise refused(attrs, "RotaryEmbedding with a scale, or with an offset for all positions")
    heads = 0
    if len(shape) == 3:
        heads = int(attrs.get("num_heads", 0)) or shape[2] // width
        if heads * width != shape[2]:
            raise refused(attrs, "RotaryEmbedding of a part of the head")
    return dialect.raw_rope(x, cos, sin, positions, heads)


def group_query_attention(builder: Any, inputs: Any, attrs: dict[str, Any], _params: Any) -> Any:
    """GroupQueryAttention as `contrib.prepare` leaves it."""
    heads, kv_heads = int(attrs["num_heads"]), int(attrs["kv_num_heads"])
    query, key, value, past_key, past_value = inputs[:5]
    if key is None:
        features = shape_of(query)[2]
        width = features // (heads + 2 * kv_heads)
        query, key, value = _columns(builder, query, [heads * width, kv_heads * width, kv_heads * width])
    if int(attrs.get("do_rotary", 0)):
        positions = inputs[ADDED["positions"]]
        query, key = (
            builder.emit(dialect.raw_rope(x, inputs[7], inputs[8], positions, n))
            for x, n in ((query, heads), (key, kv_heads))
        )
    mask = given(inputs, ADDED["mask"])
    return _attention(
        builder, query, key, value, mask, past_key, past_value, heads=heads, kv_heads=kv_heads,
        scale=float(attrs.get("scale", 0.0)), causal=int(mask is None),
    )  # fmt: skip


def multi_head_attention(builder: Any, inputs: Any, attrs: dict[str, Any], _params: Any) -> Any:
    """MultiHeadAttention as `contrib.prepare` leaves it; the bias of all three lies in one vector."""
    bias = given(inputs, 3)
    operands = list(inputs[:3])
    if bias is not None:
        sizes = [shape_of(x)[2] for x in operands]
        for index, (x, end) in enumerate(zip(operands, itertools.accumulate(sizes), strict=True)):
            part = builder.emit(relax.op.strided_slice(bias, [0], [end - sizes[index]], [end]))
            operands[index] = builder.emit(relax.op.add(x, part))
    heads = int(attrs["num_heads"])
    return _attention(
        builder, *operands, given(inputs, ADDED["mask"]), given(inputs, 6), given(inputs, 7), heads=heads,
        kv_heads=heads, scale=float(attrs.get("scale", 0.0)), causal=int(attrs.get("unidirectional", 0)),
    )  # fmt: skip


def attention(builder: Any, inputs: Any, attrs: dict[str, Any], _params: Any) -> Any:
    """Attention as `contrib.prepare` leaves it: one product makes queries, keys and values."""
    x, weight, bias = inputs[:3]
    product = builder.emit(relax.op.matmul(x, weight))
    if bias is not None:
        product = builder.emit(relax.op.add(product, bias))
    parts = _columns(builder, product, [shape_of(product)[2] // 3] * 3)
    heads = int(attrs["num_heads"])
    return _attention(
        builder, *parts, given(inputs, ADDED["mask"]), None, None, heads=heads, kv_heads=heads,
        scale=float(attrs.get("scale", 0.0)), causal=int(attrs.get("unidirectional", 0)),
    )  # fmt: skip


def _attention(builder: Any, *operands: Any, **attributes: Any) -> Any:
    result = builder.emit(dialect.raw_attention(*operands, **attributes))
    return relax.Tuple([builder.emit(relax.TupleGetItem(result, i)) for i in range(3)])


def _columns(builder: Any, packed: Any, sizes: list[int]) -> list[Any]:
    """Matrices that lie side by side in one."""
    ends = list(itertools.accumulate(sizes))
    return [
        builder.emit(relax.op.strided_slice(packed, [2], [end - size], [end]))
        for size, end in zip(sizes, ends, strict=True)
    ]


def embed_layer_norm(builder: Any, inputs: Any, attrs: dict[str, Any], _params: Any) -> Any:
    """EmbedLayerNormalization as `contrib.prepare` leaves it; results: the norm, the count of the mask, the sum."""
    total = builder.emit(relax.op.take(inputs[2], inputs[ADDED["ids"]], axis=0))
    tables = [(inputs[3], inputs[ADDED["positions"]])]
    if inputs[1] is not None:
        tables.append((inputs[4], inputs[ADDED["kinds"]]))
    for table, numbers in tables:
        rows = builder.emit(relax.op.take(table, numbers, axis=0))
        total = builder.emit(relax.op.add(total, rows))
    norm = builder.emit(_layer_norm(total, inputs[5], inputs[6], float(attrs.get("epsilon", 1e-12))))
    return relax.Tuple([norm, total, total])


CONVERTERS: Final = {
    "SimplifiedLayerNormalization": simplified_layer_norm,
    "com.microsoft.SimplifiedLayerNormalization": simplified_layer_norm,
    "com.microsoft.SkipSimplifiedLayerNormalization": skip_simplified_layer_norm,
    "com.microsoft.SkipLayerNormalization": skip_layer_norm,
    "com.microsoft.BiasGelu": bias_gelu,
    "com.microsoft.Gelu": gelu,
    "com.microsoft.FastGelu": fast_gelu,
    "com.microsoft.QuickGelu": quick_gelu,
    "com.microsoft.FusedMatMul": fused_matmul,
    "com.microsoft.RotaryEmbedding": rotary_embedding,
    GROUP_QUERY_ATTENTION: group_query_attention,
    MULTI_HEAD_ATTENTION: multi_head_attention,
    ATTENTION: attention,
    EMBEDDING: embed_layer_norm,
}
