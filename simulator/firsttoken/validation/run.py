"""Predicting every row: what rows share is timed once, the longest first, in several processes, and kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from firsttoken.validation.measurements import Measurement, Row, Skipped
from firsttoken.validation.statistics import Pair, Summary, summaries
from firsttoken.validation.steps import Key, times
from firsttoken_compiler.errors import FirsttokenError

if TYPE_CHECKING:
    from firsttoken.options import Progress
    from firsttoken_compiler.target.target import Target


@dataclass(frozen=True)
class Outcome:
    """A row with what is predicted for it, by the names of its quantities; what is not predicted is missing.

    `bands` has low and high of power and energy, whose parameters are not known better.
    """

    row: Measurement
    predicted: dict[str, float]
    bands: dict[str, tuple[float, float]] = field(default_factory=dict)

    def verdict(self, name: str) -> str:
        """How a measured bound, power or energy agrees with the prediction; empty for times."""
        quantity = next(q for q in self.row.quantities if q.name == name)
        low, high = self.bands.get(name, (self.predicted.get(name),) * 2)
        if low is None or high is None:
            return ""
        if quantity.bound:
            return "keeps the bound" if high <= quantity.value else "may keep it" if low <= quantity.value else "above"
        if name not in self.bands:
            return ""
        return "within the band" if low <= quantity.value <= high else "outside the band"


@dataclass(frozen=True)
class Validation:
    """All rows after their run.

    Attributes:
        version: of the package.
        files: names of the tables.
        outcomes: rows that were run, in order.
        skipped: rows that were not, with the reasons.
        targets: the targets of the outcomes, by first occurrence.
    """

    version: str
    files: tuple[str, ...]
    outcomes: tuple[Outcome, ...]
    skipped: tuple[Skipped, ...]
    targets: tuple[Target, ...]

    @cached_property
    def titled(self) -> tuple[tuple[Outcome, str], ...]:
        """(outcome, quantity) of everything that has a prediction."""
        return tuple((o, q.name) for o in self.outcomes for q in o.row.quantities if q.name in o.predicted)

    @cached_property
    def pairs(self) -> tuple[Pair, ...]:
        """The same as pairs of numbers."""
        found = []
        for outcome, name in self.titled:
            row = outcome.row
            quantity = next(q for q in row.quantities if q.name == name)
            found.append(
                Pair(row.target, name, row.model, quantity.value, outcome.predicted[name], quantity.counted)
            )
        return tuple(found)

    @cached_property
    def summaries(self) -> tuple[Summary, ...]:
        """Statistics of the pairs that count."""
        left_out = {
            target.name: target.fit.leave_one_model_out_mape_pct
            for target in self.targets
            if target.fit is not None and target.fit.leave_one_model_out_mape_pct is not None
        }
        return summaries(self.pairs, left_out)


class KnownClock:
    """Times of steps that are known; raises the error of a step that could not be compiled or simulated."""

    def __init__(self, known: Mapping[Key, Any]) -> None:
        self._known = known

    def seconds(self, step: Any, target: Target) -> Any:
        """The step's time; raises FirsttokenError where there is none."""
        found = self._known[target.content_hash, step]
        if isinstance(found, str):
            raise FirsttokenError(found)
        return found


def validate(rows: Sequence[Row], jobs: int = 2, progress: Progress | None = None) -> Validation:
    """Predicts every row that can be run; `jobs` processes time what is not kept from earlier runs.

    A row whose work cannot be compiled is skipped with the reason. Interrupted, it keeps every step that was finished.
    """
    from firsttoken import latency
    from firsttoken.api import target_of
    presets: dict[str, Target] = {}
    targets: dict[int, Target] = {}
    planned: list[tuple[Measurement, Target, tuple[Any, ...]]] = []
    refused: dict[int, str] = {}
    for at, row in enumerate(rows):
        if isinstance(row, Measurement):
            try:
                if row.target not in presets:
                    presets[row.target] = target_of(row.target)
                target = targets[at] = row.variant or presets[row.target]
                planned.append((row, target, latency.steps(row.work, target)))
            except FirsttokenError as error:
                refused[at] = str(error)
    known = times([(target, step) for _, target, steps in planned for step in steps], jobs, progress)
    clock = KnownClock(known)
    outcomes, skipped = [], []
    for at, row in enumerate(rows):
        if isinstance(row, Skipped):
            skipped.append(row)
        elif at in refused:
            skipped.append(Skipped(row.file, row.line, row.chip, row.model, refused[at]))
        else:
            try:
                outcomes.append(outcome_of(row, targets[at], clock))
            except FirsttokenError as error:
                skipped.append(Skipped(row.file, row.line, row.chip, row.model, str(error)))
    used = dict.fromkeys(outcome.row.target for outcome in outcomes)
    files = tuple(dict.fromkeys(row.file for row in rows))
    return Validation(
        version("firsttoken"), files, tuple(outcomes), tuple(skipped), tuple(presets[name] for name in used)
    )


def outcome_of(row: Measurement, target: Target, clock: Any) -> Outcome:
    """A row with what `latency` predicts for its quantities; raises FirsttokenError."""
    from firsttoken import latency

    found = latency.predict(row.work, target, clock)
    names = {q.name for q in row.quantities}
    bands = {"power_w": found.power_band_w, "energy_mj": found.energy_band_mj}
    return Outcome(
        row, _values(row, found), {name: band for name, band in bands.items() if band is not None and name in names}
    )


def predicted(row: Measurement, target: Target, clock: Any) -> dict[str, float]:
    """What `latency` predicts for the quantities of a row; raises FirsttokenError."""
    return outcome_of(row, target, clock).predicted


def _values(row: Measurement, found: Any) -> dict[str, float]:
    times = {"inference_ms": found.ttft_ms}
    if found.ttft_ms is None and found.time_us is not None:
        times["inference_ms"] = found.time_us / 1e3
    if found.time_us is None and found.ttft_ms is not None:
        times["time_us"] = found.ttft_ms * 1e3
    values = {q.name: times.get(q.name, getattr(found, q.name, None)) for q in row.quantities}
    return {name: float(value) for name, value in values.items() if value is not None and value > 0}
