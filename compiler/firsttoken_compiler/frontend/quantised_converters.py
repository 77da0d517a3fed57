"""Operators of quantised graphs as raw npu calls. Fused spellings become the calls that they are made of.

What has no rule later runs on the host as the ONNX node that it was.
"""

from collections.abc import Callable
from typing import Any, Final

from firsttoken_compiler.frontend import vision_converters
from firsttoken_compiler.frontend.blocks import DOMAIN, OPERATOR
from firsttoken_compiler.frontend.conversion import Converter, given, refused
from firsttoken_compiler.tvm import dialect, quantised_dialect
from firsttoken_compiler.tvm.api import Call, dtype_of, relax, shape_of

__all__ = ["CONVERTERS", "quantised_dialect"]


def _call(builder: Any, name: str, args: list[Any], **attrs: object) -> Any:
    return builder.emit(dialect.call(name, [arg for arg in args if arg is not None], **attrs))


def _dequantised(builder: Any, x: Any, scale: Any, zero: Any | None, axis: int = 1, block: int = 0) -> Any:
    return _call(builder, "npu.raw_dequantise", [x, scale, zero], axis=axis, block=block, out=dtype_of(scale))


def _pooled(builder: Any, inputs: Any, attrs: dict[str, Any], pool: Callable[[Any], Any]) -> Any:
    """A pool of dequantised values, quantised by inputs 3 and 4."""
    if int(attrs.get("channels_last", 0)):
        raise refused(attrs, "a pool of images whose channels are last")
    return _quantised(builder, builder.emit(pool(_dequantised(builder, *inputs[:3]))), inputs[3], given(inputs, 4))


def qlinear_average_pool(builder: Any, inputs: Any, attrs: dict[str, Any], params: Any) -> Any:
    """com.microsoft QLinearAveragePool with channels before lines."""
    average = vision_converters.CONVERTERS["AveragePool"]
    return _pooled(builder, inputs, attrs, lambda x: average(builder, [x], attrs, params))


def qlinear_global_average_pool(builder: Any, inputs: Any, attrs: dict[str, Any], _params: Any) -> Any:
    """com.microsoft QLinearGlobalAveragePool with channels before lines."""
    axes = list(range(2, len(shape_of(inputs[0]))))
    return _pooled(builder, inputs, attrs, lambda x: relax.op.mean(x, axes, keepdims=True))


def qlinear_conv(builder: Any, inputs: Any, attrs: dict[str, Any], params: Any) -> Any:
    """QLinearConv: a convolution of dequantised values, quantised; the bias is int32 in the scale of the sums."""
    x, weight = _dequantised(builder, *inputs[:3]), _dequantised(builder, inputs[3], inputs[4], inputs[5], 0)
    operands, bias = [x, weight], given(inputs, 8)
    if bias is not None:
        scale = builder.emit(relax.op.multiply(inputs[1], inputs[4]))
        operands.append(_dequantised(builder, bias, scale, None, 0))
    made = builder.emit(vision_converters.conv(builder, operands, attrs, params))
    return _quantised(builder, made, inputs[6], inputs[7])


def max_pool(builder: Any, inputs: Any, attrs: dict[str, Any], params: Any) -> Any:
    """MaxPool, also of integers that QuantizeLinear made: the largest is that of the values they stand for."""
    x, pool = inputs[0], vision_converters.CONVERTERS["MaxPool"]
    made = builder.lookup_binding(x) if isinstance(x, relax.Var) else None
    if not (isinstance(made, Call) and made.op.name == "npu.raw_quantise"):
        return pool(builder, inputs, attrs, params)
    scales, kept = list(made.args[1:]), dialect.plain_attributes(made)
    values = _dequantised(builder, x, scales[0], given(scales, 1), int(kept["axis"]), int(kept["block"]))
    pooled = builder.emit(pool(builder, [values], attrs, params))
    return builder.emit(dialect.call("npu.raw_quantise", [pooled, *scales], **kept))


def _quantised(builder: Any, x: Any, scale: Any, zero: Any | None, axis: int = 1, block: int = 0) -> Any:
    out = dtype_of(zero) if zero is not None else "uint8"
    return _call(builder, "npu.raw_quantise", [x, scale, zero], axis=axis, block=block, out=out)


def dequantize_linear(builder: Any, inputs: Any, attrs: dict[str, Any], _params: Any) -> Any:
    """DequantizeLinear of every opset: per tensor, per axis, blocked."""
    axis, block = int(attrs.get("axis", 1)), int(attrs.get("block_size", 0))
    return _dequantised(builder, inputs[0], inputs[1], given(inputs, 2), axis, block)


