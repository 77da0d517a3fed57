import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from page_tags import Tags

from firsttoken_simulator.energy import energy
from firsttoken_simulator.report.build import build_run
from firsttoken_simulator.report.errors import ReportError
from firsttoken_simulator.report.steps import NAMES
from firsttoken_simulator.report.waterfall import REST, Contribution, document, largest, waterfalls
from firsttoken_simulator.report.waterfall_page import CHART, LABEL, bars, page

COUNTS = st.integers(1, 120)


def made(make_case, count: int, seed: int, decode: bool = False, **options: Any) -> dict[str, Any]:
    case = make_case(count, seed, **options)
    step = make_case(40, seed + 1) if decode else None
    run = build_run(*case, energy(*case), decode=None if step is None else (*step[:2], energy(*step)))
    return dict(json.loads(run.to_json()))


@settings(max_examples=20, deadline=None)
@given(counts=st.tuples(COUNTS, COUNTS), seeds=st.tuples(st.integers(0, 999), st.integers(0, 999)), hosts=st.booleans())
def test_both_lists_sum_to_the_difference(make_case, counts, seeds, hosts: bool) -> None:
    old, new = made(make_case, counts[0], seeds[0], hosts=hosts), made(make_case, counts[1], seeds[1])
    (fall,), why = waterfalls(old, new)
    assert (fall.what, why) == ("ttft", "")
    assert fall.old_fs / 1e12 == pytest.approx(old["ttft_ms"], rel=1e-12)
    assert fall.new_fs / 1e12 == pytest.approx(new["ttft_ms"], rel=1e-12)
    for rows in (fall.by_step, fall.by_class):
        assert sum(row.old_fs for row in rows) == fall.old_fs
        assert sum(row.change_fs for row in rows) == fall.change_fs == fall.new_fs - fall.old_fs
        for most in (0, 3, 100):
            assert sum(row.change_fs for row in largest(rows, most, 0.01 * fall.new_fs)) == fall.change_fs
    assert tuple(row.name for row in fall.by_step) == NAMES
    changes = [abs(row.change_fs) for row in fall.by_class]
    assert changes == sorted(changes, reverse=True)
    back, _ = waterfalls(new, old)
    assert {row.name: row.change_fs for row in back[0].by_class} == {r.name: -r.change_fs for r in fall.by_class}


def test_the_same_run_has_no_changes(make_case) -> None:
    run = made(make_case, 100, 3, decode=True)
    falls, _ = waterfalls(run, run)
    assert [fall.what for fall in falls] == ["ttft", "tpot"]
    for fall in falls:
        assert largest(fall.by_step, 100) == largest(fall.by_class, 100) == []
        assert fall.change_fs == 0


def test_layers_join_and_the_rest_is_one_row() -> None:
    rows = [Contribution("a", 5, 9), Contribution("b", 7, 7), Contribution("c", 3, 0), Contribution("d", 1, 3)]
    assert largest(rows, 1) == [rows[0], Contribution(REST, 4, 3)]
    assert largest(rows, 9) == [rows[0], rows[2], rows[3]]
    assert largest(rows, 9, least_fs=3) == [rows[0], rows[2], Contribution(REST, 1, 3)]


def test_classes_are_patterns_with_the_dispatch(make_case) -> None:
    run = made(make_case, 160, 1)
    fall = waterfalls(run, run)[0][0]
    names = {row.name for row in fall.by_class}
    assert {"layers.*.up", "layers.*.down", "dispatch"} <= names
    assert not any("layers.1" in name for name in names)
    whole = document(fall)
    assert sum(row["change_fs"] for row in whole["by_step"]) == whole["change_fs"] == 0
    assert {row["class"] for row in whole["by_class"]} == names


def test_runs_without_ladders_say_so(make_case) -> None:
    run = made(make_case, 50, 1)
    old = {key: value for key, value in run.items() if key != "steps"}
    assert waterfalls(old, run) == ([], "the old run has no ladder ('steps' is missing): make it again with "
                                        "'firsttoken run -o'")  # fmt: skip
    assert waterfalls(run, old)[1].startswith("the new run has no ladder")
    half = made(make_case, 50, 1, decode=True)
    half["decode"]["steps"] = None
    assert [fall.what for fall in waterfalls(half, half)[0]] == ["ttft"]
    with pytest.raises(ReportError, match=r"not a run document of schema version 1: steps.names"):
        waterfalls(run, {**run, "steps": {}})
    with pytest.raises(ReportError, match=r"steps.holders is not dma"):
        waterfalls(run, {**run, "steps": {**run["steps"], "holders": ["x"]}})


def test_bars_hang_together(make_case) -> None:
    old, new = made(make_case, 100, 3), made(make_case, 60, 4)
    fall = waterfalls(old, new)[0][0]
    for rows in (fall.by_step, fall.by_class):
        drawn = bars(fall, largest(rows, 100))
        assert [drawn[0].label, drawn[-1].label] == ["old", "new"]
        for before, after in pairwise(drawn[:-1]):
            edges = (after.x, after.x + after.width)
            assert min(abs(before.end - edge) for edge in edges) <= 0.51
        assert drawn[-2].end == pytest.approx(drawn[-1].x + drawn[-1].width, abs=0.51)
        assert all(bar.x >= LABEL and bar.x + bar.width <= LABEL + CHART + 0.51 for bar in drawn)
        assert [bar.y for bar in drawn] == sorted({bar.y for bar in drawn})


def test_the_page_escapes_names_and_fetches_nothing(make_case, hostile: str) -> None:
    old, new = made(make_case, 100, 3, decode=True), made(make_case, 60, 4, decode=True)
    assert any(row["op"] == hostile for row in old["ops"])
    text = page(old, new, [f"student: {hostile} -> b"], waterfalls(old, new)[0])
    parsed = Tags()
    parsed.feed(text)
    assert not parsed.tags & {"script", "img", "iframe", "link", "object", "a", "form"}
    assert not any(name.startswith("on") or name in ("src", "href") for name in parsed.attributes)
    assert text.count("<svg") == 4
    assert "\x1b" not in text
    assert "&lt;script&gt;" in text
    assert text == page(old, new, [f"student: {hostile} -> b"], waterfalls(old, new)[0])
    assert "no ladders to compare" in page(old, new, [], [])
