"""What the canonical and the typed module mean, in numpy: the oracle that later passes are compared with.

Every operator is computed in float64 from its operands and rounded once, to the type that it declares. Where the
hardware's rule is part of the meaning (int32 sums, scales per token and per group) it is spelled out.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from interpret_images import conv_weight, pool, windows
from numpy.typing import NDArray

from firsttoken_compiler.codegen import weights
from firsttoken_compiler.frontend.importer import Imported
from firsttoken_compiler.isa.program import Packing
from firsttoken_compiler.isa.vector_kernel import VectorKernel
from firsttoken_compiler.passes.canonicalise import Canonical
from firsttoken_compiler.passes.quantise import Quantised
from firsttoken_compiler.tvm.api import Call, relax, shape_of

Array = NDArray[Any]
Attributes = dict[str, Any]

QMAX = {"int8": 127.0, "int16": 32767.0}


def interpret(module: Any, values: Mapping[str, Array]) -> list[Array]:
    """The outputs of `main` when its parameters have these values; every result has its declared type and shape."""
    function = module["main"]
    known: dict[Any, Any] = {parameter: values[parameter.name] for parameter in function.params}
    bindings = [binding for block in function.body.blocks for binding in block.bindings]
    for parameter in function.params:
        _check(parameter, known[parameter])
    for binding in bindings:
        known[binding.var] = _evaluate(binding.value, known)
        _check(binding.var, known[binding.var])
    return list(known[function.body.body])


def calls(module: Any, name: str) -> list[tuple[Any, Any]]:
    """(variable, call) of every call of an operator, in order."""
    bindings = [binding for block in module["main"].body.blocks for binding in block.bindings]
    return [(b.var, b.value) for b in bindings if isinstance(b.value, Call) and b.value.op.name == name]


def canonical_values(imported: Imported, canonical: Canonical, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Parameters of the canonical module: inputs by their ONNX names, weights out of the file, the pass's constants."""
    values = dict(canonical.constants)
    parameters = canonical.module["main"].params
    for parameter, name in zip(parameters, imported.inputs, strict=False):
        values[parameter.name] = feeds[name].reshape(shape_of(parameter))
    for parameter in parameters:
        if parameter.name in imported.weights:
            array = imported.student.array(imported.weights[parameter.name])
            values[parameter.name] = np.asarray(array).reshape(shape_of(parameter))
    return values


def quantised_values(imported: Imported, quantised: Quantised, canonical: Mapping[str, Array]) -> dict[str, Array]:
    """Parameters of a typed module, out of those of the canonical one: packed, scaled or converted."""
    values: dict[str, Array] = {}
    for parameter in quantised.module["main"].params:
        packing = quantised.packings.get(parameter.name)
        dtype = str(parameter.ty.dtype.dtype)
        if packing is None:
            values[parameter.name] = canonical[parameter.name].astype(dtype)
            continue
        matrix = np.asarray(imported.student.array(packing.source))
        matrix = matrix.T if packing.transposed else matrix
        if packing.bits == 16:
            values[parameter.name] = matrix.astype(np.float16)
        else:
            part = quantised_matrix(packing, matrix)[("panels", "scales", "zeros").index(packing.form)]
            rows = np.arange(0, packing.k, packing.group) // quantised_in(packing)
            values[parameter.name] = part if packing.form == "panels" else part[rows]
    return values


def quantised_in(packing: Packing) -> int:
    """Rows that share a scale."""
    return int(packing.layout.partition(":")[2] or packing.group)


def quantised_matrix(packing: Packing, matrix: Array) -> tuple[Array, ...]:
    """(q, scales), and zero points where the recipe has them."""
    made = weights.quantise_asymmetric if packing.shift else weights.quantise
    return made(matrix, packing.bits, quantised_in(packing))


def _check(variable: Any, value: Any) -> None:
    """A value has the type that its variable declares."""
    types = list(variable.ty.fields) if isinstance(variable.ty, relax.TupleType) else [variable.ty]
    parts = value if isinstance(variable.ty, relax.TupleType) else [value]
    for declared, part in zip(types, parts, strict=True):
        dtype = str(declared.dtype.dtype).replace("int4", "int8")
        assert part.dtype == dtype, f"{variable.name} is {part.dtype}, declared {dtype}"
        shape = tuple(int(extent) for extent in declared.shape)
        assert part.shape == shape, f"{variable.name} has shape {part.shape}, declared {shape}"


