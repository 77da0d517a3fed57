"""Why errors of a machine are large, written by hand: `causes.toml` in the folder of the report.

It has a table for each target: `[snapdragon-x-elite]`, then `causes = ["line", ...]`.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Final

from firsttoken.validation.table import MeasurementError

FILE: Final = "causes.toml"
MAX_BYTES: Final = 1 << 20


def read_causes(folder: Path) -> dict[str, tuple[str, ...]]:
    """Lines by the target's name; nothing where there is no file. Raises MeasurementError."""
    path = folder / FILE
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > MAX_BYTES:
            raise MeasurementError(f"{path}: {path.stat().st_size} bytes, the limit is {MAX_BYTES}")
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise MeasurementError(f"{path}: cannot be read as TOML: {error}") from error
    found = {}
    for name, table in document.items():
        lines = table.get("causes") if isinstance(table, dict) else None
        if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines) or len(table) != 1:
            raise MeasurementError(f"{path}: {name} must be a table with causes = [lines]")
        found[name] = tuple(lines)
    return found
