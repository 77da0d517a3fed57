"""The Relax patterns of language-model graphs, each with the canonical call that it becomes.

Rules are tried in order for the operator at their root, larger patterns first. Spellings seen from exporters are in
docs; a new one is a new rule here.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Final

import numpy as np
import tvm_ffi

from firsttoken_compiler.frontend.importer import Imported
from firsttoken_compiler.passes import neighbourhood, views
from firsttoken_compiler.passes.views import UnsupportedView, View
from firsttoken_compiler.tvm import dialect
from firsttoken_compiler.tvm.api import Call, GenericConst, dtype_of, is_op, relax, shape_of, wildcard

Captured = dict[str, Any]
Env = dict[Any, View]


@dataclass
class Context:
    """What rules may look at while they match, and what they leave behind while they emit."""

    imported: Imported
    values: dict[Any, Any]
    parameters: dict[str, Any] = field(default_factory=dict)
    """Parameters of the new function by name."""
    constants: dict[str, Any] = field(default_factory=dict)
    constant_vars: dict[str, Any] = field(default_factory=dict)
    hosts: dict[int, Any] = field(default_factory=dict)
    """`host.HostSite` of every call of the host by its segment."""
    returned: frozenset[Any] = frozenset()
    """Values that the graph returns."""
    _tables: dict[str, dict[Any, Any]] = field(default_factory=dict)
    _emitted: list[str] = field(default_factory=list)
    _inverse: dict[Any, Any] | None = None

    def multiplies(self, pair: str) -> bool:
        """Whether the target's matrix unit has a rate for the pair; without a target it has."""
        return self.imported.pairs is None or pair in self.imported.pairs

    def require_pair(self, pair: str, why: str = "") -> None:
        """Raises UnsupportedView where it has none."""
        if not self.multiplies(pair):
            known = ", ".join(sorted(self.imported.pairs or ()))
            raise UnsupportedView(f"the target multiplies {known}, not {pair}{why}")

    @cached_property
    def bindings(self) -> Any:
        """`values` as TVM's own map: handing over a dictionary copies all of it at every match."""
        return tvm_ffi.convert(self.values)

    def bindings_for(self, pattern: Any, value: Any) -> Any:
        """Those of `bindings` that a pattern can see from a value."""
        return self.bindings if len(self.values) <= neighbourhood.WHOLE else self._around.of(pattern, value)

    @cached_property
    def _around(self) -> neighbourhood.Neighbourhood:
        return neighbourhood.Neighbourhood(self.values, self.bindings)

    @cached_property
    def uses(self) -> dict[Any, int]:
        """How often each variable is read."""
        counts: dict[Any, int] = {}
        for value in self.values.values():
            if isinstance(value, Call):
                read = value.args
            else:
                read = getattr(value, "fields", None) or [getattr(value, "tuple_value", value)]
            for part in read:
                if isinstance(part, relax.Var):
                    counts[part] = counts.get(part, 0) + 1
        return counts

    @cached_property
    def initialisers(self) -> dict[Any, str]:
        """By Relax expression the initialiser that it is."""
        known = self.imported.student.initializers
        return {expr: name for name, expr in self.imported.values.items() if name in known}

    def read_once(self, value: Any) -> bool:
        """Whether one value reads it, and the graph does not return it."""
        return self.uses.get(value, 0) == 1 and value not in self.returned

    def table(self, what: str) -> dict[Any, Any]:
        """What rules of one kind have emitted for each other, by what it is."""
        return self._tables.setdefault(what, {})

    def variable(self, value: Any) -> Any:
        """The variable that a value is bound to; the value itself when it is not bound."""
        if self._inverse is None:
            self._inverse = {bound: variable for variable, bound in self.values.items()}
        return self._inverse.get(value, value)

    def emit(self, builder: Any, name: str, args: list[Any], **attrs: object) -> Any:
        """Emits a call, or reuses the variable of an identical one."""
        variable = builder.emit(dialect.call(name, args, **attrs))
        self._emitted.append(variable.name)
        return variable

    def take_emitted(self) -> list[str]:
        """Names of the variables emitted since the last call."""
        taken, self._emitted = self._emitted, []
        return taken

    def is_weight(self, value: Any) -> bool:
        """Whether the value is an initialiser that stayed a parameter."""
        return isinstance(value, relax.Var) and value.name in self.imported.weights

    def known(self, value: Any) -> np.ndarray | None:
        """The elements of a constant or of an initialiser whose data is here; None for anything computed."""
        if isinstance(value, GenericConst):
            return np.asarray(value.value.numpy())
        if self.is_weight(value):
            name = self.imported.weights[value.name]
            if self.imported.student.has_data(name):
                return np.asarray(self.imported.student.array(name))
        return None

    def scalar(self, value: Any) -> float | None:
        """A constant with one element."""
        array = self.known(value) if isinstance(value, GenericConst) else None
        return float(array.reshape(-1)[0]) if array is not None and array.size == 1 else None

    def number(self, value: float, hint: str) -> Any:
        """A parameter `[1, 1]` that holds one number."""
        return self.constant(np.full((1, 1), value, np.float32), hint)

    def constant(self, array: np.ndarray, hint: str) -> Any:
        """A parameter that holds `array`; equal arrays share one."""
        array = np.ascontiguousarray(array)
        for name, held in self.constants.items():
            if held.shape == array.shape and held.dtype == array.dtype and np.array_equal(held, array):
                return self.constant_vars[name]
        name = f"{hint}_{len(self.constants)}"
        self.constants[name] = array
        self.constant_vars[name] = relax.Var(name, relax.TensorType(list(array.shape), array.dtype.name))
        return self.constant_vars[name]


