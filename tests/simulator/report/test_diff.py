import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firsttoken_simulator.report.diff import Change, Condition, compare, differing_inputs, load_run, op_changes
from firsttoken_simulator.report.errors import ReportError

OLD = {
    "schema_version": 1, "student": "s", "weights": "int4", "seed": 1,
    "ttft_ms": 100.0, "energy_mj": 50.0, "tpot_ms": None,
    "dram_bytes_by_kind": {"kv": 0}, "ops": [{"op": "a", "cycles": 10}, {"op": "b", "cycles": 5}],
}  # fmt: skip
NEW = OLD | {"ttft_ms": 102.0, "weights": "int8", "dram_bytes_by_kind": {"kv": 7}, "ops": [{"op": "a", "cycles": 40}]}


@pytest.mark.parametrize(
    ("text", "fails"),
    [
        ("ttft_ms>+1%", True),
        ("ttft_ms > +2 %", False),
        ("ttft_ms>=+2%", True),
        ("ttft_ms>+1.9", True),
        ("ttft_ms>+2.1", False),
        ("ttft_ms>101", True),
        ("ttft_ms<101", False),
        ("ttft_ms<-1%", False),
        ("energy_mj>+0%", False),
        ("energy_mj<=+0%", True),
        ("dram_bytes_by_kind.kv>+1e6%", True),
    ],
)
def test_conditions(text: str, fails: bool) -> None:
    assert Condition.parse(text).fails(compare(OLD, NEW)) is fails


@pytest.mark.parametrize("text", ["", "ttft_ms", "ttft_ms>", "ttft_ms=1", "ttft_ms>+x%", "1>2", "a>b", "ttft_ms>+1%%"])
def test_a_condition_that_cannot_be_read(text: str) -> None:
    with pytest.raises(ReportError, match=r"cannot read the condition .* expected METRIC"):
        Condition.parse(text)


def test_other_mistakes_in_conditions() -> None:
    with pytest.raises(ReportError, match=r"needs a sign, e.g. 'ttft_ms>\+1%'"):
        Condition.parse("ttft_ms>1%")
    with pytest.raises(ReportError, match="too large"):
        Condition.parse("ttft_ms>1e999")
    with pytest.raises(ReportError, match=r"no metric 'ttft' in both runs; nearest: ttft_ms"):
        Condition.parse("ttft>+1%").fails(compare(OLD, NEW))
    with pytest.raises(ReportError, match="no metric 'tpot_ms'"):
        Condition.parse("tpot_ms>+1%").fails(compare(OLD, NEW))


@given(st.text(max_size=40))
def test_any_text_is_a_condition_or_one_message(text: str) -> None:
    with contextlib.suppress(ReportError):
        assert Condition.parse(text).text == text.strip()


@given(st.floats(0, 1e9), st.floats(0, 1e9))
def test_change(old: float, new: float) -> None:
    row = Change("m", old, new)
    assert row.change == new - old
    assert (row.percent > 0) == (row.change > 0) or abs(row.change) < 1e-300


def test_changes_of_operators_and_inputs() -> None:
    assert [(row.metric, row.change) for row in op_changes(OLD, NEW)] == [("a", 30.0), ("b", -5.0)]
    assert differing_inputs(OLD, NEW) == ["weights: int4 -> int8"]


def test_load(tmp_path) -> None:
    (tmp_path / "run.json").write_text(json.dumps(OLD))
    assert load_run(tmp_path) == load_run(tmp_path / "run.json") == OLD
    with pytest.raises(ReportError, match="no such run"):
        load_run(tmp_path / "absent.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ReportError, match="is not JSON"):
        load_run(tmp_path / "bad.json")
    (tmp_path / "other.json").write_text('{"schema_version": 99}')
    with pytest.raises(ReportError, match="schema version 99, this release reads 1"):
        load_run(tmp_path / "other.json")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ReportError, match="schema version None"):
        load_run(tmp_path / "list.json")
