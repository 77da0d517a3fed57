"""Weights that a graph stores quantised: what they are, and where their integers, scales and zero points lie.

The recipe travels as text on `npu.linear` until the pass `quantise` makes tensors of it.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from firsttoken_compiler.formats.types import BLOCK_TYPES
from firsttoken_compiler.isa.program import Packing
from firsttoken_compiler.passes.elementwise import resolved
from firsttoken_compiler.passes.views import UnsupportedView
from firsttoken_compiler.schedule.block_trees import operand_types
from firsttoken_compiler.tvm.api import Call, GenericConst, dtype_of, relax, shape_of

if TYPE_CHECKING:
    from firsttoken_compiler.passes.patterns import Context

HALF: Final = 10
"""ONNX's element type of float16."""
BITS: Final = {"int8": 8, "uint8": 8, "int4": 4, "uint4": 4}
READ_ZEROS: Final = 1 << 20
"""Zero points up to this many are read, to see whether all of them are the middle of their range."""


@dataclass(frozen=True)
class Vectors:
    """Scales or zero points: the initialiser, how it lies (`codegen.stored_weights.ROWS`), and the type on the NPU."""

    source: str
    layout: str
    dtype: str
    shift: int = 0


@dataclass(frozen=True)
class Stored:
    """A matrix `[k, n]` of an initialiser, its scales per `group` rows and column, and its zero points."""

    source: str
    layout: str
    k: int
    n: int
    bits: int
    group: int
    shift: int
    scales: Vectors | None
    zeros: Vectors | None
    blocks: str = ""
    """A key of `formats.types.BLOCK_TYPES` where the initialiser is uint8 `[n, bytes of a row]` of such blocks."""

    def to_text(self) -> str:
        """For an attribute."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_text(text: str) -> Stored:
        """Inverse of `to_text`."""
        fields = json.loads(text)
        vectors = {name: Vectors(**fields[name]) if fields[name] else None for name in ("scales", "zeros")}
        return Stored(**{**fields, **vectors})


def operand_call(context: Context, value: Any, name: str) -> Any | None:
    """The call of this operator that makes a value; None for anything else."""
    made: Any = context.values.get(resolved(context, value))
    return made if isinstance(made, Call) and made.op.name == name else None


def source_of(context: Context, value: Any) -> str | None:
    """The initialiser that a value is: a parameter without data, or a constant that the importer read."""
    value = resolved(context, value)
    if context.is_weight(value):
        return str(context.imported.weights[value.name])
    if not isinstance(value, GenericConst):
        return None
    return context.initialisers.get(value)


def number(context: Context, value: Any) -> float | None:
    """The one element of a constant or of an initialiser; None for anything else."""
    value = resolved(context, value)
    if isinstance(value, relax.Var) and not (context.is_weight(value) and math.prod(shape_of(value)) == 1):
        return None
    array = context.known(value)
    return float(np.asarray(array, np.float64).reshape(-1)[0]) if array is not None and array.size == 1 else None


def is_turn(call: Any | None) -> bool:
    """Whether a call transposes a matrix."""
    return call is not None and [int(axis) for axis in call.attrs.axes or (1, 0)] == [1, 0]


def dequantised(context: Context, value: Any) -> tuple[Any, Stored, list[Any]] | None:
    """(parameter, recipe, variables on the way) of a matrix behind DequantizeLinear; None when it is no such thing.

    Transposed before or after, or quantised again by the same scale, as a tied head is. Raises UnsupportedView when it
    is one with scales or types that no product takes.
    """
    again = operand_call(context, value, "npu.raw_dequantise")
    made = operand_call(context, again.args[0], "npu.raw_quantise") if again is not None else None
    if again is not None and made is not None:
        behind = dequantised(context, made.args[0])
        if behind is None or not _one_scale(context, [again, made, _inner(context, behind[2])]):
            return None
        return behind[0], behind[1], [value, again.args[0], *behind[2]]
    outer, inside = operand_call(context, value, "relax.permute_dims"), [value]
    if is_turn(outer):
        assert outer is not None
        value = outer.args[0]
        inside.append(value)
    blocks = operand_call(context, value, "npu.raw_blocks")
    if blocks is not None:
        return _in_blocks(context, blocks, is_turn(outer), [part for part in inside if isinstance(part, relax.Var)])
    call = operand_call(context, value, "npu.raw_dequantise")
    if call is None or len(shape_of(call)) != 2:
        return None
    weight = resolved(context, call.args[0])
    inner = operand_call(context, weight, "relax.permute_dims")
    if is_turn(inner):
        assert inner is not None
        inside.append(weight)
        weight = resolved(context, inner.args[0])
    if not context.is_weight(weight):
        return None
    zero = call.args[2] if len(call.args) > 2 else None
    made = matrix(
        context, weight, call.args[1], zero, int(call.attrs["axis"]) % 2, int(call.attrs["block"]), is_turn(outer),
        is_turn(inner) != is_turn(outer),
    )  # fmt: skip
    return weight, made, [part for part in inside if isinstance(part, relax.Var)]


def _in_blocks(context: Context, call: Any, turned: bool, inside: list[Any]) -> tuple[Any, Stored, list[Any]]:
    """The same behind DequantizeBlocks, whose rows are the columns of a product."""
    if not turned:
        raise UnsupportedView("a product along the rows of blocks, which lie along the other axis")
    weight = resolved(context, call.args[0])
    if not context.is_weight(weight):
        raise UnsupportedView("blocks that are computed")
    kind, k = BLOCK_TYPES[str(call.attrs["type"])], int(call.attrs["k"])
    source, n = str(context.imported.weights[weight.name]), shape_of(weight)[0]
    made = Stored(source, "", k, n, kind.bits, kind.group, 0, None, None, kind.name)
    return weight, made, inside


def _inner(context: Context, inside: list[Any]) -> Any:
    """The call among these variables that makes floats of the stored integers."""
    calls = (operand_call(context, part, "npu.raw_dequantise") for part in reversed(inside))
    return next(call for call in calls if call is not None)


def _one_scale(context: Context, calls: list[Any]) -> bool:
    """Whether all have the same one scale and zero point."""
    found = {
        (number(context, call.args[1]), number(context, call.args[2]) if len(call.args) > 2 else 0.0) for call in calls
    }
    return len(found) == 1 and None not in next(iter(found))


def matrix(
    context: Context, weight: Any, scale: Any, zero: Any | None, axis: int, block: int, flipped: bool = False,
    turned: bool = False,
) -> Stored:  # fmt: skip
    """The recipe of a matrix `[k, n]` with scales along `axis`.

    `flipped`: axis and scales are those of its transpose. `turned`: the file stores `[n, k]`.
    """
    dtype = dtype_of(weight)
    if dtype not in BITS:
        raise UnsupportedView(f"weights stored as {dtype}: products take {', '.join(BITS)}")
    k, n = shape_of(weight)[::-1] if turned else shape_of(weight)
    along = 1 if flipped else 0
    count = math.prod(shape_of(scale))
    group = k
    if count == 1:
        layout = "one"
    elif not block and axis != along:
        layout = "n"
    elif block and axis == along:
        layout, group = ("ng" if flipped else "gn"), min(block, k)
    else:
        raise UnsupportedView("weights with a scale per row of k, or in blocks of columns")
    middle = 1 << (BITS[dtype] - 1) if dtype[0] == "u" else 0
    scales = Vectors(_source(context, scale, "scales"), layout, float_type(context, scale))
    zeros = None
    if zero is not None and not all_equal(context, zero, middle):
        zeros = Vectors(_source(context, zero, "zero points"), layout, "int8", middle)
    if zero is None and middle:
        raise UnsupportedView("unsigned weights without zero points")
    name = str(context.imported.weights[weight.name])
    return Stored(name, "nk" if turned else "kn", k, n, BITS[dtype], group, middle, scales, zeros)


def nbits(context: Context, call: Any) -> tuple[Any, Stored]:
    """(parameter, recipe) of the weights of a raw_nbits; raises UnsupportedView for what no product takes."""
    weight = resolved(context, call.args[1])
    k, n, bits, block = (int(call.attrs[name]) for name in ("k", "n", "bits", "block"))
    if bits not in (4, 8) or not context.is_weight(weight) or dtype_of(weight) != "uint8":
        raise UnsupportedView(f"MatMulNBits of {bits} bits, or with computed weights: 4 and 8 bits are on the NPU")
    middle = 1 << (bits - 1)
    group = min(block, k)
    many = "ng" if group < k else "n"
    scales = Vectors(_source(context, call.args[2], "scales"), many, float_type(context, call.args[2]))
    zeros = None
    if int(call.attrs["zero"]):
        zero = call.args[int(call.attrs["zero"])]
        packed = dtype_of(zero) == "uint8"
        layout, dtype = (f"blob{bits}", "int8") if packed else (many, float_type(context, zero))
        all_middle = middle if bits == 8 or not packed else middle * 17
        if not all_equal(context, zero, all_middle):
            zeros = Vectors(_source(context, zero, "zero points"), layout, dtype, middle)
    name = str(context.imported.weights[weight.name])
    return weight, Stored(name, "blob", k, n, bits, group, middle, scales, zeros)


def float_type(context: Context, value: Any) -> str:
    """The type of scales as the file has them: half precision stays so."""
    source = source_of(context, value)
    entry = context.imported.student.initializers.get(source or "")
    half = entry is not None and HALF in (entry.onnx_type, entry.stored_type)
    return "float16" if half else "float32"


def _source(context: Context, value: Any, what: str) -> str:
    source = source_of(context, value)
    if source is None:
        raise UnsupportedView(f"weights whose {what} are computed")
    return source


def all_equal(context: Context, value: Any, expected: int) -> bool:
    """Whether all elements are `expected`; False where they are too many to look at, or not here."""
    value = resolved(context, value)
    if math.prod(shape_of(value)) > READ_ZEROS or not isinstance(value, (relax.Var, GenericConst)):
        return False
    array = context.known(value)
    return array is not None and bool((np.asarray(array, np.float32) == expected).all())


@dataclass(frozen=True)
class Part:
    """A tensor of a stored weight: its recipe, type and shape."""

    packing: Packing
    dtype: str
    shape: tuple[int, int]


def parts(stored: Stored, panel: int, asymmetric: bool) -> dict[str, Part]:
    """By the names of `npu.linear`'s operands, in their order: `w`, `w_scale`, `w_zero`, `w_sum`, or planes."""
    if stored.blocks:
        return block_parts(stored.source, stored.blocks, stored.k, stored.n, panel, stored=True)
    k, n, group = stored.k, stored.n, stored.group
    rows = (-(-k // group), n)
    values = Packing(stored.source, "stored", k, n, panel, stored.bits, group, False, stored.layout, stored.shift)
    found = {"w": Part(values, f"int{stored.bits}", (k, n))}
    for name, vectors in (("w_scale", stored.scales), ("w_zero", stored.zeros)):
        if vectors is not None:
            bits = {"float32": 32, "float16": 16, "int8": 8}[vectors.dtype]
            recipe = Packing(vectors.source, "vectors", k, n, panel, bits, group, False, vectors.layout, vectors.shift)
            found[name] = Part(recipe, vectors.dtype, rows)
    if asymmetric:
        found["w_sum"] = Part(replace(values, form="sums"), "float32", rows)
    return found


def block_parts(
    source: str, blocks: str, k: int, n: int, panel: int, *, stored: bool, transposed: bool = False
) -> dict[str, Part]:
    """The planes of a product's weights in blocks of a type, in the order of `npu.linear`'s operands.

    `stored`: the source holds blocks, a row of them per column of the product. Else it holds floats `[k, n]`, or
    `[n, k]` with `transposed`, which are quantised when the bytes are made.
    """
    kind, form = BLOCK_TYPES[blocks], "planes" if stored else "quantised"
    made: dict[str, Part] = {}
    for plane in kind.planes:
        dtype = operand_types(kind)[plane.name]
        packing = Packing(
            source, form, k, n, panel, plane.bits, plane.per, transposed, f"{blocks}:{plane.name}",
            kind.zero if dtype == "int4" else 0,
        )  # fmt: skip
        made[plane.name] = Part(packing, dtype, (k // plane.per, n))
    return made
