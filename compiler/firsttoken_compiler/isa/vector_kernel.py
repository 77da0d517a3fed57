"""Microprograms of the vector unit: an expression over operand streams, optionally reduced.

The text form is the encoding: `mul(s0, rsqrt(add(s1, 1e-06)))`, reduced ones as `add<- mul(s0, s0)`; a mark of an
attention's rows comes first, as in `attention: add<- s0`.
`sN` is source operand N; `i0`, `i1`, `i2` are the indices of the instruction's three axes.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

Expr = str | float | tuple["str | Expr", ...]
"""A stream name, an immediate, or `(operation, argument, ...)`."""

_F = np.float32
ENTRIES = 16
"""Entries of a table that `lookup` reads: the first argument says which, the others are the table."""
_ERF_STEPS = 64
"""Entries of the table of erf per unit; beyond `_ERF_LAST` it is 1 in fp32."""
_ERF_LAST = 4


def _erf_table() -> tuple[np.ndarray, np.ndarray]:
    """Values of erf at the table's points, and its slopes there over one step."""
    points = np.arange(_ERF_LAST * _ERF_STEPS + 2) / _ERF_STEPS
    return np.array([math.erf(x) for x in points]), 2 / math.sqrt(math.pi) * np.exp(-points * points) / _ERF_STEPS


_ERF = _erf_table()


def _erf(x: np.ndarray) -> np.ndarray:
    """Erf by table and cubic interpolation: right to one unit in the last place of fp32."""
    x = np.asarray(x, np.float32)
    at = np.minimum(np.abs(x.astype(np.float64)), _ERF_LAST) * _ERF_STEPS
    cell = np.nan_to_num(np.floor(at)).astype(np.int64)
    t = at - cell
    (low, high), (down, up) = ((table[cell], table[cell + 1]) for table in _ERF)
    rise = high - low
    value = low + t * (down + t * ((3 * rise - 2 * down - up) + t * (down + up - 2 * rise)))
    return np.copysign(np.minimum(value, 1.0), x).astype(np.float32)


def _look_up(index: np.ndarray, *table: np.ndarray) -> np.ndarray:
    """The entries of a table of numbers, or of arrays of one shape; indices beyond it read its ends."""
    entries = np.stack(np.broadcast_arrays(*table, index)[:ENTRIES])
    which = np.clip(np.nan_to_num(index), 0, ENTRIES - 1).astype(np.int64)
    return np.take_along_axis(entries, np.broadcast_to(which, entries.shape[1:])[None], axis=0)[0]


# Meaning of every operation, in fp32 lanes (comparisons give 0/1).
OPERATIONS: dict[str, tuple[int, str, Callable[..., Any]]] = {
    # name: (arity, cost class, meaning)
    "add": (2, "add", np.add),
    "sub": (2, "add", np.subtract),
    "mul": (2, "mul", np.multiply),
    "div": (2, "div", np.divide),
    "max": (2, "add", np.maximum),
    "min": (2, "add", np.minimum),
    "abs": (1, "add", np.abs),
    "neg": (1, "add", np.negative),
    "round": (1, "convert", np.rint),
    "floor": (1, "convert", np.floor),
    "ceil": (1, "convert", np.ceil),
    "exp": (1, "exp", np.exp),
    "log": (1, "exp", np.log),
    "tanh": (1, "exp", np.tanh),
    "erf": (1, "exp", _erf),
    "sigmoid": (1, "exp", lambda x: _F(1) / (_F(1) + np.exp(-x))),
    "sin": (1, "exp", np.sin),
    "cos": (1, "exp", np.cos),
    "sqrt": (1, "rsqrt", np.sqrt),
    "rsqrt": (1, "rsqrt", lambda x: _F(1) / np.sqrt(x)),
    "pow": (2, "exp", np.power),
    "lt": (2, "add", lambda a, b: (a < b).astype(_F)),
    "le": (2, "add", lambda a, b: (a <= b).astype(_F)),
    "eq": (2, "add", lambda a, b: (a == b).astype(_F)),
    "and": (2, "add", lambda a, b: ((a != 0) & (b != 0)).astype(_F)),
    "or": (2, "add", lambda a, b: ((a != 0) | (b != 0)).astype(_F)),
    "select": (3, "add", lambda c, a, b: np.where(c != 0, a, b)),
    "f16": (1, "convert", lambda x: x.astype(np.float16).astype(_F)),
    "i32": (1, "convert", lambda x: np.trunc(x)),
    "lookup": (1 + ENTRIES, "convert", _look_up),
}
COST_CLASSES = ("add", "mul", "div", "exp", "rsqrt", "convert", "reduce")
REDUCTIONS: dict[str, tuple[np.ufunc, float]] = {
    "add": (np.add, 0.0),
    "max": (np.maximum, -np.inf),
    "min": (np.minimum, np.inf),
}
SEEN, LEAVING = "attention", "attention-out"
"""Marks of microprograms on an attention's rows, and of the one that makes each row's last number."""
MAX_SOURCES = 6
MAX_DEPTH = 64

