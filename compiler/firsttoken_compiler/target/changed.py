"""A target with other values at some dotted paths, as sweeps, fits and what-if questions make them."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from firsttoken_compiler.errors import TargetError
from firsttoken_compiler.target.limits import CHOICES, LIMITS, POWERS_OF_TWO, contradictions
from firsttoken_compiler.target.target import Provenance, Target


def with_values(target: Target, values: Mapping[str, Any]) -> Target:
    """The target with other values at some dotted paths, as they are given."""
    changed: Any = target
    for path, value in values.items():
        section, *rest = path.split(".")
        changed = _put(changed, rest if section == "npu" else [section, *rest], value)
    found: Target = changed
    return found


def _put(where: Any, path: Sequence[str], value: Any) -> Any:
    """A copy of nested records and tables with one value changed."""
    if not path:
        return value
    first, *rest = path
    if isinstance(where, dict):
        return {**where, first: _put(where[first], rest, value)}
    return replace(where, **{first: _put(getattr(where, first), rest, value)})


def path_of(target: Target, name: str) -> str:
    """The dotted path of a value that is named in full (`scratchpad.bytes`), or with one underscore for the dot.

    Raises TargetError with the nearest path.
    """
    spelled = {path.replace(".", "_", 1): path for path in target.provenance}
    spelled |= {path.removeprefix("npu."): path for path in target.provenance if path.startswith("npu.")}
    found = name if name in target.provenance else spelled.get(name)
    if found is None:
        nearest = difflib.get_close_matches(name, [*target.provenance, *spelled], n=1, cutoff=0.0)
        raise TargetError(f"target {target.name} has no value {name!r:.80}; nearest: {nearest[0]}")
    return found


def checked(target: Target, values: Mapping[str, Any], source: str) -> Target:
    """The target with other values, held to what a target file may say; they are `assumed`, with `source`.

    Whole numbers stay whole, and a band that does not hold the new value is dropped. Raises TargetError naming the
    path, the value and the limit.
    """
    typed = {path: _typed(path, value, target.value(path)) for path, value in values.items()}
    made = with_values(target, typed)
    problems = [*(text for path, value in typed.items() for text in _range(path, value)), *contradictions(_plain(made))]
    if problems:
        raise TargetError(f"target {target.name} with {_said(values)}: " + "\n  ".join(problems))
    marks = {path: Provenance("assumed", source) for path in typed}
    bounds = {
        path: band for path, band in made.bounds.items() if path not in typed or band[0] <= typed[path] <= band[1]
    }
    return replace(made, provenance={**made.provenance, **marks}, bounds=bounds)


def _said(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{path} {value}" for path, value in values.items())


def _typed(path: str, value: Any, before: Any) -> Any:
    """The value in the type of the one that it replaces."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(before, bool):
        if isinstance(value, bool):
            return value
        raise TargetError(f"{path} is {value!r:.80}, must be true or false")
    if isinstance(before, int):
        if number and float(value).is_integer():
            return int(value)
        raise TargetError(f"{path} is {value!r:.80}, must be a whole number")
    if isinstance(before, float):
        if number:
            return float(value)
        raise TargetError(f"{path} is {value!r:.80}, must be a number")
    if isinstance(before, str) and isinstance(value, str):
        return value
    raise TargetError(f"{path} is {value!r:.80}, must be of the kind of {before!r:.80}")


def _range(path: str, value: Any) -> Iterator[str]:
    limits = LIMITS.get(path) or LIMITS.get(path.rpartition(".")[0])
    if limits is not None and isinstance(value, (int, float)) and not limits[0] <= value <= limits[1]:
        yield f"{path} is {value:g}, must be {limits[0]:g} to {limits[1]:g}"
    if path in CHOICES and value not in CHOICES[path]:
        yield f"{path} is {value!r:.80}, must be one of {', '.join(CHOICES[path])}"
    if path in POWERS_OF_TWO and isinstance(value, int) and value & (value - 1):
        yield f"{path} is {value}, must be a power of two"


def _plain(target: Target) -> dict[str, Any]:
    plain: dict[str, Any] = asdict(target)
    for section in ("attention", "dram_commands"):
        if plain[section] is None:
            plain.pop(section)
    return plain