@dataclass(frozen=True)
class Match:
    """A pattern found: captured expressions, what they read from outside, and the variables inside."""

    captured: Captured
    leaves: tuple[Any, ...]
    covered: tuple[Any, ...]


class Rule(ABC):
    """What may cover a value: a match rooted at its binding, and the canonical calls that the match becomes."""

    @abstractmethod
    def match(self, context: Context, variable: Any, value: Any) -> Match | None:
        """The match rooted at a binding, or None."""

    @abstractmethod
    def emit(self, context: Context, builder: Any, match: Match, env: Env) -> View:
        """Emits the canonical calls and returns the view of the result; raises UnsupportedView."""


@dataclass(frozen=True)
class PatternRule(Rule):
    """A pattern, the names of its captures, an extra condition, and the emission."""

    pattern: Any
    captures: Captured
    build: Callable[[Context, Any, Captured, Env], View]
    condition: Callable[[Context, Captured], bool] = lambda _context, _captured: True

    def match(self, context: Context, variable: Any, value: Any) -> Match | None:
        """See `Rule.match`."""
        found = self.pattern.extract_matched_expr(value, context.bindings_for(self.pattern, value))
        if found is None:
            return None
        # TVM looks through variables while matching, so what it captures are bound values: name them again.
        captured = {name: context.variable(found[part]) for name, part in self.captures.items() if part in found}
        if not self.condition(context, captured):
            return None
        leaves = tuple(captured.values())
        inner = [context.variable(expr) for expr in found.values() if isinstance(expr, Call)]
        covered = tuple(v for v in inner if isinstance(v, relax.Var) and v not in leaves)
        return Match(captured, leaves, (*covered, variable))

    def emit(self, context: Context, builder: Any, match: Match, env: Env) -> View:
        """See `Rule.emit`."""
        return self.build(context, builder, match.captured, env)


def calls(name: str, *args: Any) -> Any:
    """The pattern of a call of a Relax operator."""
    return is_op(f"relax.{name}")(*args)


# Embeddings and rows.


def _build_gather(context: Context, builder: Any, c: Captured, env: Env) -> View:
    table, known = env[c["table"]], context.known(c["ids"])
    ids = env[c["ids"]] if known is None else _numbers(context, known)
    rows = token_list(builder, ids)
    turned = {"turned": 1} if "turned" in c else {}
    base = context.emit(builder, "npu.gather", [table.base, rows], out="float32", **turned)
    width = shape_of(table.base)[0 if turned else 1]
    return views.matrix(base, "1" * (len(ids.axes) - 1) + "mn", ids.features, width)


