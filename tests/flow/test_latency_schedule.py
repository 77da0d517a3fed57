"""Schedules in the graphs that a runtime launches: chunks of a prompt, tokens of an answer."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from students import QWEN2
from typer.testing import CliRunner

from firsttoken import cli
from firsttoken.latency import ExactClock, LlmWork, Prediction, latency, steps
from firsttoken.options import RunOptions
from firsttoken.schedule_file import Entry, ScheduleFile, to_toml
from firsttoken.scheduled import DECODE, PROMPT, Graph, compiled_graph, file_of
from firsttoken.subject import subject_of
from firsttoken_compiler.errors import OptionError
from firsttoken_compiler.schedule.choice import GraphChoice, KernelKey, ProductChoice, RowsChoice, Schedules
from firsttoken_compiler.target.target import Runtime, Target

STUDENT = replace(QWEN2, name="launched", hidden=256, intermediate=512, max_positions=64)
TARGET = replace(
    Target.load("systolic-128"),
    runtimes={"r": Runtime(launch_us=100.0, chunk_tokens=8, context_buckets=(16, 32), host_roles=("output",))},
)
WORK = LlmWork(STUDENT, RunOptions(), prompt=20, context=32, new_tokens=3)
OTHER = KernelKey("linear-7x7x7-0123456789ab")


def graphs_of(work: LlmWork) -> list[Graph]:
    found = []
    for step in steps(work, TARGET):
        phase = DECODE if step.tokens == 1 else PROMPT
        found.append(compiled_graph(step.subject(), TARGET, step.tokens, step.past, step.options, phase))
    return found


@pytest.fixture(scope="module")
def own() -> ScheduleFile:
    """The compiler's own schedule of all graphs that are launched."""
    return file_of(graphs_of(WORK), "launched", TARGET, WORK.options)


def under(schedules: Schedules | None, *, cache: bool = False) -> Prediction:
    return latency(replace(WORK, options=RunOptions(schedule=schedules)), TARGET, cache=cache)


def down(file: ScheduleFile, graph: str) -> Entry:
    return next(each for each in file.kernels if each.graph == graph and "layers.*.mlp.down_proj" in each.operators)


def test_the_compilers_own_choices_take_the_same_time(own: ScheduleFile) -> None:
    found, plain = under(own.schedules), under(None)
    assert plain.schedule == ()
    count = len(own.schedules.choices)
    assert found.schedule == (f"{count} of the {count} kernels that it has choices for occur",)
    assert replace(found, schedule=()) == plain


@pytest.mark.parametrize(("graph", "phase", "other"), [(PROMPT, "prefill", "decode"), (DECODE, "decode", "prefill")])
def test_a_choice_changes_the_phase_in_whose_graphs_its_kernel_is(
    own: ScheduleFile, graph: str, phase: str, other: str
) -> None:
    entry = down(own, graph)
    assert isinstance(entry.choice, ProductChoice)
    small = replace(entry.choice, n=128, k=128, buffers=1)
    found, plain = under(Schedules.of({entry.key: small, OTHER: small})), under(None)
    assert found.parts[phase].device_s > plain.parts[phase].device_s
    assert found.parts[other] == plain.parts[other]
    assert found.schedule == ("1 of the 2 kernels that it has choices for occur", f"not in this run: {OTHER}")


def test_what_is_kept_names_the_same_kernels(own: ScheduleFile, monkeypatch: pytest.MonkeyPatch) -> None:
    choices = {down(own, PROMPT).key: down(own, PROMPT).choice, OTHER: RowsChoice(1)}
    first = under(Schedules.of(choices), cache=True)
    monkeypatch.setattr(ExactClock, "_measured", lambda *_: pytest.fail("measured again"))
    assert under(Schedules.of(choices), cache=True) == first
    assert first.schedule[1:] == (f"not in this run: {OTHER}",)


def test_a_choice_that_cannot_be_is_refused(own: ScheduleFile) -> None:
    entry = down(own, PROMPT)
    assert isinstance(entry.choice, ProductChoice)
    with pytest.raises(OptionError, match=f"schedule of {entry.key}: m is 9, the product has 8 rows: give 1 to 8"):
        under(Schedules.of({entry.key: replace(entry.choice, m=9)}))


