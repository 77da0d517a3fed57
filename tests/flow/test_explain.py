"""`firsttoken explain` and the waterfall of `firsttoken diff`, from real students through the real machines."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chain import Chain, drawn
from hypothesis import HealthCheck, Phase, given, settings
from students import LLAMA, QWEN2

from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.types import ENGINES_PER_CORE, Engine
from firsttoken_compiler.options import resolve
from firsttoken_compiler.target.target import Target
from firsttoken_models.registry import PROVIDER
from firsttoken_simulator.report.critical import critical_path
from firsttoken_simulator.report.ladder import ladder_of
from firsttoken_simulator.report.mapping import PARTS, matrix_parts_fs
from firsttoken_simulator.report.steps import OF_OPERATORS

Verb = Callable[..., subprocess.CompletedProcess[str]]
MAIN = "import sys; from firsttoken.cli import main; sys.argv[0] = 'firsttoken'; main()"


@settings(
    max_examples=12, deadline=None, print_blob=True, phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
@given(drawn())
def test_steps_sum_to_the_time_of_any_student_on_any_target(case: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        chain = Chain(folder=Path(folder), **case)
        program, line, target = chain.program, chain.timeline, chain.target
    ladder = ladder_of(program, line, target, critical_path(program, line))
    assert (ladder.steps >= 0).all()
    assert int(ladder.steps.sum()) == line.total_fs
    np.testing.assert_array_equal(ladder.steps.sum(axis=1), ladder.critical.sum(axis=1))
    # Products take exactly what their shapes say, and the rest of their run time is lost to the scratchpad.
    matrix = np.flatnonzero(program.code[:, word.QUEUE] % ENGINES_PER_CORE == Engine.MATRIX)
    parts = matrix_parts_fs(program.code[matrix], target)
    np.testing.assert_array_equal(parts.sum(axis=1) + line.stall_spad_fs[matrix], (line.end_fs - line.start_fs)[matrix])
    for at, name in enumerate(PARTS):
        own = np.zeros(len(program.ops), np.int64)
        np.add.at(own, program.code[matrix, word.OP], parts[:, at])
        mean = ladder.steps[:, OF_OPERATORS.index(name)]
        assert np.abs(mean * program.cores - own).max(initial=0) <= program.cores
    bursts = line.counters["dram_bursts"] * target.dram.burst_bytes / target.dram.peak_bytes_per_s * 1e15
    assert ladder.steps[:, OF_OPERATORS.index("dma_peak")].sum() <= bursts * 1.000001 + len(program)


def test_several_cores_are_counted_one_by_one(tmp_path: Path) -> None:
    """Products divided over four cores: a quarter of the ideal, and the cores wait for one another."""
    base = Target.load("systolic-128")
    rates = {pair: rate * 64 // 16384 for pair, rate in base.matrix.macs_per_cycle.items()}
    small = replace(base, matrix=replace(base.matrix, rows=8, columns=8, macs_per_cycle=rates), provenance={})
    ladders = {}
    for cores in (1, 4):
        student = replace(QWEN2, name="cores", layers=1, hidden=256, intermediate=320, max_positions=256)
        chain = Chain(student, 64, 0, resolve("int4", None, "32", None), replace(small, cores=cores), tmp_path)
        program, line = chain.program, chain.timeline
        assert program.cores == cores
        ladder = ladder_of(program, line, chain.target, critical_path(program, line))
        assert (ladder.steps >= 0).all()
        assert int(ladder.steps.sum()) == line.total_fs
        np.testing.assert_array_equal(ladder.steps.sum(axis=1), ladder.critical.sum(axis=1))
        ladders[cores] = {name: int(fs) for name, fs in zip(OF_OPERATORS, ladder.steps.sum(axis=0), strict=True)}
    one, four = ladders[1], ladders[4]
    assert four["ideal"] == pytest.approx(one["ideal"] / 4, rel=0.01)
    assert one["sync"] < 0.001 * sum(one.values())
    assert four["sync"] > 0.01 * sum(four.values())
    assert sum(four.values()) < 0.6 * sum(one.values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import onnx

    folder = tmp_path_factory.mktemp("explain")
    onnx.save(PROVIDER.graph(LLAMA, tokens=7, past=0), folder / "tiny.onnx")
    return folder


@pytest.fixture(scope="module")
def firsttoken(folder: Path) -> Verb:
    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-W", "error", "-c", MAIN, *arguments], capture_output=True, text=True, check=False,
            cwd=folder, timeout=300,
            env={"PATH": "/usr/bin:/bin", "FIRSTTOKEN_CACHE": str(folder / "cache"), "HOME": str(folder)},
        )  # fmt: skip

    return call


@pytest.fixture(scope="module")
def runs(firsttoken: Verb, folder: Path) -> dict[str, Any]:
    """Runs of two formats, by the name of their folder."""
    for name, weights in (("int4", "int4"), ("half", "fp16")):
        done = firsttoken(
            "run", "tiny.onnx", "--target", "systolic-128", "--weights", weights, "--weights-absent", "-o", name
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    return {name: json.loads((folder / name / "run.json").read_text()) for name in ("int4", "half")}


def test_explain_prints_steps_that_sum_and_what_helps(firsttoken: Verb, runs: dict[str, Any]) -> None:
    done = firsttoken("explain", "int4", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert document["total_cycles"] == runs["int4"]["ttft_cycles"]
    assert sum(row["fs"] for row in document["steps"]) == document["total_fs"]
    assert document["total_fs"] / 1e12 == pytest.approx(runs["int4"]["ttft_ms"], rel=1e-12)
    assert document["not_simulated"] == ""
    assert document["what_would_help"]
    assert all(row["run_fs"] > 0 for row in document["what_would_help"])
    shown = firsttoken("explain", "int4/run.json").stdout
    for text in ("MACs at peak", "= actual", "cycles", "us", "bound by: ", "what would help, simulated"):
        assert text in shown
    one = firsttoken("explain", "int4", "--op", "layers.*.mlp.up_proj", "--no-what-if").stdout
    assert "layers.*.mlp.up_proj: 2 operators, linear" in one
    assert "effects are not simulated: --no-what-if" in one
    assert "at stake" in one


def test_explain_without_the_program_names_what_is_at_stake(
    firsttoken: Verb, folder: Path, runs: dict[str, Any]
) -> None:
    (folder / "alone.json").write_text(json.dumps(runs["int4"]))
    document = json.loads(firsttoken("explain", "alone.json", "--json").stdout)
    assert "there is no program.npu" in document["not_simulated"]
    assert all(row["run_fs"] is None and row["at_stake_fs"] > 0 for row in document["what_would_help"])
    (folder / "alone.json").write_text(json.dumps({**runs["int4"], "target_hash": "0" * 16}))
    document = json.loads(firsttoken("explain", "alone.json", "--json").stdout)
    assert "the run was made with 0000000000000000: run again" in document["not_simulated"]
    assert document["what_would_help"] == []
    (folder / "alone.json").write_text(json.dumps({**runs["int4"], "target": "mine"}))
    shown = firsttoken("explain", "alone.json").stdout
    assert "target mine is no preset: name its file with --target" in shown
    (folder / "mixed").mkdir()
    (folder / "mixed" / "run.json").write_text(json.dumps(runs["int4"]))
    (folder / "mixed" / "program.npu").write_bytes((folder / "half" / "program.npu").read_bytes())
    document = json.loads(firsttoken("explain", "mixed", "--json").stdout)
    assert "is not the program of this run" in document["not_simulated"]


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({}, ("--op", "layers.*.mlp.upproj"), "no operator 'layers.*.mlp.upproj' in the run; nearest: layers.*.mlp.up"),
        ({}, ("--decode",), "the run has no decode step: run again with --decode N"),
        ({"steps": None}, (), "the run has no ladder ('steps' is missing), an earlier release wrote it"),
        ({"steps": {"names": 3}}, (), "not a run document of schema version 1: steps.names"),
        ({"npu_ms": "x"}, (), "not a run document of schema version 1: npu_ms"),
        ({"npu_ms": 1.0}, (), "its steps sum to"),
        ({"schema_version": 7}, (), "schema version 7, this release reads 1: run again"),
        ({}, ("--target", "snapdragon-x-elite"), "the run was made with"),
        ({}, ("--target", "absent.toml"), "no such target file: absent.toml"),
    ],
)
def test_bad_questions_and_bad_files(
    firsttoken: Verb, folder: Path, runs: dict[str, Any], change: dict[str, Any], arguments: tuple[str, ...],
    message: str,
) -> None:  # fmt: skip
    (folder / "bad.json").write_text(json.dumps({**runs["int4"], **change}))
    done = firsttoken("explain", "bad.json", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_damaged_program_is_one_message(firsttoken: Verb, folder: Path, runs: dict[str, Any]) -> None:
    (folder / "damaged").mkdir()
    (folder / "damaged" / "run.json").write_text(json.dumps(runs["int4"]))
    (folder / "damaged" / "program.npu").write_bytes(b"x" * 100)
    done = firsttoken("explain", "damaged")
    assert (done.returncode, done.stdout) == (2, "")
    assert "not a program file" in done.stderr


def test_diff_prints_and_draws_the_waterfall(firsttoken: Verb, folder: Path, runs: dict[str, Any]) -> None:
    done = firsttoken("diff", "int4", "half", "--html", "fall.html", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    fall = json.loads(done.stdout)["waterfall"]["ttft"]
    assert fall["change_fs"] / 1e12 == pytest.approx(runs["half"]["ttft_ms"] - runs["int4"]["ttft_ms"], abs=1e-9)
    for rows in (fall["by_step"], fall["by_class"]):
        assert sum(row["change_fs"] for row in rows) == fall["change_fs"] != 0
    page = (folder / "fall.html").read_text()
    assert page.count("<svg") == 2
    assert "layers.*.mlp.up_proj" in page
    shown = firsttoken("diff", "int4", "half").stdout
    for text in ("step from ideal to actual", "= time to first token", "of the old time", "layers.*.mlp"):
        assert text in shown
    old = {key: value for key, value in runs["int4"].items() if key != "steps"}
    (folder / "old.json").write_text(json.dumps(old))
    document = json.loads(firsttoken("diff", "old.json", "half", "--json").stdout)
    assert document["waterfall"] == {}
    assert "the old run has no ladder" in document["no_waterfall"]
    assert "no waterfall: the old run has no ladder" in firsttoken("diff", "old.json", "half").stdout
