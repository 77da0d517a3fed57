"""Convolutions on weights that the graph stores quantised, of activations with one static scale.

The image is quantised once, as the graph says, and its windows are integers: where a tap lies in the padding it meets
the zero point, which is what 0 is quantised to. The result is a float; `integer_images` narrows it where the graph
quantises it again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from firsttoken_compiler.passes import views
from firsttoken_compiler.passes.elementwise import resolved
from firsttoken_compiler.passes.patterns import Context, Env, Match, Rule
from firsttoken_compiler.passes.quantised_patterns import (
    Activations,
    constant_bias,
    emit_exact,
    quantised_activations,
    static_input,
)
from firsttoken_compiler.passes.stored import BITS, Stored, Vectors, all_equal, float_type, operand_call, source_of
from firsttoken_compiler.passes.views import UnsupportedView, View
from firsttoken_compiler.passes.vision_patterns import axes_of, depthwise, image_of, is_padded, one_conv
from firsttoken_compiler.tvm import dialect
from firsttoken_compiler.tvm.api import dtype_of, operator_name, relax, shape_of


@dataclass(frozen=True)
class _Found:
    """A convolution on stored weights."""

    call: Any
    residual: Any | None
    weight: Any
    stored: Stored
    bias: np.ndarray | None
    activations: Activations | None
    """None where each channel is convolved for itself, in floats."""


class StoredConv(Rule):
    """npu.raw_conv of dequantised values with dequantised weights, or its sum with another image."""

    def match(self, context: Context, variable: Any, value: Any) -> Match | None:
        """Captures the parts; raises UnsupportedView for a convolution on stored weights that the NPU cannot run."""
        call, residual, covered = value, None, [variable]
        if operator_name(value) == "relax.add":
            sum_of = one_conv(context, value)
            if sum_of is None:
                return None
            inner, residual = sum_of
            call, covered = context.values[inner], [inner, variable]
        dequantised = operand_call(context, call.args[1], "npu.raw_dequantise")
        if dequantised is None:
            return None
        try:
            found = _find(context, call, dequantised, residual)
        except UnsupportedView:
            if residual is not None:
                return None  # a sum like any other
            raise
        if found is None:
            return None
        inside = [call.args[1], *((call.args[0], *found.activations.inside) if found.activations else ())]
        covered = [*(part for part in inside if isinstance(part, relax.Var)), *covered]
        image = found.activations.source if found.activations else call.args[0]
        leaves = tuple(part for part in (image, residual) if part is not None)
        return Match({"found": found}, leaves, tuple(covered))

    def emit(self, context: Context, builder: Any, match: Match, env: Env) -> View:
        """Emits the quantisation of the image, its windows, and the product."""
        found: _Found = match.captured["found"]
        call, activations = found.call, found.activations
        attrs = dialect.plain_attributes(call)
        if activations is None:
            image = image_of(builder, env[call.args[0]])
            return depthwise(context, builder, call, image, _floats(context, found), found.bias)
        image = image_of(builder, activations.view(context, builder, env))
        operands = quantised_image(context, builder, activations, image)
        base, pairs = operands["a"], axes_of(attrs)
        taps = pairs["kernel_y"] * pairs["kernel_x"]
        if taps > 1 or pairs["stride_y"] > 1 or pairs["stride_x"] > 1 or is_padded(attrs):
            zero = int(activations.zero) - activations.shift
            outside = {"outside": zero} if zero and is_padded(attrs) else {}
            base = context.emit(
                builder, "npu.windows", [base], width=image.line, out="int8", exact=1, **outside, **pairs
            )
        n, asymmetric = found.stored.n, int("a_zero" in operands)
        args = [base, env[found.weight].base, *(operands[name] for name in ("a_scale", "a_zero") if name in operands)]
        if found.bias is not None:
            args.append(context.constant(found.bias, "bias"))
        if found.residual is not None:
            args.append(image_of(builder, env[found.residual]).base)
        made = context.emit(
            builder, "npu.linear", args, n=n, k=found.stored.k, transposed=0, bias=int(found.bias is not None),
            residual=int(found.residual is not None), out="float32", stored=found.stored.to_text(), acts="int8",
            asymmetric=asymmetric, zeros=0,
        )  # fmt: skip
        return views.image(made, pairs["out_y"], pairs["out_x"], n)


def quantised_image(context: Context, builder: Any, activations: Activations, image: View) -> dict[str, Any]:
    """The integers of an image `[pixels, channels]`, once for all that share them, their scale and zero point."""
    matrix = views.matrix(image.base, "mn", *shape_of(image.base))
    if activations.kind == "given" and not activations.shift and dtype_of(image.base) != activations.stored:
        whole = emit_exact(context, builder, [image.base], "s0", shape_of(image.base), activations.stored)
        matrix = views.matrix(whole, "mn", *shape_of(whole))
    return quantised_activations(context, builder, activations, matrix)


def _find(context: Context, call: Any, dequantised: Any, residual: Any | None) -> _Found | None:
    weight = resolved(context, dequantised.args[0])
    if not context.is_weight(weight):
        return None
    stored = _recipe(context, weight, dequantised)
    bias = constant_bias(context, call.args[2]).reshape(-1) if len(call.args) > 2 else None
    group = int(call.attrs["group"])
    if group != 1:
        if not group == stored.n == shape_of(call.args[0])[1] or shape_of(weight)[1] != 1:
            raise UnsupportedView(f"a convolution in {group} groups of several channels")
        if context.known(weight) is None:
            raise UnsupportedView("a convolution of each channel for itself whose weights are not here")
        return _Found(call, residual, weight, stored, bias, None) if residual is None else None
    activations = static_input(context, call.args[0], given=True)
    if activations is None:
        raise UnsupportedView("a convolution of floats, or of values of several scales, with weights stored quantised")
    if activations.stored != "int8":
        raise UnsupportedView(f"a convolution of {activations.dtype}: products of windows take int8 and uint8")
    context.require_pair("int8xint8")
    return _Found(call, residual, weight, stored, bias, activations)


def _recipe(context: Context, weight: Any, call: Any) -> Stored:
    """The weight `[O, I, y, x]` as the matrix of a product, tap by tap; raises UnsupportedView for what none takes."""
    dtype, shape = dtype_of(weight), shape_of(weight)
    if BITS.get(dtype) != 8:
        raise UnsupportedView(f"weights of a convolution stored as {dtype}: products take int8 and uint8")
    count, middle = math.prod(shape_of(call.args[1])), 128 if dtype[0] == "u" else 0
    if int(call.attrs["block"]) or not (count == 1 or int(call.attrs["axis"]) % len(shape) == 0):
        raise UnsupportedView("weights of a convolution with scales along another axis than the results'")
    if not all_equal(context, call.args[2], middle) if len(call.args) > 2 else middle:
        raise UnsupportedView(f"weights of a convolution with zero points other than {middle}")
    scales = source_of(context, call.args[1])
    if scales is None:
        raise UnsupportedView("weights whose scales are computed")
    k, kind = math.prod(shape[1:]), float_type(context, call.args[1])
    name = str(context.imported.weights[weight.name])
    layout = "one" if count == 1 else "n"
    return Stored(name, "conv", k, shape[0], 8, k, middle, Vectors(scales, layout, kind), None)


def _floats(context: Context, found: _Found) -> np.ndarray:
    """The weights that the stored integers stand for."""
    call = operand_call(context, found.call.args[1], "npu.raw_dequantise")
    assert call is not None
    integers, scale = context.known(resolved(context, call.args[0])), context.known(resolved(context, call.args[1]))
    if integers is None or scale is None:
        raise UnsupportedView("a convolution of each channel for itself whose weights are not here")
    shape = (-1, *(1,) * (integers.ndim - 1)) if scale.size > 1 else ()
    return (integers.astype(np.float32) - np.float32(found.stored.shift)) * np.reshape(scale, shape).astype(np.float32)


STORED_CONV = StoredConv()