def command(path: Path) -> list[str]:
    return ["latency", "smollm2-135m", "--target", "systolic-128", "--prompt", "4", "--new-tokens", "0",
            "--schedule", str(path), "--json"]  # fmt: skip


def test_the_verb_refuses_with_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = Target.load("systolic-128")
    graph = compiled_graph(subject_of("smollm2-135m"), target, 4, 0, RunOptions())
    whole = file_of([graph], "smollm2-135m", target, RunOptions())
    entry = down(whole, PROMPT)
    assert isinstance(entry.choice, ProductChoice)
    bad = replace(whole, kernels=(replace(entry, choice=replace(entry.choice, n=4096)),), graph=GraphChoice())
    path = tmp_path / "bad.toml"
    path.write_text(to_toml(bad), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["firsttoken", *command(path)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    message = capsys.readouterr().err
    assert ended.value.code == 2
    refused = f"error: schedule of {entry.key}: n is 4096, the product has 576 columns: give 1 to 640"
    assert message.splitlines()[-1] == refused


def test_the_verb_names_kernels_that_occur_in_no_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from firsttoken import latency as launches

    monkeypatch.setattr(launches, "compile_step", lambda step, target: step)
    monkeypatch.setattr(launches, "time_of", lambda step, target: launches.StepTime(step.tokens / 1e3, 3, 2.0))
    file = ScheduleFile("", "", (Entry(OTHER, RowsChoice(1)),), GraphChoice())
    (tmp_path / "s.toml").write_text(to_toml(file), encoding="utf-8")
    done = CliRunner().invoke(cli.app, command(tmp_path / "s.toml"))
    assert done.exit_code == 0, done.output
    assert f"note: the schedule has kernels not in this run: {OTHER}" in done.stderr
    assert json.loads(done.stdout)["schedule"][0] == "0 of the 1 kernels that it has choices for occur"


def test_what_export_writes_for_a_runtime_covers_its_graphs(monkeypatch: pytest.MonkeyPatch, own: ScheduleFile) -> None:
    from firsttoken.scheduled import launched_graphs
    from firsttoken.verbs.schedule import Asked

    monkeypatch.setattr("firsttoken.api.target_of", lambda name: TARGET)
    monkeypatch.setattr("firsttoken.verbs.schedule.subject_of", lambda name: subject_of(STUDENT))
    made: list[object] = []
    monkeypatch.setattr(
        "firsttoken.scheduled.launched_graphs",
        lambda work, *more: made.append(work) or launched_graphs(replace(work, student=STUDENT), *more),
    )
    asked = Asked(student="launched", target="t", runtime="r", prompt=20, context=32, new_tokens=3)
    graphs = asked.graphs(RunOptions())
    assert made == [replace(WORK, student="launched", runtime="r")]
    assert file_of(graphs, "launched", TARGET, RunOptions()) == own


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--context", "9"], "--context goes with --runtime NAME"),
        (["--new-tokens", "0"], "--new-tokens goes with --runtime NAME"),
        (["--runtime", "r", "--past", "9"], "--past does not go with --runtime"),
        (["--runtime", "r", "--decode", "9"], "--decode does not go with --runtime"),
    ],
)
def test_lengths_of_one_graph_and_of_a_runtime_do_not_mix(given: list[str], message: str) -> None:
    done = CliRunner().invoke(cli.app, ["schedule", "export", "smollm2-135m", "-o", "x.toml", *given])
    assert message in str(done.exception)


def test_an_answer_is_computed_under_a_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from firsttoken import api

    asked: list[RunOptions] = []

    def generate(*_: object, options: RunOptions, **__: object) -> None:
        asked.append(options)
        raise OptionError("far enough")

    monkeypatch.setattr(api, "generate", generate)
    file = ScheduleFile("", "", (Entry(OTHER, RowsChoice(1)),), GraphChoice())
    (tmp_path / "s.toml").write_text(to_toml(file), encoding="utf-8")
    arguments = ["generate", "smollm2-135m", "--prompt-text", "x", "--schedule", str(tmp_path / "s.toml")]
    assert str(CliRunner().invoke(cli.app, arguments).exception) == "far enough"
    assert [options.schedule for options in asked] == [file.schedules]
