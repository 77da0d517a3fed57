"""The figures that the project holds itself: published times and power with where they stand, as rows of a table."""

from __future__ import annotations

import tomllib
from importlib import resources
from typing import Any, Final

from firsttoken.validation.measurements import Row, rows_of
from firsttoken.validation.table import Line, Table

FILE: Final = "published.toml"


def published() -> tuple[Row, ...]:
    """Every published figure, run or skipped, in the order of the file."""
    text = resources.files("firsttoken.validation").joinpath(FILE).read_text(encoding="utf-8")
    found: list[Row] = []
    number = 0
    for group in tomllib.loads(text)["published"]:
        table = _table(group, number)
        number += len(table.lines)
        found += rows_of(table)
    return tuple(found)


def _table(group: dict[str, Any], before: int) -> Table:
    """A group as the rows of a table; what it says once is a cell of each. Rows are numbered through the file."""
    columns = group["columns"]
    common = {key: value for key, value in group.items() if key not in ("columns", "rows", "form")}
    lines = tuple(
        Line(FILE, before + at, common | {name: str(cell) for name, cell in zip(columns, row, strict=True)})
        for at, row in enumerate(group["rows"], 1)
    )
    return Table(FILE, group.get("form", "models"), lines)
