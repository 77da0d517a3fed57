"""Schedules from the compiler to a file, by hand to another one, and back: the verbs, the files, the traces."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from students import QWEN2
from typer.testing import CliRunner

from firsttoken import api
from firsttoken.cli import app
from firsttoken.compare import document
from firsttoken.npu_session import NpuSession
from firsttoken.operator_names import matching
from firsttoken.options import RunOptions
from firsttoken.schedule_file import ScheduleFile, parse_schedule, read_schedule, to_toml
from firsttoken.schedule_show import loops
from firsttoken.scheduled import Graph, file_of, graphs_of, traces_path, write
from firsttoken.subject import subject_of
from firsttoken.verbs.compare import combinations, labelled
from firsttoken_compiler.errors import FirsttokenError, OptionError
from firsttoken_compiler.schedule.choice import AttentionChoice, CoreSplit, GraphChoice, ProductChoice, Schedules
from firsttoken_compiler.schedule.traces import replay, traces
from firsttoken_compiler.target.target import Target
from firsttoken_compiler.tvm.api import same_structure
from firsttoken_models.registry import PROVIDER
from firsttoken_models.weights import write_random_weights

TARGET = Target.load("snapdragon-x-elite")
FORMATS = {
    "int4": RunOptions(), "auto": RunOptions(norm_cache="auto"), "q4_k": RunOptions(weights="q4_k"),
    "fp16": RunOptions(weights="fp16"),
    "statistics": RunOptions(norm_cache="statistics"),
}  # fmt: skip
STUDENT = replace(QWEN2, name="scheduled", hidden=256, intermediate=512, max_positions=64)


def exported(options: RunOptions, target: Target = TARGET) -> tuple[list[Graph], ScheduleFile]:
    graphs = graphs_of(subject_of(STUDENT), target, 9, None, 3, options)
    return graphs, file_of(graphs, "scheduled", target, options)


@pytest.mark.parametrize("name", FORMATS)
def test_the_compilers_own_schedule_gives_the_same_programs_to_the_byte(name: str, tmp_path: Path) -> None:
    options = FORMATS[name]
    graphs, file = exported(options)
    write(tmp_path / "own.toml", graphs, file)
    back = read_schedule(tmp_path / "own.toml")
    assert back == file
    again = graphs_of(subject_of(STUDENT), TARGET, 9, None, 3, replace(options, schedule=back.schedules))
    assert [g.program.encode() for g in again] == [g.program.encode() for g in graphs]


@pytest.mark.parametrize("name", ["int4", "statistics", "q4_k"])
def test_traces_replay_to_the_same_functions(name: str, tmp_path: Path) -> None:
    graphs, file = exported(FORMATS[name])
    _, path = write(tmp_path / "own.toml", graphs, file)
    kept = json.loads(path.read_text(encoding="utf-8"))["kernels"]
    assert set(kept) == {entry.key for entry in file.kernels}
    compared = 0
    for graph in graphs:
        for kernel, choice in zip(graph.kernels, graph.choices, strict=True):
            if choice is None:
                continue
            made = traces(kernel.spec, kernel.spaces, kernel.target, choice)
            assert [part["name"] for part in kept[kernel.key]] == [part.name for part in made]
            for part, written in zip(made, kept[kernel.key], strict=True):
                again = replay(written["source"], written["trace"])
                assert same_structure(again, part.module)
                assert part.name == "rows" or not same_structure(again, part.source)
                compared += 1
    assert compared >= len(file.kernels)


def test_steps_that_are_no_trace_are_refused(tmp_path: Path) -> None:
    graphs, file = exported(RunOptions())
    kept = json.loads(write(tmp_path / "own.toml", graphs, file)[1].read_text(encoding="utf-8"))["kernels"]
    product = next(kept[key][0] for key in kept if key.startswith("linear"))
    other = next(kept[key][0] for key in kept if key.startswith("attention"))
    with pytest.raises(OptionError, match="no trace"):
        replay(product["source"], other["trace"])
    with pytest.raises(OptionError, match="no trace"):
        replay(product["source"], [])


def test_operators_stand_for_all_layers() -> None:
    _, file = exported(RunOptions())
    covered = {operator: entry for entry in file.kernels for operator in entry.operators if entry.graph == "prompt"}
    up = covered["layers.*.mlp.up_proj"]
    assert up.dims == (9, 512, 256)
    assert isinstance(up.choice, ProductChoice)
    assert any(operator.startswith("layers.") and "*" in operator for operator in covered)
    assert {entry.graph for entry in file.kernels} == {"prompt", "decode"}


def test_a_changed_choice_is_compiled_and_computes_the_same(tmp_path: Path) -> None:
    graphs, file = exported(RunOptions())
    before = next(entry for entry in file.kernels if "layers.*.mlp.down_proj" in entry.operators)
    assert isinstance(before.choice, ProductChoice)
    small = replace(before.choice, m=4, n=128, k=128, order="rows", buffers=3)
    changed = replace(file, kernels=(replace(before, choice=small),))
    options = RunOptions(schedule=changed.schedules)
    program = api.compile(STUDENT, TARGET, prompt=9, options=options)
    tiles = {op.name: op.tile for op in program.ops}
    assert tiles["layers.0.mlp.down_proj"] == tiles["layers.1.mlp.down_proj"] == "4x128x128 rows-outer 3-buffered"
    assert len(program) > len(graphs[0].program)
    assert options.schedule is not None
    assert options.schedule.absent() == []
    run = api.run(STUDENT, TARGET, prompt=9, options=options, cache=False)
    plain = api.run(STUDENT, TARGET, prompt=9, cache=False)
    assert run.schedule == ["1 of the 1 kernels that it has choices for occur"]
    assert plain.schedule == []
    assert run.ttft_cycles != plain.ttft_cycles
    assert run.macs == plain.macs


def test_a_schedule_changes_the_key_of_a_result_and_none_leaves_it() -> None:
    subject = subject_of(STUDENT)
    plain = api.run_parts(subject, TARGET, 9, 0, RunOptions())
    given = api.run_parts(subject, TARGET, 9, 0, RunOptions(schedule=Schedules(graph=GraphChoice(2))))
    assert "schedule" not in plain
    assert {name: value for name, value in given.items() if name != "schedule"} == plain


BAD = {
    "bufers = 2": ("buffers = 2", "line {line} (kernel 1): unknown key 'bufers'; keys are m, n, k"),
    'order = "diagonal"': ('order = "columns"', "line {line} (kernel 1): order is 'diagonal'"),
    "m = -1": ("m = 9", "line {line} (kernel 1): m is -1"),
    "m = true": ("m = 9", "line {line} (kernel 1): m is True"),
    "version = 7": ("version = 1", "version is 7, 1 is read here"),
    'mystery = 1\nstudent = ""': ('student = "scheduled"', "line 2: unknown key 'mystery'; keys are version, student"),
    'key = "linear"': (None, "'linear' is no key of a kernel"),
}


@pytest.mark.parametrize("new", BAD)
def test_what_a_file_cannot_say_is_refused_with_its_line(new: str, tmp_path: Path) -> None:
    _, file = exported(RunOptions())
    entry = next(each for each in file.kernels if "layers.*.mlp.down_proj" in each.operators)
    text = to_toml(replace(file, kernels=(entry,)))
    old, message = BAD[new]
    text = text.replace(f'key = "{entry.key}"' if old is None else old, new)
    line = next(index for index, each in enumerate(text.splitlines(), 1) if new.splitlines()[0] in each)
    path = tmp_path / "bad.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(OptionError) as caught:
        read_schedule(path)
    assert message.format(line=line) in str(caught.value)
    assert str(path) in str(caught.value)


def test_files_that_are_no_schedules(tmp_path: Path) -> None:
    path = tmp_path / "no.toml"
    for content in (b"\xff", b"= 1", b"kernel = 3\nversion = 1", b"", b"[[kernel]]\n" * 20_000):
        path.write_bytes(content)
        with pytest.raises(OptionError, match=r"no\.toml"):
            read_schedule(path)
    with pytest.raises(OptionError, match="no such file"):
        read_schedule(tmp_path / "absent.toml")


def test_what_norms_keep_is_in_the_file_and_can_be_changed() -> None:
    auto = RunOptions(norm_cache="auto")
    _, file = exported(auto)
    ways = dict(text.split("=") for text in file.graph.norms)
    assert ways["layers.*.input_layernorm"] == "scratchpad"
    norms = ("layers.0.input_layernorm=statistics", "layers.1,2-3.post_attention_layernorm=dram")
    options = replace(auto, schedule=Schedules(graph=GraphChoice(norms=norms)))
    program = api.compile(STUDENT, TARGET, prompt=9, options=options)
    kinds = {op.name: op.kind for op in program.ops}
    assert kinds["layers.0.self_attn.q_proj"] == "normed"
    assert kinds["layers.1.self_attn.q_proj"] == "linear"
    lines = {line.partition(": ")[0]: line for line in program.meta["norm_decisions"]}
    assert "made from its statistics" in lines["layers.0.input_layernorm"]
    assert "in scratchpad" in lines["layers.0.post_attention_layernorm"]
    assert "in DRAM" in lines["layers.1.post_attention_layernorm"]
    with pytest.raises(OptionError, match=r"layers\.0\.input_layernorm is to go by 'statistics', and can go by "):
        api.compile(STUDENT, TARGET, prompt=9, options=replace(options, norm_cache="int8"))
    with pytest.raises(OptionError, match="give NAME=WAY"):
        GraphChoice(norms=("norm=nowhere",))


def test_splits_of_cores_are_kept() -> None:
    _, file = exported(RunOptions())
    split = replace(file, splits=((file.kernels[0].key, CoreSplit("rows", 2)),), graph=GraphChoice(2))
    assert parse_schedule(to_toml(split).encode(), "here") == split


def call(*arguments: str) -> tuple[str, str]:
    """(stdout, the message of a refusal) of a command in this process."""
    result = CliRunner().invoke(app, arguments)
    if result.exception is not None and not isinstance(result.exception, FirsttokenError):
        raise result.exception
    return result.stdout, str(result.exception or "")


def test_export_writes_the_file_and_its_traces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIRSTTOKEN_CACHE", str(tmp_path / "cache"))
    out, error = call("schedule", "export", "smollm2-135m", "--prompt", "4", "-o", str(tmp_path / "s.toml"), "--json")
    assert not error
    facts = json.loads(out)
    assert facts["files"] == [str(tmp_path / "s.toml"), str(traces_path(tmp_path / "s.toml"))]
    assert facts["kernels"] == len(read_schedule(tmp_path / "s.toml").kernels)


@pytest.mark.parametrize("name", ["layers.1.mlp.up_proj", "layers.1.ffn.up", "blk.1.ffn_up.weight", "*.1.mlp.up_proj"])
def test_operators_have_several_names(name: str) -> None:
    assert matching(name, ["layers.0.mlp.up_proj", "layers.1.mlp.up_proj", "lm_head"]) == ["layers.1.mlp.up_proj"]


def test_names_that_no_operator_has() -> None:
    names = ["layers.0.mlp.up_proj", "layers.1.mlp.up_proj", "lm_head"]
    assert matching("layers.*.ffn.up", names) == names[:2]
    assert matching("output", names) == ["lm_head"]
    with pytest.raises(OptionError, match="no such operator; layers are 0 to 1"):
        matching("layers.99.ffn.up", names)
    with pytest.raises(OptionError, match=r"no such operator; there are layers\.1\.mlp\.up_proj$"):
        matching("layers.1.ffn.sideways", names)


def test_show_says_what_a_schedule_takes_and_costs() -> None:
    out, error = call("schedule", "show", "smollm2-135m", "--op", "layers.3.ffn.up", "--prompt", "4", "--json",
                      "--script", "--trace")  # fmt: skip
    assert not error
    (document,) = json.loads(out)
    assert document["operators"] == ["layers.3.mlp.up_proj"]
    assert document["covers"] == ["layers.*.mlp.up_proj"]
    assert document["simulated_cycles"] > 0
    assert document["estimated_cycles"] > 0
    assert document["scratchpad_bytes"] <= document["free_scratchpad_bytes"]
    assert any("matmul" in line for line in document["loops"])
    costs = [row["estimated_cycles"] for row in document["alternatives"]]
    assert len(costs) == 5
    assert costs == sorted(costs)
    assert "T.prim_func" in document["script"][0]
    assert "sch.tensorize" in document["trace"][0]


@pytest.mark.parametrize("kv_cache", ["fp16", "int8"])
def test_an_online_softmax_by_hand(kv_cache: str, tmp_path: Path) -> None:
    """Prompt and token: in the file, back from it, in the program, and its answers are nearly those of whole rows."""
    options = RunOptions(weights="fp16", kv_cache=kv_cache)
    graphs = graphs_of(subject_of(STUDENT), TARGET, 9, None, 1, options)
    file = file_of(graphs, "scheduled", TARGET, options)
    attentions = [entry for entry in file.kernels if isinstance(entry.choice, AttentionChoice)]
    assert len(attentions) == 2
    kept = [replace(e, choice=replace(e.choice, rows=2, keys=4, softmax="online")) for e in attentions]  # type: ignore[arg-type]
    path = tmp_path / "online.toml"
    path.write_text(to_toml(replace(file, kernels=tuple(kept))), encoding="utf-8")
    assert path.read_text(encoding="utf-8").count('softmax = "online"') == 2
    assert "softmax" not in to_toml(file)
    given = replace(options, schedule=read_schedule(path).schedules)
    online = graphs_of(subject_of(STUDENT), TARGET, 9, None, 1, given)
    for graph, plain in zip(online, graphs, strict=True):
        tiles = {op.name: op.tile for op in graph.program.ops if op.tile.endswith("online")}
        assert list(tiles) == [f"layers.{layer}.self_attn.attention" for layer in range(STUDENT.layers)]
        assert len(graph.program) > len(plain.program)
        kernel, choice = next(pair for pair in zip(graph.kernels, graph.choices, strict=True)
                              if isinstance(pair[1], AttentionChoice))  # fmt: skip
        assert "one iteration ahead:" in "\n".join(loops(kernel, choice))
    weights = write_random_weights(STUDENT, tmp_path)
    plain, other = (NpuSession(PROVIDER, STUDENT, weights, 16, target=TARGET, options=of) for of in (options, given))
    prompt = [5, 77, 21, 8, 3, 9, 40, 2, 6]
    for rows, found in ((plain.prefill(prompt), other.prefill(prompt)), (plain.decode(4, 9), other.decode(4, 9))):
        assert not np.array_equal(rows, found)
        np.testing.assert_allclose(found, rows, atol=1e-2 * float(np.abs(rows).max()))


def test_a_schedule_of_another_target_is_refused(tmp_path: Path) -> None:
    _, file = exported(RunOptions())
    path = tmp_path / "s.toml"
    path.write_text(to_toml(file), encoding="utf-8")
    _, error = call("run", "smollm2-135m", "--schedule", str(path), "--target", "tpu-v4")
    assert f"--schedule {path} is a schedule for target snapdragon-x-elite, and the target is tpu-v4" in error


def test_compare_says_what_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIRSTTOKEN_CACHE", str(tmp_path / "cache"))
    _, file = exported(RunOptions())
    entry = next(each for each in file.kernels if "layers.*.mlp.down_proj" in each.operators)
    assert isinstance(entry.choice, ProductChoice)
    worse = replace(file, kernels=(replace(entry, choice=replace(entry.choice, n=32, buffers=1)),))
    runs = [
        api.run(STUDENT, TARGET, prompt=9, options=RunOptions(schedule=schedule), cache=False)
        for schedule in (None, worse.schedules)
    ]
    found = document(["default", "worse"], runs)
    assert found["quantities"]["TTFT ms"] == [run.ttft_ms for run in runs]
    assert runs[1].ttft_cycles > runs[0].ttft_cycles
    down = next(row for row in found["operators"] if row["op"] == "layers.*.mlp.down_proj")
    assert down["ms"][1] > down["ms"][0]
    assert sum(row["ms"][1] for row in found["operators"]) == pytest.approx(runs[1].npu_ms, rel=1e-3)
    assert found["changes"][0]["ttft_cycles"]["new"] == runs[1].ttft_cycles
    assert combinations(["a"], ["x.toml"]) == [("a", "default"), ("a", "x.toml")]
    assert combinations(["a", "b"], []) == [("a", "default"), ("b", "default")]
    assert combinations(["a", "b"], ["x", "y"]) == [("a", "x"), ("b", "y")]
    assert labelled([("a", "default"), ("a", "d/x.toml")]) == ["default", "x.toml"]
    for targets, schedules in ((["a"], []), (["a", "a"], []), (["a", "b"], ["x", "y", "z"])):
        with pytest.raises(OptionError, match="compare:"):
            combinations(targets, schedules)
