"""Microprogram text as TE: an elementwise operator carries its function as the expression that its lanes will run.

Comparisons and their combinations are conditions in TE and become 1 or 0 where a number is wanted.
"""

from typing import Any

from firsttoken_compiler.isa.vector_kernel import Expr, VectorKernel
from firsttoken_compiler.tvm.api import te, tirx


def apply(text: str, sources: list[Any]) -> Any:
    """The fp32 value of an expression whose `sN` are these fp32 values; raises ValueError for what it does not know."""
    return _number(VectorKernel.parse(text).expr, sources)


_UNARY = {
    "abs": te.abs, "round": te.round, "floor": te.floor, "ceil": te.ceil, "exp": te.exp, "log": te.log,
    "tanh": te.tanh, "erf": te.erf, "sigmoid": te.sigmoid, "sin": te.sin, "cos": te.cos, "sqrt": te.sqrt,
    "rsqrt": te.rsqrt, "i32": te.trunc, "neg": lambda x: -x,
}  # fmt: skip
_BINARY = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "div": lambda a, b: a / b,
    "max": te.max, "min": te.min, "pow": te.power,
}  # fmt: skip
_COMPARED = {"lt": tirx.LT, "le": tirx.LE, "eq": tirx.EQ}
_JOINED = {"and": tirx.And, "or": tirx.Or}


def _number(expr: Expr, sources: list[Any]) -> Any:
    if isinstance(expr, str):
        if expr[0] != "s" or int(expr[1:]) >= len(sources):
            raise ValueError(f"an elementwise expression names {expr}, it has {len(sources)} operands")
        return sources[int(expr[1:])]
    if not isinstance(expr, tuple):
        return tirx.const(expr, "float32")
    name, *parts = expr
    if name in _COMPARED or name in _JOINED:
        one, zero = (tirx.const(value, "float32") for value in (1.0, 0.0))
        return te.if_then_else(_condition(expr, sources), one, zero)
    if name == "select":
        return _selected(parts, sources)
    if name == "lookup":
        index, *table = (_number(part, sources) for part in parts)
        return _looked_up(index, table, 0)
    values = [_number(part, sources) for part in parts]
    if name in _UNARY:
        return _UNARY[str(name)](*values)
    if name in _BINARY:
        return _BINARY[str(name)](*values)
    raise ValueError(f"an elementwise expression with {name}")


def _looked_up(index: Any, table: list[Any], first: int) -> Any:
    """The entry of a table, by halving."""
    if len(table) == 1:
        return table[0]
    half = len(table) // 2
    low, high = _looked_up(index, table[:half], first), _looked_up(index, table[half:], first + half)
    return te.if_then_else(index < tirx.const(float(first + half), "float32"), low, high)


def _selected(parts: list[Expr], sources: list[Any]) -> Any:
    test, yes, no = parts
    values = [_number(yes, sources), _number(no, sources)]
    if isinstance(test, tuple) and (test[0] in _COMPARED or test[0] in _JOINED):
        return te.if_then_else(_condition(test, sources), *values)
    is_zero = tirx.EQ(_number(test, sources), tirx.const(0.0, "float32"))
    return te.if_then_else(is_zero, *values[::-1])


def _condition(expr: Expr, sources: list[Any]) -> Any:
    if isinstance(expr, tuple) and expr[0] in _JOINED:
        return _JOINED[str(expr[0])](*(_condition(part, sources) for part in expr[1:]))
    if isinstance(expr, tuple) and expr[0] in _COMPARED:
        return _COMPARED[str(expr[0])](*(_number(part, sources) for part in expr[1:]))
    return tirx.LT(tirx.const(0.0, "float32"), te.abs(_number(expr, sources)))