def quantize_linear(builder: Any, inputs: Any, attrs: dict[str, Any], _params: Any) -> Any:
    """QuantizeLinear to the integers of 8 and 16 bits."""
    zero = given(inputs, 2)
    if zero is None and int(attrs.get("output_dtype", 0)) not in (0, 2):
        raise refused(attrs, f"QuantizeLinear to type {attrs['output_dtype']} without zero point")
    if zero is not None and dtype_of(zero) not in ("int8", "uint8", "int16", "uint16"):
        raise refused(attrs, f"QuantizeLinear to {dtype_of(zero)} is not on the NPU")
    axis, block = int(attrs.get("axis", 1)), int(attrs.get("block_size", 0))
    return _quantised(builder, inputs[0], inputs[1], zero, axis, block)


def _dynamic(builder: Any, x: Any) -> list[Any]:
    made = _call(builder, "npu.raw_dynamic_quantise", [x])
    return [builder.emit(relax.TupleGetItem(made, index)) for index in range(3)]


def dynamic_quantize_linear(builder: Any, inputs: Any, _attrs: dict[str, Any], _params: Any) -> Any:
    """DynamicQuantizeLinear: uint8 with one scale and zero point for the whole tensor."""
    return relax.Tuple(_dynamic(builder, inputs[0]))


def _integer(builder: Any, a: Any, b: Any, a_zero: Any | None, b_zero: Any | None) -> Any:
    where = {"a_zero": 2 if a_zero is not None else 0, "b_zero": 0}
    if b_zero is not None:
        where["b_zero"] = 3 if a_zero is not None else 2
    return _call(builder, "npu.raw_integer_matmul", [a, b, a_zero, b_zero], **where)


def matmul_integer(builder: Any, inputs: Any, _attrs: dict[str, Any], _params: Any) -> Any:
    """MatMulInteger: int32."""
    return _integer(builder, inputs[0], inputs[1], given(inputs, 2), given(inputs, 3))


def _to_float(builder: Any, product: Any, a_scale: Any, b_scale: Any, bias: Any | None) -> Any:
    wide = builder.emit(relax.op.astype(product, dtype_of(a_scale)))
    result = builder.emit(relax.op.multiply(wide, builder.emit(relax.op.multiply(a_scale, b_scale))))
    return result if bias is None else builder.emit(relax.op.add(result, bias))


def matmul_integer_to_float(builder: Any, inputs: Any, _attrs: dict[str, Any], _params: Any) -> Any:
    """com.microsoft MatMulIntegerToFloat: the product, scaled, with a bias."""
    product = _integer(builder, inputs[0], inputs[1], given(inputs, 4), given(inputs, 5))
    return _to_float(builder, product, inputs[2], inputs[3], given(inputs, 6))


def dynamic_quantize_matmul(builder: Any, inputs: Any, _attrs: dict[str, Any], _params: Any) -> Any:
    """com.microsoft DynamicQuantizeMatMul: quantises its input, multiplies, scales, adds a bias."""
    values, scale, zero = _dynamic(builder, inputs[0])
    product = _integer(builder, values, inputs[1], zero, given(inputs, 3))
    return _to_float(builder, product, scale, inputs[2], given(inputs, 4))


def matmul_nbits(builder: Any, inputs: Any, attrs: dict[str, Any], _params: Any) -> Any:
    """com.microsoft MatMulNBits, without the permutation of g_idx."""
    if given(inputs, 4) is not None:
        raise refused(attrs, "MatMulNBits with g_idx permutes rows: export without act-order")
    zero, bias = given(inputs, 3), given(inputs, 5)
    return _call(
        builder, "npu.raw_nbits", [*inputs[:3], zero, bias], n=int(attrs["N"]), k=int(attrs["K"]),
        bits=int(attrs.get("bits", 4)), block=int(attrs["block_size"]), zero=3 if zero is not None else 0,
        bias=0 if bias is None else 3 + (zero is not None),
    )  # fmt: skip


def qlinear_matmul(builder: Any, inputs: Any, _attrs: dict[str, Any], _params: Any) -> Any:
    """QLinearMatMul: a product of dequantised values, quantised."""
    a, b = _dequantised(builder, inputs[0], inputs[1], inputs[2]), _dequantised(builder, *inputs[3:6])
    return _quantised(builder, builder.emit(relax.op.matmul(a, b)), inputs[6], inputs[7])


def qgemm(builder: Any, inputs: Any, attrs: dict[str, Any], _params: Any) -> Any:
    """com.microsoft QGemm with alpha 1: bias in int32 with the scale of the sums."""
    if float(attrs.get("alpha", 1.0)) != 1.0 or int(attrs.get("transA", 0)):
        raise refused(attrs, "QGemm with alpha or transA is not on the NPU")
    turned = int(attrs.get("transB", 0))
    a, b = _dequantised(builder, *inputs[:3]), _dequantised(builder, inputs[3], inputs[4], inputs[5], 1 - turned)
    if turned:
        b = builder.emit(relax.op.permute_dims(b, [1, 0]))
    product = builder.emit(relax.op.matmul(a, b))
    bias = given(inputs, 6)
    if bias is not None:
        scale = builder.emit(relax.op.multiply(inputs[1], inputs[4]))
        product = builder.emit(relax.op.add(product, _dequantised(builder, bias, scale, None, 0)))
    return product if given(inputs, 7) is None else _quantised(builder, product, inputs[7], given(inputs, 8))


