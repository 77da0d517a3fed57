"""What of a target may be fitted to measurements, and the record of a fit: tables of a target file.

    [[calibration]]
    path = "vector.cycles.exp"          # or "vector.cycles.*", or a list of paths
    low = 4.0
    high = 40.0
    why = "a table look-up and a product, up to a polynomial of degree 6 with range reduction"

Several values under one entry keep their ratios; the bounds are those of the first. `[fit]` is what `calibrate` writes.
Neither changes a result, so neither counts in the hash of a target.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from firsttoken_compiler.errors import TargetError

MAX_ENTRIES: Final = 32
_KEYS: Final = ("path", "low", "high", "why")
_FIT_KEYS: Final = ("measurements", "rows", "models", "mape_pct", "leave_one_model_out_mape_pct", "without", "loss")


@dataclass(frozen=True, slots=True)
class Tunable:
    """A value that a fit may change, or several that keep their ratios."""

    paths: tuple[str, ...]
    """Dotted, as `Target.value` takes them."""
    low: float
    """Smallest value of the first path."""
    high: float
    why: str
    """What the bounds are physically."""

    @property
    def name(self) -> str:
        """How tables call it: its path, or the first and how many follow."""
        return self.paths[0] if len(self.paths) == 1 else f"{self.paths[0]} (+{len(self.paths) - 1})"


@dataclass(frozen=True, slots=True)
class Fit:
    """What the values of grade `fitted` were fitted to, and how well: mean absolute errors in per cent."""

    measurements: tuple[str, ...]
    """Names of the files."""
    rows: int
    models: tuple[str, ...]
    mape_pct: float
    leave_one_model_out_mape_pct: float | None = None
    """Each model's rows predicted by a fit to the others; None where there is one model, or nobody asked."""
    without: tuple[str, ...] = ()
    """Runtimes whose rows were left out."""
    loss: str = "linear"


def split(document: dict[str, Any]) -> tuple[dict[str, Any], Any, Any]:
    """(the document without the two tables, `calibration`, `fit`); either is None where it is absent."""
    rest = {key: value for key, value in document.items() if key not in ("calibration", "fit")}
    return rest, document.get("calibration"), document.get("fit")


def tunables(given: Any, values: Mapping[str, Any], origin: str) -> tuple[Tunable, ...]:
    """The entries of `[[calibration]]`, checked; `values` are the target's by dotted path, in the file's order.

    Raises TargetError: an unknown key or path, a value that is no number, bounds out of order or off the value.
    """
    if given is None:
        return ()
    if not isinstance(given, list) or not all(isinstance(entry, dict) for entry in given) or len(given) > MAX_ENTRIES:
        raise TargetError(f"target {origin}: calibration must be at most {MAX_ENTRIES} tables [[calibration]]")
    found = tuple(_tunable(entry, values, f"target {origin}: calibration {at}") for at, entry in enumerate(given, 1))
    seen: set[str] = set()
    for path in (path for entry in found for path in entry.paths):
        if path in seen:
            raise TargetError(f"target {origin}: calibration names {path} twice; keep one entry")
        seen.add(path)
    return found


def _tunable(entry: dict[str, Any], values: Mapping[str, Any], where: str) -> Tunable:
    for key in entry:
        if key not in _KEYS:
            raise TargetError(f"{where}: unknown key {key!r}; keys are {', '.join(_KEYS)}")
    missing = [key for key in _KEYS if key not in entry]
    if missing:
        raise TargetError(f"{where}: missing key {missing[0]}")
    paths = tuple(_paths(entry["path"], values, where))
    low, high, why = entry["low"], entry["high"], entry["why"]
    for name, bound in (("low", low), ("high", high)):
        if not _is_number(bound):
            raise TargetError(f"{where}: {name} is {bound!r:.80}, must be a finite number")
    if not isinstance(why, str) or not why or len(why) > 1000 or not why.isprintable():
        raise TargetError(f"{where}: why is {why!r:.80}, must be a line that says what the bounds are physically")
    first = values[paths[0]]
    if not 0 < low < high:
        raise TargetError(f"{where}: {paths[0]} has low {low:g} and high {high:g}, must be 0 < low < high")
    if not low <= first <= high:
        raise TargetError(f"{where}: {paths[0]} is {first:g}, must lie within its bounds {low:g} to {high:g}")
    return Tunable(paths, float(low), float(high), why)


def _paths(given: Any, values: Mapping[str, Any], where: str) -> Iterator[str]:
    """The paths that an entry names, `x.*` expanded."""
    wanted = given if isinstance(given, list) else [given]
    if not wanted or not all(isinstance(path, str) for path in wanted):
        raise TargetError(f"{where}: path is {given!r:.80}, must be a dotted path or a list of them")
    for path in wanted:
        members = [known for known in values if known.startswith(path[:-1])] if path.endswith(".*") else [path]
        if not members or members[0] not in values:
            nearest = difflib.get_close_matches(path, list(values), n=1, cutoff=0.0)
            raise TargetError(f"{where}: no value has the path {path!r:.80}; nearest: {nearest[0]}")
        for member in members:
            value = values[member]
            if not _is_number(value):
                raise TargetError(f"{where}: {member} is {value!r:.80}, only numbers can be fitted")
            if value <= 0:
                raise TargetError(f"{where}: {member} is {value:g}, only values above 0 can be fitted")
            yield member


def fit_of(given: Any, origin: str) -> Fit | None:
    """The table `[fit]`; raises TargetError."""
    if given is None:
        return None
    where = f"target {origin}: fit"
    if not isinstance(given, dict):
        raise TargetError(f"{where} must be a table")
    for key in given:
        if key not in _FIT_KEYS:
            raise TargetError(f"{where}: unknown key {key!r:.80}; keys are {', '.join(_FIT_KEYS)}")
    for key in _FIT_KEYS[:4]:
        if key not in given:
            raise TargetError(f"{where}: missing key {key}")
    for key in ("measurements", "models", "without"):
        names = given.get(key, [])
        if not isinstance(names, list) or not all(isinstance(name, str) and name.isprintable() for name in names):
            raise TargetError(f"{where}: {key} is {names!r:.80}, must be a list of names")
    for key in ("rows", "mape_pct", "leave_one_model_out_mape_pct"):
        if key in given and (not _is_number(given[key]) or given[key] < 0):
            raise TargetError(f"{where}: {key} is {given[key]!r:.80}, must be a number of at least 0")
    left_out = given.get("leave_one_model_out_mape_pct")
    return Fit(
        tuple(given["measurements"]), int(given["rows"]), tuple(given["models"]), float(given["mape_pct"]),
        None if left_out is None else float(left_out), tuple(given.get("without", ())),
        str(given.get("loss", "linear")),
    )  # fmt: skip


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
