"""The `npu.*` dialect: Relax operators registered from Python.

`npu.raw_*` stand for ONNX operators that Relax lacks, in ONNX's layouts; passes/canonicalise.py turns them and the
decomposed spellings into the canonical operators, which work on matrices `[tokens, features]`.
"""

from collections.abc import Callable
from typing import Any

import tvm_ffi

from firsttoken_compiler.tvm.api import Call, Op, attributes, dtype_of, relax, shape_of, tvm

Infer = Callable[[Any, Any], Any]


def tensor(shape: Any, dtype: str) -> Any:
    """A Relax tensor type."""
    return relax.TensorType(list(shape), dtype)


def register(name: str, inputs: int, infer: Infer) -> None:
    """Registers a pure operator once per process; `inputs` is -1 for a variable number."""
    if name in _REGISTERED:
        return
    if name not in set(Op.list_op_names()):
        tvm_ffi.get_global_func("ir.RegisterOp")(name, "npu dialect")
    if inputs >= 0:
        Op.get(name).set_num_inputs(inputs)
    tvm.ir.register_op_attr(name, "FInferType", infer)
    tvm.ir.register_op_attr(name, "FPurity", True)
    _REGISTERED.add(name)


_REGISTERED: set[str] = set()


def call(name: str, args: list[Any], **attrs: object) -> Any:
    """A call of a registered operator."""
    return Call(Op.get(name), args, attributes(**attrs))


def plain_attributes(call: Any) -> dict[str, Any]:
    """Attributes of a call as Python numbers and strings."""
    return {key: value if isinstance(value, (int, float)) else str(value) for key, value in call.attrs.items()}


def _same(c: Any, _context: Any) -> Any:
    return c.args[0].ty


def _raw_attention(c: Any, _context: Any) -> Any:
    query, value = c.args[0].ty, c.args[2].ty
    dtype = dtype_of(c.args[0])
    if len(query.shape) == 3:
        kv_heads, rows = int(c.attrs["kv_heads"]), int(c.args[1].ty.shape[1])
        width = int(value.shape[2]) // kv_heads
        out = [query.shape[0], query.shape[1], int(c.attrs["heads"]) * width]
    else:
        kv_heads, rows, width = int(value.shape[1]), int(value.shape[2]), int(value.shape[3])
        out = [query.shape[0], query.shape[1], query.shape[2], width]
    rows += int(c.args[int(c.attrs["past_at"])].ty.shape[2]) if int(c.attrs["past_at"]) else 0
    present = tensor([query.shape[0], kv_heads, rows, width], dtype)
    return relax.TupleType([tensor(out, dtype), present, present])


def raw_rope(x: Any, cos: Any, sin: Any, positions: Any | None, heads: int) -> Any:
    """ONNX RotaryEmbedding: x 3-D with `heads` or 4-D (heads 0); caches `[positions, d/2]` or `[1, tokens, d/2]`."""
    return call("npu.raw_rope", [x, cos, sin] + ([positions] if positions is not None else []), heads=heads)


def raw_attention(
    query: Any, key: Any, value: Any, mask: Any | None, past_key: Any | None, past_value: Any | None,
    *, heads: int, kv_heads: int, scale: float, causal: int,
) -> Any:  # fmt: skip
    """ONNX Attention; returns (output, present key, present value)."""
    args = [query, key, value]
    mask_at = past_at = 0
    if mask is not None:
        mask_at = len(args)
        args.append(mask)
    if past_key is not None:
        past_at = len(args)
        args += [past_key, past_value]
    return call(
        "npu.raw_attention",
        args,
        heads=heads,
        kv_heads=kv_heads,
        scale=scale,
        causal=causal,
        mask_at=mask_at,
        past_at=past_at,
    )


def raw_host(args: list[Any], results: list[tuple[tuple[int, ...], str]], segment: int) -> Any:
    """A call of the host with results of these shapes and types, as a tuple."""
    return call("npu.raw_host", args, segment=segment, results=encode_results(results))


def encode_results(results: list[tuple[tuple[int, ...], str]]) -> str:
    """Shapes and types as text: attributes hold numbers and strings only."""
    return ";".join(f"{dtype}:{','.join(map(str, shape))}" for shape, dtype in results)


def decode_results(text: str) -> list[tuple[tuple[int, ...], str]]:
    """Inverse of `encode_results`."""
    found = []
    for part in filter(None, text.split(";")):
        dtype, _, extents = part.partition(":")
        found.append((tuple(int(extent) for extent in filter(None, extents.split(","))), dtype))
    return found


def _host_results(c: Any, _context: Any) -> Any:
    return relax.TupleType([tensor(shape, dtype) for shape, dtype in decode_results(str(c.attrs["results"]))])


