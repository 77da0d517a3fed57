"""Values for the dimensions that an exporter left open: from the options, by their names, by where they occur."""

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from firsttoken_compiler.errors import OptionError
from firsttoken_compiler.frontend.onnx_file import OnnxStudent, with_nodes

MAX_LENGTH: Final = 1 << 20
"""Largest value that an open dimension may get."""
MAX_EXPRESSION: Final = 200
CHANNELS: Final = 3
"""Of an image."""
BATCH, PROMPT, PAST, TOTAL, ONE, COLOURS = "batch", "prompt", "past", "total", "one", "colours"

_STRONG: Final = (
    (re.compile(r"batch|^bs?$"), BATCH),
    (re.compile(r"total|past.*(\+|plus|and)"), TOTAL),
    (re.compile(r"^past$|(past|cache).*(seq|len|tok)"), PAST),
    (re.compile(r"^((decoder|input|prompt|query|q)_?)?(seq|sequence)(_?len(gth)?)?$|^(num_?)?tokens$|^prompt"), PROMPT),
)  # fmt: skip
"""Names that say what a dimension is."""
_WEAK: Final = re.compile(r"seq|len|tok")
"""Names that suggest a number of tokens, where the input says nothing better."""
_CACHE: Final = re.compile(r"past|cache")
_POSITIONS: Final = "cache_position"
_TOKENS: Final = re.compile(r"(^|_)ids$|embeds|hidden_states|^tokens$|^input$")
_IMAGE: Final = re.compile(r"pixel_values|image")


@dataclass(frozen=True, slots=True)
class Symbol:
    """One open dimension."""

    name: str
    """As `--bind` calls it: its own name, or `input[axis]` where the file gives none."""
    places: tuple[tuple[str, int, int], ...]
    """(input, axis, rank of the input)."""

    def role(self) -> str | None:
        """What it counts, as far as names and places tell."""
        text = self.name.lower()
        for pattern, role in _STRONG:
            if pattern.search(text) and "[" not in text:
                return role
        for place in sorted(self.places, key=lambda place: "mask" in place[0].lower()):
            placed = _role_at(*place)
            if placed is not None:
                return placed
        return PROMPT if _WEAK.search(text) and "[" not in text else None


def is_cache(name: str, rank: int) -> bool:
    """Whether an input holds cached keys or values: their rows lie along the last axis but one."""
    return bool(_CACHE.search(name.lower())) and rank > 3


def _role_at(name: str, axis: int, rank: int) -> str | None:
    """What an axis of a well-known input counts."""
    text = name.lower()
    roles: tuple[str | None, ...] = ()
    if text == _POSITIONS:
        roles = (PROMPT,)
    elif "mask" in text:
        roles = {2: (BATCH, TOTAL), 3: (BATCH, PROMPT, TOTAL), 4: (BATCH, ONE, PROMPT, TOTAL)}.get(rank, ())
    elif _CACHE.search(text):
        roles = {4: (BATCH, None, PAST, None), 5: (None, BATCH, None, PAST, None)}.get(rank, ())
    elif _IMAGE.search(text):
        roles = (BATCH, COLOURS) if rank == 4 else (BATCH,)
    elif text == "position_ids" and rank == 3:
        roles = (None, BATCH, PROMPT)
    elif _TOKENS.search(text):
        roles = (PROMPT,) if rank == 1 else (BATCH, PROMPT)
    return roles[axis] if axis < len(roles) else None


def symbols(student: OnnxStudent) -> dict[str, Symbol]:
    """Open dimensions of the inputs, in the order in which they occur."""
    places: dict[str, list[tuple[str, int, int]]] = {}
    for value, axis, dim in _open_dims(student):
        rank = len(value.type.tensor_type.shape.dim)
        places.setdefault(_name(value, axis, dim), []).append((value.name, axis, rank))
    return {name: Symbol(name, tuple(found)) for name, found in places.items()}


def _open_dims(student: OnnxStudent) -> Iterator[tuple[Any, int, Any]]:
    for value in student.graph.input:
        if value.name not in student.initializers:
            for axis, dim in enumerate(value.type.tensor_type.shape.dim):
                if not dim.HasField("dim_value") or dim.dim_value < 0:
                    yield value, axis, dim


def _name(value: Any, axis: int, dim: Any) -> str:
    return str(dim.dim_param) or f"{value.name}[{axis}]"


