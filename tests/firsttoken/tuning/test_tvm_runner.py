"""firsttoken.tuning.tvm_runner: candidates of TVM's meta_schedule on the simulator."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from firsttoken.tuning.measure import measure_kernel
from firsttoken.tuning.tvm_runner import HOST, NpuBuilder, NpuRunner, ProductTask, meta_schedule
from firsttoken.tuning.whole import Graph
from firsttoken_compiler.schedule.choice import ProductChoice
from firsttoken_compiler.schedule.linear import Tile, panel_of
from firsttoken_compiler.tvm.api import Schedule


@pytest.fixture
def task(prompt: Graph) -> ProductTask:
    kernel = next(kernel for kernel in prompt.kernels if kernel.name.endswith("up_proj"))
    return ProductTask(kernel.spec, kernel.spaces, kernel.machine, kernel.room)


def built(task: ProductTask, module: Any) -> Any:
    return NpuBuilder(task).build([meta_schedule.builder.BuilderInput(module, HOST)])[0]


def run(task: ProductTask, path: str) -> Any:
    future = NpuRunner(task.target).run([meta_schedule.runner.RunnerInput(path, "cpu", [])])[0]
    assert future.done()
    return future.result()


def cycles(task: ProductTask, module: Any) -> float:
    made = built(task, module)
    assert made.error_msg is None
    found = run(task, str(made.artifact_path))
    assert found.error_msg is None
    return float(found.run_secs[0]) * task.target.clock_hz


def test_traces_replayed_have_times_of_their_own(task: ProductTask) -> None:
    default, other = task.default(), task.scheduled(Tile(16, 1, 128))
    replayed = []
    for schedule in (default, other):
        again = Schedule(task.function)
        schedule.trace.apply_to_schedule(again, remove_postproc=False)
        replayed.append(cycles(task, again.mod))
    panel = panel_of(task.target)
    own = measure_kernel(task.spec, task.spaces, task.target, task.room, ProductChoice(16, panel, 128)).cycles
    assert replayed[1] == pytest.approx(own, rel=1e-9)
    assert replayed[1] > 1.5 * replayed[0]


def test_what_the_target_cannot_do_is_a_message(task: ProductTask) -> None:
    whole = task.scheduled(Tile(48, 6, 256))
    made = built(task, whole.mod)
    assert made.artifact_path is None
    assert "acc bytes" in str(made.error_msg)
    assert "limit 262144" in str(made.error_msg)


def test_what_cannot_be_read_is_a_message(task: ProductTask) -> None:
    made = built(task, Schedule(task.function).mod)  # no schedule at all: products are loops of single elements
    assert made.artifact_path is None
    assert str(made.error_msg)


def test_a_file_that_is_no_program_is_a_message(task: ProductTask, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("nothing")
    assert "program" in str(run(task, str(tmp_path / "text")).error_msg)
    assert "No such file" in str(run(task, str(tmp_path / "absent")).error_msg)


def test_meta_schedule_finds_something(
    task: ProductTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "tvm.s_tir.tensor_intrin", types.ModuleType("none"))  # GPUs', parsed for a minute
    database = meta_schedule.tune_tir(
        task.function, HOST, str(tmp_path), 8, num_trials_per_iter=4, builder=NpuBuilder(task),
        runner=NpuRunner(task.target), space=task.space(), strategy="replay-func", cost_model="random",
        num_tuning_cores=1, seed=3,
    )  # fmt: skip
    times = [float(record.run_secs[0]) for record in database.get_all_tuning_records() if record.run_secs]
    measured = [time * task.target.clock_hz for time in times if time < 1e6]  # TVM's own mark of a failure is 1e10
    assert len(measured) >= 4
    assert len(set(measured)) > 1
    assert min(measured) < cycles(task, task.scheduled(Tile(1, 1, 128)).mod)
