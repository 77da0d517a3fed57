"""Quantised graphs: products on weights that are stored quantised, and quantisation that is an operator of its own.

A product reads what its activations were quantised from, not the quantised values, so that these need not exist in
ONNX's types: uint8 is int8 minus 128 on the NPU, the zero point with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np

from firsttoken_compiler.passes import views
from firsttoken_compiler.passes.elementwise import constant_array, resolved
from firsttoken_compiler.passes.host import base_shape
from firsttoken_compiler.passes.patterns import (
    Captured,
    Context,
    Env,
    Match,
    Rule,
    is_float,
    like,
    matrix_of,
    reshaped_view,
)
from firsttoken_compiler.passes.stored import Stored, dequantised, matrix, nbits, number, operand_call
from firsttoken_compiler.passes.vector_patterns import emit_fold
from firsttoken_compiler.passes.views import UnsupportedView, View
from firsttoken_compiler.tvm.api import Call, GenericConst, dtype_of, relax, shape_of

RANGES: Final = {"int8": (-128, 127), "uint8": (0, 255), "int16": (-32768, 32767), "uint16": (0, 65535)}
EXACT: Final = {"int8": 1 << 24, "int16": 1 << 31}
"""How large sums of products may become: what fp32 holds exactly, what the accumulators hold."""
SUMS: Final = ("relax.add", "relax.multiply")
SHORTEST: Final = 16
"""Rows of k that are worth a pass of their own."""
MOVES: Final = frozenset(f"relax.{name}" for name in ("reshape", "permute_dims", "expand_dims", "squeeze"))
QUANTISE: Final = "max({low}.0, min({high}.0, add(round(div(s0, s1)), s2)))"
IMAGE: Final = "1nyx"
DEQUANTISE: Final = "mul(sub({value}, s2), s1)"


@dataclass(frozen=True)
class Activations:
    """The value that a product's activations come from, and how they are quantised; `kind` empty: not at all."""

    source: Any
    kind: str = ""
    """`static`, `dynamic`, or `given` when `source` is the integers themselves."""
    scale: float = 1.0
    zero: float = 0.0
    dtype: str = "float32"
    """ONNX's."""
    moves: tuple[Any, ...] = ()
    """Reshapes and transpositions of the quantised values, first to last."""
    inside: tuple[Any, ...] = ()
    """Variables between the quantisation and its inverse."""

    def view(self, context: Context, builder: Any, env: Env) -> View:
        """The value as it lies where it is read."""
        view = env[self.source]
        for call in self.moves:
            view = reshaped_view(context, builder, {"x": call.args[0], "call": call}, {call.args[0]: view})
        return view

    @property
    def stored(self) -> str:
        """The type on the NPU."""
        return {"uint8": "int8", "uint16": "int16"}.get(self.dtype, self.dtype)

    @property
    def shift(self) -> int:
        """What the stored integers are less than ONNX's."""
        return 1 << (8 * np.dtype(self.dtype).itemsize - 1) if self.dtype[0] == "u" else 0


@dataclass(frozen=True)
class Product:
    """A product with a stored weight and what is added to it."""

    activations: Activations
    weight: Any
    stored: Stored
    bias: Any | None = None
    residual: Any | None = None
    covered: tuple[Any, ...] = ()


class StoredProduct(Rule):
    """Products on stored weights in all spellings, with bias and residual."""

    def match(self, context: Context, variable: Any, value: Any) -> Match | None:
        """The largest product that ends here; a sum of one that the NPU cannot run is a sum like any other."""
        try:
            found = find(context, variable, value)
        except UnsupportedView:
            if value.op.name in SUMS:
                return None
            raise
        if found is None:
            return None
        added = [part for part in (found.bias, found.residual) if isinstance(part, relax.Var)]
        computed = [part for part in added if _constant(context, part) is None]
        leaves = (found.activations.source, *computed)
        return Match({"product": found, "root": variable}, leaves, (*found.covered, variable))

    def emit(self, context: Context, builder: Any, match: Match, env: Env) -> View:
        """Emits the quantisation of the activations, once for all that share it, and the product."""
        found: Product = match.captured["product"]
        view = found.activations.view(context, builder, env)
        if not found.activations.kind and not is_float(found.activations.source):
            raise UnsupportedView(f"activations of {dtype_of(found.activations.source)} without a scale")
        stored = _chunked(found)
        _require_pair(context, found.activations, stored)
        operands = quantised_activations(context, builder, found.activations, view)
        if stored.zeros is not None:
            operands["a_sum"] = _sums(context, builder, operands, stored)
        args = [operands["a"], env[found.weight].base]
        args += [operands[name] for name in ("a_scale", "a_zero", "a_sum") if name in operands]
        if found.bias is not None:
            args.append(_bias(context, env, found.bias))
        if found.residual is not None:
            args.append(matrix_of(builder, env[found.residual]))
        kind = "fp16" if not found.activations.kind else found.activations.stored
        base = context.emit(
            builder, "npu.linear", args, n=stored.n, k=stored.k, transposed=0, bias=int(found.bias is not None),
            residual=int(found.residual is not None), out="float32", stored=stored.to_text(), acts=kind,
            asymmetric=int("a_zero" in operands), zeros=int(stored.zeros is not None),
        )  # fmt: skip
        return like(builder, view, base, stored.n)


