"""`npu.raw_*` operators of quantised graphs, in ONNX's layouts: what the converters make and the rules look for."""

from typing import Any

import numpy as np

from firsttoken_compiler.tvm.api import dtype_of, relax, shape_of
from firsttoken_compiler.tvm.dialect import declared, register, tensor


def _dynamic(c: Any, _context: Any) -> Any:
    return relax.TupleType([tensor(shape_of(c.args[0]), "uint8"), tensor([], "float32"), tensor([], "uint8")])


def _integer_matmul(c: Any, _context: Any) -> Any:
    a, b = shape_of(c.args[0]), shape_of(c.args[1])
    batch = np.broadcast_shapes(a[:-2], b[:-2])
    return tensor((*batch, a[-2], b[-1]), "int32")


def _nbits(c: Any, _context: Any) -> Any:
    return tensor((*shape_of(c.args[0])[:-1], int(c.attrs["n"])), dtype_of(c.args[0]))


def _block_gather(c: Any, _context: Any) -> Any:
    return tensor((*shape_of(c.args[1]), int(c.attrs["width"])), str(c.attrs["out"]))


def _blocks(c: Any, _context: Any) -> Any:
    return tensor((shape_of(c.args[0])[0], int(c.attrs["k"])), "float32")


register("npu.raw_blocks", 1, _blocks)  # (blocks [n, bytes of a row]); type, k
register("npu.raw_quantise", -1, declared)  # (x, scale[, zero point]); axis, block, out
register("npu.raw_dequantise", -1, declared)  # (x, scale[, zero point]); axis, block, out
register("npu.raw_dynamic_quantise", 1, _dynamic)  # (x) -> (uint8, scale, zero point)
register("npu.raw_integer_matmul", -1, _integer_matmul)  # (a, b[, zero point of a][, of b]); a_zero, b_zero
register("npu.raw_nbits", -1, _nbits)  # (a, b, scales[, zero points][, bias]); n, k, bits, block, zero, bias: positions
register("npu.raw_block_gather", -1, _block_gather)  # (table, ids, scales[, zero points]); width, bits, block, out