def bind_dims(
    student: OnnxStudent, *, prompt: int, past: int, bind: Mapping[str, int] | None = None
) -> dict[str, int]:
    """A value for every open dimension: `bind` first, then sums of bound ones, then by name and place.

    `prompt` new tokens follow `past` cached ones; the batch is 1. What the graph alone decides (the width of a head,
    say) comes from `implied.implied_dims`. Raises OptionError that lists what stays open, and for names in `bind`
    that the inputs do not have.
    """
    known, given = symbols(student), dict(bind or {})
    _check(student, known, given)
    values = {BATCH: 1, PROMPT: prompt, PAST: past, TOTAL: past + prompt, ONE: 1, COLOURS: CHANNELS}
    bound: dict[str, int] = dict(given)
    sums = [name for name in known if name not in bound and _atoms(name) - {name} and _atoms(name) <= known.keys()]
    for name, symbol in known.items():
        role = symbol.role()
        if name not in bound and name not in sums and role is not None:
            bound[name] = values[role]
    left = [name for name in known if name not in bound and name not in sums]
    if left:
        from firsttoken_compiler.frontend.implied import implied_dims

        bound.update(implied_dims(student, bound, left))
    for name in sums:
        if _atoms(name) <= bound.keys():
            bound[name] = _evaluate(name, bound)
    left = [name for name in known if name not in bound]
    if left:
        raise OptionError(_unbound(student, known, left))
    return bound


def bound(student: OnnxStudent, bindings: Mapping[str, int]) -> OnnxStudent:
    """The student with values in place of the open dimensions of its inputs; itself where nothing changes."""
    if not any(_name(value, axis, dim) in bindings for value, axis, dim in _open_dims(student)):
        return student
    copy = with_nodes(student, list(student.graph.node))
    for value, axis, dim in _open_dims(copy):
        name = _name(value, axis, dim)
        if name in bindings:
            dim.dim_value = bindings[name]
    for value in (*copy.graph.output, *copy.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in bindings:
                dim.dim_value = bindings[dim.dim_param]
    return copy


def parse_bindings(texts: list[str]) -> dict[str, int]:
    """`name=value` texts of --bind; raises OptionError for other ones and for a name that is given twice."""
    found: dict[str, int] = {}
    for text in texts:
        name, equals, value = text.rpartition("=")
        if not equals or not name or not value.isascii() or not value.isdecimal():
            raise OptionError(f"--bind {text!r}: write NAME=VALUE with a whole number, such as batch=1")
        if found.setdefault(name, int(value[:20])) != int(value[:20]):
            raise OptionError(f"--bind gives {name!r} both {found[name]} and {int(value[:20])}: leave one away")
    return found


def _check(student: OnnxStudent, known: Mapping[str, Symbol], given: Mapping[str, int]) -> None:
    strange = [name for name in given if name not in known]
    if strange:
        open_ones = f"its open dimensions are {', '.join(map(repr, known))}" if known else "all its shapes are static"
        raise OptionError(f"--bind {strange[0]!r}: {student.name} has no such dimension, {open_ones}")
    for name, value in given.items():
        if not 0 <= value <= MAX_LENGTH:
            raise OptionError(f"--bind {name}={value}: a dimension is between 0 and {MAX_LENGTH}")


def _unbound(student: OnnxStudent, known: Mapping[str, Symbol], left: list[str]) -> str:
    lines = []
    for name in left:
        inputs = dict.fromkeys(place[0] for place in known[name].places)
        lines.append(f"  {name!r} of {', '.join(map(repr, inputs))}")
    return (
        f"{student.name}: {len(left)} dimensions of the inputs have no value:\n" + "\n".join(lines) + "\n"
        f"  remedy: give each one, such as --bind {left[0]}=64"
    )


def _atoms(name: str) -> set[str]:
    """Names in a dimension that is a sum, difference or product of others; the name itself where it is none."""
    tree = _parsed(name)
    if tree is None:
        return {name}
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} or {name}


def _parsed(name: str) -> ast.Expression | None:
    if len(name) > MAX_EXPRESSION or not re.fullmatch(r"[\w\s+*/()-]+", name, re.ASCII):
        return None
    try:
        tree = ast.parse(name.strip(), mode="eval")
    except (SyntaxError, RecursionError, MemoryError, ValueError):
        return None
    allowed = (
        ast.Expression, ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Name, ast.Load, ast.Constant,
    )  # fmt: skip
    return tree if all(isinstance(node, allowed) for node in ast.walk(tree)) else None


def _evaluate(name: str, values: Mapping[str, int]) -> int:
    """The value of a sum of bound dimensions; raises OptionError where it is negative or too large."""
    tree = _parsed(name)
    assert tree is not None
    value = _value(tree.body, values)
    if not 0 <= value <= MAX_LENGTH:
        raise OptionError(f"the dimension {name!r} is {value} with these lengths; it must be 0 to {MAX_LENGTH}")
    return value


def _value(node: ast.expr, values: Mapping[str, int]) -> int:
    if isinstance(node, ast.Name):
        return values[node.id]
    if isinstance(node, ast.Constant):
        return int(node.value) if isinstance(node.value, int) else 0
    assert isinstance(node, ast.BinOp)
    left, right = _value(node.left, values), _value(node.right, values)
    if isinstance(node.op, ast.Add):
        return left + right
    if isinstance(node.op, ast.Sub):
        return left - right
    if isinstance(node.op, ast.Mult):
        return left * right
    return left // right if right else 0