def _raw_windows(c: Any, _context: Any) -> Any:
    """[images, channels, y, x] of a convolution or a pool."""
    channels = shape_of(c.args[1])[0] if len(c.args) > 1 else shape_of(c.args[0])[1]
    extents = [shape_of(c.args[0])[0], channels, int(c.attrs["out_y"]), int(c.attrs["out_x"])]
    return tensor(extents, dtype_of(c.args[0]))


register("npu.raw_conv", -1, _raw_windows)
register("npu.raw_pool", -1, _raw_windows)
register("npu.raw_batch_norm", -1, _same)
register("npu.raw_host", -1, _host_results)
register("npu.raw_rope", -1, _same)
register("npu.raw_attention", -1, _raw_attention)


def _gather(c: Any, _context: Any) -> Any:
    table, ids = c.args[0].ty, c.args[1].ty
    if "width" in c.attrs:  # of a table that is stored quantised, in bytes
        return tensor([ids.shape[0], int(c.attrs["width"])], str(c.attrs["out"]))
    return tensor([ids.shape[0], table.shape[0 if "turned" in c.attrs else 1]], str(c.attrs["out"]))


def declared(c: Any, _context: Any) -> Any:
    """A tensor of the first operand's shape and of the type `out`."""
    return tensor(shape_of(c.args[0]), str(c.attrs["out"]))


def _quantised(c: Any, _context: Any) -> Any:
    rows, width = shape_of(c.args[0])
    out = str(c.attrs["out"])
    if out in ("int8", "int16") and "static" not in c.attrs:
        return relax.TupleType([tensor([rows, width], out), tensor([rows, 1], "float32")])
    return tensor([rows, width], out)


def _norm_stats(c: Any, _context: Any) -> Any:
    """A column per number of a row; see `schedule.norm_definitions`."""
    count = 1 + (str(c.attrs["norm"]) == "layer_norm") + (str(c.attrs["out"]) in ("int8", "int16"))
    return relax.TupleType([tensor([shape_of(c.args[0])[0], 1], "float32") for _ in range(count)])


def _unpack(c: Any, _context: Any) -> Any:
    rows, width = shape_of(c.args[0])
    return tensor([rows, 2 * width], str(c.attrs["out"]))


def _group_sums(c: Any, _context: Any) -> Any:
    return tensor([shape_of(c.args[0])[0], int(c.attrs["groups"])], str(c.attrs["out"]))


def _linear(c: Any, _context: Any) -> Any:
    return tensor([shape_of(c.args[0])[0], int(c.attrs["n"])], str(c.attrs["out"]))


