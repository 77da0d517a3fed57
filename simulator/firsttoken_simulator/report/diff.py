"""Compares two run documents, and judges the change by expressions such as `ttft_ms>+1%`."""

from __future__ import annotations

import difflib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from firsttoken_simulator.report.errors import ReportError

if TYPE_CHECKING:
    from firsttoken_simulator.report.document import RunDocument

MAX_FILE_BYTES: Final = 256 << 20
_EXPRESSION: Final = re.compile(
    r"\s*([A-Za-z_][\w.]*)\s*(>=|<=|>|<)\s*([+-]?)(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+)\s*(%?)\s*"
)


@dataclass(frozen=True, slots=True)
class Condition:
    """One `--fail-if`: fails when the change (or, without a sign, the new value) compares so with the limit.

    `ttft_ms>+1%`: grew by more than 1 %. `energy_mj>+5`: grew by more than 5. `macs<-2%`: fell by more than 2 %.
    `ttft_ms>130`: the new value is above 130.
    """

    text: str
    metric: str
    comparison: str
    relative: bool
    """The limit bounds a change, not a value."""
    percent: bool
    limit: float

    @staticmethod
    def parse(text: str) -> Condition:
        """The condition of a text; raises ReportError showing the form that is expected."""
        found = _EXPRESSION.fullmatch(text)
        if found is None:
            raise ReportError(
                f"cannot read the condition {text!r}; expected METRIC, one of > >= < <=, and a limit, "
                "e.g. 'ttft_ms>+1%', 'energy_mj>+5' or 'ttft_ms>130'"
            )
        metric, comparison, sign, number, percent = found.groups()
        if percent and not sign:
            raise ReportError(
                f"condition {text!r}: a percentage is a change and needs a sign, e.g. '{metric}>+{number}%'"
            )
        limit = float(f"{sign}{number}")
        if not math.isfinite(limit):
            raise ReportError(f"condition {text!r}: the limit {number} is too large")
        return Condition(text.strip(), metric, comparison, bool(sign), bool(percent), limit)

    def fails(self, rows: dict[str, Change]) -> bool:
        """Whether the comparison holds; raises ReportError with the nearest metric when there is none of that name."""
        if self.metric not in rows:
            nearest = difflib.get_close_matches(self.metric, rows, n=3, cutoff=0.3)
            raise ReportError(
                f"condition {self.text!r}: no metric {self.metric!r} in both runs; nearest: "
                f"{', '.join(nearest) or ', '.join(rows)}"
            )
        row = rows[self.metric]
        value = row.new
        if self.relative:
            value = row.percent if self.percent else row.change
        holds = {">": value > self.limit, ">=": value >= self.limit, "<": value < self.limit, "<=": value <= self.limit}
        return holds[self.comparison]


@dataclass(frozen=True, slots=True)
class Change:
    """One number of both runs."""

    metric: str
    old: float
    new: float

    @property
    def change(self) -> float:
        """How much `new` exceeds `old`."""
        return self.new - self.old

    @property
    def percent(self) -> float:
        """Change relative to the old value; infinite when that is 0 and the new one is not."""
        if self.old == 0:
            return 0.0 if self.new == 0 else math.copysign(math.inf, self.new)
        return 100.0 * self.change / abs(self.old)


def load_document(path: Path) -> RunDocument:
    """The run document of a `run.json` or of a folder that holds one; raises ReportError naming the field at fault."""
    from firsttoken_simulator.report.document import RunDocument

    load_run(path)
    return RunDocument.from_json((path / "run.json" if path.is_dir() else path).read_bytes())


def load_run(path: Path) -> dict[str, Any]:
    """The document of a `run.json` (or of a folder that holds one), unvalidated but for its version.

    Raises ReportError when the file is missing, too large, or not a run document of this schema version.
    """
    from firsttoken_simulator.report.document import SCHEMA_VERSION

    file = path / "run.json" if path.is_dir() else path
    if not file.is_file():
        raise ReportError(f"no such run: {file}; write one with 'firsttoken run -o'")
    if file.stat().st_size > MAX_FILE_BYTES:
        raise ReportError(f"{file} has {file.stat().st_size} bytes, the limit is {MAX_FILE_BYTES}")
    try:
        document = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{file} is not JSON: {error}") from error
    version = document.get("schema_version") if isinstance(document, dict) else None
    if version != SCHEMA_VERSION:
        raise ReportError(f"{file} has schema version {version!r}, this release reads {SCHEMA_VERSION}: run again")
    return dict(document)


def metrics(document: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Every number of a document by dotted name, tables and identity apart."""
    found: dict[str, float] = {}
    for key, value in document.items():
        name = f"{prefix}{key}"
        if name.endswith("steps.dispatch_fs"):
            continue
        if name in ("schema_version", "seed", "peak_macs_per_s", "clock_hz", "dram_peak_bytes_per_s"):
            continue
        if isinstance(value, dict):
            found |= metrics(value, f"{name}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[name] = float(value)
    return found


def compare(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Change]:
    """Numbers that both documents have, by name, in the order of the new one."""
    before, after = metrics(old), metrics(new)
    return {name: Change(name, before[name], value) for name, value in after.items() if name in before}


def op_changes(old: dict[str, Any], new: dict[str, Any], count: int = 10) -> list[Change]:
    """Cycles of the operators of the same name, largest change first; absent ones count as 0."""
    before, after = _op_cycles(old), _op_cycles(new)
    rows = [Change(name, before.get(name, 0.0), after.get(name, 0.0)) for name in {**before, **after}]
    return sorted((row for row in rows if row.change), key=lambda row: (-abs(row.change), row.metric))[:count]


def differing_inputs(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between the two questions: `name: old -> new`."""
    names = (
        "tool_version", "student", "target", "target_hash", "phase", "prompt_tokens", "past", "weights", "activations",
        "group", "norm_cache", "kv_cache", "acts_range", "seed",
    )  # fmt: skip
    return [f"{name}: {old.get(name)} -> {new.get(name)}" for name in names if old.get(name) != new.get(name)]


def _op_cycles(document: dict[str, Any]) -> dict[str, float]:
    cycles: dict[str, float] = {}
    ops = document.get("ops")
    for row in ops if isinstance(ops, list) else []:
        if isinstance(row, dict) and isinstance(row.get("cycles"), (int, float)):
            name = str(row.get("op"))
            cycles[name] = cycles.get(name, 0.0) + float(row["cycles"])
    return cycles
