"""Rules of networks over images: convolutions, pools, batch normalisation.

An image lies as a matrix `[pixels, channels]`. A convolution is a product of that matrix (a kernel of one pixel), or of
its windows, with the weight; what is read in ONNX's order, channels before pixels, is turned first.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Final

import numpy as np

from firsttoken_compiler.passes import views
from firsttoken_compiler.passes.patterns import Context, Env, Match, Rule, is_float, reshaped, row_major
from firsttoken_compiler.passes.views import UnsupportedView, View
from firsttoken_compiler.tvm import dialect
from firsttoken_compiler.tvm.api import operator_name, relax, shape_of

LARGEST_ROW: Final = 1 << 15
"""Elements of a row that a concatenation moves."""
AXES: Final = ("kernel", "stride", "pad", "dilation", "out")


def image_of(builder: Any, view: View) -> View:
    """A tensor `[1, channels, lines, pixels]` as an image; raises UnsupportedView for several images."""
    shape = view.shape
    if len(shape) != 4 or shape[0] != 1:
        raise UnsupportedView(f"images of shape {list(shape)}, expected one of them")
    _, channels, lines, line = shape
    if len(shape_of(view.base)) == 2 and view.repeat == 1 and view.is_laid_out("nm"):
        base = reshaped(builder, view.base, (lines * line, channels))
        return views.image(base, lines, line, channels)
    flat = reshaped(builder, row_major(builder, view).base, (channels, lines * line))
    if channels == 1 or lines * line == 1:
        return views.image(reshaped(builder, flat, (lines * line, channels)), lines, line, channels)
    turned = builder.emit(dialect.call("npu.transpose", [flat], out="float32"))
    return views.image(turned, lines, line, channels)


def axes_of(attrs: dict[str, Any]) -> dict[str, int]:
    """The geometry that the kernels need."""
    return {f"{name}_{axis}": int(attrs[f"{name}_{axis}"]) for name in AXES for axis in "yx"}


class Conv(Rule):
    """npu.raw_conv, or its sum with another image, as a product of the windows."""

    def match(self, context: Context, variable: Any, value: Any) -> Match | None:
        """Captures the call, and what is added to it."""
        residual, covered = None, []
        if operator_name(value) == "relax.add":
            found = one_conv(context, value)
            if found is None:
                return None
            inner, residual = found
            value, covered = context.values[inner], [inner]
            if int(value.attrs["group"]) != 1:
                return None
        constant = all(context.is_weight(part) or context.known(part) is not None for part in value.args[2:])
        if not is_float(*value.args) or not context.is_weight(value.args[1]) or not constant:
            if residual is not None:
                return None
            raise UnsupportedView("a convolution whose weight or bias is computed, an input, or stored quantised")
        leaves = [part for part in (*value.args, residual) if isinstance(part, relax.Var)]
        return Match({"call": value, "residual": residual}, tuple(leaves), (*covered, variable))

    def emit(self, context: Context, builder: Any, match: Match, env: Env) -> View:
        """Emits the windows, where the kernel is more than a pixel, and the product."""
        call, residual = match.captured["call"], match.captured["residual"]
        attrs = dialect.plain_attributes(call)
        n, channels, *kernel = shape_of(call.args[1])
        image, taps = image_of(builder, env[call.args[0]]), int(np.prod(kernel))
        base, pairs = image.base, axes_of(attrs)
        if attrs["group"] != 1:
            arrays = [context.known(part) for part in call.args[1:]]
            if any(array is None for array in arrays):
                raise UnsupportedView("a convolution of each channel for itself whose weights are not here")
            return depthwise(context, builder, call, image, *map(np.asarray, arrays))
        if taps > 1 or pairs["stride_y"] > 1 or pairs["stride_x"] > 1 or is_padded(attrs):
            base = context.emit(builder, "npu.windows", [base], width=image.line, out="float32", **pairs)
        args = [base, env[call.args[1]].base]
        args += [env[b].base if b in env else context.constant(_known(context, b), "bias") for b in call.args[2:]]
        if residual is not None:
            args.append(image_of(builder, env[residual]).base)
        made = context.emit(
            builder, "npu.linear", args, n=n, k=taps * channels, transposed=0, kernel=taps,
            bias=int(len(call.args) > 2), residual=int(residual is not None), out="float32",
        )  # fmt: skip
        return views.image(made, pairs["out_y"], pairs["out_x"], n)


def depthwise(
    context: Context, builder: Any, call: Any, image: View, weights: np.ndarray, bias: np.ndarray | None = None
) -> View:
    """Each channel for itself, on the vector unit: sums of pixels times rows of weights, the last row the bias."""
    attrs, (n, inner, *_) = dialect.plain_attributes(call), shape_of(call.args[1])
    if not attrs["group"] == n == image.features or inner != 1:
        raise UnsupportedView(f"a convolution in {attrs['group']} groups of several channels")
    rows = np.concatenate([np.reshape(weights, (n, -1)).T, np.reshape(np.zeros(n) if bias is None else bias, (1, n))])
    args, pairs = [image.base, context.constant(rows.astype(np.float32), "taps")], axes_of(attrs)
    made = context.emit(
        builder, "npu.pool", args, width=image.line, mode="depthwise", scale=1.0, out="float32", **pairs
    )
    return views.image(made, pairs["out_y"], pairs["out_x"], n)


def _known(context: Context, value: Any) -> np.ndarray:
    return np.asarray(context.known(value))


def is_padded(attrs: dict[str, Any]) -> bool:
    """Whether windows reach beyond the image."""
    return any(int(attrs[f"{name}_{axis}"]) for name in ("pad", "after") for axis in "yx")


def one_conv(context: Context, value: Any) -> tuple[Any, Any] | None:
    """(a convolution that nothing else reads, the computed image of its shape that is added); None for other sums."""
    if len(value.args) != 2:
        return None
    for inner, other in (tuple(value.args), tuple(value.args)[::-1]):
        bound = context.values.get(inner) if isinstance(inner, relax.Var) else None
        alone = operator_name(bound) == "npu.raw_conv" and context.read_once(inner)
        if alone and isinstance(other, relax.Var) and shape_of(other) == shape_of(inner) and is_float(other):
            return inner, other
    return None


class Pool(Rule):
    """npu.raw_pool."""

    def match(self, context: Context, variable: Any, value: Any) -> Match | None:
        """Captures the call."""
        image = value.args[0]
        computed = isinstance(image, relax.Var) and is_float(image)
        return Match({"call": value}, (image,), (variable,)) if computed else None

    def emit(self, context: Context, builder: Any, match: Match, env: Env) -> View:
        """Emits the pool; where padding does not count, an average has a factor per pixel."""
        call = match.captured["call"]
        attrs = dialect.plain_attributes(call)
        image, pairs = image_of(builder, env[call.args[0]]), axes_of(attrs)
        lines = image.tokens // image.line
        args, scale = [image.base], 1.0
        if attrs["mode"] == "average":
            factors = np.outer(_counts(attrs, "y", lines), _counts(attrs, "x", image.line)).reshape(-1, 1)
            factors = (1.0 / np.maximum(factors, 1)).astype(np.float32)
            scale = float(factors[0, 0])
            if (factors != factors[0]).any():
                args.append(context.constant(factors, "counts"))
        made = context.emit(
            builder, "npu.pool", args, width=image.line, mode=attrs["mode"], scale=scale, out="float32", **pairs
        )
        return views.image(made, pairs["out_y"], pairs["out_x"], image.features)


def _counts(attrs: dict[str, Any], axis: str, extent: int) -> np.ndarray:
    """How many taps of each window count along an axis: those inside of the image, or of its padding too."""
    kernel, stride, pad, dilation, out, after = (
        int(attrs[f"{name}_{axis}"]) for name in ("kernel", "stride", "pad", "dilation", "out", "after")
    )
    at = np.arange(out)[:, None] * stride - pad + np.arange(kernel) * dilation
    low, high = (-pad, extent + after) if int(attrs["count_include_pad"]) else (0, extent)
    return np.asarray(((at >= low) & (at < high)).sum(axis=1))


class BatchNorm(Rule):
    """npu.raw_batch_norm, a relu behind it included, as a factor and a shift per channel."""

    def match(self, context: Context, variable: Any, value: Any) -> Match | None:
        """Captures the call where its statistics are weights."""
        covered: list[Any] = []
        if operator_name(value) == "relax.nn.relu":
            inner = value.args[0]
            bound = context.values.get(inner) if isinstance(inner, relax.Var) else None
            if operator_name(bound) != "npu.raw_batch_norm" or not context.read_once(inner):
                return None
            value, covered = bound, [inner]
        if not is_float(value.args[0]) or not isinstance(value.args[0], relax.Var):
            return None
        relu = bool(covered)
        return Match({"call": value, "relu": relu}, (value.args[0],), (*covered, variable))

    def emit(self, context: Context, builder: Any, match: Match, env: Env) -> View:
        """Emits the elementwise operator on rows of channels."""
        call = match.captured["call"]
        known = [context.known(part) for part in call.args[1:]]
        if any(array is None for array in known):
            raise UnsupportedView("batch normalisation by computed statistics, or by weights that are not here")
        gamma, beta, mean, variance = (np.asarray(array, np.float64) for array in known)
        factor = gamma / np.sqrt(variance + float(call.attrs["eps"]))
        shift = (beta - mean * factor).astype(np.float32)
        view = env[call.args[0]]
        view = image_of(builder, view) if len(view.shape) == 4 else view
        if not (len(shape_of(view.base)) == 2 and shape_of(view.base)[1] == gamma.size and view.axes in ("1nyx", "mn")):
            raise UnsupportedView(f"batch normalisation of a tensor of shape {list(view.shape)}")
        rows, width = shape_of(view.base)
        text = "add(mul(s0, s1), s2)"
        args = [view.base, context.constant(factor.astype(np.float32), "vector"), context.constant(shift, "vector")]
        text = f"max({text}, 0.0)" if match.captured["relu"] else text
        made = context.emit(builder, "npu.map", args, expr=text, rows=rows, width=width, out="float32")
        return replace(view, base=made)


class Concat(Rule):
    """A concatenation of floats: by rows where nothing lies before its axis, else by columns."""

    def match(self, context: Context, variable: Any, value: Any) -> Match | None:
        """Captures the parts; at least one is computed."""
        parts = list(value.args[0].fields) if isinstance(value.args[0], relax.Tuple) else []
        if not parts or not is_float(*parts) or not any(isinstance(part, relax.Var) for part in parts):
            return None
        axis = int(value.attrs.axis if value.attrs.axis is not None else 0) % max(1, len(shape_of(variable)))
        leaves = tuple(part for part in parts if isinstance(part, relax.Var))
        return Match({"parts": parts, "axis": axis, "shape": shape_of(variable)}, leaves, (variable,))

    def emit(self, context: Context, builder: Any, match: Match, env: Env) -> View:
        """Emits the transfers; images stay images where channels are added."""
        axis, shape = match.captured["axis"], match.captured["shape"]
        operands = [self._operand(context, part, env) for part in match.captured["parts"]]
        operands = [view for view in operands if 0 not in view.shape]
        if axis == 1 and len(shape) == 4 and any(view.axes == "1nyx" for view in operands):
            images = [image_of(builder, view) for view in operands]
            base = context.emit(builder, "npu.concat", [view.base for view in images], axis=1, out="float32")
            return views.image(base, shape[2], shape[3], shape[1])
        before = math.prod(shape[:axis])
        by_rows = before == 1 and axis < len(shape) - 1
        bases = []
        for view in operands:
            rows = math.prod(view.shape[:-1]) if by_rows else before
            bases.append(reshaped(builder, row_major(builder, view).base, (rows, math.prod(view.shape) // rows)))
        if max(shape_of(base)[1] for base in bases) > LARGEST_ROW:
            raise UnsupportedView(f"a concatenation of rows of more than {LARGEST_ROW} elements")
        base = context.emit(builder, "npu.concat", bases, axis=int(not by_rows), out="float32")
        wanted = (math.prod(shape[:-1]), shape[-1])
        return views.dense(reshaped(builder, base, wanted if len(shape) > 1 else shape), shape)

    @staticmethod
    def _operand(context: Context, part: Any, env: Env) -> View:
        if part in env:
            return env[part]
        array = _known(context, part)
        return views.dense(context.constant(array.reshape(-1, array.shape[-1]), "part"), array.shape)


CONV, POOL, BATCH_NORM, CONCAT = Conv(), Pool(), BatchNorm(), Concat()
