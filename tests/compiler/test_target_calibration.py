"""The tables `[[calibration]]` and `[fit]` of a target file."""

from importlib import resources

import pytest

from firsttoken_compiler.errors import TargetError
from firsttoken_compiler.target.calibration import Fit, Tunable
from firsttoken_compiler.target.load import parse_target


@pytest.fixture(scope="module")
def text() -> str:
    return (resources.files("firsttoken_compiler.target") / "presets" / "systolic-128.toml").read_text("utf-8")


def entry(path: str = '"vector.cycles.exp"', low: str = "1.0", high: str = "64.0", why: str = '"a reason"') -> str:
    return f"\n[[calibration]]\npath = {path}\nlow = {low}\nhigh = {high}\nwhy = {why}\n"


FIT = """
[fit]
measurements = ["rows.csv"]
rows = 3
models = ["a", "b"]
mape_pct = 4.5
"""


def test_the_tables_are_read_and_change_no_hash(text: str) -> None:
    plain = parse_target(text.encode(), "x")
    more = entry('["matrix.macs_per_cycle.int8xint8", "matrix.macs_per_cycle.int8xint4"]', "64", "16384")
    target = parse_target((text + entry() + more + FIT).encode(), "x")
    assert target.calibration[0] == Tunable(("vector.cycles.exp",), 1.0, 64.0, "a reason")
    assert target.calibration[1].paths == ("matrix.macs_per_cycle.int8xint8", "matrix.macs_per_cycle.int8xint4")
    assert target.fit == Fit(("rows.csv",), 3, ("a", "b"), 4.5)
    assert target.content_hash == plain.content_hash
    assert plain.calibration == ()
    assert plain.fit is None


def test_a_star_stands_for_the_whole_table_in_the_order_of_the_file(text: str) -> None:
    target = parse_target((text + entry('"vector.cycles.*"')).encode(), "x")
    assert target.calibration[0].paths == tuple(p for p in target.provenance if p.startswith("vector.cycles."))
    assert target.calibration[0].name == "vector.cycles.add (+6)"


@pytest.mark.parametrize(
    ("addition", "message"),
    [
        (entry('"vector.cycles.exq"'), "no value has the path 'vector.cycles.exq'; nearest: vector.cycles.exp"),
        (entry('"vectors.*"'), "no value has the path 'vectors.*'"),
        (entry('"dram.standard"'), "only numbers can be fitted"),
        (entry('"matrix.double_buffered"'), "only numbers can be fitted"),
        (entry('"matrix.fill_cycles"', "1", "2"), "only values above 0 can be fitted"),
        (entry("7"), "must be a dotted path or a list of them"),
        (entry(low="64.0", high="1.0"), "must be 0 < low < high"),
        (entry(low="0.0"), "must be 0 < low < high"),
        (entry(low="63.0"), "must lie within its bounds 63 to 64"),
        (entry(low='"1"'), "low is '1', must be a finite number"),
        (entry(why='""'), "must be a line that says what the bounds are physically"),
        (entry() + entry(), "calibration names vector.cycles.exp twice"),
        (entry() + "unit = 1\n", "unknown key 'unit'; keys are path, low, high, why"),
        (entry().replace("why", "whY"), "unknown key 'whY'"),
        ("\n[[calibration]]\nlow = 1.0\nhigh = 2.0\nwhy = 'x'\n", "calibration 1: missing key path"),
        ("\n[calibration]\nlow = 1.0\n", "must be at most 32 tables"),
        (FIT + "date = 'x'\n", "fit: unknown key 'date'"),
        (FIT.replace("rows = 3", "rows = -3"), "fit: rows is -3, must be a number of at least 0"),
        (FIT.replace("rows = 3\n", ""), "fit: missing key rows"),
        (FIT.replace('["a", "b"]', "3"), "fit: models is 3, must be a list of names"),
    ],
)
def test_what_is_wrong_is_named(text: str, addition: str, message: str) -> None:
    with pytest.raises(TargetError) as caught:
        parse_target((text + addition).encode(), "mine.toml")
    assert message in str(caught.value)
    assert "mine.toml" in str(caught.value)
