"""Fitted values in the text of a target, and the verb from a table to a file."""

from __future__ import annotations

import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

from firsttoken.calibration.calibrate import calibrated
from firsttoken.calibration.parameters import parameters_of
from firsttoken.calibration.rows import fit_rows
from firsttoken.calibration.write import check_bounds, number, source_text, with_fit, with_value
from firsttoken.verbs.calibrate import document
from firsttoken_compiler.errors import FirsttokenError, OptionError, TargetError
from firsttoken_compiler.target.calibration import Fit
from firsttoken_compiler.target.load import parse_target
from firsttoken_compiler.target.target import Target

EXP = "vector.cycles.exp"
FIT = Fit(("rows.csv",), 5, ("a", "b"), 4.5, 6.25)
HEAD = (
    "chip,model,params,weight_bits,act_bits,prompt_tokens,context,ttft_ms,prefill_tok_s,decode_tok_s,power_w,energy,"
    "source,confidence,notes\n"
)
ROW = "Snapdragon X Elite (HTP v73),MiniLM-L6-v2,22.7M,fp16,fp16,seq 128,,{ms},,,,,made up,high,float onnx\n"


@pytest.fixture(scope="module")
def text() -> str:
    return (resources.files("firsttoken_compiler.target") / "presets" / "systolic-128.toml").read_text("utf-8")


def declared(path: str, low: float, high: float) -> str:
    return f'\n[[calibration]]\npath = "{path}"\nlow = {low}\nhigh = {high}\nwhy = "made up for tests"\n'


def test_one_line_changes_and_the_rest_stays(text: str) -> None:
    written = with_value(text, EXP, "7.5", "5 rows of rows.csv")
    different = [(a, b) for a, b in zip(text.splitlines(), written.splitlines(), strict=True) if a != b]
    assert len(different) == 1
    before, after = parse_target(text.encode(), "x"), parse_target(written.encode(), "x")
    assert after.vector.cycles["exp"] == 7.5
    old, new = before.provenance[EXP], after.provenance[EXP]
    assert new.grade == "fitted"
    assert new.source == f"{old.source}; was 4.0 ({old.grade}); fitted to 5 rows of rows.csv"


def test_a_second_fit_replaces_the_note_and_remembers_the_first_value(text: str) -> None:
    once = with_value(text, EXP, "7.5", "5 rows of rows.csv")
    assert with_value(once, EXP, "7.5", "5 rows of rows.csv") == once
    again = with_value(once, EXP, "8.0", "6 rows of more.csv")
    source = parse_target(again.encode(), "x").provenance[EXP].source
    assert source.count("fitted to") == 1
    assert "was 4.0 (" in source
    assert source.endswith("fitted to 6 rows of more.csv")


def test_the_record_of_a_fit_is_replaced(text: str) -> None:
    once = with_fit(text, FIT)
    assert once.startswith(text.rstrip())
    assert parse_target(once.encode(), "x").fit == FIT
    other = Fit(("more.csv",), 6, ("a",), 3.0, None, ("onnx",), "soft_l1")
    moved = once.replace(text.rstrip(), "").lstrip() + "\n" + text
    for place in (once, moved):
        assert parse_target(with_fit(place, other).encode(), "x").fit == other
        assert with_fit(with_fit(place, other), FIT).count("[fit]") == 1


def test_comments_and_values_in_any_order_survive() -> None:
    line = 'exp = { grade = "assumed", source = "x = 1", value = 4 } # why\n'
    written = with_value(f"[vector.cycles]\n{line}[other]\nexp = 3\n", EXP, "9.0", "rows")
    assert written.splitlines()[1] == (
        'exp = { grade = "fitted", source = "x = 1; was 4 (assumed); fitted to rows", value = 9.0 } # why'
    )


def test_a_value_that_the_text_does_not_state_is_refused(text: str) -> None:
    with pytest.raises(TargetError, match=r"vector\.cycles\.nothing is not on a line of its own under"):
        with_value(text, "vector.cycles.nothing", "1.0")


def test_numbers_are_what_the_schema_takes() -> None:
    assert [number(16.0, True), number(16.0, False), number(0.123456789, False), number(2e11, False)] == [
        "16", "16.0", "0.123457", "2e+11",
    ]  # fmt: skip


