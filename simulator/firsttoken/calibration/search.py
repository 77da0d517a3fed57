"""Rounds of a fit on kept programs.

A round takes the slope of every step's time along every parameter by simulating the kept programs on changed targets,
solves the problem on these straight lines within a region that it trusts (`scipy.optimize.least_squares`), and
simulates once at the solution, rounded to values that a target can have. What the host adds is exact in every
prediction: only times of devices are straight lines. Between rounds slopes follow the simulated times (Broyden); they
are taken anew when the lines mislead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from firsttoken.calibration.forward import KeptClock, LineClock, RecordingClock
from firsttoken.calibration.problem import SCALE, Problem

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from firsttoken.calibration.problem import Vector

STEP: Final = 0.08
"""Relative step of a difference: well above what rounding to whole cycles and rates does."""
FAINT: Final = 0.01
"""A slope below which a step does not feel a parameter."""
FAR: Final = math.log(2.0)
"""How far down a parameter is looked for that no step feels, because another value decides."""
REGION: Final = (math.log(2.0), math.log(1.02))
"""First and smallest half-width of the region that straight lines are trusted in."""
WIDTH: Final = 1e-5
"""Difference on lines, where nothing is rounded."""
ROUNDS: Final = 10
ENOUGH: Final = 0.03
"""A round that would lower the cost by less than this share is not made."""
EXACT: Final = 0.003
"""Root mean square of the residuals below which nothing is left to fit."""
GOOD: Final = 0.75
POOR: Final = 0.25
"""Shares of the promised gain above which the region grows, and below which slopes are taken anew."""


@dataclass
class Lines:
    """Times of all steps at one place, and their slopes there."""

    place: Vector
    times: dict[Any, Any]
    slopes: dict[Any, Vector]

    def at(self, x: Vector) -> LineClock:
        """The clock of another place."""
        return LineClock(self.times, self.slopes, x - self.place)

    def moved(self, place: Vector, times: dict[Any, Any]) -> Lines:
        """Lines through newly simulated times, slopes turned as little as explains them."""
        slopes = {}
        for step, slope in self.slopes.items():
            delta = np.where(slope != 0, place - self.place, 0.0)
            size = float(delta @ delta)
            grown = math.log(times[step].device_s / self.times[step].device_s)
            slopes[step] = slope if size == 0 else slope + (grown - float(slope @ delta)) / size * delta
        return Lines(place, times, slopes)


@dataclass
class Search:
    """A place that improves round by round; `free` says which parameters may move."""

    problem: Problem
    clock: KeptClock
    x: Vector
    free: NDArray[np.bool_]
    lines: Lines | None = None
    say: Callable[[str], None] = lambda text: None
    rounds: int = 0
    _region: float = field(default=REGION[0])

    def run(self, rounds: int = ROUNDS, fresh: bool = True) -> None:
        """Moves until nothing is gained; `fresh` allows slopes to be taken anew."""
        if not self.free.any():
            return
        if self.lines is None:
            self.lines = self.tangents()
        renewed, tried = False, set[tuple[float, ...]]()
        for _ in range(rounds):
            cost = self.problem.cost(self.problem.residuals(self.x, self.lines.at(self.x)))
            if cost <= EXACT**2 * len(self.problem.names):
                return
            aim = self.solve(self.lines)
            promised = cost - self.problem.cost(self.problem.residuals(aim, self.lines.at(aim)))
            there = self.problem.rounded(aim)
            if promised <= ENOUGH * cost or np.array_equal(there, self.x) or tuple(there) in tried:
                if renewed or not fresh or self.rounds == 0:
                    return
                self.lines, renewed = self.tangents(), True
                continue
            self.rounds += 1
            tried.add(tuple(there))
            times = self.measure(there, list(self.lines.times))
            arrived = self.lines.moved(there, times)
            gained = cost - self.problem.cost(self.problem.residuals(there, arrived.at(there)))
            self.say(f"round {self.rounds}: sum of squares {cost:.5f} -> {cost - gained:.5f}")
            if gained > 0:
                self.x, self.lines = there, arrived
            else:
                self.lines = arrived.moved(self.x, self.lines.times)
            renewed = False
            if gained < POOR * promised:
                self._region /= 3
                if fresh:
                    self.lines, renewed = self.tangents(), True
            elif gained > GOOD * promised:
                self._region = min(self._region * 2, 2 * REGION[0])
            if self._region < REGION[1]:
                return

    def solve(self, lines: Lines) -> Vector:
        """The best place on the lines within the bounds and the region."""
        from scipy.optimize import least_squares

        free = self.free
        low = np.maximum(self.problem.low, self.x - self._region)[free]
        high = np.minimum(self.problem.high, self.x + self._region)[free]
        found = least_squares(
            lambda part: self.on(lines, self._whole(part)),
            np.clip(self.x[free], low + 1e-9, high - 1e-9),
            jac=lambda part: self.slopes(lines, self._whole(part))[:, free],
            bounds=(low, high), loss=self.problem.loss, f_scale=SCALE, max_nfev=40,
        )  # fmt: skip
        return self._whole(np.asarray(found.x))

    def _whole(self, part: Vector) -> Vector:
        x = self.x.copy()
        x[self.free] = part
        return x

    def on(self, lines: Lines, x: Vector) -> Vector:
        """Residuals on the lines, of a target whose values are not rounded."""
        return self.problem.of_target(self.problem.target(x, exact=True), lines.at(x))

    def slopes(self, lines: Lines, x: Vector) -> Vector:
        """Derivatives of residuals along parameters on the lines, `[residuals, parameters]`."""
        here, columns = self.on(lines, x), []
        for at in range(len(x)):
            beside = x.copy()
            beside[at] += WIDTH
            columns.append((self.on(lines, beside) - here) / WIDTH)
        return np.stack(columns, axis=1)

    def steps(self) -> list[Any]:
        """Every step that the rows need."""
        recorder = RecordingClock(self.clock)
        self.problem.residuals(self.x, recorder)
        return list(recorder.steps)

    def measure(self, x: Vector, steps: Sequence[Any]) -> dict[Any, Any]:
        """Simulated times of steps at a place."""
        target = self.problem.target(x)
        return {step: self.clock.seconds(step, target) for step in steps}

    def tangents(self) -> Lines:
        """Lines at the present place: one simulation of every step for every free parameter that it depends on."""
        steps = self.steps()
        times = self.measure(self.x, steps)
        slopes = {step: np.zeros(len(self.x)) for step in steps}
        for at in np.flatnonzero(self.free).tolist():
            paths = self.problem.parameters[at].tunable.paths
            touched = [step for step in steps if self.clock.depends(step, paths)]
            if not touched:
                continue
            for size in (STEP, -STEP, -FAR):
                found = self._slopes_along(at, size, touched, times)
                if found is None:
                    continue
                for step, slope in found.items():
                    slopes[step][at] = slope
                if max(map(abs, found.values())) >= FAINT:
                    break
        return Lines(self.x.copy(), times, slopes)

    def _slopes_along(
        self, at: int, size: float, steps: Sequence[Any], times: dict[Any, Any]
    ) -> dict[Any, float] | None:
        """Slopes of steps between here and about `size` away along one parameter; None beyond a bound."""
        beside = self.beside(at, size)
        if beside is None:
            return None
        there, width = self.measure(beside, steps), beside[at] - self.x[at]
        return {step: math.log(there[step].device_s / times[step].device_s) / width for step in steps}

    def beside(self, at: int, size: float) -> Vector | None:
        """The present place with one parameter moved, by as much more as changes its values; None beyond a bound."""
        parameter = self.problem.parameters[at]
        here = float(self.x[at])
        while parameter.low - STEP <= here + size <= parameter.high + STEP:
            there = parameter.rounded(here + size)
            if there != here:
                x = self.x.copy()
                x[at] = there
                return x
            size *= 1.5
        return None
