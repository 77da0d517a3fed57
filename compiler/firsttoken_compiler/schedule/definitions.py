"""The npu operators as TE: what TVM fuses and plans, and what the row-wise kernels are lowered from.

Arithmetic is fp32; results narrow where they are stored. Integer activations are symmetric per token:
scale = max(|row|) / qmax, value = round-half-even(x * (1 / scale)).
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from firsttoken_compiler.formats.types import BLOCK_TYPES
from firsttoken_compiler.isa.types import Dtype
from firsttoken_compiler.schedule import (
    expressions,
    norm_definitions,
    normed,
    vector_definitions,
    vision_definitions,
)
from firsttoken_compiler.schedule.block_trees import Blocks, Tree, kernel_of, leaves
from firsttoken_compiler.schedule.quantised_definitions import QUANTISED, QUANTISED_BY_ELEMENT
from firsttoken_compiler.schedule.spec import MASKED, NAMES, Arg, KernelSpec
from firsttoken_compiler.schedule.windows import product_of, windows_of
from firsttoken_compiler.tvm.api import te, tirx

QMAX = {"int8": 127.0, "int16": 32767.0, "int4": 7.0}
ADDED = ("bias", "residual", "factor")
"""Operands of a product's epilogue, in the order of the call: two are added, the last one multiplied."""
MIN_SCALE = 1e-12
"""Smallest activation scale, so that a row of zeros divides by something."""
MIN_CACHE_SCALE = 2.0**-14
"""Smallest scale of a row of a cache: the smallest normal number of fp16."""


def definition(spec: KernelSpec) -> Any:
    """The PrimFunc of a spec: operands, then results."""
    inputs = [te.placeholder(arg.shape, NAMES[arg.dtype], name=f"p{i}") for i, arg in enumerate(spec.args)]
    outputs = _narrowed(spec, inputs, _DEFINITIONS[spec.kind])
    return te.create_prim_func([*inputs, *outputs])


def element_definition(spec: KernelSpec, inputs: list[Any]) -> list[Any]:
    """What the schedule of a row-wise kernel starts from: as `definition`, with the axes of heads spelled out."""
    return _narrowed(spec, inputs, _BY_ELEMENT.get(spec.kind, _DEFINITIONS[spec.kind]))


def in_floats(spec: KernelSpec) -> KernelSpec:
    """The kernel with the fp32 result that a static scale makes integers of."""
    params = tuple((name, value) for name, value in spec.params if name != "static")
    return KernelSpec(spec.kind, params, spec.args[:-1], (Arg(spec.outs[0].shape, Dtype.F32),))


def _narrowed(spec: KernelSpec, p: list[Any], make: Callable[[KernelSpec, list[Any]], list[Any]]) -> list[Any]:
    """Results; `static` ones are round-half-even(x * inverse), where the last operand is the inverse of the scale."""
    if not spec.get("static"):
        return make(spec, p)
    (x,), dtype = make(in_floats(spec), p[:-1]), NAMES[spec.outs[0].dtype]
    return [te.compute(spec.outs[0].shape, lambda i, j: te.round(x[i, j] * p[-1][0, 0]).astype(dtype), name="q")]


def _f32(value: Any) -> Any:
    return value.astype("float32")


def _store(spec: KernelSpec, value: Any, index: int = 0) -> Any:
    """Narrows to the type of a result."""
    dtype = NAMES[spec.outs[index].dtype]
    return value if dtype == "float32" else value.astype(dtype)


def _row_scale(x: Any, dtype: str, rows: int, width: int) -> Any:
    """Scale of each row of the fp32 matrix x, [rows, 1]."""
    r = te.reduce_axis((0, width), "r")
    peak = te.compute((rows,), lambda i: te.max(te.abs(x[i, r]), axis=r), name="peak")
    return te.compute((rows, 1), lambda i, _: te.max(peak[i], MIN_SCALE) * (1.0 / QMAX[dtype]), name="scale")


