"""Fitted values in the text of a target file, everything else as it was: comments, order, layout."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from firsttoken_compiler.errors import TargetError
from firsttoken_compiler.target.load import parse_target, preset_names

if TYPE_CHECKING:
    from firsttoken.calibration.parameters import Parameter
    from firsttoken_compiler.target.calibration import Fit

_WAS: Final = re.compile(r"; was \S+ \((?:datasheet|measured|derived|fitted|assumed)\); fitted to .*$")
_VALUE: Final = re.compile(r"value\s*=\s*[^,}]+")
_GRADE: Final = re.compile(r'grade\s*=\s*"([^"]*)"')
_SOURCE: Final = re.compile(r'source\s*=\s*"((?:[^"\\]|\\.)*)"')
MOST_SOURCE: Final = 1000
"""Characters that a source may have."""
NAMED: Final = 8
"""Models that a source names one by one."""


def source_text(target: str) -> tuple[str, str]:
    """(text of a target file, how messages call it) for a preset's name or a path; raises TargetError."""
    from importlib import resources

    if target in preset_names():
        file = resources.files("firsttoken_compiler.target") / "presets" / f"{target}.toml"
        return file.read_text(encoding="utf-8"), target
    try:
        return Path(target).read_text(encoding="utf-8"), target
    except (OSError, UnicodeDecodeError) as error:
        raise TargetError(f"cannot read target file {target}: {error}") from error


def number(value: float, whole: bool) -> str:
    """A value as TOML has it."""
    if whole:
        return str(round(value))
    text = f"{value:.6g}"
    return text if any(mark in text for mark in ".e") else f"{text}.0"


def with_value(text: str, path: str, value: str, note: str | None = None) -> str:
    """The text with one value changed; with a `note` it becomes `fitted`, and the note follows what the source said.

    Raises TargetError where the text does not hold the value on a line of its own.
    """
    table, _, key = path.rpartition(".")
    lines = text.splitlines(keepends=True)
    at = _line_of(lines, table, key)
    if at is None:
        raise TargetError(
            f"{path} is not on a line of its own under [{table}]; write it there as "
            f'{key} = {{ value = ..., grade = "...", source = "..." }}'
        )
    line = lines[at]
    before = _VALUE.search(line)
    assert before is not None
    old = before.group().partition("=")[2].strip()
    gap = " " if line[before.end()] == "}" else ""
    line = f"{line[: before.start()]}value = {value}{gap}{line[before.end() :]}"
    if note is not None:
        line = _noted(line, old, note)
    lines[at] = line
    return "".join(lines)


def _line_of(lines: Sequence[str], table: str, key: str) -> int | None:
    here = ""
    for at, line in enumerate(lines):
        if header := re.match(r"\s*\[([^\[\]]+)\]\s*(?:#.*)?$", line):
            here = header.group(1).strip()
        elif line.lstrip().startswith("[["):
            here = ""
        elif here == table and re.match(rf"\s*{re.escape(key)}\s*=\s*\{{.*value\s*=.*\}}", line):
            return at
    return None


def _noted(line: str, old: str, note: str) -> str:
    grade, source = _GRADE.search(line), _SOURCE.search(line)
    assert grade is not None
    assert source is not None
    said = source.group(1)
    known = _WAS.search(said)
    was = known.group().partition("; fitted to ")[0] if known else f"; was {old} ({grade.group(1)})"
    kept = _WAS.sub("", said)
    told = f"{kept}{was}; fitted to {note}"
    if len(told) > MOST_SOURCE:
        told = f"{kept[: max(0, len(kept) - (len(told) - MOST_SOURCE) - 3)]}...{was}; fitted to {note}"
    line = line[: source.start(1)] + told + line[source.end(1) :]
    return _GRADE.sub('grade = "fitted"', line, count=1)


def with_fit(text: str, fit: Fit) -> str:
    """The text with the table `[fit]` in place of an earlier one, or at its end."""
    names = {key: json.dumps(list(getattr(fit, key)), ensure_ascii=False) for key in ("measurements", "models")}
    body = [
        "[fit]", f"measurements = {names['measurements']}", f"rows = {fit.rows}", f"models = {names['models']}",
        f"mape_pct = {fit.mape_pct:.2f}",
    ]  # fmt: skip
    if fit.leave_one_model_out_mape_pct is not None:
        body.append(f"leave_one_model_out_mape_pct = {fit.leave_one_model_out_mape_pct:.2f}")
    if fit.without:
        body.append(f"without = {json.dumps(list(fit.without))}")
    if fit.loss != "linear":
        body.append(f'loss = "{fit.loss}"')
    table = "\n".join(body) + "\n"
    earlier = re.compile(r"^\[fit\][^\n]*\n(?:(?!\s*\[)[^\n]+\n?)*", flags=re.MULTILINE)
    if earlier.search(text):
        return earlier.sub(lambda match: table, text, count=1)
    return f"{text.rstrip()}\n\n{table}"


def check_bounds(text: str, origin: str, parameters: Sequence[Parameter]) -> None:
    """Raises TargetError where a bound is a value that the target cannot have, with the reason."""
    for parameter in parameters:
        for bound in (parameter.low, parameter.high):
            changed = text
            values = parameter.values(bound)
            for path, value, whole in zip(parameter.tunable.paths, values, parameter.whole, strict=True):
                changed = with_value(changed, path, number(value, whole))
            try:
                parse_target(changed.encode(), origin)
            except TargetError as error:
                if "must lie within its bounds" in str(error):  # rounding to six digits or to whole numbers
                    continue
                raise TargetError(
                    f"the bound {values[0]:g} of {parameter.name} is no value that the target can have: {error}"
                ) from error


def _listed(models: Sequence[str]) -> str:
    """The models, or how many there are of more than `NAMED`."""
    return ", ".join(models) if len(models) <= NAMED else f"{len(models)} models"


def note_of(file_names: Sequence[str], models: Sequence[str], rows: int, fit: Fit, slopes: Mapping[str, float]) -> str:
    """What a source says of a fit, without a date: equal fits give equal text."""
    left_out = fit.leave_one_model_out_mape_pct
    outside = "" if left_out is None else f", {left_out:.1f} % with each model left out"
    felt = ", ".join(f"{name} {slope:+.2f}" for name, slope in slopes.items())
    return (
        f"{rows} rows of {', '.join(file_names)} ({_listed(models)}), MAPE {fit.mape_pct:.1f} %{outside}; "
        f"d log time / d log value: {felt}"
    )
