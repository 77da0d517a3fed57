"""Elementwise and normalising ONNX operators that TVM spells awkwardly or not at all, as plain Relax.

Each converter has the signature of TVM's: (block builder, inputs, attributes, [values, parameters]).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from firsttoken_compiler.frontend.conversion import Converter, refused
from firsttoken_compiler.tvm.api import dtype_of, onnx_frontend, relax, shape_of


def _const(value: float, like: Any) -> Any:
    return relax.const(np.asarray(value, dtype_of(like)))


def _floats(attrs: dict[str, Any], *values: Any) -> None:
    """Raises StudentError for integers, whose arithmetic the vector unit does not have."""
    for value in values:
        if dtype_of(value) not in ("float16", "float32"):
            raise refused(attrs, f"no NPU operator on {dtype_of(value)}")


def clip(builder: Any, inputs: Any, attrs: dict[str, Any], _params: Any) -> Any:
    """Bounds are attributes (opset 6) or inputs, each of which may be missing."""
    x = inputs[0]
    _floats(attrs, x)
    given = [inputs[index] if index < len(inputs) else None for index in (1, 2)]
    for index, name in enumerate(("min", "max")):
        if given[index] is None and name in attrs:
            given[index] = _const(float(attrs[name]), x)
    if given[0] is not None:
        x = builder.emit(relax.op.maximum(x, given[0]))
    return x if given[1] is None else relax.op.minimum(x, given[1])


def _variadic(operator: Callable[[Any, Any], Any]) -> Any:
    """An operator of any number of tensors as a chain of pairs."""

    def convert(builder: Any, inputs: Any, attrs: dict[str, Any], _params: Any) -> Any:
        values = [value for value in inputs if value is not None]
        _floats(attrs, *values)
        return functools.reduce(lambda a, b: builder.emit(operator(a, b)), values)

    return convert


def mean(builder: Any, inputs: Any, attrs: dict[str, Any], params: Any) -> Any:
    """The mean of any number of tensors."""
    total = _variadic(relax.op.add)(builder, inputs, attrs, params)
    count = len([value for value in inputs if value is not None])
    return relax.op.multiply(total, _const(1.0 / count, total))


def prelu(builder: Any, inputs: Any, attrs: dict[str, Any], _params: Any) -> Any:
    """The slope broadcasts from the right."""
    x, slope = inputs
    _floats(attrs, x, slope)
    low = builder.emit(relax.op.multiply(x, slope))
    below = builder.emit(relax.op.less(x, _const(0.0, x)))
    return relax.op.where(below, low, x)


def _elu(builder: Any, x: Any, slope: float, rate: float) -> Any:
    """`slope * (exp(x / rate) - 1)` below 0, x above."""
    inner = x if rate == 1.0 else builder.emit(relax.op.multiply(x, _const(1.0 / rate, x)))
    raised = builder.emit(relax.op.subtract(builder.emit(relax.op.exp(inner)), _const(1.0, x)))
    low = builder.emit(relax.op.multiply(raised, _const(slope, x)))
    below = builder.emit(relax.op.less(x, _const(0.0, x)))
    return builder.emit(relax.op.where(below, low, x))


def celu(builder: Any, inputs: Any, attrs: dict[str, Any], _params: Any) -> Any:
    """Alpha scales the exponent too."""
    alpha = float(attrs.get("alpha", 1.0))
    return _elu(builder, inputs[0], alpha, alpha)


def elu(builder: Any, inputs: Any, attrs: dict[str, Any], _params: Any) -> Any:
    """Alpha scales the negative part."""
    return _elu(builder, inputs[0], float(attrs.get("alpha", 1.0)), 1.0)


def shrink(builder: Any, inputs: Any, attrs: dict[str, Any], _params: Any) -> Any:
    """Towards 0 by `bias` outside of +-`lambd`, 0 inside."""
    x = inputs[0]
    _floats(attrs, x)
    bias, bound = (_const(float(attrs.get(name, default)), x) for name, default in (("bias", 0.0), ("lambd", 0.5)))
    zero = _const(0.0, x)
    above = builder.emit(relax.op.less(bound, x))
    high = builder.emit(relax.op.where(above, builder.emit(relax.op.subtract(x, bias)), zero))
    below = builder.emit(relax.op.less(x, _const(-float(attrs.get("lambd", 0.5)), x)))
    return relax.op.where(below, builder.emit(relax.op.add(x, bias)), high)


def _normalised(builder: Any, x: Any, rows: int, epsilon: float) -> Any:
    """Every row of `[rows, rest]` with mean 0 and variance 1."""
    shape = shape_of(x)
    width = math.prod(shape) // max(1, rows)
    flat = builder.emit(relax.op.reshape(x, (rows, width)))
    ones, zeros = (relax.const(np.full(width, value, dtype_of(x))) for value in (1.0, 0.0))
    normed = builder.emit(relax.op.nn.layer_norm(flat, ones, zeros, [-1], epsilon))
    return builder.emit(relax.op.reshape(normed, shape))


def _scaled(builder: Any, x: Any, scale: Any, bias: Any) -> Any:
    """Times a scale and plus a bias per channel, axis 1."""
    shape = (-1, *[1] * (len(shape_of(x)) - 2))
    factors = [builder.emit(relax.op.reshape(value, shape)) for value in (scale, bias)]
    return relax.op.add(builder.emit(relax.op.multiply(x, factors[0])), factors[1])


def instance_normalization(builder: Any, inputs: Any, attrs: dict[str, Any], _params: Any) -> Any:
    """Over all places of a channel of one image."""
    x, scale, bias = inputs
    _floats(attrs, x)
    images, channels = shape_of(x)[:2]
    normed = _normalised(builder, x, images * channels, float(attrs.get("epsilon", 1e-5)))
    return _scaled(builder, normed, scale, bias)


def group_normalization(builder: Any, inputs: Any, attrs: dict[str, Any], _params: Any) -> Any:
    """Over groups of channels; opset 21's scale and bias per channel."""
    x, scale, bias = inputs
    _floats(attrs, x)
    images, channels = shape_of(x)[:2]
    groups = int(attrs["num_groups"])
    if channels % groups or shape_of(scale) != (channels,):
        raise refused(
            attrs,
            f"GroupNormalization of {channels} channels in {groups} groups with "
            f"scales {list(shape_of(scale))}, expected one scale per channel"
        )
    normed = _normalised(builder, x, images * groups, float(attrs.get("epsilon", 1e-5)))
    return _scaled(builder, normed, scale, bias)