def _numbers(context: Context, known: np.ndarray) -> View:
    """Constant token numbers `[1, m]`."""
    base = context.constant(known.reshape(-1).astype(np.int64), "numbers")
    return View(base, "1" * (known.ndim - 1) + "n", 1, known.size)


def token_list(builder: Any, ids: View) -> Any:
    """Token or position numbers `[1, m]` as `[m]`; raises UnsupportedView for a batch of several prompts."""
    if not ids.is_laid_out("n") or dtype_of(ids.base) != "int64":
        raise UnsupportedView(f"{dtype_of(ids.base)} numbers of shape {list(ids.shape)}, expected int64 [1, tokens]")
    return reshaped(builder, ids.base, (ids.features,))


_table, _ids = wildcard(), wildcard()
GATHER = PatternRule(
    calls("take", _table, _ids),
    {"table": _table, "ids": _ids},
    _build_gather,
    lambda context, c: context.is_weight(c["table"]) and len(shape_of(c["table"])) == 2 and is_float(c["table"]),
)


def _turned_gather() -> Rule:
    """Rows of a table that the file holds transposed, as the head of a student with tied embeddings."""
    table, ids = wildcard(), wildcard()
    turned = calls("permute_dims", table)

    def condition(context: Context, c: Captured) -> bool:
        if not context.is_weight(c["table"]) or len(shape_of(c["table"])) != 2 or not is_float(c["table"]):
            return False
        return [int(axis) for axis in context.values[c["turned"]].attrs.axes or (1, 0)] == [1, 0]

    captures = {"table": table, "ids": ids, "turned": turned}
    return LookThrough(calls("take", turned, ids), captures, _build_gather, condition)


def slice_bounds(call: Any) -> tuple[int, int, int] | None:
    """(axis, first, end) of a slice along one axis in steps of 1; None for any other."""
    parts = [getattr(part, "fields", None) or [] for part in call.args[1:]]
    numbers = [[int(getattr(number, "value", number)) for number in part] for part in parts]
    axes, begins, ends, steps = (*numbers, [], [], [], [])[:4]
    if len(axes) != 1 or len(begins) != 1 or len(ends) != 1 or any(step != 1 for step in steps):
        return None
    shape = shape_of(call.args[0])
    axis = axes[0] % len(shape)
    first, end, _ = slice(begins[0], ends[0]).indices(shape[axis])
    return axis, first, end


def _last_rows(call: Any) -> tuple[int, int] | None:
    """(first, end) of a slice along the second axis of a 3-D tensor."""
    bounds = slice_bounds(call)
    return bounds[1:] if bounds is not None and bounds[0] == 1 else None


def _build_row(context: Context, builder: Any, c: Captured, env: Env) -> View:
    view = env[c["x"]]
    bounds = _last_rows(c["call"])
    assert bounds is not None
    base = context.emit(builder, "npu.row", [matrix_of(builder, view)], index=bounds[0], out="float32")
    return views.matrix(base, "1mn", 1, view.features)


def _build_columns(context: Context, builder: Any, c: Captured, env: Env) -> View:
    view = env[c["x"]]
    bounds = slice_bounds(c["call"])
    assert bounds is not None
    _, first, end = bounds
    source = matrix_of(builder, view)
    base = context.emit(builder, "npu.columns", [source], first=first, width=end - first, out="float32")
    return like(builder, view, base, end - first)


def _build_part(context: Context, _builder: Any, c: Captured, _env: Env) -> View:
    bounds, known = slice_bounds(c["call"]), context.known(c["x"])
    assert bounds is not None
    assert known is not None
    part = known[bounds[1] : bounds[2]]
    return View(context.constant(part, "vector"), "n", 1, part.size)


def _is_part(context: Context, c: Captured) -> bool:
    return len(shape_of(c["x"])) == 1 and slice_bounds(c["call"]) is not None and context.known(c["x"]) is not None


def _is_columns(_context: Context, c: Captured) -> bool:
    bounds = slice_bounds(c["call"])
    last = len(shape_of(c["x"])) - 1
    return bounds is not None and bounds[0] == last > 0 and bounds[1] < bounds[2] and is_float(c["x"])


