"""Reading untrusted tables: forms by their headers, readings of fields, limits, and what each error says."""

import re
from pathlib import Path

import pytest
from measurement_tables import MODEL, models, table

from firsttoken.validation import table as module
from firsttoken.validation.table import FORMS, Line, MeasurementError, parse_table, read_table


def line(text: str) -> Line:
    return Line("t.csv", 7, {"x": text})


@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_known_by_its_header_in_any_order(form: str) -> None:
    columns = [name.upper() for name in reversed(FORMS[form])]
    assert parse_table(table(columns, dict.fromkeys(columns, "1")), "t.csv").form == form


def test_what_a_header_explains_in_brackets_and_further_columns_do_not_matter() -> None:
    found = parse_table(b"chip,op,shape(MxKxN),time_us,colour\nRK3588,MatMul,2x2x2,1.5,red\n", "t.csv")
    assert (found.form, found.lines[0].text("shape"), found.lines[0].text("colour")) == ("operators", "2x2x2", "red")


def test_an_unknown_header_names_what_the_nearest_form_lacks() -> None:
    with pytest.raises(MeasurementError, match=r"t.csv, line 1: .* of no known form.*operators, lacks shape"):
        parse_table(b"chip,op,time_us\n", "t.csv")
    with pytest.raises(MeasurementError, match="column 'chip' stands there twice"):
        parse_table(b"chip,op,shape,time_us,chip\n", "t.csv")
    with pytest.raises(MeasurementError, match="no known form"):
        parse_table(b"", "t.csv")


def test_a_row_knows_its_line_behind_quoted_line_breaks_and_empty_lines() -> None:
    data = models(MODEL | {"notes": "two\nlines"}, {}) + b"\n"
    assert [found.number for found in parse_table(data, "t.csv").lines] == [2, 4]


@pytest.mark.parametrize(
    ("text", "value", "bound"),
    [
        ("12.5", 12.5, ""), ("~12", 12.0, ""), ("<5", 5.0, "<"), ("<= 5", 5.0, "<"), ("1065\u20131116", 1090.5, ""),
        ("11-14", 12.5, ""), ("1.5e3", 1500.0, ""), ("12.21 peak / 10.38 plateau", 10.38, ""), ("7 (derived)", 7.0, ""),
    ],
)  # fmt: skip
def test_readings(text: str, value: float, bound: str) -> None:
    assert line(text).reading("x") == (value, bound)


def test_an_empty_field_is_no_reading() -> None:
    assert line("").reading("x") is None
    assert line("").reading("absent") is None


@pytest.mark.parametrize("text", ["fast", "0", "-3", "nan", "inf", "1e999", "=1+1", "1,5", "1 2", "١٢", "9" * 400])
def test_anything_else_names_file_line_column_and_value(text: str) -> None:
    with pytest.raises(MeasurementError, match=r"t.csv, line 7, column x: .* is not a number above 0") as error:
        line(text).reading("x")
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("text", ["", "0", "1.5", "-1", "x", "9" * 20])
def test_whole_numbers(text: str) -> None:
    assert line("12").whole("x") == 12
    with pytest.raises(MeasurementError, match="a whole number of at least 1"):
        line(text).whole("x")


def test_limits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "MAX_ROWS", 2)
    with pytest.raises(MeasurementError, match="line 4: more than 2 rows"):
        parse_table(models({}, {}, {}), "t.csv")
    with pytest.raises(MeasurementError, match=r"column notes: 4001 characters, the limit is 4000"):
        parse_table(models({"notes": "x" * 4001}), "t.csv")
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 10)
    (tmp_path / "t.csv").write_bytes(models({}))
    with pytest.raises(MeasurementError, match=r"t.csv: \d+ bytes, the limit is 10"):
        read_table(tmp_path / "t.csv")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"\xff\xfe", "not UTF-8"),
        (b"chip,op,shape,time_us\na,b\n", "line 2: 2 fields, the header has 4"),
        (b'chip,op,shape,time_us\n"a,b,c,d\n', "not CSV"),
        (b"chip,op,shape,time_us\n\0,b,c,d\n", "NUL"),
    ],
)
def test_what_is_no_table(data: bytes, says: str) -> None:
    with pytest.raises(MeasurementError, match=re.escape(says)):
        parse_table(data, "t.csv")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MeasurementError, match="no such file of measurements"):
        read_table(tmp_path / "none.csv")
