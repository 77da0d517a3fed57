"""Rows of measurements as a problem of least squares: residuals are logarithms of predicted over measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from firsttoken.calibration.forward import Clock
from firsttoken.calibration.parameters import Parameter, target_at
from firsttoken_compiler.target.target import Target

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Vector = NDArray[np.float64]

Loss = Literal["linear", "soft_l1"]
Predict = Callable[[Any, Target, Clock], Mapping[str, float]]
"""Quantities of a work on a target, times of its steps from a clock."""

SCALE: Final = 0.15
"""Where `soft_l1` goes over from squares to absolute values."""


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        label: file and line.
        model: rows of one model are left out together.
        work: what was measured, as the predictor takes it.
        quantities: measured values by name, independent ones only.
    """

    label: str
    model: str
    work: Any
    quantities: Mapping[str, float]


@dataclass
class Problem:
    """Rows, the parameters, and how a row is predicted."""

    base: Target
    parameters: tuple[Parameter, ...]
    rows: tuple[Row, ...]
    predict: Predict
    loss: Loss = "linear"

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Quantity of every residual, in order."""
        return tuple(name for row in self.rows for name in row.quantities)

    @cached_property
    def low(self) -> Vector:
        """Lower bounds."""
        return np.array([p.low for p in self.parameters])

    @cached_property
    def high(self) -> Vector:
        """Upper bounds."""
        return np.array([p.high for p in self.parameters])

    @cached_property
    def start(self) -> Vector:
        """Where the target is."""
        return np.array([p.x for p in self.parameters])

    def target(self, x: Vector, exact: bool = False) -> Target:
        """The target at a place, its values rounded unless `exact`."""
        return target_at(self.base, self.parameters, x, exact)

    def rounded(self, x: Vector) -> Vector:
        """The nearest place that a target can have."""
        return np.array([p.rounded(float(place)) for p, place in zip(self.parameters, x, strict=True)])

    def residuals(self, x: Vector, clock: Clock) -> Vector:
        """log(predicted / measured) of every quantity of every row at a place."""
        return self.of_target(self.target(x), clock)

    def of_target(self, target: Target, clock: Clock) -> Vector:
        """The same for a target."""
        found = []
        for row in self.rows:
            predicted = self.predict(row.work, target, clock)
            found += [math.log(predicted[name] / measured) for name, measured in row.quantities.items()]
        return np.array(found)

    def cost(self, residuals: Vector) -> float:
        """What is made small."""
        squares = residuals**2
        if self.loss == "soft_l1":
            squares = 2 * SCALE**2 * (np.sqrt(1 + squares / SCALE**2) - 1)
        return float(squares.sum())

    def of_rows(self, rows: tuple[Row, ...]) -> Problem:
        """The same problem with other rows."""
        return Problem(self.base, self.parameters, rows, self.predict, self.loss)

    def without(self, model: str) -> Problem:
        """The problem without one model's rows."""
        return self.of_rows(tuple(row for row in self.rows if row.model != model))

    def only(self, model: str) -> Problem:
        """The problem of one model's rows."""
        return self.of_rows(tuple(row for row in self.rows if row.model == model))