def _is_row(_context: Context, c: Captured) -> bool:
    bounds = _last_rows(c["call"]) if len(shape_of(c["x"])) == 3 else None
    return bounds is not None and bounds[1] - bounds[0] == 1 and is_float(c["x"])


INNER: Final = ("turned", "norm", "mean", "low", "high", "weights")
"""Captures that are values inside their pattern."""


class LookThrough(PatternRule):
    """A rule whose captures include values inside the pattern, wanted for their attributes only."""

    def match(self, context: Context, variable: Any, value: Any) -> Match | None:
        """The match without the inner values among its leaves."""
        found = super().match(context, variable, value)
        if found is None:
            return None
        leaves = tuple(v for name, v in found.captured.items() if name not in INNER)
        inside = tuple(v for name, v in found.captured.items() if name in INNER and v not in found.covered)
        return Match(found.captured, leaves, (*inside, *found.covered))


@dataclass(frozen=True)
class CallRule(Rule):
    """A rule for one call, whose emission looks at the call's own arguments."""

    build: Callable[[Context, Any, Captured, Env], View]
    condition: Callable[[Context, Captured], bool]

    def match(self, context: Context, variable: Any, value: Any) -> Match | None:
        """The match with the call itself among the captures."""
        if not isinstance(value, Call):
            return None
        captured = {"call": value, "x": value.args[0]}
        if not self.condition(context, captured):
            return None
        return Match(captured, (value.args[0],), (variable,))

    def emit(self, context: Context, builder: Any, match: Match, env: Env) -> View:
        """See `Rule.emit`."""
        return self.build(context, builder, match.captured, env)


TURNED_GATHER = _turned_gather()
ROW = CallRule(_build_row, _is_row)
COLUMNS = CallRule(_build_columns, _is_columns)
PART = CallRule(_build_part, _is_part)

# Norms.


def _build_norm(context: Context, builder: Any, c: Captured, env: Env) -> View:
    view = env[c["x"]]
    gamma = _vector(context, env, c["gamma"])
    eps = context.values[c["norm"]].attrs.epsilon if "norm" in c else context.scalar(c["eps"]) or 0.0
    base = context.emit(builder, "npu.rms_norm", [matrix_of(builder, view), gamma], eps=float(eps), out="float32")
    return like(builder, view, base)


def reshaped(builder: Any, base: Any, shape: tuple[int, ...]) -> Any:
    """A base seen as a tensor of another shape; itself where it has that."""
    return base if shape_of(base) == shape else builder.emit(relax.op.reshape(base, shape))


