"""From a target and tables of measurements to the fitted target: everything that the verb does but the printing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from firsttoken.calibration.fit import GENERATIONS, Fitted, Outcome, fit, mape
from firsttoken.calibration.forward import KeptClock
from firsttoken.calibration.parameters import parameters_of
from firsttoken.calibration.problem import Loss, Problem, Row
from firsttoken.calibration.rows import Check, LatencySteps, LeftOut, check_line, fit_rows, predict_row, runnable
from firsttoken.calibration.write import check_bounds, note_of, number, source_text, with_fit, with_value
from firsttoken_compiler.errors import OptionError
from firsttoken_compiler.target.calibration import Fit
from firsttoken_compiler.target.load import parse_target

if TYPE_CHECKING:
    from firsttoken.options import Progress


@dataclass(frozen=True)
class Calibration:
    """A fit to rows of tables.

    Attributes:
        problem: rows and parameters.
        outcome: the fitted target and its errors.
        fit: the summary that the file records.
        text: the file of the fitted target.
        left_out: rows of the target that are not fitted.
        checks: whole students beside the lines that stand for them.
    """

    problem: Problem
    outcome: Outcome
    fit: Fit
    text: str
    left_out: tuple[LeftOut, ...]
    checks: tuple[Check, ...]

    @property
    def mape_before(self) -> float:
        """Of the target as it was, in per cent."""
        return mape(self.outcome.before)

    @property
    def residuals(self) -> tuple[tuple[Row, str, float], ...]:
        """(row, quantity, measured value) in the order of the errors."""
        return tuple((row, name, value) for row in self.problem.rows for name, value in row.quantities.items())

    def grade(self, entry: Fitted) -> str:
        """The grade of a parameter after the fit."""
        return "fitted" if entry.determined else self.problem.base.provenance[entry.parameter.tunable.paths[0]].grade


def calibrated(
    target: str,
    files: Sequence[Path],
    wanted: Sequence[str] = (),
    *,
    without: Sequence[str] = (),
    leave_one_out: bool = True,
    loss: Loss = "linear",
    check: bool = True,
    generations: int = GENERATIONS,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Calibration:
    """Fits the declared parameters of a target to the rows that tables have of it.

    Args:
        target: a preset's name or a `.toml` file.
        files: tables of measurements.
        wanted: paths of the parameters to fit; empty for all that are declared.
        without: runtimes whose rows are left out.
        leave_one_out: whether each model is predicted by a fit to the others.
        loss: of `scipy.optimize.least_squares`.
        generations: most sets of programs that rounds are made on.
        check: whether a whole student is compiled beside its short versions.
        progress: called with (stage, done, total).
        say: called with a line per round.

    Raises:
        FirsttokenError: the target declares nothing or impossible bounds, or no row can be fitted.
    """
    text, origin = source_text(target)
    machine = parse_target(text.encode(), origin)
    parameters = parameters_of(machine, wanted)
    check_bounds(text, origin, parameters)
    rows, left_out = fit_rows(files, machine, without)
    clock = KeptClock(machine, LatencySteps(), progress)
    rows, refused = runnable(rows, machine, clock)
    if not rows:
        raise OptionError(f"no row of {machine.name} can be run: {refused[0].label}: {refused[0].reason}")
    problem = Problem(machine, parameters, rows, predict_row, loss)
    outcome = fit(problem, clock, leave_one_out, say, generations)
    checks = check_line(rows, machine, clock) if check else ()
    models, names = tuple(dict.fromkeys(row.model for row in rows)), tuple(dict.fromkeys(file.name for file in files))
    outside = None if outcome.left_out is None else round(mape(outcome.left_out), 2)
    summary = Fit(names, len(rows), models, round(mape(outcome.after), 2), outside, tuple(without), loss)
    for entry in outcome.parameters:
        if entry.determined:
            note = note_of(names, models, len(rows), summary, entry.sensitivity)
            held = zip(entry.parameter.tunable.paths, entry.values, entry.parameter.whole, strict=True)
            for path, value, whole in held:
                text = with_value(text, path, number(value, whole), note)
    text = with_fit(text, summary)
    parse_target(text.encode(), f"{origin}, fitted")
    return Calibration(problem, outcome, summary, text, (*left_out, *refused), checks)
