"""Rows together: steps are timed once, what cannot be compiled is skipped, and the report is safe to open."""

from __future__ import annotations

import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from measurement_tables import models
from typer.testing import CliRunner

from firsttoken.cli import app
from firsttoken.latency import ExactClock, LlmWork, Step, StepTime
from firsttoken.options import RunOptions
from firsttoken.validation import run, steps
from firsttoken.validation.causes import read_causes
from firsttoken.validation.measurements import Measurement, Quantity, Row, Skipped, parse
from firsttoken.validation.report import page, write
from firsttoken.validation.run import validate
from firsttoken.validation.table import MeasurementError
from firsttoken_compiler.errors import OptionError
from firsttoken_compiler.target.target import Target

FAST = {"model": "SmolLM2-135M", "params": "135M", "ttft_ms": "10", "decode_tok_s": "50"}


class Recorder:
    """A clock that compiles nothing: a token takes a millisecond."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, Step]] = []

    def __call__(self, step: Step, target: Target) -> StepTime:
        self.seen.append((target.name, step))
        if step.tokens == 13:
            raise OptionError("thirteen tokens")
        if step.tokens == 14:
            raise KeyError("fourteen")
        return StepTime(step.tokens / 1e3, 10, 1.0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    timed = steps.times
    monkeypatch.setattr(run, "times", lambda wanted, jobs, progress: timed(wanted, 1, progress, recorder))
    return recorder


def rows(*changes: dict[str, str]) -> tuple[Row, ...]:
    return parse(models(*(FAST | change for change in changes)), "t.csv")


def test_rows_share_what_they_have_in_common(clock: Recorder) -> None:
    found = validate(rows({}, {"decode_tok_s": ""}, {"prompt_tokens": "64"}))
    assert len(clock.seen) == len(set(clock.seen))
    assert len(found.outcomes) == 3
    assert sum(step.tokens == 128 for _, step in clock.seen) == 1
    assert [step.tokens for _, step in clock.seen] == sorted((s.tokens for _, s in clock.seen), reverse=True)


def test_the_prediction_is_the_sum_of_launches(clock: Recorder) -> None:
    (outcome,) = validate(rows({})).outcomes
    launch_ms = Target.load("rk3588").runtime(outcome.row.work.runtime).launch_us / 1e3
    assert outcome.predicted["ttft_ms"] >= 128 + launch_ms
    assert outcome.predicted["decode_tok_s"] <= 1e3 / (1 + launch_ms)


def test_what_cannot_be_compiled_is_skipped_with_the_reason(clock: Recorder) -> None:
    found = validate(rows({"prompt_tokens": "13"}, {}, {"chip": "Apple M4"}, {"prompt_tokens": "14"}))
    reasons = [(s.line, s.reason) for s in found.skipped]
    assert reasons[:2] == [(2, "thirteen tokens"), (4, "no target for the chip 'Apple M4'")]
    assert reasons[2][0] == 5
    assert "please report it: KeyError: 'fourteen'" in reasons[2][1]
    assert [o.row.line for o in found.outcomes] == [3]


def test_statistics_count_only_what_counts(clock: Recorder) -> None:
    found = validate(rows({}, {"confidence": "LOW for decode"}))
    assert {(s.kind, s.n) for s in found.summaries if s.chip == "rk3588"} == {
        ("prefill", 2), ("decode", 1), ("all times", 3),
    }  # fmt: skip
    assert len(found.pairs) == 4


class Tags(HTMLParser):
    """Every tag, and every attribute that could act."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.acting: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.acting += [name for name, _ in attrs if name.startswith("on") or name in ("src", "href")]


HOSTILE = "</title><script>alert(1)</script><img src=x onerror=alert(1)>"


def test_no_text_of_a_table_becomes_markup(clock: Recorder, tmp_path: Path) -> None:
    bad = {"notes": HOSTILE, "source": HOSTILE, "confidence": HOSTILE, "chip": f"RK3588 {HOSTILE}"}
    skipped = {"chip": HOSTILE, "model": "=cmd|' /C calc'!A0"}
    found = validate(rows(bad, bad | {"confidence": f"LOW for decode {HOSTILE}"}, skipped))
    text = page(found, {"rk3588": (HOSTILE,)})
    tags = Tags(text)
    assert not tags.tags & {"script", "img", "link", "iframe"}
    assert not tags.acting
    assert "default-src 'none'" in text
    assert tags.tags >= {"svg", "circle", "polygon", "table"}


def test_no_cell_becomes_a_formula(clock: Recorder, tmp_path: Path) -> None:
    found = validate(rows({"confidence": "=1+1", "source": "@SUM(A1)"}, {"chip": "=HYPERLINK(1)"}))
    write(tmp_path, found, {})
    for name in ("rows.csv", "skipped.csv", "summary.csv"):
        for line in csv.reader(io.StringIO((tmp_path / name).read_text(encoding="utf-8"))):
            assert not any(cell.startswith(("=", "@", "+")) for cell in line), line


