"""Trees of elementwise Relax operators as one microprogram expression: what a chain of them computes in one pass.

A tree grows from its root through operands that nothing else reads, as long as the vector unit has ports for what it
reads and no larger pattern wants one of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from firsttoken_compiler.isa.vector_kernel import MAX_SOURCES, OPERATIONS, Expr
from firsttoken_compiler.passes.axis_split import common
from firsttoken_compiler.tvm.api import GenericConst, dtype_of, operator_name, relax, shape_of

if TYPE_CHECKING:
    from firsttoken_compiler.passes.patterns import Context

MAX_OPERATIONS: Final = 48
CHEAP: Final = 2
"""Operations that may be computed again where an expression reads its operand more than once."""
LANES: Final = ("float16", "float32", "bool")
"""Types of values that the lanes compute on."""
INTEGERS: Final = (*LANES, "int64", "int32", "int16", "int8")
"""Types that they can read, in memory."""
COMPARISONS: Final = ("less", "less_equal", "greater", "greater_equal", "equal", "not_equal")
EXACT: Final = 1 << 24
"""Integers below it are fp32 numbers."""
RESHAPES: Final = ("reshape", "expand_dims", "squeeze")
FEW: Final = 8
"""Operations of a truth value that is computed again where it is read, instead of being stored."""
_GELU_TANH: Final = (math.sqrt(2 / math.pi), 0.044715)

Make = Callable[[Any, list[Expr]], Expr | None]
"""(call, its operands) → the expression; None where the operator has no such form."""


@dataclass
class Tree:
    """An expression over `leaves` (Relax values: computed, parameters, constants) and the variables that it covers."""

    expr: Expr
    leaves: list[Any] = field(default_factory=list)
    covered: list[Any] = field(default_factory=list)


def _power(_call: Any, p: list[Expr]) -> Expr:
    base, exponent = p
    if exponent == 0.5:
        return ("sqrt", base)
    if exponent == -0.5:
        return ("rsqrt", base)
    if exponent == -1.0:
        return ("div", 1.0, base)
    if exponent in (2.0, 3.0) and operations(base) <= CHEAP:
        square = ("mul", base, base)
        return square if exponent == 2.0 else ("mul", square, base)
    return ("pow", base, exponent)


def _clip(call: Any, p: list[Expr]) -> Expr:
    low, high = (float(getattr(bound, "value", bound)) for bound in call.args[1:3])
    return ("min", ("max", p[0], low), high)


def _gelu_tanh(_call: Any, p: list[Expr]) -> Expr:
    x, (root, cubic) = p[0], _GELU_TANH
    inner = ("mul", ("mul", x, root), ("add", 1.0, ("mul", ("mul", x, x), cubic)))
    return ("mul", ("mul", x, 0.5), ("add", 1.0, ("tanh", inner)))


def _sign(_call: Any, p: list[Expr]) -> Expr:
    return ("select", ("eq", p[0], 0.0), p[0], ("select", ("lt", p[0], 0.0), -1.0, 1.0))


def _convert(call: Any, p: list[Expr]) -> Expr | None:
    """To floats, where a truth value is 1 or 0, and to truth values."""
    if dtype_of(call) == "bool":
        return p[0] if dtype_of(call.args[0]) == "bool" else _not(_not(p[0]))
    return p[0] if dtype_of(call) in LANES else None


def _compared(name: str, swapped: bool = False) -> Make:
    """A comparison; with itself a value is only compared for being a number, which TVM would take for granted."""

    def make(_call: Any, p: list[Expr]) -> Expr:
        a, b = p[::-1] if swapped else p
        if a == b:
            return ("lt", math.inf, ("abs", a)) if name == "lt" else _is_number(a)
        return (name, a, b)

    return make


def _is_number(expr: Expr) -> Expr:
    return ("le", ("abs", expr), math.inf)


def _times(_call: Any, p: list[Expr]) -> Expr | None:
    """TVM would make 0 of a product with 0, also where NaN and infinity are multiplied."""
    return None if 0.0 in p else ("mul", *p)


def _less(_call: Any, p: list[Expr]) -> Expr | None:
    """TVM would make 0 of a value less itself, which may be NaN or infinite."""
    return None if p[0] == p[1] else ("sub", *p)


def _bound(name: str) -> Make:
    return lambda _call, p: p[0] if p[0] == p[1] else (name, *p)


def _where(_call: Any, p: list[Expr]) -> Expr:
    return (p[1] if p[0] else p[2]) if isinstance(p[0], float) else ("select", *p)


def _not(expr: Expr) -> Expr:
    return ("eq", expr, 0.0)


def _plain(name: str) -> Make:
    return lambda _call, p: (name, *p)


MAKERS: Final[dict[str, Make]] = {
    "add": _plain("add"), "subtract": _less, "multiply": _times,
    "divide": lambda _call, p: None if p[0] == 0.0 else ("div", *p),
    "maximum": _bound("max"), "minimum": _bound("min"), "power": _power, "negative": _plain("neg"),
    "abs": _plain("abs"), "exp": _plain("exp"), "log": _plain("log"), "sqrt": _plain("sqrt"),
    "rsqrt": _plain("rsqrt"), "tanh": _plain("tanh"), "sigmoid": _plain("sigmoid"), "erf": _plain("erf"),
    "floor": _plain("floor"), "ceil": _plain("ceil"), "round": _plain("round"), "trunc": _plain("i32"),
    "sin": _plain("sin"), "cos": _plain("cos"), "tan": lambda _call, p: ("div", ("sin", p[0]), ("cos", p[0])),
    "cosh": lambda _call, p: ("mul", 0.5, ("add", ("exp", p[0]), ("exp", ("neg", p[0])))),
    "square": lambda _call, p: ("mul", p[0], p[0]), "sign": _sign, "clip": _clip,
    "nn.relu": lambda _call, p: ("max", p[0], 0.0), "nn.silu": lambda _call, p: ("mul", p[0], ("sigmoid", p[0])),
    "nn.gelu": lambda _call, p: ("mul", ("mul", p[0], 0.5), ("add", 1.0, ("erf", ("mul", p[0], math.sqrt(0.5))))),
    "nn.gelu_tanh": _gelu_tanh,
    "nn.leakyrelu": lambda call, p: ("select", ("lt", p[0], 0.0), ("mul", p[0], float(call.attrs.alpha)), p[0]),
    "where": _where, "less": _compared("lt"), "less_equal": _compared("le"), "equal": _compared("eq"),
    "greater": _compared("lt", swapped=True), "greater_equal": _compared("le", swapped=True),
    "not_equal": lambda call, p: _not(_compared("eq")(call, p) or 0.0), "logical_not": lambda _call, p: _not(p[0]),
    "logical_and": _plain("and"), "logical_or": _plain("or"),
    "logical_xor": lambda _call, p: _not(("eq", *(_not(part) for part in p))),
    "isnan": lambda _call, p: _not(_is_number(p[0])), "isinf": lambda _call, p: ("eq", ("abs", p[0]), math.inf),
    "isfinite": lambda _call, p: ("lt", ("abs", p[0]), math.inf), "astype": _convert,
    "broadcast_to": lambda _call, p: p[0],
}  # fmt: skip
"""Relax operators (without `relax.`) that work element by element."""
TWICE: Final = frozenset((
    "nn.silu", "nn.gelu", "nn.gelu_tanh", "nn.leakyrelu", "square", "tan", "cosh", "sign", "isnan",
))  # fmt: skip
"""Those that read their operand more than once."""


def operations(expr: Expr) -> int:
    """Operations of an expression; a special function counts as eight."""
    if not isinstance(expr, tuple):
        return 0
    own = 8 if OPERATIONS[str(expr[0])][1] in ("exp", "rsqrt", "div") else 1
    return own + sum(operations(part) for part in expr[1:])


def grow(context: Context, variable: Any, wanted: Callable[[Any], bool]) -> Tree | None:
    """The tree rooted at a variable, or None when its operator is not elementwise or reads what no lane can hold.

    `wanted`: whether a larger pattern wants a variable, which then stays a leaf.
    """
    grower = _Grower(context, wanted, shape_of(variable))
    expr = grower.node(variable)
    if expr is None or operations(expr) > MAX_OPERATIONS * 8:
        return None
    return Tree(expr, grower.leaves, grower.covered)


class _Grower:
    def __init__(self, context: Context, wanted: Callable[[Any], bool], shape: tuple[int, ...]) -> None:
        self.context, self.wanted, self.shape = context, wanted, shape
        self.leaves: list[Any] = []
        self.covered: list[Any] = []
        self.count = 0

    def node(self, variable: Any, converted: bool = False) -> Expr | None:
        """The expression of a call, or None with nothing changed; its operands are leaves where trees read too much.

        `converted`: what the call makes is read by a conversion.
        """
        call: Any = self.context.values.get(variable)
        name = operator_of(call)
        if name not in MAKERS or self.count >= MAX_OPERATIONS:
            return None
        operands = [part for part in call.args if isinstance(part, (relax.Var, GenericConst))]
        for deep in (True, False):
            before = self._mark()
            self.count += 1
            self.covered.append(variable)
            reads = name == "astype" or (converted and name == "broadcast_to") or self._compares(name, operands)
            parts = [self.operand(part, name in TWICE, deep, reads) for part in operands]
            made = MAKERS[name](call, [part for part in parts if part is not None]) if None not in parts else None
            if made is not None and self._fits():
                return made
            self._back(before)
        return None

    def _compares(self, name: str, operands: list[Any]) -> bool:
        """Whether integers are compared with constants that fp32 holds: rounding then moves none of them across."""
        if name not in COMPARISONS:
            return False
        found = [self.context.known(part) for part in operands if isinstance(part, GenericConst)]
        return any(array is not None and bool((np.abs(array.astype(np.float64)) < EXACT).all()) for array in found)

    def _fits(self) -> bool:
        """Whether one instruction can read all leaves: it has the ports, and rows and columns that suit them."""
        if len(self.leaves) > MAX_SOURCES:
            return False
        constants = [is_constant(self.context, leaf) for leaf in self.leaves]
        return common([(shape_of(leaf), fixed) for leaf, fixed in zip(self.leaves, constants, strict=True)], self.shape)

    def _mark(self) -> tuple[int, int, int]:
        return len(self.leaves), len(self.covered), self.count

    def _back(self, mark: tuple[int, int, int]) -> None:
        del self.leaves[mark[0] :], self.covered[mark[1] :]
        self.count = mark[2]

    def operand(self, value: Any, twice: bool, deep: bool, converted: bool) -> Expr | None:
        """A number, a smaller tree, or a leaf; None for what the lanes do not hold exactly.

        Integers round as they widen, so only a conversion may read them (`converted`), or what rounds as well.
        """
        scalar = self.context.scalar(value)
        if scalar is not None:
            return scalar
        value = resolved(self.context, value)
        truth = dtype_of(value) == "bool"
        if (deep or truth) and self._grows(value, truth):
            before = self._mark()
            made = self.node(value, converted)
            if made is not None and operations(made) <= self._limit(value, twice):
                return made
            self._back(before)
        if dtype_of(value) not in (INTEGERS if converted else LANES):
            return None
        for index, leaf in enumerate(self.leaves):
            if leaf is value or (isinstance(leaf, relax.Var) and leaf == value):
                return f"s{index}"
        self.leaves.append(value)
        return f"s{len(self.leaves) - 1}"

    def _grows(self, value: Any, truth: bool) -> bool:
        if not isinstance(value, relax.Var) or operator_of(self.context.values.get(value)) not in MAKERS:
            return False
        if truth:
            return True
        name = operator_of(self.context.values[value])
        whole = math.prod(shape_of(value)) == math.prod(self.shape) or name == "broadcast_to"
        return self.context.read_once(value) and whole and not self.wanted(value)

    def _limit(self, value: Any, twice: bool) -> int:
        """Operations that may be computed again where a value is read more than once, in the tree or outside."""
        if twice:
            return CHEAP
        return MAX_OPERATIONS * 8 if self.context.read_once(value) else FEW


def operator_of(value: Any) -> str:
    """Name of a call's Relax operator without `relax.`; empty for everything else."""
    return operator_name(value).removeprefix("relax.")


def resolved(context: Context, value: Any) -> Any:
    """What a variable that is only another name of a value or constant stands for."""
    while isinstance(context.values.get(value), (relax.Var, GenericConst)):
        value = context.values[value]
    return value


def is_constant(context: Context, value: Any) -> bool:
    """Whether a value is a constant or a weight, reshaped or not."""
    call: Any = context.values.get(value) if isinstance(value, relax.Var) else None
    if operator_of(call) in RESHAPES:
        return is_constant(context, resolved(context, call.args[0]))
    return isinstance(value, GenericConst) or context.is_weight(value)


def constant_array(context: Context, value: Any) -> np.ndarray | None:
    """A constant or a small weight as fp32, reshaped or not; None for computed values and for large weights.

    Large weights stay parameters.
    """
    call: Any = context.values.get(value)
    if operator_of(call) in RESHAPES:
        array = constant_array(context, resolved(context, call.args[0]))
        return None if array is None else array.reshape(shape_of(value))
    if context.is_weight(value) and math.prod(shape_of(value)) > 1 << 16:
        return None
    known = context.known(value)
    return None if known is None else np.asarray(known, np.float32)