def layer_normalization(builder: Any, inputs: Any, attrs: dict[str, Any], params: Any) -> Any:
    """Results: the norm, the mean and the reciprocal deviation, over the axes from `axis` on."""
    x = inputs[0]
    _floats(attrs, x)
    normed, *_ = onnx_frontend.LayerNormalization._impl_v17(builder, inputs, attrs, params).fields
    rank = len(shape_of(x))
    axes = list(range(int(attrs.get("axis", -1)) % rank, rank))
    middle = builder.emit(relax.op.mean(x, axis=axes, keepdims=True))
    apart = builder.emit(relax.op.subtract(x, middle))
    spread = builder.emit(relax.op.mean(builder.emit(relax.op.multiply(apart, apart)), axis=axes, keepdims=True))
    raised = builder.emit(relax.op.add(spread, _const(float(attrs.get("epsilon", 1e-5)), x)))
    return relax.Tuple([builder.emit(normed), middle, builder.emit(relax.op.rsqrt(raised))])


def is_inf(builder: Any, inputs: Any, attrs: dict[str, Any], _params: Any) -> Any:
    """Either infinity, or the one that the attributes leave."""
    x = inputs[0]
    _floats(attrs, x)
    wanted = [int(attrs.get(f"detect_{name}", 1)) for name in ("positive", "negative")]
    if wanted == [1, 1]:
        return relax.op.isinf(x)
    if wanted == [0, 0]:
        raise refused(attrs, "IsInf that detects nothing")
    return relax.op.equal(x, _const(math.inf if wanted[0] else -math.inf, x))


def lp_normalization(builder: Any, inputs: Any, attrs: dict[str, Any], _params: Any) -> Any:
    """Divided by the sum of magnitudes (p 1) or the root of the sum of squares (p 2); rows of zeros stay zeros."""
    x = inputs[0]
    _floats(attrs, x)
    axis, euclidean = int(attrs.get("axis", -1)), int(attrs.get("p", 2)) == 2
    size = builder.emit(relax.op.multiply(x, x) if euclidean else relax.op.abs(x))
    total = builder.emit(relax.op.sum(size, axis=axis, keepdims=True))
    length = builder.emit(relax.op.sqrt(total)) if euclidean else total
    none = builder.emit(relax.op.equal(length, _const(0.0, x)))
    return relax.op.divide(x, builder.emit(relax.op.where(none, _const(1.0, x), length)))


CONVERTERS: dict[str, Converter] = {
    "Celu": celu,
    "Clip": clip,
    "Elu": elu,
    "GroupNormalization": group_normalization,
    "InstanceNormalization": instance_normalization,
    "IsInf": is_inf,
    "LayerNormalization": layer_normalization,
    "LpNormalization": lp_normalization,
    "Max": _variadic(relax.op.maximum),
    "Mean": mean,
    "Min": _variadic(relax.op.minimum),
    "PRelu": prelu,
    "Shrink": shrink,
    "Sum": _variadic(relax.op.add),
}
