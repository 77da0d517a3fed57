"""What is swept: `--set path=a,b,c` as an axis with typed values.

Paths: `target` (presets or files), `target.VALUE` (a value of the target, `target.scratchpad.bytes` or
`target.scratchpad_bytes`), `student` (names or files), `student.FIELD` (a dimension of a built-in student), `prompt`,
`decode`, and the number formats of `run` (`weights`, `acts`, ...).
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import product
from typing import Any, Final

from firsttoken.options import RunOptions
from firsttoken_compiler.errors import OptionError

MAX_VALUES: Final = 4096
"""Values of one axis."""
MAX_POINTS: Final = 1_000_000
"""Combinations of all axes."""
LENGTHS: Final = ("prompt", "decode")
FORMATS: Final = (
    "weights", "acts", "group", "norm_cache", "norm_cache_place", "residual_spill", "kv_cache", "asymmetric", "seed",
    "host_weight_bits",
)  # fmt: skip
"""Fields of RunOptions that one word or number sets."""
_NUMBER: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?)(k|M|G|T)?")
_POWERS: Final = {None: 0, "k": 1, "M": 2, "G": 3, "T": 4}

Value = str | int | float | bool


@dataclass(frozen=True, slots=True)
class Axis:
    """A setting and the values that it takes, in the order given, each once."""

    path: str
    values: tuple[Value, ...]


def axis_of(text: str) -> Axis:
    """`path=a,b,c` as an axis; raises OptionError naming what is wrong.

    k, M, G and T are powers of 1000, and of 1024 in numbers of bytes.
    """
    path, equals, given = text.partition("=")
    path = path.strip().replace("-", "_")
    words = [word.strip() for word in given.split(",")]
    if not equals or not path or not all(words):
        raise OptionError(f"--set {text!r:.80}: give a setting and its values, such as target.scratchpad_bytes=1M,2M")
    _check(path)
    values = tuple(dict.fromkeys(_value(path, word) for word in words))
    if len(values) > MAX_VALUES:
        raise OptionError(f"--set {path} has {len(values)} values, at most {MAX_VALUES} are swept")
    return Axis(path, values)


def axes_of(texts: Iterable[str]) -> tuple[Axis, ...]:
    """All axes; raises OptionError where one is given twice or the combinations are too many."""
    axes = tuple(axis_of(text) for text in texts)
    for number, axis in enumerate(axes):
        if any(axis.path == other.path for other in axes[:number]):
            raise OptionError(f"--set {axis.path} is given twice; give all of its values at once, with commas")
    count = math.prod(len(axis.values) for axis in axes)
    if count > MAX_POINTS:
        raise OptionError(f"the sweep has {count:,} combinations, at most {MAX_POINTS:,} are swept; leave some out")
    return axes


def combinations(axes: Iterable[Axis]) -> Iterator[Mapping[str, Value]]:
    """Every combination, the last axis fastest."""
    axes = tuple(axes)
    for values in product(*(axis.values for axis in axes)):
        yield dict(zip((axis.path for axis in axes), values, strict=True))


def _check(path: str) -> None:
    if path in ("target", "student", *LENGTHS, *FORMATS):
        return
    head, dot, rest = path.partition(".")
    if head == "target" and dot and rest:
        return
    dimensions = _dimensions()
    if head == "student" and rest in dimensions:
        return
    known = ["target", "student", *LENGTHS, *FORMATS, *(f"student.{name}" for name in dimensions)]
    nearest = difflib.get_close_matches(path, known, n=1, cutoff=0.0)[0]
    raise OptionError(
        f"--set {path!r:.80} is no setting; nearest: {nearest}; settings are target, target.VALUE, student, "
        f"student.DIMENSION, {', '.join((*LENGTHS, *FORMATS))}"
    )


def _dimensions() -> tuple[str, ...]:
    from firsttoken.student import StudentConfig

    return tuple(f.name for f in fields(StudentConfig) if str(f.type) in ("int", "float", "bool"))


def _value(path: str, word: str) -> Value:
    """A value in the type that its setting takes; of a target's value, what the word looks like."""
    if path in ("target", "student"):
        return word
    if path in FORMATS:
        kind = str(next(f.type for f in fields(RunOptions) if f.name == path))
        if kind.startswith("str"):
            return word
    if word in ("true", "false"):
        return word == "true"
    found = _NUMBER.fullmatch(word)
    if found is None:
        if path.startswith("target."):
            return word
        raise OptionError(f"--set {path}={word!r:.80}: must be a number")
    base = 1024 if "bytes" in path and "bytes_per_s" not in path else 1000
    number = float(found[1]) * base ** _POWERS[found[2]]
    if not math.isfinite(number):
        raise OptionError(f"--set {path}={word!r:.80}: must be a finite number")
    return int(number) if number.is_integer() else number


def said(settings: Mapping[str, Any]) -> str:
    """Settings as a line."""
    return ", ".join(f"{path} {value}" for path, value in settings.items()) or "no settings"
