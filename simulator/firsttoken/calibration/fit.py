"""The whole fit: rounds on kept programs, recompiled until they agree; what is determined; and each model left out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from firsttoken.calibration.forward import KeptClock
from firsttoken.calibration.parameters import Parameter
from firsttoken.calibration.problem import Problem
from firsttoken.calibration.search import FAINT, Lines, Search
from firsttoken_compiler.errors import OptionError
from firsttoken_compiler.target.target import Target

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from firsttoken.calibration.problem import Vector

AGREE: Final = 0.01
"""Fresh programs and kept ones agree when no prediction differs by more."""
GENERATIONS: Final = 3
"""Most sets of programs that rounds are made on; the best place by freshly compiled programs is taken."""
NOISE: Final = 0.02
"""Smallest standard deviation assumed of a residual: no measurement is better."""
AT_BOUND: Final = 1e-3
LEFT_OUT_ROUNDS: Final = 4


@dataclass(frozen=True, slots=True)
class Fitted:
    """One parameter after the fit.

    Attributes:
        parameter: what it is.
        value: of its first path.
        values: of all its paths.
        sensitivity: d log time / d log value, averaged over the residuals of each quantity.
        error: standard error of log value, from the slopes; None where it is not determined.
        determined: whether the data say more of it than its bounds do; if not, it has its starting value.
        at_bound: "low" or "high" where it stopped at a bound, else empty.
    """

    parameter: Parameter
    value: float
    values: tuple[float, ...]
    sensitivity: dict[str, float]
    error: float | None
    determined: bool
    at_bound: str


@dataclass(frozen=True)
class Outcome:
    """A fit: the target, its parameters, and errors (predicted over measured, less 1) of every quantity of every row.

    Attributes:
        target: with the fitted values.
        parameters: one entry each.
        before: errors of the target as it was.
        after: errors of the fitted target, freshly compiled.
        left_out: errors of every row by a fit to the other models' rows; None where nobody asked or there is one model.
        disagreement: largest difference of a prediction between fresh programs and those of the last rounds.
        generations: sets of programs that rounds were made on.
    """

    target: Target
    parameters: tuple[Fitted, ...]
    before: Vector
    after: Vector
    left_out: Vector | None
    disagreement: float
    generations: int


def mape(errors: Vector) -> float:
    """Mean of absolute relative errors, in per cent."""
    return float(np.abs(errors).mean()) * 100


def fit(
    problem: Problem, clock: KeptClock, leave_one_out: bool = True, say: Callable[[str], None] = lambda text: None,
    generations: int = GENERATIONS,
) -> Outcome:  # fmt: skip
    """Fits and judges; `clock` compiles for the target that the problem starts from.

    `generations`: most sets of programs that rounds are made on.

    Raises OptionError where there are no rows.
    """
    if not problem.rows:
        raise OptionError("no row can be fitted: every one is of another target, unreliable or not modelled")
    start = problem.start
    before = problem.residuals(start, clock)
    kept, best, generation = clock, None, 0
    place = start
    while True:
        generation += 1
        place, free, lines = _settled(problem, kept, place, say)
        fresh = kept.anew(problem.target(place)) if _recompiles(problem, place, start) else kept
        after = problem.residuals(place, fresh)
        worst = float(np.abs(after - problem.residuals(place, kept)).max())
        say(f"compiled for the fitted values: predictions move by at most {worst:.1%}")
        found = _Place(place, free, lines, fresh, after, worst)
        if best is None or problem.cost(after) < problem.cost(best.after):
            best = found
        if worst <= AGREE or generation >= generations:
            break
        kept = fresh
    judged = _judged(problem, Search(problem, best.clock, best.x, best.free, best.lines), best.after)
    outside = _left_out(problem, best.clock, best.x, best.lines, say) if leave_one_out else None
    return Outcome(
        problem.target(best.x), judged, np.expm1(before), np.expm1(best.after),
        None if outside is None else np.expm1(outside), best.disagreement, generation,
    )  # fmt: skip


@dataclass(frozen=True)
class _Place:
    """Where rounds ended, and what freshly compiled programs say there."""

    x: Vector
    free: NDArray[np.bool_]
    lines: Lines
    clock: KeptClock
    after: Vector
    disagreement: float


def _recompiles(problem: Problem, x: Vector, start: Vector) -> bool:
    """Whether a schedule may depend on what changed."""
    return any(a != b and not p.of_host for p, a, b in zip(problem.parameters, x, start, strict=True))


def _settled(
    problem: Problem, clock: KeptClock, x: Vector, say: Callable[[str], None]
) -> tuple[Vector, NDArray[np.bool_], Lines]:
    """(place, which parameters are determined there, lines there) after rounds on one set of programs."""
    free = np.ones(len(x), bool)
    search = Search(problem, clock, x, free, say=say)
    search.lines = search.tangents()
    while True:
        search.run()
        assert search.lines is not None
        residuals = search.on(search.lines, search.x)
        known = determined(search.slopes(search.lines, search.x), residuals, problem, search.x, search.free)
        if np.array_equal(known, search.free):
            return search.x, search.free, search.lines
        for at in np.flatnonzero(search.free & ~known).tolist():
            say(f"{problem.parameters[at].name} is not determined by the data: it keeps its value")
        place = np.where(known, search.x, problem.start)
        search = Search(problem, clock, place, known, say=say)
        search.lines = Search(problem, clock, place, free).tangents()


def errors_of(slopes: Vector, residuals: Vector, free: NDArray[np.bool_]) -> Vector:
    """Standard errors of the free parameters, infinite for the others and for directions without a slope."""
    found = np.full(len(free), np.inf)
    if not free.any():
        return found
    part = slopes[:, free]
    spare = max(1, len(residuals) - part.shape[1])
    sigma = max(NOISE, math.sqrt(float(residuals @ residuals) / spare))
    values, vectors = np.linalg.eigh(part.T @ part)
    inverse = 1 / np.maximum(values, 1e-12)
    found[free] = sigma * np.sqrt((vectors**2) @ inverse)
    return found


def determined(
    slopes: Vector, residuals: Vector, problem: Problem, x: Vector, free: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Which free parameters the data say more of than their bounds do; the least known go first, one by one.

    Bounds alone know a parameter as well as a uniform distribution between them does. One that stopped at a bound also
    stays where the data would take it further beyond than its standard error.
    """
    known = free & (np.abs(slopes).max(axis=0, initial=0.0) > FAINT)
    bound = np.isclose(x, problem.low, atol=AT_BOUND) | np.isclose(x, problem.high, atol=AT_BOUND)
    width = (problem.high - problem.low) / math.sqrt(12)
    while known.any():
        pull = np.zeros(len(x))
        pull[known] = np.linalg.lstsq(slopes[:, known], -residuals, rcond=None)[0]
        outwards = np.where(bound & ((pull > 0) == (x > (problem.low + problem.high) / 2)), np.abs(pull), 0.0)
        share = np.where(known, errors_of(slopes, residuals, known) / np.maximum(width, outwards), 0.0)
        if share.max() <= 1:
            break
        known[int(share.argmax())] = False
    return known


