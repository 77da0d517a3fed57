"""The fit finds machines again that made measurements: formulas first, then the simulator itself."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from calibration_bench import STUDENT, Machinery, Step, predict, problem, tunable

from firsttoken.calibration.fit import Outcome, fit, mape
from firsttoken.calibration.forward import KeptClock
from firsttoken.calibration.parameters import parameters_of, target_at
from firsttoken.calibration.problem import Problem, Row
from firsttoken_compiler.errors import OptionError, TargetError
from firsttoken_compiler.target.calibration import Tunable
from firsttoken_compiler.target.changed import with_values
from firsttoken_compiler.target.target import Target

RATE, BUS, EXP = "matrix.macs_per_cycle.int8xint8", "dma.bus_bytes_per_cycle", "vector.cycles.exp"


@dataclass(frozen=True)
class Sum:
    """A step that takes so many multiplications, bytes and exponentials, one after the other."""

    macs: float
    nbytes: float
    exps: float


@dataclass(frozen=True)
class Took:
    device_s: float


class Formula(KeptClock):
    """Times by a formula in place of programs."""

    def depends(self, step: Any, paths: Any) -> bool:
        return True

    def seconds(self, step: Sum, target: Target) -> Took:
        cycles = step.macs / target.value(RATE) + step.nbytes / target.value(BUS) + step.exps * target.value(EXP)
        return Took(cycles / target.clock_hz)


SUMS = (("a", Sum(1e9, 1e6, 1e4)), ("a", Sum(1e8, 1e7, 1e4)), ("b", Sum(1e8, 1e6, 1e5)), ("b", Sum(2e9, 4e6, 5e4)),
        ("c", Sum(4e8, 8e6, 9e4)))  # fmt: skip
TRUTH = {RATE: 5000, BUS: 20, EXP: 11.0}
ALL = (tunable(RATE, 500, 16384), tunable(BUS, 4, 128), tunable(EXP, 1, 100))


@pytest.fixture(scope="module")
def base() -> Target:
    return with_values(Target.load("systolic-128"), {"host.dispatch_us": 10.0})


def took(work: Sum, target: Target, clock: Any) -> dict[str, float]:
    return {"time_us": clock.seconds(work, target).device_s * 1e6 + target.host.dispatch_us}


def posed(base: Target, tunables: tuple[Tunable, ...], truth: dict[str, float], noise: float = 0.0) -> Problem:
    real = with_values(base, truth)
    rng = np.random.default_rng(7)
    rows = tuple(
        Row(str(at), model, work, {"time_us": took(work, real, Formula(real, Machinery()))["time_us"]
                                   * math.exp(noise * rng.standard_normal())})
        for at, (model, work) in enumerate(SUMS)
    )  # fmt: skip
    start = replace(base, calibration=tunables)
    return Problem(start, parameters_of(start), rows, took)


def solved(posed: Problem, **how: Any) -> Outcome:
    return fit(posed, Formula(posed.base, Machinery()), **how)


def test_the_machine_that_made_the_measurements_is_found_again(base: Target) -> None:
    outcome = solved(posed(base, ALL, TRUTH))
    assert mape(outcome.before) > 20
    assert mape(outcome.after) < 1
    for entry in outcome.parameters:
        assert entry.determined
        assert entry.value == pytest.approx(TRUTH[entry.parameter.tunable.paths[0]], rel=0.04)
        assert not entry.at_bound
        assert outcome.target.value(entry.parameter.tunable.paths[0]) == entry.value
    assert outcome.left_out is not None
    assert mape(outcome.left_out) < 8


def test_a_parameter_of_the_host_is_found_without_a_device(base: Target) -> None:
    outcome = solved(posed(base, (tunable("host.dispatch_us", 1, 5000),), {"host.dispatch_us": 700.0}))
    assert outcome.target.host.dispatch_us == pytest.approx(700.0, rel=0.01)
    assert outcome.generations == 1


def test_what_no_row_depends_on_stays_and_is_named(base: Target) -> None:
    told: list[str] = []
    other = tunable("matrix.macs_per_cycle.fp16xfp16", 500, 16384)
    outcome = solved(posed(base, (*ALL, other), TRUTH), say=told.append)
    last = outcome.parameters[-1]
    assert not last.determined
    assert last.error is None
    assert last.values == (float(base.matrix.macs_per_cycle["fp16xfp16"]),)
    assert any("fp16xfp16 is not determined by the data" in line for line in told)
    assert all(entry.determined for entry in outcome.parameters[:-1])


def test_bounds_hold_and_are_flagged(base: Target) -> None:
    outcome = solved(posed(base, (tunable(RATE, 8000, 16384), *ALL[1:]), TRUTH), leave_one_out=False)
    assert outcome.target.value(RATE) == 8000
    assert outcome.parameters[0].at_bound == "low"
    assert outcome.left_out is None


def test_noise_gives_the_uncertainty_of_what_is_fitted(base: Target) -> None:
    outcome = solved(posed(base, ALL, TRUTH, noise=0.05))
    for entry in outcome.parameters:
        if entry.determined:
            assert entry.error is not None
            off = abs(math.log(entry.value / TRUTH[entry.parameter.tunable.paths[0]]))
            assert off < 4 * entry.error


def test_soft_squares_leave_an_outlier(base: Target) -> None:
    plain = posed(base, ALL[:2], {RATE: 5000, BUS: 20})
    worse = tuple(
        replace(row, quantities={"time_us": row.quantities["time_us"] * (3 if row.label == "4" else 1)})
        for row in plain.rows
    )
    outcome = solved(Problem(plain.base, plain.parameters, worse, took, "soft_l1"), leave_one_out=False)
    hard = solved(Problem(plain.base, plain.parameters, worse, took), leave_one_out=False)
    assert mape(outcome.after[:4]) < mape(hard.after[:4])


def test_members_of_a_group_keep_their_ratios(base: Target) -> None:
    paths = tuple(path for path in base.provenance if path.startswith("vector.cycles."))
    start = replace(base, calibration=(Tunable(paths, 0.5, 20.0, "made up"),))
    (parameter,) = parameters_of(start)
    moved = target_at(start, (parameter,), [parameter.x + math.log(3.0)])
    for path in paths:
        assert moved.value(path) == pytest.approx(3 * base.value(path))
    assert moved.value("matrix.rows") == base.value("matrix.rows")


def test_only_what_is_declared_can_be_fitted(base: Target) -> None:
    with pytest.raises(TargetError, match="declares nothing to fit"):
        parameters_of(base)
    start = replace(base, calibration=ALL)
    assert [p.name for p in parameters_of(start, (BUS,))] == [BUS]
    with pytest.raises(OptionError, match=r"--parameters dma.outstanding: target systolic-128 declares no such"):
        parameters_of(start, ("dma.outstanding",))


def test_no_rows_is_an_error(base: Target) -> None:
    start = replace(base, calibration=ALL)
    with pytest.raises(OptionError, match="no row can be fitted"):
        solved(Problem(start, parameters_of(start), (), took))


WORKS = tuple(Step(STUDENT, tokens, past) for tokens, past in ((128, 0), (32, 96), (1, 127)))


def test_a_machine_is_found_again_from_what_the_simulator_measures(base: Target) -> None:
    start = with_values(base, {BUS: 32})
    truth = {BUS: 20, "host.dispatch_us": 60.0}
    tunables = (tunable(BUS, 8, 128), tunable("host.dispatch_us", 1, 1000))
    posed = problem(start, truth, (*tunables, tunable("matrix.macs_per_cycle.fp16xint8", 64, 16384)), WORKS)
    machinery = Machinery()
    outcome = fit(posed, KeptClock(posed.base, machinery), leave_one_out=False)
    assert mape(outcome.after) < 2
    assert outcome.target.value(BUS) == pytest.approx(20, rel=0.2)
    assert outcome.target.value("host.dispatch_us") == pytest.approx(60, rel=0.25)
    assert not outcome.parameters[2].determined
    assert machinery.compiled <= 3 * (outcome.generations + 1)


def test_programs_are_kept_and_students_are_lines_through_short_ones(base: Target) -> None:
    deep = Step(replace(STUDENT, layers=10), 32, 32)
    machinery = Machinery()
    clock = KeptClock(base, machinery)
    whole = machinery.time(deep, machinery.compile(deep, base), base)
    machinery.compiled = 0
    line = clock.seconds(deep, base)
    assert line.device_s == pytest.approx(whole.device_s, rel=0.03)
    slower = with_values(base, {BUS: 8})
    assert clock.seconds(deep, slower).device_s > 1.2 * line.device_s
    assert machinery.compiled == 2
    assert clock.simulated == 4
    clock.seconds(deep, with_values(slower, {"host.dispatch_us": 99.0}))
    assert clock.simulated == 4  # programs do not feel the host
    assert clock.depends(deep, (BUS,))
    assert clock.depends(deep, ("matrix.macs_per_cycle.int8xint8",))
    assert not clock.depends(deep, ("matrix.macs_per_cycle.int16xint4",))
    assert not clock.depends(deep, ("host.dispatch_us",))
    assert predict(deep, base, clock)["ttft_ms"] == pytest.approx(line.device_s * 1e3 + 0.01)