def find(context: Context, variable: Any, value: Any, sums: int = 2) -> Product | None:
    """The product that a value is, with at most so many `sums` behind it.

    Raises UnsupportedView for one on stored weights that cannot be on the NPU.
    """
    name = value.op.name if isinstance(value, Call) else ""
    if name == "relax.add":
        return _sum(context, variable, value, sums - 1) if sums else None
    if name == "relax.matmul":
        return _matmul(context, value)
    if name == "relax.multiply":
        return _dynamic(context, value)
    if name == "npu.raw_nbits":
        weight, stored = nbits(context, value)
        at = int(value.attrs["bias"])
        return Product(Activations(value.args[0]), weight, stored, value.args[at] if at else None)
    return None


def _sum(context: Context, variable: Any, value: Any, sums: int) -> Product | None:
    """A product plus its bias or a residual."""
    for inner, other in (value.args, value.args[::-1]):
        inner = resolved(context, inner)
        made = context.values.get(inner)
        alone = isinstance(inner, relax.Var) and context.read_once(inner)
        found = find(context, inner, made, sums) if alone and made is not None else None
        if found is None or found.residual is not None:
            continue
        other, covered = resolved(context, other), (*found.covered, inner)
        if shape_of(variable) != shape_of(inner):
            continue
        if _constant(context, other) is not None or context.is_weight(other):
            if found.bias is None and math.prod(shape_of(other)) == shape_of(other)[-1] == found.stored.n:
                return replace(found, bias=other, covered=covered)
        elif isinstance(other, relax.Var) and shape_of(other) == shape_of(variable) and is_float(other):
            return replace(found, residual=other, covered=covered)
    return None


def _matmul(context: Context, value: Any) -> Product | None:
    if not is_float(value.args[0], value.args[1]):
        return None
    found = dequantised(context, value.args[1])
    if found is None:
        return None
    weight, stored, inner = found
    activations = None if stored.blocks else static_input(context, value.args[0], given=True)
    if activations is None or not context.multiplies(_pair(activations, stored)):
        activations = Activations(resolved(context, value.args[0]))
    covered = [part for part in (value.args[0], *activations.inside) if activations.kind]
    return Product(activations, weight, stored, covered=(*inner, *(v for v in covered if isinstance(v, relax.Var))))


def static_input(context: Context, value: Any, given: bool = False) -> Activations | None:
    """What DequantizeLinear(QuantizeLinear(x)) quantises, with one scale for all; None for anything else.

    Integers that are only reshaped or transposed on the way count too; where they come from elsewhere, they are taken
    themselves if `given` says so.
    """
    call = operand_call(context, value, "npu.raw_dequantise")
    if call is None:
        return None
    quantised, inside = resolved(context, call.args[0]), [call.args[0]]
    moves: list[Any] = []
    made: Any = context.values.get(quantised)
    while isinstance(made, Call) and made.op.name in MOVES:
        moves.insert(0, made)
        quantised = resolved(context, made.args[0])
        inside.append(quantised)
        made = context.values.get(quantised)
    if not isinstance(made, Call) or made.op.name != "npu.raw_quantise":
        return _given_input(context, call) if given else None
    scale, zero = number(context, call.args[1]), number(context, call.args[2]) if len(call.args) > 2 else 0.0
    before = number(context, made.args[1]), number(context, made.args[2]) if len(made.args) > 2 else 0.0
    if scale is None or zero is None or before != (scale, zero) or dtype_of(made) not in RANGES:
        return None
    source = resolved(context, made.args[0])
    return Activations(source, "static", scale, zero, dtype_of(made), tuple(moves), tuple(inside))