def test_the_report_holds_every_row(clock: Recorder, tmp_path: Path) -> None:
    found = validate(rows({}, {"confidence": "LOW for decode"}, {"chip": "Apple M4"}))
    paths = write(tmp_path, found, {"rk3588": ("the bus is wide",)})
    assert [path.name for path in paths] == ["rows.csv", "summary.csv", "skipped.csv", "README.md", "index.html"]
    text = paths[-1].read_text(encoding="utf-8")
    assert "the bus is wide" in text
    assert "no target for the chip" in text
    assert all(line in re.sub(r"&#\d+;|&amp;", "", text) or "'" in line for line in found.targets[0].not_modelled)
    assert len(re.findall("<circle", text)) == len(found.pairs)
    assert len(list(csv.reader(io.StringIO((tmp_path / "rows.csv").read_text(encoding="utf-8"))))) == 5


def test_an_empty_table_still_makes_a_report(clock: Recorder, tmp_path: Path) -> None:
    write(tmp_path, validate(rows({"chip": "Apple M4"})), {})
    assert "No measured time was predicted" in (tmp_path / "index.html").read_text(encoding="utf-8")


def test_causes_are_read_from_the_folder(tmp_path: Path) -> None:
    assert read_causes(tmp_path) == {}
    (tmp_path / "causes.toml").write_text('[rk3588]\ncauses = ["a", "b"]\n', encoding="utf-8")
    assert read_causes(tmp_path) == {"rk3588": ("a", "b")}
    for text in ("[rk3588]\ncause = 1\n", "rk3588 = 1\n", "[[["):
        (tmp_path / "causes.toml").write_text(text, encoding="utf-8")
        with pytest.raises(MeasurementError, match=r"causes\.toml"):
            read_causes(tmp_path)


def test_a_second_run_measures_nothing(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    work = LlmWork(llama, RunOptions(weights="fp16"), 8, new_tokens=2)
    row = Measurement("t.csv", 2, "c", "systolic-128", None, llama.name, work, "", (Quantity("ttft_ms", 1.0),))
    first = validate([row], jobs=1)
    monkeypatch.setattr(ExactClock, "_measured", lambda *_: pytest.fail("measured again"))
    second = validate([row], jobs=1)
    assert first.outcomes == second.outcomes
    assert first.outcomes[0].predicted["ttft_ms"] > 0


def test_two_processes_say_what_one_says(llama: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    work = LlmWork(llama, RunOptions(weights="fp16"), 8, new_tokens=2)
    row = Measurement("t.csv", 2, "c", "systolic-128", None, llama.name, work, "", (Quantity("ttft_ms", 1.0),))
    alone = validate([row], jobs=1)
    monkeypatch.setenv("FIRSTTOKEN_CACHE", str(tmp_path / "other"))
    assert validate([row], jobs=2).outcomes == alone.outcomes


def test_the_verb(clock: Recorder, tmp_path: Path) -> None:
    one, two = tmp_path / "one.csv", tmp_path / "two.csv"
    one.write_bytes(models(FAST))
    two.write_bytes(models(FAST | {"chip": "RK3576"}, FAST | {"chip": "Apple M4"}))
    out = tmp_path / "out"
    shown = CliRunner().invoke(app, ["validate", "--measurements", str(one), str(two), "-o", str(out), "--json"])
    assert shown.exit_code == 0, shown.output
    document = json.loads(shown.output)
    assert document["files"] == ["one.csv", "two.csv"]
    assert {row["target"] for row in document["rows"]} == {"rk3588", "rk3576"}
    assert [s["line"] for s in document["skipped"]] == [3]
    assert (out / "index.html").is_file()
    shown = CliRunner().invoke(app, ["validate", "--measurements", str(two), "-o", str(out), "--target", "rk3576"])
    assert shown.exit_code == 0, shown.output
    assert "MAPE" in shown.output
    assert "does not model" in shown.output


def test_the_verb_refuses_a_target_without_rows(clock: Recorder, tmp_path: Path) -> None:
    table = tmp_path / "one.csv"
    table.write_bytes(models(FAST))
    with pytest.raises(OptionError, match="rows are of rk3588"):
        CliRunner().invoke(
            app, ["validate", "--measurements", str(table), "--target", "tpu-v4", "-o", str(tmp_path)],
            catch_exceptions=False,
        )  # fmt: skip


def test_skipped_rows_are_rows(clock: Recorder) -> None:
    assert all(isinstance(row, Skipped) for row in rows({"chip": "Apple M4"}))