_TOKEN = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_]*|[-+]?(?:inf|nan|[0-9.]+(?:[eE][-+]?[0-9]+)?)|[(),])")


@dataclass(frozen=True)
class VectorKernel:
    """One microprogram: `expr` evaluated per element in fp32, then folded by `reduction` where one is named.

    A map reads its sources and writes each element. A reduction folds into what the destination holds,
    over the axes along which the destination has stride 0.
    """

    expr: Expr
    reduction: str | None = None
    rows: str = ""
    """`SEEN` or `LEAVING` where a target may run it as a part of its own kernel of attention; changes no number."""

    def __post_init__(self) -> None:
        """Raises ValueError for unknown operations, wrong arity, or more sources than the unit has ports."""
        _check(self.expr, 0)
        if self.reduction is not None and self.reduction not in REDUCTIONS:
            raise ValueError(f"unknown reduction {self.reduction!r}; known: {', '.join(REDUCTIONS)}")
        if self.rows not in ("", SEEN, LEAVING):
            raise ValueError(f"unknown mark {self.rows!r}; known: {SEEN}, {LEAVING}")

    @cached_property
    def sources(self) -> int:
        """How many source operands the kernel reads (one more than the largest stream number)."""
        return 1 + max((int(leaf[1:]) for leaf in _leaves(self.expr) if leaf.startswith("s")), default=-1)

    @cached_property
    def operations(self) -> frozenset[str]:
        """Names of the operations of the expression."""
        return frozenset(_operations(self.expr))

    @cached_property
    def cost(self) -> tuple[int, ...]:
        """Operations per element by `COST_CLASSES`; a pure copy counts one `add` for the pass through the lanes."""
        counts = dict.fromkeys(COST_CLASSES, 0)
        _count(self.expr, counts)
        if self.reduction is not None:
            counts["reduce"] += 1
        elif not isinstance(self.expr, tuple):
            counts["add"] += 1
        return tuple(counts.values())

    def __str__(self) -> str:
        """The text form."""
        head = f"{self.reduction}<- " if self.reduction else ""
        return (f"{self.rows}: " if self.rows else "") + head + _text(self.expr)

    @staticmethod
    def parse(text: str) -> "VectorKernel":
        """Inverse of `str`; raises ValueError naming what was expected."""
        mark, colon, rest = text.partition(":")
        text = rest if colon else text
        head, arrow, body = text.partition("<-")
        tokens = _TOKEN.findall(body if arrow else text)
        if "".join(tokens) != re.sub(r"\s", "", body if arrow else text):
            raise ValueError(f"not a vector kernel: {text!r}")
        expr, end = _parse(tokens, 0, 0)
        if end != len(tokens):
            raise ValueError(f"text after the end of the vector kernel: {text!r}")
        return VectorKernel(expr, head.strip() if arrow else None, mark.strip() if colon else "")

    def evaluate(self, sources: list[np.ndarray], shape: tuple[int, int, int]) -> np.ndarray:
        """The mapped values before reduction: sources are fp32 arrays that broadcast to `shape`; returns that shape."""
        with np.errstate(all="ignore"):  # inf and nan are values here, as in the hardware
            value = _evaluate(self.expr, sources, shape)
        return np.broadcast_to(value, shape)