def _given_input(context: Context, call: Any) -> Activations | None:
    """Integers that the host or an input provides, with one scale for all."""
    source, scale = resolved(context, call.args[0]), number(context, call.args[1])
    zero = number(context, call.args[2]) if len(call.args) > 2 else 0.0
    integers = isinstance(source, relax.Var) and not context.is_weight(source) and dtype_of(source) in RANGES
    if not integers or scale is None or zero is None:
        return None
    return Activations(source, "given", scale, zero, dtype_of(source))


def _dynamic(context: Context, value: Any) -> Product | None:
    """Cast(MatMulInteger(DynamicQuantizeLinear(x), w)) times both scales."""
    for product, scales in (value.args, value.args[::-1]):
        cast = operand_call(context, product, "relax.astype")
        integer = operand_call(context, cast.args[0], "npu.raw_integer_matmul") if cast is not None else None
        both = operand_call(context, scales, "relax.multiply")
        if cast is None or integer is None or both is None:
            continue
        made = _dynamic_parts(context, integer, both)
        if made is None:
            return None
        source, items, w_scale = made
        weight = resolved(context, integer.args[1])
        if not context.is_weight(weight) or len(shape_of(weight)) != 2:
            return None
        at = int(integer.attrs["b_zero"])
        stored = matrix(context, weight, w_scale, integer.args[at] if at else None, 1, 0, False)
        inner = (product, cast.args[0], scales, *items)
        covered = tuple(v for v in inner if isinstance(v, relax.Var))
        return Product(Activations(source, "dynamic", dtype="uint8"), weight, stored, covered=covered)
    return None


def _dynamic_parts(context: Context, integer: Any, both: Any) -> tuple[Any, list[Any], Any] | None:
    """(what is quantised, variables on the way, scale of the weights) when all parts are of one quantisation."""
    values, zero = _item(context, integer.args[0]), int(integer.attrs["a_zero"])
    if values is None or values[1] != 0 or not zero:
        return None
    quantisation, _ = values
    if _item(context, integer.args[zero]) != (quantisation, 2):
        return None
    for mine, other in (both.args, both.args[::-1]):
        if _item(context, mine) == (quantisation, 1):
            call: Any = context.values[quantisation]
            items = [integer.args[0], integer.args[zero], mine, quantisation]
            return resolved(context, call.args[0]), items, other
    return None


def _item(context: Context, value: Any) -> tuple[Any, int] | None:
    """(variable of DynamicQuantizeLinear, number of its result) that a value is."""
    made: Any = context.values.get(resolved(context, value))
    if not isinstance(made, relax.TupleGetItem):
        return None
    of = resolved(context, made.tuple_value)
    return (of, int(made.index)) if operand_call(context, of, "npu.raw_dynamic_quantise") is not None else None


def _pair(activations: Activations, stored: Stored) -> str:
    return f"{activations.stored if activations.kind else 'fp16'}xint{stored.bits}"


def _require_pair(context: Context, activations: Activations, stored: Stored) -> None:
    """Raises UnsupportedView where the matrix unit has no rate for the pair; blocks are made fp16 on the way to it."""
    context.require_pair("fp16xfp16" if stored.blocks else _pair(activations, stored))


def _chunked(found: Product) -> Stored:
    """The recipe in groups short enough for the sums of integers."""
    stored, kind = found.stored, found.activations
    if stored.blocks:
        return stored
    if not kind.kind:
        return _in_parts(stored) if stored.zeros is not None and stored.k % stored.group else stored
    bits = 8 * np.dtype(kind.stored).itemsize + stored.bits - 2
    most = EXACT[kind.stored] >> bits
    asymmetric = kind.kind == "dynamic" or kind.zero != kind.shift
    if stored.group > most and stored.zeros is None:
        return replace(stored, group=most)
    if stored.group > most and kind.stored == "int16":
        raise UnsupportedView(f"sums of {stored.group} products of int16 and int{stored.bits} with zero points")
    if stored.group < stored.k and stored.zeros is not None and (asymmetric or stored.k % stored.group):
        raise UnsupportedView("zero points of activations and of blocks of weights both")
    return stored


def _in_parts(stored: Stored) -> Stored:
    """The recipe in parts of its groups that divide k, so that sums of activations have one width."""
    part = math.gcd(stored.k, stored.group)
    if part < SHORTEST or stored.zeros is None:
        raise UnsupportedView(f"zero points with a last block shorter than {stored.group}: K is {stored.k}")
    of = f":{stored.group}"
    scales, zeros = (v and replace(v, layout=v.layout + of) for v in (stored.scales, stored.zeros))
    return replace(stored, group=part, scales=scales, zeros=zeros)


