"""What a fit changes: the entries of `[[calibration]]` of a target as numbers on a logarithmic axis.

A fit knows one number per entry, the logarithm of the value of its first path. The other paths keep their ratios to it;
whole numbers are rounded one by one where a target is made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from firsttoken_compiler.errors import OptionError, TargetError
from firsttoken_compiler.target.calibration import Tunable
from firsttoken_compiler.target.changed import with_values
from firsttoken_compiler.target.target import Target

if TYPE_CHECKING:
    from numpy.typing import NDArray

HOST_SECTIONS: Final = ("runtimes", "host")
"""Sections that no program depends on: they change what is added to a device's times."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One number of a fit.

    Attributes:
        tunable: the entry of the target file.
        start: values of its paths before the fit.
        whole: which of them are whole numbers.
    """

    tunable: Tunable
    start: tuple[float, ...]
    whole: tuple[bool, ...]

    @property
    def name(self) -> str:
        """How tables call it."""
        return self.tunable.name

    @property
    def low(self) -> float:
        """Lower bound on the axis."""
        return math.log(self.tunable.low)

    @property
    def high(self) -> float:
        """Upper bound on the axis."""
        return math.log(self.tunable.high)

    @property
    def x(self) -> float:
        """The start on the axis."""
        return math.log(self.start[0])

    @property
    def of_host(self) -> bool:
        """Whether no program depends on it."""
        return all(path.split(".")[0] in HOST_SECTIONS for path in self.tunable.paths)

    def values(self, x: float, exact: bool = False) -> tuple[float, ...]:
        """Values of the paths, rounded to what a target can have unless `exact`."""
        ratio = math.exp(x) / self.start[0]
        if exact:
            return tuple(value * ratio for value in self.start)
        return tuple(
            max(1, round(value * ratio)) if whole else float(f"{value * ratio:.6g}")
            for value, whole in zip(self.start, self.whole, strict=True)
        )

    def rounded(self, x: float) -> float:
        """The nearest place on the axis that a target can have."""
        return math.log(self.values(x)[0])


def parameters_of(target: Target, wanted: Sequence[str] = ()) -> tuple[Parameter, ...]:
    """The parameters that a target declares, or those of them that hold a path of `wanted`.

    Raises TargetError where it declares none, and OptionError for a path that it does not declare.
    """
    if not target.calibration:
        raise TargetError(
            f"target {target.name} declares nothing to fit; add tables [[calibration]] with path, low, high and why "
            "to its file"
        )
    declared = [_parameter(target, tunable) for tunable in target.calibration]
    for path in wanted:
        if not any(_holds(parameter, path) for parameter in declared):
            known = ", ".join(parameter.name for parameter in declared)
            raise OptionError(
                f"--parameters {path}: target {target.name} declares no such parameter; it declares {known}"
            )
    return tuple(p for p in declared if not wanted or any(_holds(p, path) for path in wanted))


def _holds(parameter: Parameter, path: str) -> bool:
    if path.endswith(".*"):
        return all(own.startswith(path[:-1]) for own in parameter.tunable.paths)
    return path in parameter.tunable.paths


def _parameter(target: Target, tunable: Tunable) -> Parameter:
    values = [target.value(path) for path in tunable.paths]
    return Parameter(tunable, tuple(float(value) for value in values), tuple(type(value) is int for value in values))


def target_at(
    target: Target, parameters: Sequence[Parameter], x: Sequence[float] | NDArray[Any], exact: bool = False
) -> Target:
    """The target with the parameters at these places of their axes; `exact` ones are not rounded."""
    values: dict[str, float] = {}
    for parameter, place in zip(parameters, x, strict=True):
        values |= dict(zip(parameter.tunable.paths, parameter.values(float(place), exact), strict=True))
    return with_values(target, values)
