"""Reading a table of measurements: a CSV file whose header says which of the known forms it has.

The file is not trusted: its size, its number of rows, their fields and the length of each are limited, and whatever is
wrong is one `MeasurementError` that names file, line, column, value, and what is expected.
"""

from __future__ import annotations

import csv
import io
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from firsttoken_compiler.errors import FirsttokenError

MAX_FILE_BYTES: Final = 8 << 20
MAX_ROWS: Final = 20_000
MAX_CELL: Final = 4_000
"""Characters of a field."""

FORMS: Final[dict[str, tuple[str, ...]]] = {
    "models": (
        "chip", "model", "params", "weight_bits", "act_bits", "prompt_tokens", "context", "ttft_ms", "prefill_tok_s",
        "decode_tok_s", "power_w", "energy", "source", "confidence", "notes",
    ),
    "cycles": ("workload", "tpu_v3_measured_cycles", "source"),
    "products": ("chip", "op", "m", "n", "k", "dtype", "time_us", "source"),
    "operators": ("chip", "op", "shape", "time_us"),
}  # fmt: skip
"""Columns that each form needs, by its name; further ones are kept and not read."""
OPTIONAL: Final = {"models": ("params", "prefill_tok_s", "power_w", "energy", "source", "confidence", "notes"),
                   "cycles": ("source",), "products": ("source",), "operators": ()}  # fmt: skip
"""Those of them that may be missing."""
_NUMBER: Final = r"\d{1,12}(?:\.\d{1,20})?(?:[eE][+-]?\d{1,2})?"
_READING: Final = re.compile(
    rf"(?P<sign>~|<=?)? ?(?P<value>{_NUMBER})(?: ?[-\u2013] ?(?P<second>{_NUMBER})| ?± ?{_NUMBER})?(?: ?\(.*\))?",
    re.ASCII,
)
_SUSTAINED: Final = re.compile(
    rf"{_NUMBER} ?peak ?/ ?(?P<value>{_NUMBER}) ?(?:plateau|sustained|average|avg|mean)", re.ASCII
)


class MeasurementError(FirsttokenError):
    """A table of measurements cannot be read; the message names file, line, column, value and what is expected."""


@dataclass(frozen=True, slots=True)
class Line:
    """One row.

    Attributes:
        file: name of the file, as messages and reports call it.
        number: line of the file that the row begins on, from 1.
        cells: fields by the names of their columns, stripped.
    """

    file: str
    number: int
    cells: dict[str, str]

    def text(self, column: str) -> str:
        """The field of a column; empty where the file has none."""
        return self.cells.get(column, "")

    def error(self, column: str, expected: str) -> MeasurementError:
        """The error for a field that is not what is expected."""
        return MeasurementError(
            f"{self.file}, line {self.number}, column {column}: {self.text(column)!r:.120} is not {expected}"
        )

    def reading(self, column: str) -> tuple[float, str] | None:
        """(value, "<" where it is only an upper bound, else "") of a field, or None for an empty one.

        Takes 12.5, ~12.5, <12.5, 11-14 or 11±1 by its middle, and "12 peak / 10 plateau" by the plateau, with a remark
        in brackets after it or not; raises MeasurementError for anything else.
        """
        text = self.text(column)
        if not text:
            return None
        sustained = _SUSTAINED.fullmatch(text.casefold())
        if sustained is not None:
            text = sustained["value"]
        found = _READING.fullmatch(text)
        value = math.nan
        if found is not None:
            first, second = float(found["value"]), found["second"]
            value = (first + float(second)) / 2 if second else first
        if found is None or not math.isfinite(value) or value <= 0:
            raise self.error(column, "a number above 0 such as 12.5, ~12.5, <12.5 or 11-14, nor empty")
        return value, "<" if (found["sign"] or "").startswith("<") else ""

    def whole(self, column: str) -> int:
        """A whole number of at least 1; raises MeasurementError."""
        text = self.text(column)
        if not text.isascii() or not text.isdigit() or not 1 <= len(text) <= 9 or int(text) < 1:
            raise self.error(column, "a whole number of at least 1")
        return int(text)


@dataclass(frozen=True, slots=True)
class Table:
    """A file: its form, one of `FORMS`, and its rows."""

    file: str
    form: str
    lines: tuple[Line, ...]


def read_table(path: Path) -> Table:
    """The table in a file; raises MeasurementError."""
    try:
        if not path.is_file():
            raise MeasurementError(f"{path}: no such file of measurements; give a CSV file")
        if (size := path.stat().st_size) > MAX_FILE_BYTES:
            raise MeasurementError(f"{path}: {size} bytes, the limit is {MAX_FILE_BYTES}; split the file")
        return parse_table(path.read_bytes(), path.name)
    except OSError as error:
        raise MeasurementError(f"{path}: cannot be read: {error.strerror or error}") from error


def parse_table(data: bytes, file: str) -> Table:
    """The table in the bytes of a CSV file; `file` names it in messages. Raises MeasurementError."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise MeasurementError(f"{file}: byte {error.start} is not UTF-8; save the table as UTF-8") from error
    if "\0" in text:
        raise MeasurementError(f"{file}: it holds a character NUL, so it is no CSV file")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [_column(name) for name in next(reader, [])]
        form = form_of(header, file)
        lines, begins = [], reader.line_num + 1
        for cells in reader:
            if any(cell.strip() for cell in cells):
                lines.append(_line(file, begins, header, cells))
            if len(lines) > MAX_ROWS:
                raise MeasurementError(f"{file}, line {begins}: more than {MAX_ROWS} rows; split the file")
            begins = reader.line_num + 1
    except csv.Error as error:
        raise MeasurementError(f"{file}, line {reader.line_num}: not CSV: {error}") from error
    return Table(file, form, tuple(lines))


def form_of(header: list[str], file: str) -> str:
    """The form whose columns a header has; raises MeasurementError naming the columns of the nearest one."""
    repeated = next((name for name in header if name and header.count(name) > 1), None)
    if repeated is not None:
        raise MeasurementError(f"{file}, line 1: column {repeated!r:.80} stands there twice; keep one")
    for form, columns in FORMS.items():
        if all(name in header for name in columns if name not in OPTIONAL[form]):
            return form
    nearest = max(FORMS, key=lambda form: sum(name in header for name in FORMS[form]) / len(FORMS[form]))
    missing = [name for name in FORMS[nearest] if name not in header and name not in OPTIONAL[nearest]]
    raise MeasurementError(
        f"{file}, line 1: the header {','.join(header)!r:.160} is of no known form; the nearest one, of {nearest}, "
        f"lacks {', '.join(missing)}"
    )


def _column(name: str) -> str:
    """A column's name without what is explained in it: "shape(MxKxN)" is `shape`, "M" is `m`."""
    return re.sub(r"\(.*\)", "", name).strip().lower()[:80]


def _line(file: str, number: int, header: list[str], cells: list[str]) -> Line:
    if len(cells) != len(header):
        raise MeasurementError(
            f"{file}, line {number}: {len(cells)} fields, the header has {len(header)}; "
            "quote fields that hold commas"
        )
    for name, cell in zip(header, cells, strict=True):
        if len(cell) > MAX_CELL:
            raise MeasurementError(
                f"{file}, line {number}, column {name}: {len(cell)} characters, the limit is {MAX_CELL}"
            )
    return Line(file, number, {name: cell.strip() for name, cell in zip(header, cells, strict=True)})