def quantised_activations(context: Context, builder: Any, kind: Activations, view: View) -> dict[str, Any]:
    """Operands by name: the matrix, and where it is quantised its scale and, unless it is 0, its zero point."""
    if not kind.kind:
        return {"a": matrix_of(builder, view)}
    made: dict[Any, dict[str, Any]] = context.table("quantised")
    key = (view.base, view.axes, view.shape, kind.kind, kind.scale, kind.zero, kind.dtype)
    if key not in made:
        x = matrix_of(builder, view)
        if kind.kind == "dynamic":
            scale, zero = _dynamic_range(context, builder, x)
        else:
            scale, zero = (context.number(value, "quantisation") for value in (kind.scale, kind.zero - kind.shift))
        low, high = (bound - kind.shift for bound in RANGES[kind.dtype])
        text = QUANTISE.format(low=low, high=high)
        if kind.kind != "given":
            a = emit_exact(context, builder, [x, scale, zero], text, shape_of(x), kind.stored)
        else:
            less = f"sub(s0, {kind.shift}.0)"
            a = emit_exact(context, builder, [x], less, shape_of(x), kind.stored) if kind.shift else x
        made[key] = {"a": a, "a_scale": scale, "a_zero": zero}
    operands = dict(made[key])
    if kind.kind != "dynamic" and kind.zero == kind.shift:
        del operands["a_zero"]
    return operands


def _dynamic_range(context: Context, builder: Any, x: Any) -> tuple[Any, Any]:
    """(scale, zero point less 128) of DynamicQuantizeLinear, as `[1, 1]`."""
    ends = []
    for fold in ("min", "max"):
        column = emit_fold(context, builder, x, 1, fold)
        row = builder.emit(relax.op.reshape(column, (1, shape_of(x)[0])))
        ends.append(emit_fold(context, builder, row, 1, fold))
    low, high = "min(s0, 0.0)", "max(s1, 0.0)"
    spread = f"sub({high}, {low})"
    text = f"select(eq({spread}, 0.0), 1.0, div({spread}, 255.0))"
    scale = emit_exact(context, builder, ends, text, (1, 1))
    text = "sub(round(max(0.0, min(255.0, neg(div(min(s0, 0.0), s1))))), 128.0)"
    return scale, emit_exact(context, builder, [ends[0], scale], text, (1, 1))


def emit_exact(
    context: Context, builder: Any, args: list[Any], text: str, shape: tuple[int, ...], out: str = "float32"
) -> Any:
    """An elementwise operator whose result keeps this type."""
    return context.emit(builder, "npu.map", args, expr=text, rows=shape[0], width=shape[1], out=out, exact=1)


