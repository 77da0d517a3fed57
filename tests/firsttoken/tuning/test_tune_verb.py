"""firsttoken tune on the command line: table, JSON, the file that --schedule reads, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from students import SMALL

from firsttoken import cli, subject
from firsttoken.schedule_file import read_schedule
from firsttoken.subject import subject_of


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small student for any name."""
    found = subject_of(SMALL)
    monkeypatch.setattr(subject, "subject_of", lambda *_: found)


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The exit code of the command line."""
    monkeypatch.setattr("sys.argv", ["firsttoken", *words])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


def test_a_schedule_file_and_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("tune", "small", "--target", "systolic-128", "--prompt", "48", "--trials", "6")
    out = tmp_path / "schedule.toml"
    assert call(monkeypatch, *words, "-o", str(out)) == 0
    shown = capsys.readouterr().out
    for text in ("M x N x K", "48 x 768 x 256", "whole program", "cycles", "mJ", f"wrote {out}"):
        assert text in shown
    assert call(monkeypatch, *words, "--json") == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert document["measured"] == 0  # all out of the store
    assert document["after"]["cycles"] < document["before"]["cycles"]
    file = read_schedule(out)
    assert file.made_by.startswith("firsttoken tune --objective ttft --trials 6 --seed 0: ")
    assert {entry.key for entry in file.kernels} == set(document["choices"])
    products = [entry for entry in file.kernels if entry.dims]
    assert all("cycles a launch" in entry.note and entry.graph == "prompt" for entry in products)


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text"
    text.write_text("no database " * 200)
    for words, message in (
        (("--target", "none"), "none"), (("--objective", "speed"), "speed"), (("--trials", "0"), "trials"),
        (("--weights", "int3"), "int3"), (("--store", str(text)), "not a database"),
    ):  # fmt: skip
        assert call(monkeypatch, "tune", "small", "--prompt", "48", *words) == 2
        said = capsys.readouterr().err
        assert message in said
        assert "Traceback" not in said