def _qlinear_pair(operator: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """com.microsoft QLinearAdd and QLinearMul."""

    def convert(builder: Any, inputs: Any, _attrs: dict[str, Any], _params: Any) -> Any:
        a, b = _dequantised(builder, *inputs[:3]), _dequantised(builder, *inputs[3:6])
        return _quantised(builder, builder.emit(operator(a, b)), inputs[6], given(inputs, 7))

    return convert


def qlinear_sigmoid(builder: Any, inputs: Any, _attrs: dict[str, Any], _params: Any) -> Any:
    """com.microsoft QLinearSigmoid."""
    x = builder.emit(relax.op.sigmoid(_dequantised(builder, *inputs[:3])))
    return _quantised(builder, x, inputs[3], given(inputs, 4))


def qlinear_softmax(builder: Any, inputs: Any, attrs: dict[str, Any], _params: Any) -> Any:
    """com.microsoft QLinearSoftmax along the last axis."""
    rank = len(shape_of(inputs[0]))
    if int(attrs.get("axis", -1)) not in (-1, rank - 1):
        raise refused(attrs, "QLinearSoftmax over another axis than the last")
    x = builder.emit(relax.op.nn.softmax(_dequantised(builder, *inputs[:3]), axis=-1))
    return _quantised(builder, x, inputs[3], given(inputs, 4))


def qlinear_concat(builder: Any, inputs: Any, attrs: dict[str, Any], _params: Any) -> Any:
    """com.microsoft QLinearConcat: scale and zero point of the result first, then three inputs a part."""
    parts = [_dequantised(builder, *inputs[at : at + 3]) for at in range(2, len(inputs), 3)]
    whole = builder.emit(relax.op.concat(relax.Tuple(parts), axis=int(attrs["axis"])))
    return _quantised(builder, whole, inputs[0], inputs[1])


def gather_block_quantized(builder: Any, inputs: Any, attrs: dict[str, Any], _params: Any) -> Any:
    """com.microsoft GatherBlockQuantized of rows with blocks along them."""
    rank, bits = len(shape_of(inputs[0])), int(attrs.get("bits", 4))
    along = int(attrs.get("quantize_axis", 1)) % rank
    if rank != 2 or int(attrs.get("gather_axis", 0)) != 0 or along != 1:
        raise refused(attrs, "GatherBlockQuantized of anything but rows with blocks along them")
    width = shape_of(inputs[0])[1] * (8 // bits if dtype_of(inputs[0]) == "uint8" else 1)
    return _call(
        builder, "npu.raw_block_gather", list(inputs[:4]), width=width, bits=bits, out=dtype_of(inputs[2]),
        block=int(attrs.get("block_size", 128)),
    )  # fmt: skip


def dequantize_blocks(builder: Any, inputs: Any, attrs: dict[str, Any], _params: Any) -> Any:
    """DequantizeBlocks: weights in blocks of GGUF, which products and gathers of rows read as they are."""
    kind = attrs["type"]
    text = kind.decode() if isinstance(kind, bytes) else str(kind)
    return _call(builder, "npu.raw_blocks", [inputs[0]], type=text, k=int(attrs["k"]))


_MICROSOFT: Final = {
    "DequantizeLinear": dequantize_linear, "QuantizeLinear": quantize_linear, "MatMulNBits": matmul_nbits,
    "MatMulIntegerToFloat": matmul_integer_to_float, "DynamicQuantizeMatMul": dynamic_quantize_matmul, "QGemm": qgemm,
    "QLinearAdd": _qlinear_pair(relax.op.add), "QLinearMul": _qlinear_pair(relax.op.multiply),
    "QLinearSigmoid": qlinear_sigmoid, "QLinearSoftmax": qlinear_softmax, "QLinearConcat": qlinear_concat,
    "GatherBlockQuantized": gather_block_quantized, "QLinearAveragePool": qlinear_average_pool,
    "QLinearGlobalAveragePool": qlinear_global_average_pool,
}  # fmt: skip
CONVERTERS: Final[dict[str, Converter]] = {
    "DequantizeLinear": dequantize_linear, "QuantizeLinear": quantize_linear,
    "DynamicQuantizeLinear": dynamic_quantize_linear, "MatMulInteger": matmul_integer, "QLinearMatMul": qlinear_matmul,
    "QLinearConv": qlinear_conv,
    **{f"com.microsoft.{name}": converter for name, converter in _MICROSOFT.items()},
    f"{DOMAIN}.{OPERATOR}": dequantize_blocks,
}  # fmt: skip