def _sums(context: Context, builder: Any, operands: dict[str, Any], stored: Stored) -> Any:
    """Sums of the activations per group, once for all products that share them."""
    made: dict[Any, Any] = context.table("group_sums")
    groups = -(-stored.k // stored.group)
    args = [operands[name] for name in ("a", "a_zero") if name in operands]
    key = (*args, groups)
    if key not in made:
        made[key] = context.emit(builder, "npu.group_sums", args, groups=groups, out="float32", exact=1)
    return made[key]


def constant_bias(context: Context, value: Any) -> np.ndarray:
    """A bias as fp32; raises UnsupportedView for one that is computed, or not here."""
    known = _constant(context, value)
    if known is None:
        raise UnsupportedView("a bias that is computed, or not here")
    return known


def _bias(context: Context, env: Env, value: Any) -> Any:
    known = _constant(context, value)
    return env[value].base if known is None else context.constant(known.reshape(-1), "bias")


def _constant(context: Context, value: Any) -> np.ndarray | None:
    """A small constant as fp32, behind DequantizeLinear or not; None for what is computed, large or not here."""
    call = operand_call(context, value, "npu.raw_dequantise")
    if call is None:
        return constant_array(context, value)
    stored = context.known(resolved(context, call.args[0])) if _is_small(context, call.args[0]) else None
    scale, zero = (_constant_product(context, part) for part in (*call.args[1:], None)[:2])
    if stored is None or scale is None or int(call.attrs["block"]):
        return None
    if scale.size > 1:
        axis = int(call.attrs["axis"]) % stored.ndim
        shape = [-1 if index == axis else 1 for index in range(stored.ndim)]
        scale, zero = scale.reshape(shape), None if zero is None else zero.reshape(shape)
    with np.errstate(over="ignore"):
        return np.asarray((stored.astype(np.float64) - (0 if zero is None else zero)) * scale, np.float32)


def _is_small(context: Context, value: Any) -> bool:
    value = resolved(context, value)
    return isinstance(value, GenericConst) or (context.is_weight(value) and math.prod(shape_of(value)) <= 1 << 16)


def _constant_product(context: Context, value: Any | None) -> np.ndarray | None:
    """A constant, or the product of two."""
    if value is None:
        return None
    call = operand_call(context, value, "relax.multiply")
    if call is None:
        return constant_array(context, value)
    a, b = (constant_array(context, part) for part in call.args)
    return None if a is None or b is None else a * b


@dataclass
class _Scalars:
    """Scale and zero point of one quantisation of a whole tensor."""

    scale: float
    zero: float
    operands: list[Any] = field(default_factory=list)

    @staticmethod
    def of(context: Context, call: Any) -> _Scalars:
        """Raises UnsupportedView unless both are constants with one element."""
        scale = number(context, call.args[1])
        zero = number(context, call.args[2]) if len(call.args) > 2 else 0.0
        if scale is None or zero is None:
            raise UnsupportedView("quantisation of activations by more than one scale, or by a computed one")
        return _Scalars(scale, zero)


class Requantise(Rule):
    """QuantizeLinear and DequantizeLinear on their own: elementwise operators."""

    def match(self, context: Context, variable: Any, value: Any) -> Match | None:
        """Both of a pair where one follows the other; small constants as floats."""
        if not isinstance(value, Call):
            return None
        if value.op.name == "npu.raw_dequantise":
            pair = static_input(context, variable)
            if pair is not None:
                return Match({"pair": pair}, (pair.source,), (*pair.inside, variable))
        source = resolved(context, value.args[0])
        if not isinstance(source, relax.Var) or context.is_weight(source):
            array = _constant(context, variable)
            if array is None:
                raise UnsupportedView("stored weights that no product on the NPU reads")
            return Match({"constant": array}, (), (variable,))
        return Match({"call": value, "source": source}, (source,), (variable,))

    def emit(self, context: Context, builder: Any, match: Match, env: Env) -> View:
        """Emits one elementwise operator."""
        c: Captured = match.captured
        if "constant" in c:
            array = c["constant"]
            return views.dense(context.constant(array.reshape(base_shape(array.shape)), "dequantised"), array.shape)
        if "pair" in c:
            pair: Activations = c["pair"]
            view = pair.view(context, builder, env)
            if view.axes == IMAGE and pair.stored == "int8":
                return _image(context, builder, view, pair)
            low, high = RANGES[pair.dtype]
            text = DEQUANTISE.format(value=QUANTISE.format(low=low, high=high))
            return _elementwise(context, builder, view, text, pair.scale, pair.zero, "")
        call = c["call"]
        scalars = _Scalars.of(context, call)
        turns = call.op.name == "npu.raw_quantise"
        integers = dtype_of(call) if turns else dtype_of(c["source"])
        if integers not in RANGES:
            raise UnsupportedView(f"values of {integers}: the vector unit has {', '.join(RANGES)}")
        text = QUANTISE.format(low=RANGES[integers][0], high=RANGES[integers][1]) if turns else DEQUANTISE
        out = integers if turns else ""
        return _elementwise(
            context, builder, env[c["source"]], text.format(value="s0"), scalars.scale, scalars.zero, out
        )


def _image(context: Context, builder: Any, view: View, pair: Activations) -> View:
    """An image through its integers, which convolutions and pools read too."""
    rows, width = shape_of(view.base)
    a = quantised_activations(context, builder, pair, views.matrix(view.base, "mn", rows, width))["a"]
    args = [a, *(context.number(value, "quantisation") for value in (pair.scale, pair.zero - pair.shift))]
    text = DEQUANTISE.format(value="s0")
    return replace(view, base=context.emit(builder, "npu.map", args, expr=text, rows=rows, width=width, out="float32"))


def _elementwise(
    context: Context, builder: Any, view: View, text: str, scale: float, zero: float, out: str
) -> View:
    plain = len(shape_of(view.base)) == 2 and not views.is_row_major(view)
    x = view.base if plain else matrix_of(builder, view)  # element by element, whatever their order
    args = [x, context.number(scale, "quantisation"), context.number(zero, "quantisation")]
    rows, width = shape_of(x)
    if out:
        base = emit_exact(context, builder, args, text, (rows, width), out)
    else:
        base = context.emit(builder, "npu.map", args, expr=text, rows=rows, width=width, out="float32")
    return replace(view, base=base) if plain else like(builder, view, base)


STORED_PRODUCT = StoredProduct()
REQUANTISE = Requantise()