def _cache_shape(c: Any) -> list[int]:
    rows, width = shape_of(c.args[0])
    heads, past = int(c.attrs["kv_heads"]), int(c.attrs["past"])
    return [heads, past + rows, width // heads]


def _kv_append(c: Any, _context: Any) -> Any:
    return tensor(_cache_shape(c), str(c.attrs["out"]))


def _kv_quantise(c: Any, _context: Any) -> Any:
    shape = _cache_shape(c)
    return relax.TupleType([tensor(shape, "int8"), tensor([*shape[:2], 1], "float16")])


def _columns(c: Any, _context: Any) -> Any:
    return tensor([shape_of(c.args[0])[0], int(c.attrs["width"])], str(c.attrs["out"]))


def _row(c: Any, _context: Any) -> Any:
    return tensor([1, shape_of(c.args[0])[1]], str(c.attrs["out"]))


def _map(c: Any, _context: Any) -> Any:
    return tensor([int(c.attrs["rows"]), int(c.attrs["width"])], str(c.attrs["out"]))


def _reduce(c: Any, _context: Any) -> Any:
    return tensor([shape_of(c.args[0])[0], int(c.attrs["inner"])], str(c.attrs["out"]))


def _windows(c: Any, _context: Any) -> Any:
    a = c.attrs
    taps = int(a["kernel_y"]) * int(a["kernel_x"])
    return tensor([int(a["out_y"]) * int(a["out_x"]), taps * shape_of(c.args[0])[1]], str(a["out"]))


def _conv(c: Any, _context: Any) -> Any:
    return tensor([int(c.attrs["out_y"]) * int(c.attrs["out_x"]), int(c.attrs["n"])], str(c.attrs["out"]))


def _pool(c: Any, _context: Any) -> Any:
    return tensor([int(c.attrs["out_y"]) * int(c.attrs["out_x"]), shape_of(c.args[0])[1]], str(c.attrs["out"]))


def _concat(c: Any, _context: Any) -> Any:
    shapes, axis = [shape_of(argument) for argument in c.args], int(c.attrs["axis"])
    total = sum(shape[axis] for shape in shapes)
    return tensor([total, shapes[0][1]] if axis == 0 else [shapes[0][0], total], str(c.attrs["out"]))


def _transpose(c: Any, _context: Any) -> Any:
    return tensor(shape_of(c.args[0])[::-1], str(c.attrs["out"]))


CANONICAL: dict[str, Infer] = {
    "npu.gather": _gather,  # (table [v, h], or [h, v] with turned, ids [m]) -> [m, h]
    "npu.rms_norm": _quantised,  # (x [m, h], gamma [h]); eps -> [m, h], with int8/int16 out: ([m, h], scale [m, 1])
    "npu.linear": _linear,  # (a [m, k], weight[, a_scale, w_scale][, bias][, residual]) -> [m, n]
    "npu.rope": declared,  # (x [m, heads*d], cos [m, d/2], sin [m, d/2]); heads
    "npu.kv_append": _kv_append,  # (x [m, kv*d][, past [kv, c, d]]); kv_heads, past -> [kv, c + m, d], in place
    # (x [m, kv*d][, past int8 [kv, c, d], scales fp16 [kv, c, 1]]); kv_heads, past -> both grown by m rows, in place
    "npu.kv_quantise": _kv_quantise,
    # (q [m, heads*d], k, v[, mask [m, t]][, scales of k and v][, inverse]) -> [m, heads*d]; k and v are caches
    # [kv, t, d], of int8 with scales [kv, t, 1], or [t, kv*d] without past. `narrow` as of npu.linear: the result is
    # integers with a static scale, the inverse of which is the last operand
    "npu.attention": declared,
    "npu.swiglu": _quantised,  # (gate [m, i], up [m, i]) -> [m, i], with int8/int16 out: ([m, i], scale [m, 1])
    # (x [m, h]) -> ([m, h], scale [m, 1]). This and other operators with integer results take the inverse of a scale
    # [1, 1] as their last operand where `static` is 1, and then have one result
    "npu.quantise": _quantised,
    "npu.add": declared,  # (a, b) of one shape
    "npu.host": _host_results,  # (any tensors); segment, results -> the results as a tuple, row-major
    "npu.columns": _columns,  # (x [m, h]); first, width -> [m, width]
    # (x [m, h], gamma [h][, beta [h]]); eps -> [m, h], with int8/int16 out: ([m, h], scale [m, 1])
    "npu.layer_norm": _quantised,
    # (x [m, h], gamma [h][, beta [h]]); norm rms_norm or layer_norm, eps, out (the type of the rows) -> ([mean [m, 1],]
    # factor [m, 1][, scale [m, 1] of integer rows]); with `normalise` the same rows as the operator that `norm` names
    "npu.norm_stats": _norm_stats,
    "npu.normalise": declared,  # (x [m, h], the results of norm_stats, gamma [h][, beta [h]]); norm, out -> [m, h]
    # (the operands of normalise, as many as `operands` says, those of npu.linear without the first); norm, rows (their
    # type), and the attributes of npu.linear
    "npu.normed": _linear,
    # (matrices [rows, width], rows [width] or [1, width], columns [rows, 1], numbers [1]); expr, a microprogram over
    # their elements; rows, width -> [rows, width]
    "npu.map": _map,
    # (x [m, depth * inner]); fold (sum, max, min) of expr(s0) over depth, times scale; inner -> [m, inner]
    "npu.reduce": _reduce,
    # (x [m, h][, zero [1, 1]]); groups -> [m, groups], sums of neighbouring columns less their zero point
    "npu.group_sums": _group_sums,
    "npu.unpack": _unpack,  # (bytes [m, w]) -> [m, 2 w] int8, their signed halves, low ones first
    "npu.softmax": declared,  # (x [m, h]); log 0 or 1 -> [m, h]
    # Images are matrices [height * width, channels]. width; kernel, stride, pad (before), dilation, out as _y and _x.
    "npu.windows": _windows,  # (image) -> [pixels, taps * channels], in the padding zero, or `outside`
    "npu.conv": _conv,  # (image, weight, as of npu.linear); the product of the image's windows, which exist nowhere
    # (image[, factors]) -> [pixels, c]; mode max; average: the sum times scale, or factors [pixels, 1]; depthwise: the
    # sum weighted by factors [taps + 1, c], plus their last row
    "npu.pool": _pool,
    "npu.concat": _concat,  # (matrices); axis 0 by rows, 1 by columns -> [m, n]
    "npu.transpose": _transpose,  # (x [m, n]) -> [n, m]
    "npu.row": _row,  # (x [m, h]); index -> [1, h]
}
for _name, _infer in CANONICAL.items():
    register(_name, -1, _infer)