def test_a_bound_that_no_machine_can_have_is_named(text: str) -> None:
    full = text + declared("matrix.macs_per_cycle.int8xint8", 64, 1 << 20)
    parameters = parameters_of(parse_target(full.encode(), "x"))
    with pytest.raises(TargetError, match=r"the bound 1\.04858e\+06 of matrix\.macs_per_cycle\.int8xint8 is no"):
        check_bounds(full, "x", parameters)
    possible = text + declared(EXP, 1, 50)
    check_bounds(possible, "x", parameters_of(parse_target(possible.encode(), "x")))


def made(tmp_path: Path, addition: str) -> Path:
    """The Snapdragon with something to fit."""
    plain = source_text("snapdragon-x-elite")[0].split("[[calibration]]")[0]
    path = tmp_path / "mine.toml"
    path.write_text(plain + addition, encoding="utf-8")
    return path


def test_what_is_at_fault_is_named(tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    table.write_text(HEAD + ROW.format(ms=1.1), encoding="utf-8")
    with pytest.raises(TargetError, match="declares nothing to fit"):
        calibrated("systolic-128", [table])
    mine = made(tmp_path, declared("runtimes.onnx.launch_us", 1, 5000))
    with pytest.raises(OptionError, match="declares no such parameter"):
        calibrated(str(mine), [table], ["vector.cycles.add"])
    with pytest.raises(FirsttokenError, match="nowhere"):
        calibrated(str(mine), [tmp_path / "nowhere.csv"])
    other = tmp_path / "other.csv"
    other.write_text(HEAD + ROW.format(ms=1.1).replace("X Elite (HTP v73)", "8 Elite (HTP v79)"), encoding="utf-8")
    with pytest.raises(OptionError, match="no row of snapdragon-x-elite can be fitted; rows are of snapdragon-8-elite"):
        calibrated(str(mine), [other])


def test_rows_of_a_runtime_are_left_out(tmp_path: Path) -> None:
    table, target = tmp_path / "rows.csv", Target.load("snapdragon-x-elite")
    table.write_text(HEAD + ROW.format(ms=1.1) + ROW.format(ms=1.3).replace("float onnx", "qnn_dlc"), encoding="utf-8")
    assert [len(part) for part in fit_rows([table], target)] == [2, 0]
    rows, apart = fit_rows([table], target, ["qnn_dlc"])
    assert [row.quantities for row in rows] == [{"inference_ms": 1.1}]
    assert [entry.reason for entry in apart] == ["--without qnn_dlc"]
    with pytest.raises(FirsttokenError, match="metal"):
        fit_rows([table], target, ["metal"])
    with pytest.raises(OptionError, match="no row of snapdragon-x-elite can be fitted"):
        fit_rows([table], target, ["qnn_dlc", "onnx"])


def test_the_verb_writes_a_target_that_it_does_not_change_again(tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    table.write_text(HEAD + ROW.format(ms=2.5), encoding="utf-8")
    mine, out = made(tmp_path, declared("runtimes.onnx.launch_us", 1, 5000)), tmp_path / "fitted.toml"

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "firsttoken.cli", "calibrate", "--measurements", str(table), "--no-check"]
        code = "import sys; sys.argv = sys.argv[1:]; from firsttoken.cli import main; main()"
        command[1:3] = ["-c", code, "firsttoken"]
        return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, check=False)

    done = run("--target", mine, "-o", out)
    assert done.returncode == 0, done.stderr
    assert f"wrote {out}" in done.stdout
    assert "(1 quantities of 1 rows)" in done.stdout
    written = out.read_text(encoding="utf-8")
    target = parse_target(written.encode(), "out")
    assert target.fit is not None
    assert target.fit.rows == 1
    assert target.fit.mape_pct < 0.5
    assert target.provenance["runtimes.onnx.launch_us"].grade == "fitted"
    again = calibrated(str(out), [table], check=False)
    for old, new in zip(written.splitlines(), again.text.splitlines(), strict=True):
        assert old == new or old.partition("value")[0] == new.partition("value")[0]
    found = document(again)
    assert found["parameters"][0]["grade"] == "fitted"
    assert found["leave_one_model_out_mape_pct"] is None
    assert found["parameters"][0]["after"][0] == pytest.approx(target.runtimes["onnx"].launch_us, rel=1e-3)
    wrong = run("--target", mine, "-o", tmp_path / "fitted.json")
    assert wrong.returncode == 2
    assert "a target is a .toml file" in wrong.stderr
