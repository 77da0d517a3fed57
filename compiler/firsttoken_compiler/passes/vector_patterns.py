"""Rules of the general vector operators of encoders and heads: elementwise trees, broadcasts, folds, softmax.

All work on row-major matrices; a tensor's axes are split where every operand is a matrix, a row or a column.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Final

import numpy as np

from firsttoken_compiler.isa.vector_kernel import VectorKernel
from firsttoken_compiler.passes import views
from firsttoken_compiler.passes.axis_split import form, split_axis, spread
from firsttoken_compiler.passes.elementwise import (
    LANES,
    Tree,
    constant_array,
    grow,
    is_constant,
    operator_of,
    resolved,
)
from firsttoken_compiler.passes.patterns import Context, Env, Match, Rule, is_float, like, matrix_of, reshaped
from firsttoken_compiler.passes.views import UnsupportedView, View
from firsttoken_compiler.tvm.api import dtype_of, relax, shape_of

FOLD_BLOCK: Final = 1 << 14
"""Elements that one fold takes at a time; longer ones are folded in two steps."""


# --- elementwise --------------------------------------------------------------------------------------------


class Elementwise(Rule):
    """A tree of elementwise operators becomes one npu.map."""

    def match(self, context: Context, variable: Any, value: Any) -> Match | None:
        """The largest tree that ends at the variable; not a plain sum of two computed tensors of one shape."""
        if dtype_of(variable) not in LANES:
            return None
        tree = grow(context, variable, lambda inner: _wanted(context, inner))
        if tree is None or not any(isinstance(leaf, relax.Var) for leaf in tree.leaves):
            return None
        shapes = [shape_of(leaf) for leaf in tree.leaves if isinstance(leaf, relax.Var)]
        if tree.expr == ("add", "s0", "s1") and shapes == [shape_of(variable)] * 2:
            return None
        leaves = tuple(leaf for leaf in tree.leaves if isinstance(leaf, relax.Var))
        return Match({"tree": tree, "root": variable}, leaves, tuple(tree.covered))

    def emit(self, context: Context, builder: Any, match: Match, env: Env) -> View:
        """Emits the operator over the split of the axes that suits all operands."""
        root = match.captured["root"]
        return emit_map(context, builder, match.captured["tree"], env, shape_of(root), _stored(root))


def _wanted(context: Context, variable: Any) -> bool:
    """Whether a rule for something larger than elementwise trees starts at a variable."""
    from firsttoken_compiler.passes.patterns import ADD
    from firsttoken_compiler.passes.rules import RULES

    value = context.values[variable]
    rules = RULES.get(f"relax.{operator_of(value)}", ())
    special = [rule for rule in rules if rule is not ADD and not isinstance(rule, Elementwise)]
    if operator_of(value) in ("astype", "broadcast_to"):
        return False
    return any(rule.match(context, variable, value) is not None for rule in special)


def _stored(value: Any) -> str:
    """How a result lies in memory before types are given: floats as fp32, truth values as such."""
    return "bool" if dtype_of(value) == "bool" else "float32"


def emit_map(
    context: Context, builder: Any, tree: Tree, env: Env, shape: tuple[int, ...], out: str = "float32"
) -> View:
    """Emits `tree` with a result of this shape; raises UnsupportedView for operands that lie in no common order."""
    operands: list[View | np.ndarray] = []
    for leaf in tree.leaves:
        array = constant_array(context, leaf)
        operands.append(array if array is not None else env[leaf])
    text = str(VectorKernel(tree.expr))
    in_place = _one_layout(operands, shape)
    if in_place is not None:
        bases = [_in_place_operand(context, operand, in_place) for operand in operands]
        return replace(in_place, base=_map(context, builder, bases, text, shape_of(in_place.base), out))
    try:
        at = split_axis([operand.shape for operand in operands], shape)
    except UnsupportedView:
        operands = [operand if isinstance(operand, View) else _spread(operand, shape) for operand in operands]
        at = split_axis([operand.shape for operand in operands], shape)
    rows, width = math.prod(shape[:at]), math.prod(shape[at:])
    bases = [_operand(context, builder, operand, shape, at) for operand in operands]
    base = _map(context, builder, bases, text, (rows, width), out)
    return dense(builder, base, shape)


def _map(context: Context, builder: Any, bases: list[Any], text: str, shape: tuple[int, ...], out: str) -> Any:
    return context.emit(builder, "npu.map", bases, expr=text, rows=shape[0], width=shape[1], out=out)


def dense(builder: Any, base: Any, shape: tuple[int, ...]) -> View:
    """The view of a row-major result."""
    wanted = (math.prod(shape[:-1]), shape[-1]) if shape else (1, 1)
    return views.dense(reshaped(builder, base, wanted), shape)


def _one_layout(operands: list[View | np.ndarray], shape: tuple[int, ...]) -> View | None:
    """A view whose layout all operands share, when it is not row-major: elements then pair up wherever they lie."""
    whole = [operand for operand in operands if isinstance(operand, View)]
    first = whole[0]
    constants = [operand for operand in operands if not isinstance(operand, View)]
    if first.dims is not None or any(_along(constant, first) is None for constant in constants):
        return None
    layouts = {(replace(v, base=None), shape_of(v.base)) for v in whole}
    if len(layouts) != 1 or first.shape != shape or len(shape_of(first.base)) != 2 or views.is_row_major(first):
        return None
    return first


def _in_place_operand(context: Context, operand: View | np.ndarray, like: View) -> Any:
    if isinstance(operand, View):
        return operand.base
    row = _along(operand, like)
    assert row is not None
    return context.constant(row, "operand")


def _along(array: np.ndarray, view: View) -> np.ndarray | None:
    """A constant as the number or the row of features that it is over the base of a view; None for anything else."""
    if array.size == 1:
        return array.reshape(1)
    at = view.axes.find("n") - len(view.axes)
    row = array.size == view.features and -at <= array.ndim and array.shape[at] == array.size
    return array.reshape(-1) if row else None


def _spread(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    array = array.reshape((1,) * (len(shape) - array.ndim) + array.shape)
    return np.broadcast_to(array, spread(array.shape, shape))


def _operand(context: Context, builder: Any, operand: View | np.ndarray, shape: tuple[int, ...], at: int) -> Any:
    wanted = form(operand.shape, shape, at)
    assert wanted is not None
    if not isinstance(operand, View):
        return context.constant(operand.reshape(wanted), "operand")
    if shape_of(operand.base) == wanted and views.is_row_major(operand):
        return operand.base
    return reshaped(builder, matrix_of(builder, operand), wanted)


class Outer(Rule):
    """A product over one term, as of positions and frequencies, multiplies element by element."""

    def match(self, context: Context, variable: Any, value: Any) -> Match | None:
        """Captures both factors, neither of which is a weight of the matrix unit."""
        factors = [resolved(context, part) for part in value.args]
        shapes = [shape_of(part) for part in factors]
        if min(map(len, shapes)) < 2 or shapes[0][-1] != 1 or not is_float(*factors):
            return None
        weights = [is_constant(context, part) and len(shape) == 2 for part, shape in zip(factors, shapes, strict=True)]
        leaves = tuple(part for part in factors if isinstance(part, relax.Var))
        if any(weights) or not leaves:
            return None
        return Match({"factors": factors, "root": variable}, leaves, (variable,))

    def emit(self, context: Context, builder: Any, match: Match, env: Env) -> View:
        """Emits the multiplication of a column by a row."""
        tree = Tree(("mul", "s0", "s1"), list(match.captured["factors"]))
        return emit_map(context, builder, tree, env, shape_of(match.captured["root"]))


class Broadcast(Rule):
    """Repeated heads of keys and values are a view; any other broadcast is a copy."""

    def match(self, context: Context, variable: Any, value: Any) -> Match | None:
        """Captures the tensor, which is computed or an input."""
        source = resolved(context, value.args[0])
        if not isinstance(source, relax.Var) or dtype_of(source) not in LANES:
            return None
        return Match({"x": source, "root": variable}, (source,), (variable,))

    def emit(self, context: Context, builder: Any, match: Match, env: Env) -> View:
        """The view, or the copy."""
        source, shape = match.captured["x"], shape_of(match.captured["root"])
        view = views.broadcast(env[source], shape)
        if view is not None:
            return view
        return emit_map(context, builder, Tree("s0", [source]), env, shape, _stored(source))


# --- folds --------------------------------------------------------------------------------------------------


class Fold(Rule):
    """Sum, mean, maximum, minimum over neighbouring axes; what is folded may be an expression of one tensor."""

    def match(self, context: Context, variable: Any, value: Any) -> Match | None:
        """Captures the folded tensor and the expression."""
        source = resolved(context, value.args[0])
        if not is_float(source) or not isinstance(source, relax.Var) or not shape_of(source):
            return None
        if 0 in shape_of(source):
            return None
        tree, covered = Tree("s0", [source]), []
        inner = operator_of(context.values.get(source))
        if inner and context.read_once(source):
            grown = grow(context, source, lambda part: _wanted(context, part)) if not _wanted(context, source) else None
            one = grown is not None and len(grown.leaves) == 1 and isinstance(grown.leaves[0], relax.Var)
            if grown is not None and one and shape_of(grown.leaves[0]) == shape_of(source):
                tree, covered = grown, grown.covered
        return Match({"call": value, "tree": tree}, (tree.leaves[0],), (*covered, variable))

    def emit(self, context: Context, builder: Any, match: Match, env: Env) -> View:
        """Emits one fold, or two where a row is too long for one."""
        call, tree = match.captured["call"], match.captured["tree"]
        view, shape = env[tree.leaves[0]], shape_of(call.args[0])
        rows, depth, inner = _folded_axes(call, shape)
        kind = operator_of(call)
        if view.axes == "1nyx" and rows == view.features and inner == 1:  # over all pixels of an image
            rows, inner, base = 1, rows, view.base
        else:
            base = matrix_of(builder, view)
        base = reshaped(builder, base, (rows, depth * inner))
        fold, scale = ("sum", 1.0 / depth) if kind == "mean" else (kind, 1.0)
        made = emit_fold(context, builder, base, inner, fold, str(VectorKernel(tree.expr)), scale)
        return dense(builder, made, shape_of(call))


def emit_fold(
    context: Context, builder: Any, base: Any, inner: int, fold: str, text: str = "s0", scale: float = 1.0
) -> Any:
    """Emits the fold of rows `[depth, inner]` over their depth: `[rows, inner]`."""
    rows, length = shape_of(base)
    depth = length // inner
    if length > FOLD_BLOCK and depth > 1:
        part = max((d for d in range(1, depth) if depth % d == 0 and d * inner <= FOLD_BLOCK), default=1)
        if part > 1:
            narrow = reshaped(builder, base, (rows * depth // part, part * inner))
            partial = emit_fold(context, builder, narrow, inner, fold, text)
            base, text = reshaped(builder, partial, (rows, depth // part * inner)), "s0"
            return emit_fold(context, builder, base, inner, fold, text, scale)
    return context.emit(
        builder, "npu.reduce", [base], fold=fold, expr=text, scale=float(scale), inner=inner, out="float32"
    )


def _folded_axes(call: Any, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(rows before, depth, elements behind) of the folded axes; raises UnsupportedView unless they are neighbours."""
    given = call.attrs.axis
    axes = sorted({int(axis) % len(shape) for axis in given}) if given is not None else list(range(len(shape)))
    if not axes:
        raise UnsupportedView("a fold over no axis")
    longer = [axis for axis in range(axes[0], axes[-1] + 1) if shape[axis] != 1]
    if any(axis not in axes for axis in longer):
        raise UnsupportedView(f"a fold over the axes {axes} of {list(shape)}, which are no neighbours")
    first, last = axes[0], axes[-1] + 1
    return math.prod(shape[:first]), math.prod(shape[first:last]), math.prod(shape[last:])


