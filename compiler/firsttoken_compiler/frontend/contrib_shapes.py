"""Types of what onnxruntime's own operators make, where ONNX has no definition of them to ask."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from numpy.typing import NDArray

FLOAT, UINT8, INT32 = 1, 2, 6

Shape = tuple[int | None, ...]
Kind = tuple[int, Shape | None]
"""Element type and shape; None for an extent, or a rank, that is not known."""


class NoShape(Exception):
    """The inputs do not tell, or do not fit."""


@dataclass(frozen=True)
class Operands:
    """A node's inputs as far as they are known."""

    kinds: Sequence[Kind | None]
    """None where an input is left away or has no type."""
    values: Sequence[NDArray[Any] | None]
    """None where a value is not known."""
    attributes: Mapping[str, Any]
    outputs: int
    """Number of results that have a name, those before the last one included."""

    def has(self, index: int) -> bool:
        """Whether the input is there."""
        return index < len(self.kinds) and self.kinds[index] is not None

    def elem(self, index: int) -> int:
        """Element type of an input; raises NoShape."""
        if not self.has(index):
            raise NoShape
        return self.kinds[index][0]  # type: ignore[index]

    def shape(self, index: int, rank: int | None = None) -> Shape:
        """Shape of an input, of a rank where one is asked for; raises NoShape."""
        shape = self.kinds[index][1] if self.has(index) else None  # type: ignore[index]
        if shape is None or (rank is not None and len(shape) != rank):
            raise NoShape
        return shape

    def attribute(self, name: str, default: int = 0) -> int:
        """A whole number."""
        return int(self.attributes.get(name, default))

    def scalar(self, index: int) -> int | None:
        """The single number that an input is known to hold."""
        value = self.values[index] if index < len(self.values) else None
        return int(value.reshape(-1)[0]) if value is not None and value.size == 1 else None


Rule = Callable[[Operands], list[Kind]]


def _like(index: int = 0, kind: int | None = None) -> Rule:
    def rule(given: Operands) -> list[Kind]:
        return [(given.elem(index) if kind is None else kind, given.shape(index))]

    return rule


def _normalised(given: Operands) -> list[Kind]:
    """Of a norm: the rows, their statistics, and the sum that was normalised."""
    rows, elem = given.shape(0), given.elem(0)
    axis = given.attribute("axis", -1) % max(1, len(rows))
    moments = (FLOAT, (*rows[:axis], *(1 for _ in rows[axis:])))
    return [(elem, rows), moments, moments, (elem, rows)]


def _simplified(given: Operands) -> list[Kind]:
    """SimplifiedLayerNormalization: the rows and the reciprocal of their root mean square."""
    return _normalised(given)[:2]


def _product(left: Shape, right: Shape) -> Shape:
    """Shape of a matrix product, as numpy has it."""
    if not left or not right:
        raise NoShape
    a, b = (1, *left) if len(left) == 1 else left, (*right, 1) if len(right) == 1 else right
    if None not in (a[-1], b[-2]) and a[-1] != b[-2]:
        raise NoShape
    whole = (*_broadcast(a[:-2], b[:-2]), *(a[-2:-1] if len(left) > 1 else ()), *(b[-1:] if len(right) > 1 else ()))
    return tuple(whole)


def _broadcast(left: Shape, right: Shape) -> Shape:
    rank = max(len(left), len(right))
    pairs = zip((1,) * (rank - len(left)) + left, (1,) * (rank - len(right)) + right, strict=True)
    made: list[int | None] = []
    for a, b in pairs:
        if a is not None and b is not None and 1 not in (a, b) and a != b:
            raise NoShape
        made.append(b if a == 1 else a if b == 1 or b is None else b)
    return tuple(made)


def _fused_matmul(given: Operands) -> list[Kind]:
    shapes = []
    for index, name in enumerate(("A", "B")):
        shape = given.shape(index)
        if given.attribute(f"transBatch{name}") and len(shape) > 1:
            shape = (*shape[1:-1], shape[0], shape[-1])
        if given.attribute(f"trans{name}") and len(shape) > 1:
            shape = (*shape[:-2], shape[-1], shape[-2])
        shapes.append(shape)
    return [(given.elem(0), _product(*shapes))]


def _matmul_float(given: Operands) -> list[Kind]:
    """DynamicQuantizeMatMul and MatMulIntegerToFloat: a float product."""
    return [(FLOAT, _product(given.shape(0), given.shape(1)))]