def _check(expr: Expr, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise ValueError(f"vector kernel nests deeper than {MAX_DEPTH}")
    if isinstance(expr, tuple) and expr:
        name = expr[0]
        if not isinstance(name, str) or name not in OPERATIONS:
            raise ValueError(f"unknown vector operation {name!r}")
        if len(expr) - 1 != OPERATIONS[name][0]:
            raise ValueError(f"{name} takes {OPERATIONS[name][0]} arguments, not {len(expr) - 1}")
        for argument in expr[1:]:
            _check(argument, depth + 1)
    elif isinstance(expr, str):
        if re.fullmatch(rf"s[0-{MAX_SOURCES - 1}]|i[012]", expr):
            return
        raise ValueError(f"unknown stream {expr!r}; sources are s0 to s{MAX_SOURCES - 1}, indices i0 to i2")
    elif type(expr) not in (int, float):
        raise ValueError(f"{expr!r} is no stream, number or operation")


def _operations(expr: Expr) -> list[str]:
    if not isinstance(expr, tuple):
        return []
    return [str(expr[0]), *(name for argument in expr[1:] for name in _operations(argument))]


def _leaves(expr: Expr) -> list[str]:
    if isinstance(expr, tuple):
        return [leaf for argument in expr[1:] for leaf in _leaves(argument)]
    return [expr] if isinstance(expr, str) else []


def _count(expr: Expr, counts: dict[str, int]) -> None:
    if isinstance(expr, tuple):
        counts[OPERATIONS[str(expr[0])][1]] += 1
        for argument in expr[1:]:
            _count(argument, counts)


def _text(expr: Expr) -> str:
    if isinstance(expr, tuple):
        return f"{expr[0]}({', '.join(_text(argument) for argument in expr[1:])})"
    return expr if isinstance(expr, str) else repr(float(expr))


def _parse(tokens: list[str], at: int, depth: int) -> tuple[Expr, int]:
    if depth > MAX_DEPTH:
        raise ValueError(f"vector kernel nests deeper than {MAX_DEPTH}")
    if at >= len(tokens):
        raise ValueError("vector kernel ends early")
    head = tokens[at]
    if at + 1 < len(tokens) and tokens[at + 1] == "(":
        arguments: list[Expr] = []
        at += 2
        while True:
            argument, at = _parse(tokens, at, depth + 1)
            arguments.append(argument)
            if at >= len(tokens) or tokens[at] not in ",)":
                raise ValueError("vector kernel: expected ',' or ')'")
            at += 1
            if tokens[at - 1] == ")":
                return (head, *arguments), at
    if head in "(),":
        raise ValueError(f"vector kernel: unexpected {head!r}")
    if re.fullmatch(r"[si]\d", head):
        return head, at + 1
    return float(head), at + 1


def _evaluate(expr: Expr, sources: list[np.ndarray], shape: tuple[int, int, int]) -> np.ndarray:
    if isinstance(expr, tuple):
        meaning = OPERATIONS[str(expr[0])][2]
        return np.asarray(meaning(*(_evaluate(argument, sources, shape) for argument in expr[1:])), np.float32)
    if isinstance(expr, str):
        if expr[0] == "s":
            return sources[int(expr[1:])]
        axis = int(expr[1:])
        return np.arange(shape[axis], dtype=np.float32).reshape([-1 if a == axis else 1 for a in range(3)])
    return np.asarray(expr, np.float32)
