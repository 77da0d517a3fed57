"""Files of activation ranges: written, read, and refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firsttoken.act_ranges import MAX_FILE_BYTES, ActRanges, parse_ranges, ranges_of
from firsttoken_compiler.errors import OptionError

GOOD = {
    "format": "firsttoken-ranges", "version": 1, "student": "tiny", "method": "minmax", "samples": 3,
    "ranges": {"/a": [-1.5, 2.0], "/b": [-4, 0.5]},
}  # fmt: skip
NUMBERS = st.floats(-1e30, 1e30)


def written(folder: Path, **changes: Any) -> Path:
    path = folder / "ranges.json"
    path.write_text(json.dumps({**GOOD, **changes}))
    return path


@given(st.dictionaries(st.text(min_size=1), st.tuples(NUMBERS, NUMBERS).map(sorted).map(tuple), min_size=1))
def test_what_is_written_is_read(ranges: dict[str, tuple[float, float]]) -> None:
    made = ActRanges("tiny", "entropy", 2, ranges)
    assert parse_ranges(made.to_json().encode(), "file") == made


def test_options_hold_the_largest_magnitudes(tmp_path: Path) -> None:
    assert ranges_of(str(written(tmp_path))) == (("/a", 2.0), ("/b", 4.0))
    assert ranges_of("dynamic") == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranges": {"/a": [2.0, -1.5]}}, "'/a': the range 2.0 to -1.5 ends below its start"),
        ({"ranges": {"/a": [0.0, float("nan")]}}, "ranges./a.1: Input should be a finite number"),
        ({"ranges": {"/a": [-float("inf"), 0.0]}}, "ranges./a.0: Input should be a finite number"),
        ({"ranges": {"/a": [0.0]}}, "ranges./a.1: Field required"),
        ({"ranges": {"/a": ["0", 1.0]}}, "ranges./a.0: Input should be a valid number"),
        ({"ranges": {}}, "ranges: Dictionary should have at least 1 item"),
        ({"version": 2}, "version: Input should be 1"),
        ({"format": "other"}, "format: Input should be 'firsttoken-ranges'"),
        ({"method": "guess"}, "method: Input should be 'minmax', 'entropy', 'percentile' or 'declared'"),
        ({"samples": -1}, "samples: Input should be greater than or equal to 0"),
        ({"samples": 0}, "0 samples and the method minmax: ranges that are declared have none, others at least 1"),
        ({"method": "declared"}, "3 samples and the method declared: ranges that are declared have none"),
        ({"more": 1}, "more: Extra inputs are not permitted"),
    ],
)
def test_what_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = written(tmp_path, **changes)
    with pytest.raises(OptionError) as raised:
        ranges_of(str(path))
    assert message in str(raised.value)
    assert str(path) in str(raised.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no such file; write one with 'firsttoken ranges'"):
        ranges_of(str(tmp_path / "absent.json"))
    path = tmp_path / "noise.json"
    path.write_bytes(b"\xff\x00{")
    with pytest.raises(OptionError, match="document: Invalid JSON"):
        ranges_of(str(path))
    with path.open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(OptionError, match=f"{MAX_FILE_BYTES + 1} bytes, the limit is {MAX_FILE_BYTES}"):
        ranges_of(str(path))
    path.write_text('{"ranges":' * 100_000)
    with pytest.raises(OptionError, match=r"noise\.json"):
        ranges_of(str(path))