def _judged(problem: Problem, search: Search, residuals: Vector) -> tuple[Fitted, ...]:
    assert search.lines is not None
    slopes = search.slopes(search.lines, search.x)
    errors = errors_of(slopes, residuals, search.free)
    names = np.array(problem.names)
    signs = np.where(np.char.endswith(names, "tok_s"), -1.0, 1.0)
    found = []
    for at, parameter in enumerate(problem.parameters):
        place = float(search.x[at])
        bound = "low" if place <= parameter.low + AT_BOUND else "high" if place >= parameter.high - AT_BOUND else ""
        known = bool(search.free[at])
        values = parameter.values(place) if known else parameter.start
        found.append(
            Fitted(
                parameter, values[0], values,
                {name: float((signs * slopes[:, at])[names == name].mean()) for name in dict.fromkeys(problem.names)},
                float(errors[at]) if known else None, known, bound if known else "",
            )
        )  # fmt: skip
    return tuple(found)


def _left_out(problem: Problem, clock: KeptClock, x: Vector, lines: Lines, say: Callable[[str], None]) -> Vector | None:
    """Residuals of every row, each model's by a fit to the others that begins at the whole fit."""
    models = dict.fromkeys(row.model for row in problem.rows)
    if len(models) < 2:
        return None
    by_model = {model: iter(_one_left_out(problem, clock, x, lines, model, say)) for model in models}
    return np.array([next(by_model[row.model]) for row in problem.rows for _ in row.quantities])


def _one_left_out(
    problem: Problem, clock: KeptClock, x: Vector, lines: Lines, model: str, say: Callable[[str], None]
) -> Vector:
    rest, alone = problem.without(model), problem.only(model)
    search = Search(rest, clock, x, np.ones(len(x), bool))
    residuals = search.on(lines, x)
    known = determined(search.slopes(lines, x), residuals, rest, x, search.free)
    place = np.where(known, x, problem.start)
    search = Search(rest, clock, place, known)
    steps = search.steps()
    search.lines = Lines(place, search.measure(place, steps), {step: lines.slopes[step] for step in steps})
    search.run(LEFT_OUT_ROUNDS, fresh=False)
    found = alone.residuals(search.x, clock)
    say(f"without {model}: its {len(alone.rows)} rows are predicted with {mape(np.expm1(found)):.1f} %")
    return found


__all__ = ["Fitted", "Outcome", "errors_of", "fit", "mape"]
