"""A sweep from its axes to its table: what is known is read, the rest computed and kept point by point."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from firsttoken.sweeping import engines
from firsttoken.sweeping.axes import LENGTHS, Axis, Value, combinations
from firsttoken.sweeping.pareto import front
from firsttoken.sweeping.points import NUMBERS, OBJECTIVES, Base, Point, point_of
from firsttoken.sweeping.store import SUFFIX, Kept, Store
from firsttoken_compiler.errors import FirsttokenError, OptionError

if TYPE_CHECKING:
    from firsttoken.options import Progress
    from firsttoken_compiler.target.target import Target


@dataclass(frozen=True, slots=True)
class Row:
    """A combination with its numbers, or with the message of what is at fault with it."""

    settings: dict[str, Value]
    result: dict[str, Any]
    error: str
    pareto: bool
    seconds: float

    def cells(self) -> dict[str, Any]:
        """By column: settings, numbers, whether it is on the front, the error."""
        numbers = {name: self.result.get(name) for name in NUMBERS}
        return {**self.settings, **numbers, "pareto": self.pareto, "error": self.error}


@dataclass(frozen=True, slots=True)
class Sweep:
    """All rows in the order of the axes; `computed` of them were not known before."""

    axes: tuple[Axis, ...]
    rows: tuple[Row, ...]
    computed: int

    @property
    def front(self) -> tuple[Row, ...]:
        """The rows on the Pareto fronts of `OBJECTIVES`, one front for each prompt and token, by the first of them."""
        return tuple(sorted((row for row in self.rows if row.pareto), key=lambda row: float(row.result[OBJECTIVES[0]])))

    def csv(self) -> str:
        """The table as CSV; the same sweep gives the same bytes."""
        text = io.StringIO()
        columns = [*(axis.path for axis in self.axes), *NUMBERS, "pareto", "error"]
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        for row in self.rows:
            cells = {name: _cell(value) for name, value in row.cells().items()}
            writer.writerow(cells)
        return text.getvalue()


def store_of(out: Path) -> Path:
    """The database beside a table: `sweep.csv` has `sweep.sqlite3`."""
    return out.with_suffix(SUFFIX)


def sweep(
    base: Base, axes: Sequence[Axis], store: Path, *, jobs: int = 1, engine: str = "joblib",
    address: str | None = None, progress: Progress | None = None,
) -> Sweep:  # fmt: skip
    """Runs every combination of the axes; what `store` knows is not run again.

    Args:
        base: what holds where no axis says otherwise.
        axes: what is varied.
        store: the SQLite file; made where it is not there.
        jobs: processes of this machine.
        engine: "joblib" for these, "ray" for the workers of a cluster.
        address: of the cluster; None starts one of `jobs` workers here.
        progress: called with ("sweep", done, total).

    Raises:
        FirsttokenError: the base, an engine or the store is at fault. A combination that cannot run is a row.
    """
    if engine not in engines.ENGINES:
        raise OptionError(f"--engine {engine!r:.80} is not one of {', '.join(engines.ENGINES)}")
    if jobs < 1:
        raise OptionError(f"--jobs {jobs}: at least 1")
    settings = [dict(found) for found in combinations(axes)]
    points: list[Point | str] = []
    loaded: dict[str, Target] = {}
    for found in settings:
        try:
            points.append(point_of(base, found, loaded))
        except FirsttokenError as error:
            points.append(str(error))
    if all(isinstance(point, str) for point in points):
        raise OptionError(f"no combination can be run: {points[0]}")
    keys = {at: point.key for at, point in enumerate(points) if isinstance(point, Point)}
    with Store(store) as kept:
        known = kept.known(set(keys.values()))
        before = len(known)
        missing: dict[str, tuple[int, Point]] = {}
        for at, point in enumerate(points):
            if isinstance(point, Point) and point.key not in known:
                missing.setdefault(point.key, (at, point))
        _tell(progress, len(known), len(known) + len(missing))
        total = len(known) + len(missing)
        work = list(missing.values())
        finished = engines.here(work, jobs) if engine == "joblib" else engines.on_ray(work, jobs, address)
        for at, result in finished:
            kept.put(keys[at], settings[at], result)
            known[keys[at]] = result
            _tell(progress, len(known), total)
    return Sweep(tuple(axes), _rows(settings, points, known), len(known) - before)


def _rows(settings: list[dict[str, Value]], points: list[Point | str], known: dict[str, Kept]) -> tuple[Row, ...]:
    rows = []
    for found, point in zip(settings, points, strict=True):
        if isinstance(point, str):
            rows.append(Row(found, {}, point, False, 0.0))
            continue
        kept = known[point.key]
        error = str(kept.result["error"]) if kept.state == "refused" else ""
        rows.append(Row(found, {} if error else dict(kept.result), error, False, kept.seconds))
    by_question: dict[Any, list[int]] = {}
    for at, row in enumerate(rows):
        if not row.error:
            by_question.setdefault(tuple(row.settings.get(name) for name in LENGTHS), []).append(at)
    for members in by_question.values():
        on = front([[float(rows[at].result[name]) for name in OBJECTIVES] for at in members])
        for at, kept in zip(members, on, strict=True):
            rows[at] = replace(rows[at], pareto=bool(kept))
    return tuple(rows)


def _cell(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula."""
    if value is None:
        return ""
    if not isinstance(value, str):
        return value
    text = "; ".join(line.strip() for line in value.splitlines())
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def _tell(progress: Progress | None, done: int, total: int) -> None:
    if progress is not None:
        progress("sweep", float(done), float(total))
