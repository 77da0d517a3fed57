"""firsttoken.tuning.tune: a schedule that is no worse, the same for any number of jobs and after any kill."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from students import SMALL

from firsttoken import api
from firsttoken.options import RunOptions
from firsttoken.student import StudentConfig
from firsttoken.subject import subject_of
from firsttoken.tuning.store import TrialStore
from firsttoken.tuning.tune import Plan, TuneResult, tune
from firsttoken_compiler.errors import OptionError
from firsttoken_compiler.schedule.choice import GraphChoice, Schedules
from firsttoken_compiler.target.target import Target

TARGET = Target.load("systolic-128")
PLAN = Plan("ttft", prompt=48, trials=12, seed=1)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[TuneResult, TrialStore]:
    """What an uninterrupted search of one process finds."""
    store = TrialStore(tmp_path_factory.mktemp("tuned") / "trials.sqlite3")
    return tune(subject_of(SMALL), TARGET, RunOptions(), PLAN, store), store


def outcome(result: TuneResult) -> tuple[object, ...]:
    return result.before, result.after, result.kernels, result.schedules


def test_the_whole_program_gets_better(tuned: tuple[TuneResult, TrialStore], student: StudentConfig) -> None:
    result, store = tuned
    assert result.after.ms < result.before.ms
    for row in result.kernels:
        assert row.best_cycles <= row.default_cycles
        assert row.bound_cycles <= row.best_cycles
        assert row.trials == min(PLAN.trials, row.choices)
    assert result.measured == sum(row.trials for row in result.kernels)
    assert store.counts() == (result.measured + result.simulated,) * 2


def test_the_numbers_are_those_of_a_run(tuned: tuple[TuneResult, TrialStore], student: StudentConfig) -> None:
    result, _ = tuned
    for options, cost in (
        (RunOptions(), result.before), (dataclasses.replace(RunOptions(), schedule=result.schedules), result.after)
    ):  # fmt: skip
        document = api.run(student, TARGET, prompt=48, options=options, cache=False)
        assert document.ttft_ms == pytest.approx(cost.ms, rel=1e-12)
        assert document.energy_mj == pytest.approx(cost.energy_mj, rel=1e-12)


def test_jobs_change_nothing(
    tuned: tuple[TuneResult, TrialStore], student: StudentConfig, tmp_path: Path
) -> None:  # fmt: skip
    store = TrialStore(tmp_path / "trials.sqlite3")
    result = tune(subject_of(student), TARGET, RunOptions(), dataclasses.replace(PLAN, jobs=2), store)
    assert outcome(result) == outcome(tuned[0])
    assert store.counts() == tuned[1].counts()


def test_a_killed_search_goes_on(
    tuned: tuple[TuneResult, TrialStore], student: StudentConfig, tmp_path: Path
) -> None:  # fmt: skip
    store = TrialStore(tmp_path / "trials.sqlite3")
    for least in (5, 40):  # killed twice
        process = subprocess.Popen([sys.executable, Path(__file__).with_name("killed.py"), str(store.path)])
        deadline = time.monotonic() + 300
        while store.counts()[0] < least and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    before = store.counts()
    assert 40 <= before[0] < tuned[1].counts()[0]
    result = tune(subject_of(student), TARGET, RunOptions(), PLAN, store)
    assert outcome(result) == outcome(tuned[0])
    assert store.counts() == tuned[1].counts()  # nothing was measured twice
    assert result.measured + result.simulated == store.counts()[0] - before[0]


def test_a_second_search_measures_nothing(tuned: tuple[TuneResult, TrialStore], student: StudentConfig) -> None:
    again = tune(subject_of(student), TARGET, RunOptions(), PLAN, tuned[1])
    assert (again.measured, again.simulated) == (0, 0)
    assert outcome(again) == outcome(tuned[0])


@pytest.mark.parametrize("objective", ["tpot", "energy", "edp"])
def test_objectives(objective: str, student: StudentConfig, tmp_path: Path) -> None:
    plan = Plan(objective, prompt=48, trials=4, decode=1)
    result = tune(subject_of(student), TARGET, RunOptions(), plan, TrialStore(tmp_path / "trials.sqlite3"))
    assert result.after.of(objective) <= result.before.of(objective)
    rows = {(row.graph, row.dims[0]) for row in result.kernels if row.operators[0].endswith("_proj")}
    assert rows == {("decode", 1)} | ({("prompt", 48)} if objective != "tpot" else set())


def test_what_is_asked_for_is_checked() -> None:
    for text, wrong in (
        ("--objective 'speed' is not one of ttft, tpot, energy, edp", {"objective": "speed"}),
        ("--trials is 0, must be at least 1", {"trials": 0}), ("--jobs is 0", {"jobs": 0}),
    ):  # fmt: skip
        with pytest.raises(OptionError, match=text):
            Plan(**wrong)  # type: ignore[arg-type]
    assert Plan("tpot").decode == 1


def test_several_cores(student: StudentConfig, tmp_path: Path) -> None:
    target = dataclasses.replace(TARGET, name="two-cores", cores=2)
    plan = Plan("ttft", prompt=48, trials=3)
    result = tune(subject_of(student), target, RunOptions(), plan, TrialStore(tmp_path / "trials.sqlite3"))
    assert result.after.ms <= result.before.ms
    one = api.run(student, target, prompt=48, options=with_cores(1), cache=False)
    assert result.after.ms <= one.ttft_ms  # over one core was tried too
    options = dataclasses.replace(RunOptions(), schedule=result.schedules)
    document = api.run(student, target, prompt=48, options=options, cache=False)
    assert document.ttft_ms == pytest.approx(result.after.ms, rel=1e-12)


def with_cores(cores: int) -> RunOptions:
    return dataclasses.replace(RunOptions(), schedule=Schedules((), GraphChoice(cores)))