def _quantise_rows(spec: KernelSpec, x: Any, rows: int, width: int) -> list[Any]:
    """(values, scale) of the fp32 matrix x."""
    dtype = NAMES[spec.outs[0].dtype]
    scale = _row_scale(x, dtype, rows, width)
    inverse = te.compute((rows,), lambda i: 1.0 / scale[i, 0], name="inverse")
    values = te.compute((rows, width), lambda i, j: te.round(x[i, j] * inverse[i]).astype(dtype), name="q")
    return [values, scale]


def _rms_norm(spec: KernelSpec, p: list[Any]) -> list[Any]:
    x, gamma = p
    rows, width = spec.args[0].shape
    k = te.reduce_axis((0, width), "k")
    square = te.compute((rows,), lambda i: te.sum(_f32(x[i, k]) * _f32(x[i, k]), axis=k), name="square")
    factor = te.compute((rows,), lambda i: te.rsqrt(square[i] * (1.0 / width) + spec["eps"]), name="factor")
    if len(spec.outs) == 1:
        return [
            te.compute((rows, width), lambda i, j: _store(spec, _f32(x[i, j]) * factor[i] * _f32(gamma[j])), name="out")
        ]
    normed = te.compute((rows, width), lambda i, j: _f32(x[i, j]) * factor[i] * _f32(gamma[j]), name="normed")
    return _quantise_rows(spec, normed, rows, width)


def _swiglu(spec: KernelSpec, p: list[Any]) -> list[Any]:
    gate, up = p
    rows, width = spec.args[0].shape

    def element(i: Any, j: Any) -> Any:
        return _f32(gate[i, j]) * te.sigmoid(_f32(gate[i, j])) * _f32(up[i, j])

    if len(spec.outs) == 1:
        return [te.compute((rows, width), lambda i, j: _store(spec, element(i, j)), name="out")]
    return _quantise_rows(spec, te.compute((rows, width), element, name="product"), rows, width)


def _quantise(spec: KernelSpec, p: list[Any]) -> list[Any]:
    rows, width = spec.args[0].shape
    x = p[0]
    if len(spec.outs) == 1:
        return [te.compute((rows, width), lambda i, j: _store(spec, _f32(x[i, j])), name="out")]
    if spec.args[0].dtype is not Dtype.F32:
        x = te.compute((rows, width), lambda i, j: _f32(p[0][i, j]), name="wide")
    return _quantise_rows(spec, x, rows, width)


def _add(spec: KernelSpec, p: list[Any]) -> list[Any]:
    return [te.compute(spec.outs[0].shape, lambda *i: _store(spec, _f32(p[0][i]) + _f32(p[1][i])), name="out")]


def _row(spec: KernelSpec, p: list[Any]) -> list[Any]:
    return [te.compute(spec.outs[0].shape, lambda i, j: _store(spec, _f32(p[0][i + spec["index"], j])), name="out")]


def _columns(spec: KernelSpec, p: list[Any]) -> list[Any]:
    return [te.compute(spec.outs[0].shape, lambda i, j: _store(spec, _f32(p[0][i, j + spec["first"]])), name="out")]


def _rope(spec: KernelSpec, p: list[Any]) -> list[Any]:
    """Half-rotate within each head of `width` features; the tables are as wide as half a head, or as a whole one."""
    x, cos, sin = p
    rows, features = spec.args[0].shape
    width = features // spec["heads"]
    half, table = width // 2, spec.args[1].shape[1]

    def element(i: Any, f: Any) -> Any:
        c = f % width
        first = c < half
        turned = te.if_then_else(first, -_f32(x[i, te.min(f + half, features - 1)]), _f32(x[i, te.max(f - half, 0)]))
        return _store(spec, _f32(x[i, f]) * _f32(cos[i, c % table]) + turned * _f32(sin[i, c % table]))

    return [te.compute((rows, features), element, name="out")]


