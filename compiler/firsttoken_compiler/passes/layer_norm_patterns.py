"""The rule of layer norms: one operator, or the parts that older exporters write."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from firsttoken_compiler.passes.elementwise import operator_of, resolved
from firsttoken_compiler.passes.patterns import Captured, Context, Env, Match, Rule, is_float, like, matrix_of, reshaped
from firsttoken_compiler.passes.vector_patterns import dense
from firsttoken_compiler.passes.views import UnsupportedView, View
from firsttoken_compiler.tvm.api import relax, shape_of


class LayerNorm(Rule):
    """relax.nn.layer_norm, or its parts: (x - mean) / sqrt(mean((x - mean)^2) + eps) * gamma + beta."""

    def match(self, context: Context, variable: Any, value: Any) -> Match | None:
        """Captures x, gamma, beta (either may be missing), the number of normalised axes, epsilon."""
        if operator_of(value) == "nn.layer_norm":
            found = _fused(context, value)
            covered: tuple[Any, ...] = (variable,)
        else:
            parts = _Parts(context)
            found = parts.layer_norm(variable)
            covered = tuple(parts.covered)
        if found is None or not is_float(found["x"]) or not isinstance(found["x"], relax.Var):
            return None
        given = (found[name] for name in ("x", "gamma", "beta") if name in found)
        return Match(found, tuple(v for v in given if isinstance(v, relax.Var)), covered)

    def emit(self, context: Context, builder: Any, match: Match, env: Env) -> View:
        """Emits the operator on rows of the normalised axes."""
        c = match.captured
        view = env[c["x"]]
        width = math.prod(view.shape[len(view.shape) - c["axes"] :])
        base = reshaped(builder, matrix_of(builder, view), (math.prod(view.shape) // width, width))
        gamma = _vector(context, env, c, "gamma", width)
        if gamma is None:
            gamma = context.constant(np.ones(width, np.float32), "ones")
        beta = _vector(context, env, c, "beta", width)
        args = [base, gamma] + ([beta] if beta is not None else [])
        made = context.emit(builder, "npu.layer_norm", args, eps=float(c["eps"]), out="float32")
        return like(builder, view, made) if width == view.shape[-1] else dense(builder, made, view.shape)


def _vector(context: Context, env: Env, c: Captured, name: str, width: int) -> Any:
    """Gamma or beta as `[width]`; None for a beta of zeros or one that is missing."""
    if name not in c:
        return None
    value = c[name]
    if value in env and shape_of(env[value].base) == (width,):
        return env[value].base
    known = context.known(value)
    if known is None or known.size != width:
        raise UnsupportedView(f"a layer norm's {name} of shape {list(shape_of(value))}")
    return context.constant(known.reshape(width).astype(np.float32), name)


def _fused(context: Context, call: Any) -> Captured | None:
    shape = shape_of(call.args[0])
    axes = sorted(int(axis) % len(shape) for axis in call.attrs.axes)
    if axes != list(range(axes[0], len(shape))):
        return None
    found: Captured = {"x": resolved(context, call.args[0]), "axes": len(axes), "eps": float(call.attrs.epsilon)}
    if int(call.attrs.scale):
        found["gamma"] = call.args[1]
    beta = context.known(call.args[2])
    if int(call.attrs.center) and (beta is None or np.any(beta)):
        found["beta"] = call.args[2]
    return found


class _Parts:
    """Reads a decomposed layer norm backwards; `covered` are the variables of its parts."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.covered: list[Any] = []

    def layer_norm(self, variable: Any) -> Captured | None:
        """The captures, or None."""
        found: Captured = {"axes": 1}
        shape = shape_of(variable)
        rest = variable
        for operator, name in (("add", "beta"), ("multiply", "gamma")):
            parts = self.call(rest, operator)
            if parts is None:
                continue
            weights = [part for part in parts if self.is_vector(part, shape)]
            others = [part for part in parts if part not in weights]
            if len(weights) == 1 and len(others) == 1:
                found[name] = weights[0]
                self.covered.append(rest)
                rest = others[0]
        normed = self.normed(rest)
        return None if normed is None else {**found, **normed}

    def normed(self, variable: Any) -> Captured | None:
        """The input and epsilon of `centred / sqrt(variance + eps)`, in either spelling."""
        self.covered.append(variable)
        quotient = self.call(variable, "divide")
        if quotient is not None:
            return self.centred(quotient[0], self.root(quotient[1], "sqrt"))
        product = self.call(variable, "multiply")
        for left, right in (product, product[::-1]) if product is not None else ():
            inverse = self.call(right, "divide")
            if inverse is not None and self.context.scalar(inverse[0]) == 1.0:
                self.covered.append(right)
                return self.centred(left, self.root(inverse[1], "sqrt"))
            if self.call(right, "rsqrt") is not None:
                return self.centred(left, self.root(right, "rsqrt"))
        return None

    def root(self, value: Any, operator: str) -> tuple[Any, float] | None:
        """(variance, epsilon) under a root."""
        under = self.call(value, operator)
        total = self.call(under[0], "add") if under is not None else None
        for variance, eps in (total, total[::-1]) if total is not None else ():
            number = self.context.scalar(eps)
            if number is not None and under is not None:
                self.covered += [value, under[0]]
                return variance, number
        return None

    def centred(self, difference: Any, root: tuple[Any, float] | None) -> Captured | None:
        """The input, where `difference` is x - mean(x) and the root's variance is the mean of its square."""
        mean = self.mean(root[0]) if root is not None else None
        parts = self.call(difference, "subtract")
        if root is None or mean is None or parts is None or self.mean(parts[1]) != parts[0]:
            return None
        square = self.call(mean, "power") or self.call(mean, "multiply")
        if square is None or not self.same(square[0], difference):
            return None
        if not (self.context.scalar(square[1]) == 2.0 or self.same(square[1], difference)):
            return None
        self.covered += [root[0], mean, difference, square[0], parts[1]]
        return {"x": parts[0], "eps": root[1]}

    def same(self, value: Any, difference: Any) -> bool:
        """Whether both are the difference of the same two values."""
        parts = self.call(value, "subtract")
        return bool(value == difference) or (parts is not None and parts == self.call(difference, "subtract"))

    def mean(self, value: Any) -> Any:
        """What a mean over the last axis, that keeps it, is taken of; None for anything else."""
        call: Any = self.context.values.get(value)
        if operator_of(call) != "mean" or not call.attrs.keepdims or call.attrs.axis is None:
            return None
        rank = len(shape_of(call.args[0]))
        return resolved(self.context, call.args[0]) if [int(a) % rank for a in call.attrs.axis] == [rank - 1] else None

    def call(self, value: Any, operator: str) -> list[Any] | None:
        """The operands of a call of this operator."""
        call: Any = self.context.values.get(value) if isinstance(value, relax.Var) else None
        if operator_of(call) != operator:
            return None
        return [resolved(self.context, part) for part in call.args]

    def is_vector(self, value: Any, shape: tuple[int, ...]) -> bool:
        """Whether a value is a weight or constant with a number for each column."""
        constant = self.context.is_weight(value) or self.context.known(value) is not None
        own = shape_of(value)
        return bool(constant and shape) and own[-1:] == shape[-1:] and math.prod(own) == shape[-1]


LAYER_NORM = LayerNorm()