def _matmul_bits(given: Operands) -> list[Kind]:
    rows = given.shape(0)
    if not rows or rows[-1] not in (None, given.attribute("K")):
        raise NoShape
    return [(given.elem(0), (*rows[:-1], given.attribute("N")))]


def _gather_blocks(given: Operands) -> list[Kind]:
    data, indices = list(given.shape(0)), given.shape(1)
    axis, along = (given.attribute(name, default) for name, default in (("gather_axis", 0), ("quantize_axis", -1)))
    axis, along = axis % max(1, len(data)), along % max(1, len(data))
    packed = data[along] if given.elem(0) == UINT8 else None
    if packed is not None:
        data[along] = packed * (8 // max(1, given.attribute("bits", 4)))
    return [(given.elem(2), (*data[:axis], *indices, *data[axis + 1 :]))]


def _gemm(given: Operands) -> list[Kind]:
    a, b = given.shape(0, 2), given.shape(3 if given.has(3) and len(given.kinds) > 5 else 1, 2)
    rows = a[1] if given.attribute("transA") else a[0]
    columns = b[0] if given.attribute("transB") else b[1]
    quantised = len(given.kinds) > 5
    elem = (given.elem(8) if given.has(8) else FLOAT) if quantised else given.elem(0)
    return [(elem, (rows, columns))]


def _binary(given: Operands) -> list[Kind]:
    """QLinearAdd, QLinearMul."""
    return [(given.elem(0), _broadcast(given.shape(0), given.shape(3)))]


def _concat(given: Operands) -> list[Kind]:
    """QLinearConcat: scale and zero point of the result, then tensor, scale and zero point of each part."""
    parts = [given.shape(index) for index in range(2, len(given.kinds), 3)]
    axis = given.attribute("axis") % max(1, len(parts[0])) if parts else 0
    if not parts or any(len(part) != len(parts[0]) for part in parts):
        raise NoShape
    extents = [part[axis] for part in parts]
    whole = None if None in extents else sum(extent or 0 for extent in extents)
    return [(given.elem(1), (*parts[0][:axis], whole, *parts[0][axis + 1 :]))]


def _pooled(given: Operands) -> list[Kind]:
    """QLinearGlobalAveragePool."""
    rows, last = given.shape(0), given.attribute("channels_last")
    if len(rows) < 3:
        raise NoShape
    ones = (1,) * (len(rows) - 2)
    return [(given.elem(0), (rows[0], *ones, rows[-1]) if last else (*rows[:2], *ones))]


def _dequantised_blocks(given: Operands) -> list[Kind]:
    """DequantizeBlocks: rows of bytes to rows of k floats."""
    return [(FLOAT, (given.shape(0, 2)[0], given.attribute("k")))]


def _quantised(given: Operands) -> list[Kind]:
    return [(given.elem(2) if given.has(2) else UINT8, given.shape(0))]


def _dequantised(given: Operands) -> list[Kind]:
    return [(given.elem(1), given.shape(0))]


def _embedded(given: Operands) -> list[Kind]:
    """EmbedLayerNormalization: rows, lengths of the masks, sum before the norm."""
    batch, tokens = given.shape(0, 2)
    table = given.shape(2, 2)
    elem = given.elem(2) if given.elem(2) != UINT8 else FLOAT
    rows = (elem, (batch, tokens, table[1]))
    return [rows, (INT32, (batch,)), rows]


def _attention(given: Operands) -> list[Kind]:
    """com.microsoft Attention and QAttention: one weight for query, key and value."""
    batch, tokens, _ = given.shape(0, 3)
    sizes, heads = given.attributes.get("qkv_hidden_sizes"), max(1, given.attribute("num_heads", 1))
    width = given.shape(1, 2)[1]
    if width is None:
        raise NoShape
    key, value = (sizes[1], sizes[2]) if sizes else (width // 3, width // 3)
    past = 4 if given.has(4) else None
    rows = tokens
    if past is not None and len(given.kinds) <= 8:
        before = given.shape(past)[3] if len(given.shape(past)) == 5 else 0
        rows = None if tokens is None or before is None else tokens + before
    return [(given.elem(0), (batch, tokens, value)), (given.elem(0), (2, batch, heads, rows, key // heads))]


def _quantised_attention(given: Operands) -> list[Kind]:
    """QAttention: of 8-bit rows and weights, in the type of their scales."""
    return [(given.elem(3), shape) for _, shape in _attention(given)]


def _multi_head(given: Operands) -> list[Kind]:
    query, heads = given.shape(0), max(1, given.attribute("num_heads", 1))
    batch, tokens = query[0], query[1]
    width: int | None
    rows: int | None = tokens
    if len(query) == 5:  # query, key and value in one
        width = None if query[4] is None else query[2] * query[4] if query[2] is not None else None
    elif given.has(2):
        value = given.shape(2)
        width = value[2] if len(value) == 3 else _times(value[1], value[3])
        rows = value[1] if len(value) == 3 else value[2]
    elif given.has(1) and len(given.shape(1)) == 5:
        width, rows = query[2], given.shape(1)[1]
    else:
        width = query[2]
    if given.has(6):
        past = given.shape(6, 4)[2]
        rows = None if rows is None or past is None else rows + past
    present = (batch, heads, rows, None if width is None else width // heads)
    elem = given.elem(0)
    return [(elem, (batch, tokens, width)), (elem, present), (elem, present)]


def _times(left: int | None, right: int | None) -> int | None:
    return None if left is None or right is None else left * right


def _grouped(given: Operands) -> list[Kind]:
    """GroupQueryAttention; query, key and value may lie in the first input. Caches may have room for more rows."""
    batch, tokens, width = given.shape(0, 3)
    heads, kv = max(1, given.attribute("num_heads", 1)), max(1, given.attribute("kv_num_heads", 1))
    if width is None:
        raise NoShape
    packed = not given.has(1)
    head = width // (heads + 2 * kv) if packed else width // heads
    total = given.scalar(6)
    room = given.shape(3, 4)[2] if given.has(3) else 0
    if total is not None and room is not None:
        rows: int | None = max(total, room)
    else:
        rows = None if tokens is None or room is None else tokens + room
    elem = given.elem(0)
    cache = (given.elem(3) if given.has(3) else elem, (batch, kv, rows, head))
    return [(elem, (batch, tokens, heads * head)), cache, cache]


RULES: Final[Mapping[str, Rule]] = {
    **dict.fromkeys(
        ("BiasGelu", "FastGelu", "Gelu", "QuickGelu", "RotaryEmbedding", "MoE", "QMoE", "BiasAdd", "BiasDropout",
         "BiasSoftmax", "QLinearLeakyRelu", "QLinearSigmoid", "QLinearSoftmax", "Inverse", "Trilu", "Swish"),
        _like(),
    ),
    "SimplifiedLayerNormalization": _simplified, "SkipLayerNormalization": _normalised,
    "SkipSimplifiedLayerNormalization": _normalised, "RMSNormalization": _like(),
    "FusedMatMul": _fused_matmul, "TransposeMatMul": _fused_matmul, "DynamicQuantizeMatMul": _matmul_float,
    "MatMulIntegerToFloat": _matmul_float, "MatMulNBits": _matmul_bits, "MatMulBnb4": _matmul_bits,
    "GatherBlockQuantized": _gather_blocks, "FusedGemm": _gemm, "QGemm": _gemm, "QLinearAdd": _binary,
    "QLinearMul": _binary, "QLinearConcat": _concat, "QLinearGlobalAveragePool": _pooled,
    "QuantizeLinear": _quantised, "DequantizeLinear": _dequantised, "EmbedLayerNormalization": _embedded,
    "Attention": _attention, "QAttention": _quantised_attention, "MultiHeadAttention": _multi_head,
    "GroupQueryAttention": _grouped, "DequantizeBlocks": _dequantised_blocks,
}  # fmt: skip
"""Operators by name, in whatever domain, for which ONNX has no definition."""

STANDARD: Final = {"FusedConv": ("Conv", (0, 1)), "QLinearAveragePool": ("AveragePool", (0,))}
"""Operators whose result has the shape that a standard operator makes of these inputs."""


def contrib_types(op_type: str, given: Operands) -> list[Kind] | None:
    """Types of the results, as many as are known; None where the operator is unknown or its inputs do not tell."""
    rule = RULES.get(op_type)
    if rule is None:
        return None
    try:
        kinds = rule(given)
    except (NoShape, ZeroDivisionError, IndexError, TypeError, ValueError):
        return None
    fine = [(kind, shape) for kind, shape in kinds if shape is None or all(e is None or e >= 0 for e in shape)]
    return fine if len(fine) == len(kinds) and _small(fine) else None


def _small(kinds: list[Kind]) -> bool:
    return all(shape is None or math.prod(extent or 1 for extent in shape) < 1 << 62 for _, shape in kinds)