def _evaluate(value: Any, known: Mapping[Any, Any]) -> Any:
    if isinstance(value, relax.Tuple):
        return tuple(known[part] for part in value.fields)
    if isinstance(value, relax.TupleGetItem):
        return known[value.tuple_value][int(value.index)]
    if isinstance(value, relax.Var):
        return known[value]
    if value.op.name == "relax.reshape":
        return known[value.args[0]].reshape([int(extent) for extent in value.args[1].values])
    attributes = {key: v if isinstance(v, int | float) else str(v) for key, v in value.attrs.items()}
    return _MEANING[value.op.name]([known[argument] for argument in value.args], attributes)


def _wide(array: Array) -> Array:
    return array.astype(np.float64)


def _out(array: Array, a: Attributes) -> Any:
    """Narrows to the declared type; integers are quantised per row: (values, scales)."""
    if a["out"] not in QMAX:
        return array.astype(a["out"])
    peak = np.abs(array.astype(np.float32)).max(axis=1, keepdims=True)
    scale = np.maximum(peak, np.float32(1e-12)) * np.float32(1.0 / QMAX[a["out"]])
    return np.rint(array.astype(np.float32) / scale).astype(a["out"]), scale


def _gather(p: list[Array], a: Attributes) -> Any:
    return _out((p[0].T if a.get("turned") else p[0])[p[1]], a)


def _rms_norm(p: list[Array], a: Attributes) -> Any:
    x = _wide(p[0])
    return _out(x / np.sqrt((x * x).mean(axis=1, keepdims=True) + a["eps"]) * _wide(p[1]), a)


def _linear(p: list[Array], a: Attributes) -> Any:
    x, w, *rest = p
    if a.get("transposed"):
        w = w.T
    if a.get("kernel"):
        w = conv_weight(w, a)
    assert w.shape == (a["k"], a["n"])
    assert x.shape[1] == a["k"]
    a_scale = rest.pop(0) if a.get("acts") in QMAX else None
    group = a.get("group") or a["k"]
    starts = range(0, a["k"], group)
    sums = np.stack([_wide(x[:, first : first + group]).sum(axis=1) for first in starts], axis=1)
    if a.get("zeros") and rest[0].dtype == np.float32:  # there are none before it is settled what is summed
        np.testing.assert_allclose(rest.pop(0), sums, rtol=1e-6, atol=1e-6 * np.abs(sums).max())
    w_scale = rest.pop(0) if a.get("group") else None
    w_zero = rest.pop(0) if a.get("zeros") else None
    total = np.zeros((len(x), a["n"]))
    for index, first in enumerate(starts):
        part = _wide(x[:, first : first + group]) @ _wide(w[first : first + group])  # integers: exact below 2^53
        part = part if w_zero is None else part - sums[:, index : index + 1] * _wide(w_zero[index])
        total += part * _wide(w_scale[index]) if w_scale is not None else part
    if a_scale is not None:
        total *= _wide(a_scale)
    for name in ("bias", "residual"):
        total = total + _wide(rest.pop(0)) if a[name] else total
    if a.get("silu"):
        total = total / (1 + np.exp(-total))
    if a.get("act"):
        total = VectorKernel.parse(a["act"]).evaluate([total.astype(np.float32)], (1, *total.shape))[0]
    if a.get("factor"):
        total = total * _wide(rest.pop(0))
    assert not rest
    return _out(total, a)


def _rope(p: list[Array], a: Attributes) -> Any:
    x = _wide(p[0]).reshape(len(p[0]), a["heads"], 2, -1)
    cos, sin = (_wide(table)[:, None] for table in p[1:])
    low, high = x[:, :, 0], x[:, :, 1]
    return _out(np.stack([low * cos - high * sin, high * cos + low * sin], axis=2).reshape(p[0].shape), a)