# --- softmax ------------------------------------------------------------------------------------------------


class Softmax(Rule):
    """Softmax or its logarithm over the last axis."""

    def match(self, context: Context, variable: Any, value: Any) -> Match | None:
        """Captures the call where nothing longer than 1 lies behind its axis."""
        source, shape = resolved(context, value.args[0]), shape_of(variable)
        axis = int(value.attrs.axis) % max(1, len(shape))
        if not shape or not isinstance(source, relax.Var) or not is_float(source) or math.prod(shape[axis + 1 :]) != 1:
            return None
        return Match({"x": source, "axis": axis, "log": int("log" in operator_of(value))}, (source,), (variable,))

    def emit(self, context: Context, builder: Any, match: Match, env: Env) -> View:
        """Emits the operator on rows of the axis."""
        c = match.captured
        view = env[c["x"]]
        shape = view.shape
        width = shape[c["axis"]]
        base = reshaped(builder, matrix_of(builder, view), (math.prod(shape) // width, width))
        made = context.emit(builder, "npu.softmax", [base], log=c["log"], out="float32")
        return like(builder, view, made) if width == shape[-1] else dense(builder, made, shape)


ELEMENTWISE, OUTER, BROADCAST, FOLD = Elementwise(), Outer(), Broadcast(), Fold()
SOFTMAX = Softmax()