def matrix_of(builder: Any, view: View) -> Any:
    """The matrix `[prod(shape[:-1]), shape[-1]]` that a row-major tensor is, or that a transposed matrix becomes.

    Raises UnsupportedView for any other layout.
    """
    view = row_major(builder, view)
    width = view.shape[-1] if view.shape else 1
    wanted = (math.prod(view.shape) // max(1, width), width)
    return reshaped(builder, view.base, wanted)


def row_major(builder: Any, view: View) -> View:
    """The tensor in its own order: images and transposed matrices are turned; raises UnsupportedView for others."""
    if views.is_row_major(view):
        return view
    if len(shape_of(view.base)) != 2 or view.repeat != 1 or not view.is_laid_out("nm"):
        raise UnsupportedView(f"an operand of shape {list(view.shape)} laid out as {view.axes}, expected rows")
    turned = builder.emit(dialect.call("npu.transpose", [view.base], out="float32"))
    wanted = (math.prod(view.shape[:-1]), view.shape[-1])
    return views.dense(reshaped(builder, turned, wanted), view.shape)


def like(builder: Any, view: View, base: Any, width: int | None = None) -> View:
    """The view of an operator's result `base`, made from `matrix_of(view)` row by row; `width`: its features."""
    other = "y" in view.axes or not views.is_row_major(view)
    if view.dims is not None or other or (width is not None and "h" in view.axes):
        return views.dense(base, (*view.shape[:-1], width or (view.shape[-1] if view.shape else 1)))
    if width is not None:
        return View(base, view.axes, view.tokens, width)
    whole = (view.tokens, view.features)
    return replace(view, base=reshaped(builder, base, whole))


def is_float(*values: Any) -> bool:
    """Whether all are tensors of float16 or float32."""
    return all(dtype_of(value) in ("float16", "float32") for value in values)


def laid_out(view: View, axes: str) -> Any:
    """The base of a tensor whose axes are these; raises UnsupportedView for another layout, or for a cache."""
    if view.dims is not None or not view.is_laid_out(axes) or len(shape_of(view.base)) != 2:
        raise UnsupportedView(f"an operand of shape {list(view.shape)} laid out as {view.axes}, expected {axes}")
    return view.base


def _vector(context: Context, env: Env, value: Any) -> Any:
    """A bias or gamma as a parameter."""
    return env[value].base if value in env else context.constant(np.asarray(context.known(value)), "vector")


def _decomposed_norm() -> Rule:
    x, gamma, eps, power, one = (wildcard() for _ in range(5))
    mean = calls("mean", calls("power", x, power))
    root = calls("sqrt", calls("add", mean, eps))
    scaled = calls("multiply", x, calls("divide", one, root)) | calls("divide", x, root)
    pattern = calls("multiply", gamma, scaled)
    captures = {"x": x, "gamma": gamma, "eps": eps, "power": power, "mean": mean, "one": one}

    def condition(context: Context, c: Captured) -> bool:
        attrs, rank = context.values[c["mean"]].attrs, len(shape_of(c["x"]))
        axes = [int(axis) % rank for axis in attrs.axis or ()]
        constants = {"power": 2.0, "one": 1.0}
        exact = all(context.scalar(c[name]) == value for name, value in constants.items() if name in c)
        rows = axes == [rank - 1] and bool(attrs.keepdims)
        return exact and rows and context.scalar(c["eps"]) is not None and _has_gamma(context, c)

    return LookThrough(pattern, captures, _build_norm, condition)


def _has_gamma(context: Context, c: Captured) -> bool:
    constant = context.is_weight(c["gamma"]) or context.known(c["gamma"]) is not None
    return constant and shape_of(c["gamma"]) == shape_of(c["x"])[-1:]


def _fused_norm() -> Rule:
    x, gamma = wildcard(), wildcard()
    pattern = calls("nn.rms_norm", x, gamma)
    return LookThrough(pattern, {"x": x, "gamma": gamma, "norm": pattern}, _build_norm, _has_gamma)


DECOMPOSED_NORM, FUSED_NORM = _decomposed_norm(), _fused_norm()


# Products.


def _build_linear(context: Context, builder: Any, c: Captured, env: Env) -> View:
    view, weight = env[c["x"]], env[c["w"]].base
    transposed = "turned" in c
    k, n = shape_of(weight)[::-1] if transposed else shape_of(weight)
    args = [matrix_of(builder, view), weight]
    if "bias" in c:
        args.append(_vector(context, env, c["bias"]))
    if "residual" in c:
        args.append(matrix_of(builder, env[c["residual"]]))
    base = context.emit(
        builder, "npu.linear", args, n=int(n), k=int(k), transposed=int(transposed),
        bias=int("bias" in c), residual=int("residual" in c), out="float32",
    )  # fmt: skip
    return like(builder, view, base, int(n))


def _linear_rules(*, sums: bool) -> tuple[Rule, ...]:
    """The products whose root is an addition (of a bias, a residual, or both in either order), or the plain ones.

    The weight is plain or behind a transpose.
    """
    rules: list[Rule] = []
    orders = (("bias", "residual"), ("residual", "bias"), ("residual",), ("bias",)) if sums else ((),)
    for added in orders:
        for with_turn in (True, False):
            x, w = wildcard(), wildcard()
            captures = {"x": x, "w": w}
            turned = calls("permute_dims", w)
            pattern = calls("matmul", x, turned if with_turn else w)
            if with_turn:
                captures["turned"] = turned
            for name in added:
                captures[name] = wildcard()
                pattern = calls("add", pattern, captures[name])
            rules.append(LookThrough(pattern, captures, _build_linear, _is_linear))
    return tuple(rules)


def _is_linear(context: Context, c: Captured) -> bool:
    if not context.is_weight(c["w"]) or len(shape_of(c["w"])) != 2 or not is_float(c["x"], c["w"]):
        return False
    if "turned" in c and [int(axis) for axis in context.values[c["turned"]].attrs.axes or (1, 0)] != [1, 0]:
        return False
    n = shape_of(c["w"])[0 if "turned" in c else 1]
    if "bias" in c:
        constant = context.is_weight(c["bias"]) or context.known(c["bias"]) is not None
        if shape_of(c["bias"]) != (n,) or not constant:
            return False
    if "residual" in c:
        rows = shape_of(c["x"])[:-1]
        return shape_of(c["residual"]) == (*rows, n) and isinstance(c["residual"], relax.Var)
    return True


LINEAR_SUMS, LINEAR = _linear_rules(sums=True), _linear_rules(sums=False)


# Elementwise.


def _build_swiglu(context: Context, builder: Any, c: Captured, env: Env) -> View:
    gate, up = env[c["gate"]], env[c["up"]]
    base = context.emit(builder, "npu.swiglu", [matrix_of(builder, gate), matrix_of(builder, up)], out="float32")
    return like(builder, gate, base)


def _swiglu() -> Rule:
    gate, up = wildcard(), wildcard()
    silu = calls("multiply", gate, calls("sigmoid", gate)) | calls("nn.silu", gate)

    def condition(_context: Context, c: Captured) -> bool:
        return is_float(c["gate"], c["up"]) and shape_of(c["gate"]) == shape_of(c["up"])

    return PatternRule(calls("multiply", silu, up), {"gate": gate, "up": up}, _build_swiglu, condition)


def _build_add(context: Context, builder: Any, c: Captured, env: Env) -> View:
    a, b = env[c["a"]], env[c["b"]]
    if len(shape_of(a.base)) == 2 and replace(a, base=b.base) == b and not views.is_row_major(a):
        return replace(a, base=context.emit(builder, "npu.add", [a.base, b.base], out="float32"))
    base = context.emit(builder, "npu.add", [matrix_of(builder, a), matrix_of(builder, b)], out="float32")
    return like(builder, a, base)


def _add() -> Rule:
    a, b = wildcard(), wildcard()

    def condition(_context: Context, c: Captured) -> bool:
        computed = all(isinstance(c[name], relax.Var) for name in "ab")
        return computed and is_float(c["a"], c["b"]) and shape_of(c["a"]) == shape_of(c["b"])

    return PatternRule(calls("add", a, b), {"a": a, "b": b}, _build_add, condition)


SWIGLU, ADD = _swiglu(), _add()


# Views.


def reshaped_view(_context: Context, _builder: Any, c: Captured, env: Env) -> View:
    """What a reshape, transposition, broadcast or cast `call` makes of `x`; raises UnsupportedView where that moves."""
    view, call = env[c["x"]], c["call"]
    name = call.op.name
    found: View | None
    if name == "relax.permute_dims":
        rank = len(view.axes)
        found = views.permute(view, [int(axis) for axis in call.attrs.axes or range(rank - 1, -1, -1)])
    elif name == "relax.expand_dims":
        found = views.expand(view, [int(axis) for axis in call.attrs.axis])
    elif name == "relax.squeeze":
        found = views.reshape(view, shape_of(call))
    elif name == "relax.astype":
        found = view  # between floats: types are given later
    elif name == "relax.broadcast_to":
        found = views.broadcast(view, shape_of(call))
    else:
        found = views.reshape(view, shape_of(call)) or views.reshape(row_major(_builder, view), shape_of(call))
    if found is None:
        raise UnsupportedView(f"{name.removeprefix('relax.')} to {list(shape_of(call))}")
    return found


def _is_view(_context: Context, c: Captured) -> bool:
    converts = c["call"].op.name == "relax.astype"
    return isinstance(c["x"], relax.Var) and (not converts or is_float(c["x"], c["call"]))


VIEW = CallRule(reshaped_view, _is_view)
