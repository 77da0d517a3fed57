"""What a pattern can see of a function: the bindings around the value at which it is matched.

TVM checks the type of every binding that it is handed, at every match, so that matching all of a long function against
all of its bindings would take the square of its length. A pattern looks as many calls deep as it is nested.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import tvm_ffi

from firsttoken_compiler.tvm.api import Call, dpl, relax

WHOLE: Final = 4096
"""Bindings up to which all are handed over: checking these costs less than finding those around."""


def depth_of(pattern: Any) -> int | None:
    """Calls and tuples that are nested in a pattern; None for a kind of pattern whose reach is not known."""
    if isinstance(pattern, (dpl.WildcardPattern, dpl.ExprPattern, dpl.ConstantPattern)):
        return 0
    if isinstance(pattern, dpl.CallPattern):
        inner = [depth_of(part) for part in (pattern.op, *pattern.args)]
    elif isinstance(pattern, dpl.TuplePattern):
        inner = [depth_of(part) for part in pattern.fields]
    elif isinstance(pattern, (dpl.OrPattern, dpl.AndPattern)):
        inner = [depth_of(part) for part in (pattern.left, pattern.right)]
    else:
        return None
    depths = [depth for depth in inner if depth is not None]
    return 1 + max(depths, default=0) if len(depths) == len(inner) else None


@dataclass
class Neighbourhood:
    """Bindings around values of one function; those around the last value are kept, since many patterns are tried."""

    values: dict[Any, Any]
    whole: Any
    """All bindings, as TVM's map."""
    depths: dict[int, tuple[int | None, Any]] = field(default_factory=dict)
    """By the identity of a pattern, which is kept alive beside its depth."""
    last: tuple[Any, int, Any] | None = None

    def of(self, pattern: Any, value: Any) -> Any:
        """The bindings of the variables that a value reads, and of what these read, as deep as a pattern looks."""
        if id(pattern) not in self.depths:
            self.depths[id(pattern)] = depth_of(pattern), pattern
        depth, _ = self.depths[id(pattern)]
        if depth is None:
            return self.whole
        if self.last is None or self.last[1] < depth or not self.last[0].same_as(value):
            self.last = value, depth, self._around(value, depth)
        return self.last[2]

    def _around(self, value: Any, depth: int) -> Any:
        found: dict[Any, Any] = {}
        level = [value]
        for _ in range(depth + 1):
            level = [bound for expr in level for variable in _reads(expr) for bound in self._bound(variable, found)]
        return tvm_ffi.convert(found)

    def _bound(self, variable: Any, found: dict[Any, Any]) -> list[Any]:
        """What a variable is bound to, through others that it is another name of; nothing where that is found."""
        while variable in self.values and variable not in found:
            found[variable] = bound = self.values[variable]
            if not isinstance(bound, relax.Var):
                return [bound]
            variable = bound
        return []


def _reads(expr: Any) -> list[Any]:
    if isinstance(expr, relax.Var):
        return [expr]
    if isinstance(expr, Call):
        parts = list(expr.args)
    elif isinstance(expr, relax.Tuple):
        parts = list(expr.fields)
    else:
        parts = [expr.tuple_value] if isinstance(expr, relax.TupleGetItem) else []
    return [variable for part in parts for variable in _reads(part)]
