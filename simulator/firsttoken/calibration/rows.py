"""Rows of tables for a fit, and how `latency` compiles and times their steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from firsttoken.calibration.forward import SHORT, Clock, KeptClock
from firsttoken.calibration.problem import Row
from firsttoken_compiler.errors import FirsttokenError, OptionError
from firsttoken_compiler.target.target import Target

if TYPE_CHECKING:
    from firsttoken.validation.measurements import Measurement
    from firsttoken_compiler.isa.program import Program


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A row that is not fitted, and why."""

    label: str
    reason: str


class LatencySteps:
    """Steps of `latency`; satisfies `Machinery`."""

    def compile(self, step: Any, target: Target) -> Program:
        """See `Machinery`."""
        from firsttoken.latency import compile_step

        return compile_step(step, target)

    def time(self, step: Any, program: Program, target: Target) -> Any:
        """See `Machinery`. Energies are left at zero: nothing is fitted to them."""
        from firsttoken.latency import StepTime, attentions_of
        from firsttoken_simulator.machine import simulate_program

        device_s = simulate_program(program, target).total_fs / 1e15
        return StepTime(device_s, len(program.ops), 0.0, attentions=attentions_of(program))

    def layers(self, step: Any) -> int:
        """See `Machinery`. A student whose layers differ from one another is not cut."""
        from firsttoken_compiler.formats.policy import POLICIES

        config = _config(step)
        options = step.options
        by_layer = options.weights in POLICIES or any(rule.layers for rule in options.rules)
        uneven = getattr(config, "per_layer", None) or options.layer_bits or by_layer
        return 0 if config is None or uneven else int(config.layers)

    def cut(self, step: Any, layers: int) -> Any:
        """See `Machinery`."""
        return replace(step, student=replace(_config(step), layers=layers))


def _config(step: Any) -> Any:
    """The configuration of a step's student, where it has equal layers."""
    from firsttoken.encoder import EncoderConfig
    from firsttoken.student import StudentConfig
    from firsttoken.subject import Built, Encoder

    if isinstance(step.student, (StudentConfig, EncoderConfig)):
        return step.student
    subject = step.subject()
    if isinstance(subject, Encoder) or (isinstance(subject, Built) and subject.file is None):
        return subject.config
    return None


def fit_rows(
    files: Sequence[Path], target: Target, without: Sequence[str] = ()
) -> tuple[tuple[Row, ...], tuple[LeftOut, ...]]:
    """(rows of a target that can be fitted, its rows that cannot); raises FirsttokenError for malformed tables.

    Rows of the runtimes `without` are not fitted.

    Raises OptionError where no table has a row of the target.
    """
    from firsttoken.validation.measurements import Measurement, read

    for name in without:
        target.runtime(name)  # refuses a name that it does not have
    rows, left_out, others = [], [], dict[str, None]()
    for found in (row for file in files for row in read(file)):
        label = f"{found.file}:{found.line}"
        if not isinstance(found, Measurement):
            left_out.append(LeftOut(f"{label} {found.chip}, {found.model}", found.reason))
        elif found.target != target.name or found.variant is not None:
            others.setdefault(found.target)
        elif found.work.runtime in without:
            left_out.append(LeftOut(f"{label} {found.model}", f"--without {found.work.runtime}"))
            continue
        elif found.counted:
            rows.append(Row(label, found.model, found, found.counted))
        for apart in getattr(found, "quantities", ()):
            if isinstance(found, Measurement) and found.target == target.name and not apart.counted:
                reason = apart.apart or "an upper bound"
                left_out.append(LeftOut(f"{label} {found.model}, {apart.name}", reason))
    if not rows:
        names = ", ".join(str(file) for file in files)
        raise OptionError(
            f"{names}: no row of {target.name} can be fitted; rows are of {', '.join(others) or 'no known target'}: "
            "give a table with rows of this target"
        )
    return tuple(rows), tuple(left_out)


def predict_row(row: Measurement, target: Target, clock: Clock) -> Mapping[str, float]:
    """Quantities of a row by way of `latency`; satisfies `Predict`."""
    from firsttoken.validation.run import predicted

    return predicted(row, target, clock)


def runnable(rows: Sequence[Row], target: Target, clock: KeptClock) -> tuple[tuple[Row, ...], tuple[LeftOut, ...]]:
    """(rows whose steps compile, the others with the message); compiles everything."""
    kept, refused = [], []
    for row in rows:
        try:
            found = predict_row(row.work, target, clock)
        except FirsttokenError as error:
            refused.append(LeftOut(f"{row.label} {row.model}", str(error)))
            continue
        wanted = {name: value for name, value in row.quantities.items() if name in found}
        if wanted:
            kept.append(replace(row, quantities=wanted))
    return tuple(kept), tuple(refused)


@dataclass(frozen=True, slots=True)
class Check:
    """A whole student beside the line through its short versions, in seconds."""

    student: str
    tokens: int
    past: int
    layers: int
    whole_s: float
    line_s: float

    @property
    def error(self) -> float:
        """Of the line, relative."""
        return self.line_s / self.whole_s - 1


def check_line(rows: Sequence[Row], target: Target, clock: KeptClock) -> tuple[Check, ...]:
    """The smallest prompt graph and the smallest token graph of a cut student, compiled whole for `clock.origin`."""
    from firsttoken import latency

    machinery = LatencySteps()
    steps = dict.fromkeys(step for row in rows for step in latency.steps(row.work.work, target))
    cut = [step for step in steps if len(clock.pieces(step)) == len(SHORT)]
    found = []
    for group in ([s for s in cut if s.tokens > 1], [s for s in cut if s.tokens == 1]):
        if group:
            step = min(group, key=lambda s: (_config(s).layers * _config(s).hidden**2, s.tokens * (s.past + s.tokens)))
            whole = machinery.time(step, machinery.compile(step, clock.origin), clock.origin)
            line = clock.seconds(step, clock.origin)
            name, layers = _config(step).name, _config(step).layers
            found.append(Check(name, step.tokens, step.past, layers, whole.device_s, line.device_s))
    return tuple(found)