def _rope_by_head(spec: KernelSpec, p: list[Any]) -> list[Any]:
    """The same over (row, head, half, column): x[s, c] cos[c] + (2s - 1) x[1 - s, c] sin[c]."""
    x, cos, sin = p
    heads = spec["heads"]
    rows, width = spec.args[0].shape
    half = width // heads // 2
    step = half if spec.args[1].shape[1] == 2 * half else 0

    def at(i: Any, h: Any, s: Any, c: Any) -> Any:
        return _f32(x[i, h * (2 * half) + s * half + c])

    def element(i: Any, h: Any, s: Any, c: Any) -> Any:
        sign = (2 * s - 1).astype("float32")
        j = s * step + c
        return _store(spec, at(i, h, s, c) * _f32(cos[i, j]) + at(i, h, 1 - s, c) * _f32(sin[i, j]) * sign)

    return [te.compute((rows, heads, 2, half), element, name="out")]


def _gather(spec: KernelSpec, p: list[Any]) -> list[Any]:
    return [te.compute(spec.outs[0].shape, lambda i, j: _store(spec, p[0][p[1][i], j]), name="out")]


def _host(spec: KernelSpec, _p: list[Any]) -> list[Any]:
    """Stands in for what the host computes, so that TVM plans its memory; it is never lowered."""
    return [_nothing(out, f"out{i}") for i, out in enumerate(spec.outs)]


def _nothing(out: Arg, name: str) -> Any:
    return te.compute(out.shape, lambda *_: tirx.const(0, NAMES[out.dtype]), name=name)


def _kv_append(spec: KernelSpec, p: list[Any]) -> list[Any]:
    past, width = spec["past"], spec.outs[0].shape[2]

    def element(h: Any, t: Any, c: Any) -> Any:
        new = p[0][te.max(t - past, 0), h * width + c]
        return te.if_then_else(t < past, p[1][h, te.min(t, past - 1), c], new) if past else new

    return [te.compute(spec.outs[0].shape, element, name="out")]


def _kv_rows(spec: KernelSpec, p: list[Any]) -> list[Any]:
    """The rows that `kv_append` adds, as (row, head, column); those already there stay where they are."""
    heads, _, width = spec.outs[0].shape
    rows = spec.args[0].shape[0]
    return [te.compute((rows, heads, width), lambda t, h, c: _store(spec, p[0][t, h * width + c]), name="out")]


def _quantised_rows(spec: KernelSpec, p: list[Any]) -> list[Any]:
    """The rows that `kv_quantise` adds, as (row, head, column), and their scales: symmetric int8 per row and head.

    scale = fp16(max(max(|x|) / 127, MIN_CACHE_SCALE)), value = round-half-even(x * (1 / scale)), of the rounded scale.
    """
    heads, _, width = spec.outs[0].shape
    rows, x = spec.args[0].shape[0], p[0]
    c = te.reduce_axis((0, width), "c")
    peak = te.compute(
        (rows, heads), lambda t, h: te.max(te.abs(_f32(x[t, h * width + c])), axis=c), name="peak"
    )
    scale = te.compute(
        (rows, heads, 1),
        lambda t, h, _: te.max(peak[t, h] * (1.0 / 127.0), MIN_CACHE_SCALE).astype("float16"), name="scale",
    )  # fmt: skip
    inverse = te.compute((rows, heads), lambda t, h: 1.0 / _f32(scale[t, h, 0]), name="inverse")
    values = te.compute(
        (rows, heads, width),
        lambda t, h, c: te.round(_f32(x[t, h * width + c]) * inverse[t, h]).astype("int8"), name="q",
    )  # fmt: skip
    return [values, scale]


def _kv_quantise(spec: KernelSpec, p: list[Any]) -> list[Any]:
    """The whole caches of integers and scales: what is there already, then the new rows."""
    past = int(spec["past"])

    def grown(index: int, new: Any) -> Any:
        def element(h: Any, t: Any, c: Any) -> Any:
            row = new[te.max(t - past, 0), h, c]
            return te.if_then_else(t < past, p[1 + index][h, te.min(t, past - 1), c], row) if past else row

        return te.compute(spec.outs[index].shape, element, name=f"out{index}")

    return [grown(index, new) for index, new in enumerate(_quantised_rows(spec, p))]