def _heads(matrix: Array, heads: int) -> Array:
    return matrix.reshape(len(matrix), heads, -1).transpose(1, 0, 2)


def _kv_append(p: list[Array], a: Attributes) -> Any:
    new = _heads(p[0], a["kv_heads"])
    return _out(np.concatenate([p[1], new], axis=1) if a["past"] else new, a)


def _attention(p: list[Array], a: Attributes) -> Any:
    q = _wide(_heads(p[0], a["heads"]))
    keys, values = (_wide(x if x.ndim == 3 else _heads(x, a["kv_heads"])) for x in p[1:3])
    keys, values = (np.repeat(x, a["heads"] // a["kv_heads"], axis=0) for x in (keys, values))
    scores = q @ keys.transpose(0, 2, 1) * a["scale"]
    tokens, rows = scores.shape[1:]
    if a["mask"]:
        scores = scores + _wide(p[3])
    if a["causal"]:
        scores[:, np.triu(np.ones((tokens, rows), bool), 1 + a["past"])] = -np.inf
    scores = np.exp(scores - scores.max(axis=2, keepdims=True))
    mixed = scores / scores.sum(axis=2, keepdims=True) @ values
    return _out(mixed.transpose(1, 0, 2).reshape(tokens, -1), a)


def _swiglu(p: list[Array], a: Attributes) -> Any:
    gate, up = _wide(p[0]), _wide(p[1])
    return _out(gate / (1 + np.exp(-gate)) * up, a)


def _layer_norm(p: list[Array], a: Attributes) -> Any:
    x, gamma, *beta = map(_wide, p)
    normed = (x - x.mean(axis=1, keepdims=True)) / np.sqrt(x.var(axis=1, keepdims=True) + a["eps"]) * gamma
    return _out(normed + beta[0] if beta else normed, a)


def _map(p: list[Array], a: Attributes) -> Any:
    shape = (1, a["rows"], a["width"])
    kernel = VectorKernel.parse(a["expr"])
    return _out(kernel.evaluate([x.astype(np.float32) for x in p], shape)[0], a)


def _reduce(p: list[Array], a: Attributes) -> Any:
    values = VectorKernel.parse(a["expr"]).evaluate([p[0].astype(np.float32)], (1, *p[0].shape))[0]
    cube = _wide(values).reshape(len(p[0]), -1, a["inner"])
    return _out({"sum": np.sum, "max": np.max, "min": np.min}[a["fold"]](cube, axis=1) * a["scale"], a)


def _softmax(p: list[Array], a: Attributes) -> Any:
    x = _wide(p[0]) - _wide(p[0]).max(axis=1, keepdims=True)
    total = np.exp(x).sum(axis=1, keepdims=True)
    return _out(x - np.log(total) if a["log"] else np.exp(x) / total, a)


_MEANING: dict[str, Callable[[list[Array], Attributes], Any]] = {
    "npu.gather": _gather,
    "npu.columns": lambda p, a: _out(p[0][:, a["first"] : a["first"] + a["width"]], a),
    "npu.rms_norm": _rms_norm,
    "npu.linear": _linear,
    "npu.group_sums": lambda p, a: _out(_wide(p[0]).reshape(len(p[0]), a["groups"], -1).sum(axis=2), a),
    "npu.rope": _rope,
    "npu.kv_append": _kv_append,
    "npu.attention": _attention,
    "npu.swiglu": _swiglu,
    "npu.quantise": lambda p, a: _out(p[0], a),
    "npu.add": lambda p, a: _out(_wide(p[0]) + _wide(p[1]), a),
    "npu.layer_norm": _layer_norm,
    "npu.map": _map,
    "npu.reduce": _reduce,
    "npu.softmax": _softmax,
    "npu.windows": windows,
    "npu.pool": pool,
    "npu.concat": lambda p, a: _out(np.concatenate([part.astype(np.float32) for part in p], axis=a["axis"]), a),
    "npu.transpose": lambda p, a: _out(p[0].T, a),
    "npu.row": lambda p, a: _out(p[0][a["index"] : a["index"] + 1], a),
}
