"""Merged products from a schedule file to reports and back, and what `tune` makes of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from students import QWEN2, SMALL
from typer.testing import CliRunner

from firsttoken import api
from firsttoken.cli import app
from firsttoken.operator_names import matching
from firsttoken.options import RunOptions
from firsttoken.schedule_file import read_schedule
from firsttoken.scheduled import file_of, graphs_of, write
from firsttoken.subject import subject_of
from firsttoken.tuning.store import TrialStore
from firsttoken.tuning.tune import Plan, tune
from firsttoken_compiler.errors import OptionError
from firsttoken_compiler.schedule.choice import GraphChoice, Schedules
from firsttoken_compiler.target.target import Target
from firsttoken_simulator.report.explain import explain

TARGET = Target.load("snapdragon-x-elite")
STUDENT = replace(QWEN2, name="merged", hidden=256, intermediate=512, max_positions=64)
QKV = "layers.1.self_attn.q_proj+k_proj+v_proj"


def merged(*lines: str) -> RunOptions:
    return RunOptions(schedule=Schedules(graph=GraphChoice(merged=lines)))


def test_an_exported_schedule_of_merged_products_gives_the_same_programs(tmp_path: Path) -> None:
    options = merged("layers.*.self_attn=qkv", "gate_up")
    graphs = graphs_of(subject_of(STUDENT), TARGET, 9, None, 3, options)
    file = file_of(graphs, "merged", TARGET, options)
    write(tmp_path / "own.toml", graphs, file)
    assert 'merged = ["layers.*.self_attn=qkv", "gate_up"]' in (tmp_path / "own.toml").read_text(encoding="utf-8")
    covered = {operator: entry for entry in file.kernels for operator in entry.operators if entry.graph == "prompt"}
    assert covered["layers.*.self_attn.q_proj+k_proj+v_proj"].dims == (9, 192, 256)
    back = read_schedule(tmp_path / "own.toml")
    assert back == file
    again = graphs_of(subject_of(STUDENT), TARGET, 9, None, 3, RunOptions(schedule=back.schedules))
    assert [g.program.encode() for g in again] == [g.program.encode() for g in graphs]


def test_a_line_of_a_file_that_merges_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIRSTTOKEN_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "bad.toml"
    lines = {"layers.99.*=qkv": "there are layers.0.self_attn, ", "layers=qkvs": "give NAME=KIND or KIND"}
    for line, words in lines.items():
        path.write_text(f'version = 1\n[graph]\nmerged = ["{line}"]\n', encoding="utf-8")
        made = CliRunner().invoke(app, ["run", "smollm2-135m", "--prompt", "4", "--schedule", str(path)])
        assert isinstance(made.exception, OptionError)
        assert words in str(made.exception)


def test_reports_know_merged_products_by_the_names_of_their_parts() -> None:
    run = api.run(STUDENT, TARGET, prompt=9, options=merged("qkv"), cache=False)
    plain = api.run(STUDENT, TARGET, prompt=9, cache=False)
    assert run.macs == plain.macs
    assert run.weight_bytes == plain.weight_bytes
    assert run.schedule == [
        "0 of the 0 kernels that it has choices for occur",
        "layers.*.self_attn: q_proj, k_proj and v_proj are one product",
    ]
    one = api.run(STUDENT, TARGET, prompt=9, options=merged("layers.1.*=qkv"), cache=False)
    assert one.schedule[1:] == ["layers.1.self_attn: q_proj, k_proj and v_proj are one product"]
    names = [row.op for row in run.ops]
    for name in ("layers.1.self_attn.k_proj", "blk.1.attn_k", "layers.1.attn.k", QKV):
        assert matching(name, names) == [QKV]
    assert matching("layers.*.attn.v", names) == [QKV.replace("1", layer) for layer in "01"]
    for name in ("layers.1.self_attn.v_proj", QKV):
        assert [row.op for row in explain(run, name).ops] == [QKV]
    with pytest.raises(OptionError, match="no such operator"):
        matching("layers.1.self_attn.w_proj", names)


@pytest.mark.parametrize("objective", ["ttft", "tpot"])
def test_tune_merges_where_the_whole_program_gets_better_by_it(objective: str, tmp_path: Path) -> None:
    target, store = Target.load("systolic-128"), TrialStore(tmp_path / "trials.sqlite3")
    result = tune(subject_of(SMALL), target, RunOptions(), Plan(objective, prompt=48, trials=1, decode=1), store)
    length = (48, 0) if objective == "ttft" else (1, 48)

    def cost(*lines: str) -> Any:
        options = merged(*lines) if lines else RunOptions()
        run = api.run(SMALL, target, prompt=length[0], past=length[1] or None, options=options, cache=False)
        return run.ttft_ms

    alone, kept = cost(), result.schedules.graph.merged
    pays = [kind for kind in ("qkv",) if cost(kind) < alone]
    assert "qkv" in kept if pays else "qkv" not in kept
    assert ("gate_up" in kept) == (cost(*pays, "gate_up") < cost(*pays))
    assert result.after.ms == pytest.approx(cost(*kept), rel=1e-12)
    assert result.after.ms <= result.before.ms == pytest.approx(alone, rel=1e-12)