def _linear(spec: KernelSpec, p: list[Any]) -> list[Any]:
    """Accumulate per group of k, take off zero points, scale per token and column, add bias and residual, narrow."""
    if spec.get("blocks"):
        return _linear_on_blocks(spec, p)
    operands = linear_operands(spec, p)
    m, k = spec.args[0].shape
    n = spec["n"]
    group = spec["group"] or k
    groups = -(-k // group)
    wide = "int32" if spec.args[0].dtype is not Dtype.F16 else "float32"
    a, w = p[0], p[1]
    r = te.reduce_axis((0, k), "r")
    if groups == 1:
        acc = te.compute((m, n), lambda i, j: te.sum(a[i, r].astype(wide) * w[r, j].astype(wide), axis=r), name="C")

        def single(i: Any, j: Any) -> Any:
            value = without_zero_points(operands, _f32(acc[i, j]), i, 0, (0, j))
            return epilogue(spec, operands, value, i, j, single=True)

        return [te.compute((m, n), single, name="O")]
    scaled = te.compute(
        (m, n),
        lambda i, j: te.sum(
            _f32(a[i, r].astype(wide) * w[r, j].astype(wide)) * _f32(operands["w_scale"][r // group, j]), axis=r
        ),
        name="P",
    )
    if not any(spec.get(name) for name in ("zeros", "asymmetric", "minimum")):
        return [te.compute((m, n), lambda i, j: epilogue(spec, operands, scaled[i, j], i, j, single=False), name="O")]
    g = te.reduce_axis((0, groups), "g")
    shift = te.compute(
        (m, n),
        lambda i, j: te.sum(scaled_sum(operands, te.const(0.0), i, g, (g, j)), axis=g),
        name="Z",
    )
    return [
        te.compute(
            (m, n), lambda i, j: epilogue(spec, operands, scaled[i, j] + shift[i, j], i, j, single=False), name="O"
        )
    ]


def _normed(spec: KernelSpec, p: list[Any]) -> list[Any]:
    """The product of the rows that it makes."""
    count = int(spec["operands"])
    rows = norm_definitions.normalise(normed.normalise_of(spec), p[:count])
    return _linear(normed.product_of(spec), [*rows, *p[count:]])


def _linear_on_blocks(spec: KernelSpec, p: list[Any]) -> list[Any]:
    """The product with fp16 weights that are made of the planes of their blocks."""
    blocks, operands = Blocks.of(spec), dict(zip(linear_names(spec), p, strict=True))
    (m, k), n, group = spec.args[0].shape, spec["n"], blocks.kind.group
    staged: dict[str, Any] = {}

    def at(tree: Tree, r: Any, j: Any) -> Any:
        values = [
            staged[name][r // group, j] if name in staged else _f32(operands[name][r // blocks.grain(name), j])
            for name in leaves(tree)
        ]
        return expressions.apply(str(kernel_of(tree)), values)

    def of_groups(name: str, tree: Tree) -> Any:
        return te.compute((k // group, n), lambda g, j: at(tree, g * group, j), name=name)

    staged.update({name: of_groups(name, tree) for name, tree in blocks.staged().items()})
    w = te.compute((k, n), lambda r, j: at(blocks.floats, r, j).astype("float16"), name="W")
    r = te.reduce_axis((0, k), "r")
    acc = te.compute((m, n), lambda i, j: te.sum(_f32(p[0][i, r]) * _f32(w[r, j]), axis=r), name="C")
    return [te.compute((m, n), lambda i, j: epilogue(spec, operands, acc[i, j], i, j, single=False), name="O")]


def _conv(spec: KernelSpec, p: list[Any]) -> list[Any]:
    """The product of the image's windows."""
    matrix = vision_definitions.DEFINITIONS["windows"](windows_of(spec), p[:1])
    return _linear(product_of(spec), [*matrix, *p[1:]])


@lru_cache(maxsize=4096)
def linear_names(spec: KernelSpec) -> tuple[str, ...]:
    """Names of a product's operands in the order of the call.

    `a_zero`: the zero point of all activations, with `w_sum`, sums of the weights per group and column.
    `a_sum`: sums of the activations, less their zero point, per token and group, with `w_zero`, those of the weights,
    or with `w_min`, what is added to the weights of each group and column after they are scaled. In place of `w`,
    weights in blocks have a plane for each part of their blocks; their integer activations lie as fp16.
    `inverse`: of the static scale of integers that the result becomes. With `requantised` scales and bias are in units
    of that scale already. With `residual_scaled` the residual is multiplied by `r_scale`.
    """
    if spec.get("blocks"):
        planes = [plane.name for plane in BLOCK_TYPES[str(spec["blocks"])].planes]
        scale = ["a_scale"] if spec["acts"] in ("int8", "int16") else []
        return ("a", *planes, *scale, *(name for name in ADDED if spec.get(name)))
    names = ["a", "w"]
    if spec["acts"] in ("int8", "int16"):
        names.append("a_scale")
    given = {
        "a_zero": spec.get("asymmetric"), "a_sum": spec.get("zeros") or spec.get("minimum"),
        "w_scale": spec["group"], "w_zero": spec.get("zeros"),
        "w_min": spec.get("minimum"), "w_sum": spec.get("asymmetric"), **{name: spec.get(name) for name in ADDED},
        "r_scale": spec.get("residual_scaled"), "inverse": spec.get("narrow"),
    }  # fmt: skip
    return (*names, *(name for name, present in given.items() if present))


def linear_operands(spec: KernelSpec, p: list[Any]) -> dict[str, Any]:
    """Optional operands of a product by name."""
    return dict(zip(linear_names(spec)[2:], p[2:], strict=True))


def without_zero_points(operands: dict[str, Any], value: Any, i: Any, g: Any, column: tuple[Any, ...]) -> Any:
    """A group's sum of products of what is stored, as the sum of products of values less their zero points.

    sum (a - az)(w - wz) = sum a w - az sum w - wz sum (a - az). Exact while each of these is below 2^24.
    """
    if "a_zero" in operands:
        value = value - operands["a_zero"][0, 0] * operands["w_sum"][column]
    if "w_zero" in operands:
        value = value - operands["a_sum"][i, g] * _f32(operands["w_zero"][column])
    return value


def scaled_sum(operands: dict[str, Any], value: Any, i: Any, g: Any, column: tuple[Any, ...]) -> Any:
    """A group's sum of products of what is stored, as its part of the product.

    With `w_min` weights are d q + m: sum a w = d sum a q + m sum a.
    """
    scale = _f32(operands["w_scale"][column])
    if "w_min" not in operands:
        return without_zero_points(operands, value, i, g, column) * scale
    total = operands["a_sum"][i, g]
    return value * scale + total * _f32(operands["w_min"][column])


def epilogue(spec: KernelSpec, operands: dict[str, Any], value: Any, i: Any, j: Any, *, single: bool) -> Any:
    """Scales, bias, residual, SiLU or another function, factor, narrowing of one element.

    `single`: the weight's scale is per channel.
    """
    if "a_scale" in operands:
        value = value * operands["a_scale"][i if int(operands["a_scale"].shape[0]) > 1 else 0, 0]
    if "w_scale" in operands and single:
        value = value * _f32(operands["w_scale"][0, j])
    if "bias" in operands:
        value = value + _f32(operands["bias"][j])
    if "residual" in operands:
        residual = _f32(operands["residual"][i, j])
        value = value + (residual * operands["r_scale"][0, 0] if "r_scale" in operands else residual)
    if spec.get("silu"):
        value = value * te.sigmoid(value)
    if spec.get("act"):
        value = expressions.apply(str(spec["act"]), [value])
    if "factor" in operands:
        value = value * _f32(operands["factor"][i, j])
    if "inverse" in operands:
        value = te.round(value * operands["inverse"][0, 0])
    if spec.get("requantised"):
        value = te.round(value)
    return _store(spec, value)


def _attention(spec: KernelSpec, p: list[Any]) -> list[Any]:
    """Grouped-query attention with an exact softmax over the whole row of scores; int8 caches times their scales."""
    q = p[0]
    heads, kv_heads = spec["heads"], spec["kv_heads"]
    rows, features = spec.args[0].shape
    cached = len(spec.args[1].shape) == 3
    total, width = spec.args[1].shape[1] if cached else spec.args[1].shape[0], features // heads
    shared = heads // kv_heads

    scaled, last = spec.args[1].dtype is Dtype.I8, len(p) - bool(spec.get("narrow"))

    def at(index: int, h: Any, t: Any, d: Any) -> Any:
        value = _f32(p[index][h // shared, t, d] if cached else p[index][t, h // shared * width + d])
        return value * _f32(p[last + index - 3][h // shared, t, 0]) if scaled else value

    c = te.reduce_axis((0, width), "c")
    shape = (heads, rows, total)
    scores = te.compute(shape, lambda h, i, t: te.sum(_f32(q[i, h * width + c]) * at(1, h, t, c), axis=c), name="S")
    masked = te.compute(shape, lambda h, i, t: mask(spec, p, scores[h, i, t] * spec["scale"], i, t), name="M")
    r1, r2, r3 = (te.reduce_axis((0, total), f"t{n}") for n in range(3))
    peak = te.compute((heads, rows), lambda h, i: te.max(masked[h, i, r1], axis=r1), name="peak")
    weights = te.compute(shape, lambda h, i, t: te.exp(masked[h, i, t] - peak[h, i]).astype("float16"), name="E")
    norm = te.compute((heads, rows), lambda h, i: te.sum(_f32(weights[h, i, r2]), axis=r2), name="norm")
    mixed = te.compute(
        (heads, rows, width),
        lambda h, i, d: te.sum(_f32(weights[h, i, r3]) * at(2, h, r3, d), axis=r3), name="V",
    )  # fmt: skip

    def element(i: Any, f: Any) -> Any:
        value = mixed[f // width, i, f % width] / norm[f // width, i]
        return _store(spec, te.round(value * p[last][0, 0]) if spec.get("narrow") else value)

    return [te.compute((rows, features), element, name="out")]


def mask(spec: KernelSpec, p: list[Any], value: Any, i: Any, t: Any) -> Any:
    """Adds the mask `[rows or 1, keys]`, or removes keys behind the query; `MASKED` stands for minus infinity."""
    if spec["mask"]:
        return value + p[3][0 if spec.args[3].shape[0] == 1 else i, t]
    if spec["causal"]:
        return te.if_then_else(t <= i + spec["past"], value, tirx.const(MASKED, "float32"))
    return value


_DEFINITIONS: dict[str, Callable[[KernelSpec, list[Any]], list[Any]]] = {
    "rms_norm": _rms_norm, "swiglu": _swiglu, "quantise": _quantise, "add": _add, "row": _row, "columns": _columns,
    "rope": _rope,
    "gather": _gather, "kv_append": _kv_append, "kv_quantise": _kv_quantise,
    "host": _host, "linear": _linear, "conv": _conv,
    "attention": _attention,
    "layer_norm": lambda spec, p: vector_definitions.layer_norm(spec, p, _quantise_rows),
    "norm_stats": lambda spec, p: norm_definitions.norm_stats(spec, p, _row_scale),
    "normalise": norm_definitions.normalise, "normed": _normed,
    **QUANTISED, **vector_definitions.DEFINITIONS, **vision_definitions.DEFINITIONS,
}  # fmt: skip
_BY_ELEMENT: dict[str, Callable[[KernelSpec, list[Any]], list[Any]]] = {
    "rope": _rope_by_head, "kv_append": _kv_rows, "kv_quantise": _quantised_rows, **QUANTISED_BY_ELEMENT,
}  # fmt: skip
