"""The value of a nest as a microprogram: loads become source streams, constants fold, loops that are dense join."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from firsttoken_compiler.codegen.loops import Access, Nest, Value
from firsttoken_compiler.errors import ProgramError
from firsttoken_compiler.isa.types import PACKED, Dtype, Space
from firsttoken_compiler.isa.vector_kernel import MAX_SOURCES, Expr

AXES = 3


@dataclass(frozen=True, slots=True)
class Stream:
    """An operand over the loops of a nest; address and strides in bits."""

    symbol: int
    space: Space
    dtype: Dtype
    address: int
    bits: tuple[int, ...]


class Streams:
    """Collects the source streams of one nest while its value becomes an expression.

    Indices are expressed over the nest's loops as `i{loop}` and renumbered by `merged`.
    """

    def __init__(self, stream: Callable[[Access], Stream], env: list[int], first: tuple[int, ...]) -> None:
        self._stream, self._env, self._first = stream, env, first
        self.found: list[Stream] = []

    def reduction(self, nest: Nest) -> tuple[str, Value]:
        """(reduction, what is folded) of `dst = dst op value`."""
        name, *parts = nest.value
        if name in ("add", "max", "min") and len(parts) == 2:
            for own, other in (parts, parts[::-1]):
                if own[0] == "load" and own[1].buffer is nest.dst.buffer:
                    return name, other
        raise ProgramError("internal: a nest folds an axis but is no reduction")

    def expression(self, value: Value, own: Access | None, initial: float | None) -> Expr:
        """The expression; a load of the destination `own` that is still `initial` is that constant."""
        kind = value[0]
        if kind in ("const", "fill"):
            return float(value[1])
        if kind == "load":
            if own is not None and initial is not None and value[1].buffer is own.buffer:
                return float(initial)
            return self._source(self._stream(value[1]))
        if kind == "index":
            return self._index(value)
        return _folded(kind, [self.expression(part, own, initial) for part in value[1:]])

    def _source(self, stream: Stream) -> str:
        if stream not in self.found:
            self.found.append(stream)
            if len(self.found) > MAX_SOURCES:
                raise ProgramError(f"internal: a nest reads more than {MAX_SOURCES} streams")
        return f"s{self.found.index(stream)}"

    def _index(self, value: Value) -> Expr:
        _, base, coefficients = value
        constant = base(self._env) + sum(c * f for c, f in zip(coefficients, self._first, strict=False))
        total: Expr = float(constant)
        for loop, coefficient in enumerate(coefficients):
            if coefficient:
                total = _folded("add", [_folded("mul", [f"i{loop}", float(coefficient)]), total])
        return total


def _folded(name: str, parts: list[Expr]) -> Expr:
    """The call, without additions of 0, products with 1 and arithmetic between constants."""
    numbers = [part if isinstance(part, float) else None for part in parts]
    if name == "add" and 0.0 in numbers:
        return parts[1 - numbers.index(0.0)]
    if name == "mul" and 1.0 in numbers:
        return parts[1 - numbers.index(1.0)]
    if len(parts) == 2 and None not in numbers and name in ("add", "sub", "mul"):
        a, b = (number or 0.0 for number in numbers)
        return {"add": a + b, "sub": a - b, "mul": a * b}[name]
    return (name, *parts)


def neutral(reduction: str, value: float) -> bool:
    """Whether a reduction may start from its neutral element instead of `value`."""
    if reduction == "add":
        return value == 0.0
    return value <= -3.4e38 if reduction == "max" else value >= 3.4e38


def merged(
    extents: tuple[int, ...], dst: Stream, sources: list[Stream], expr: Expr
) -> tuple[tuple[int, ...], Stream, list[Stream], Expr]:
    """Drops loops of one iteration, joins neighbours that are dense in every stream, pads to three axes."""
    used = _indices(expr)
    loops = [i for i, extent in enumerate(extents) if extent > 1]
    if any(source.dtype in PACKED for source in sources) and len(extents) - 1 not in loops:
        loops.append(len(extents) - 1)  # one column: the axis along which elements share bytes is there all the same
    groups: list[list[int]] = []
    for loop in loops:
        if groups and _joins(groups[-1], loop, extents, (dst, *sources), used):
            groups[-1].append(loop)
        else:
            groups.append([loop])
    if len(groups) > AXES:
        raise ProgramError("internal: a nest has more than three axes that do not join")
    sizes = [_size(group, extents) for group in groups]
    dims = (1,) * (AXES - len(groups)) + tuple(sizes)

    def reshaped(stream: Stream) -> Stream:
        return replace(stream, bits=tuple(stream.bits[group[-1]] for group in groups))

    position = {group[-1]: AXES - len(groups) + i for i, group in enumerate(groups)}
    return dims, reshaped(dst), [reshaped(s) for s in sources], _renumbered(expr, position)


def _size(group: list[int], extents: tuple[int, ...]) -> int:
    size = 1
    for loop in group:
        size *= extents[loop]
    return size


def _joins(group: list[int], loop: int, extents: tuple[int, ...], streams: tuple[Stream, ...], used: set[int]) -> bool:
    if loop in used or used.intersection(group):
        return False
    return all(stream.bits[group[-1]] == stream.bits[loop] * extents[loop] for stream in streams)


def _indices(expr: Expr) -> set[int]:
    if isinstance(expr, tuple):
        return set().union(*(_indices(part) for part in expr[1:]))
    return {int(expr[1:])} if isinstance(expr, str) and expr[0] == "i" else set()


def _renumbered(expr: Expr, position: dict[int, int]) -> Expr:
    """Loop indices become axis indices; the index of a loop with one iteration is 0."""
    if isinstance(expr, tuple):
        return _folded(str(expr[0]), [_renumbered(part, position) for part in expr[1:]])
    if isinstance(expr, str) and expr[0] == "i":
        loop = int(expr[1:])
        return f"i{position[loop]}" if loop in position else 0.0
    return expr
