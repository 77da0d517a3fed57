from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from students import LLAMA

from firsttoken import api, what_if
from firsttoken_compiler.isa.program import Program
from firsttoken_compiler.target.load import preset_names
from firsttoken_compiler.target.target import Target
from firsttoken_simulator.report.document import RunDocument
from firsttoken_simulator.report.errors import ReportError
from firsttoken_simulator.report.explain import Explanation, Rung, explain
from firsttoken_simulator.report.steps import STEPS

TARGET = Target.load("systolic-128")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDocument, Program, Program]:
    """A run that measures a decode step, and its programs as the folder has them."""
    folder = tmp_path_factory.mktemp("run")
    document = api.run(LLAMA, TARGET, prompt=9, decode=1, out=folder, cache=False)
    return document, Program.load(folder / "program.npu"), Program.load(folder / "decode.npu")


def all_steps(total: int = 1700) -> Explanation:
    """A ladder of which every step has the same time."""
    rungs = tuple(Rung(step, 100, 1, 100 * 100 / total) for step in STEPS)
    critical = {"dma": 500, "matrix": 500, "vector": 400, "host": 300}
    return Explanation("the whole run", (), rungs, total, 1, critical, total, 0)


@pytest.mark.parametrize("name", preset_names())
def test_every_change_is_another_value_of_the_target(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target.load(name)
    monkeypatch.setattr(what_if, "MOST", 99)
    found = what_if.changes(target, all_steps())
    assert {change.step for change in found} >= {"ideal", "dma_peak", "dma_outstanding", "vector", "bank_conflicts"}
    for change in found:
        better = what_if.with_values(target, change.values)
        assert better.content_hash != target.content_hash
        for path, value in change.values.items():
            assert better.value(path) == value != target.value(path)
            assert type(value) is type(target.value(path)) or isinstance(target.value(path), float)
        assert change.text
        assert 0 < change.at_stake_fs <= 500


def test_one_change_that_serves_two_steps_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(what_if, "MOST", 99)
    for name in preset_names():
        found = what_if.changes(Target.load(name), all_steps())
        assert len({change.text for change in found}) == len(found)
    texts = [change.text for change in what_if.changes(TARGET, all_steps())]
    assert any("matrix.rows 128 -> 64, matrix.columns 128 -> 64, matrix.arrays 1 -> 4" in text for text in texts)


def test_small_steps_are_not_tried() -> None:
    found = all_steps()
    small = replace(found, rungs=tuple(replace(rung, percent=1.9) for rung in found.rungs))
    assert what_if.changes(TARGET, small) == []


@pytest.mark.parametrize("decode", [False, True])
def test_effects_are_those_of_simulation(made: Any, decode: bool) -> None:
    document, program = made[0], made[2] if decode else made[1]
    whole = explain(document, decode=decode)
    done: list[float] = []
    found = what_if.effects(program, TARGET, whole, done.append)
    assert done == sorted(done)
    assert done[-1] == 1
    assert len(found) == len(what_if.changes(TARGET, whole)) > 1
    for effect in found:
        machine = what_if.with_values(TARGET, effect.change.values)
        total = api.simulate(program, machine).total_fs + round(machine.host.dispatch_us * 1e9)
        assert effect.run_fs == effect.op_fs == total
    times = [effect.op_fs for effect in found]
    assert times == sorted(times)
    assert times[0] is not None
    assert times[0] < whole.total_fs
    one = what_if.effects(program, TARGET, explain(document, "layers.*.mlp.up_proj", decode=decode))
    assert all(effect.op_fs is not None and effect.op_fs < (effect.run_fs or 0) for effect in one)


def test_more_requests_in_flight_help_where_there_are_few(made: Any) -> None:
    slow = replace(TARGET, dma=replace(TARGET.dma, outstanding=2))
    document = api.run(LLAMA, slow, prompt=9, cache=False)
    program = api.compile(LLAMA, slow, prompt=9)
    assert any("(few requests in flight); raise dma.outstanding" in line for line in document.advice)
    first = what_if.effects(program, slow, explain(document))[0]
    assert first.change.text == "dma.outstanding 2 -> 4"
    assert first.run_fs is not None
    assert first.run_fs < 0.7 * explain(document).total_fs


def test_the_program_of_another_run_is_refused(made: Any) -> None:
    document, program, _ = made
    longer = api.compile(LLAMA, TARGET, prompt=40)
    with pytest.raises(ReportError, match="takes another time on systolic-128 than the run says"):
        what_if.effects(longer, TARGET, explain(document, "layers.0.mlp.up_proj"))
    other = replace(program, ops=tuple(replace(op, name=f"{op.name}x") for op in program.ops))
    with pytest.raises(ReportError, match="the program has no operator"):
        what_if.effects(other, TARGET, explain(document))


def test_files_of_a_run_with_a_decode_step(tmp_path: Path) -> None:
    api.run(LLAMA, TARGET, prompt=3, decode=1, out=tmp_path / "a")
    api.run(LLAMA, TARGET, prompt=3, decode=1, out=tmp_path / "b")
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {path.name for path in (tmp_path / "b").iterdir()} == set(api.DECODE_REPORTS)
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
