"""What was measured: rows of a table as works with quantities, or the reason why a row is not run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from firsttoken.validation.table import MeasurementError, Table, parse_table, read_table

if TYPE_CHECKING:
    from firsttoken_compiler.target.target import Target

KINDS: Final = {
    "ttft_ms": "prefill", "prefill_tok_s": "prefill", "decode_tok_s": "decode", "inference_ms": "inference",
    "time_us": "kernel", "power_w": "power", "energy_mj": "energy",
}  # fmt: skip
"""Quantities by their names, and the kind that statistics put each in."""
UNITS: Final = {
    "ttft_ms": "ms", "prefill_tok_s": "tokens/s", "decode_tok_s": "tokens/s", "inference_ms": "ms", "time_us": "us",
    "power_w": "W", "energy_mj": "mJ",
}  # fmt: skip
TIMES: Final = ("prefill", "decode", "inference", "kernel")
"""Kinds that a target's times are judged, and fitted, by."""


@dataclass(frozen=True, slots=True)
class Quantity:
    """One measured value.

    Attributes:
        name: a key of `KINDS`.
        value: in the unit of `UNITS`.
        bound: "<" where the value is only an upper bound, else empty.
        apart: why it is shown apart and counts in no statistic, else empty.
    """

    name: str
    value: float
    bound: str = ""
    apart: str = ""

    @property
    def kind(self) -> str:
        """What statistics put it under."""
        return KINDS[self.name]

    @property
    def counted(self) -> bool:
        """Whether statistics count it."""
        return not self.apart and not self.bound


@dataclass(frozen=True)
class Measurement:
    """One row that can be run.

    Attributes:
        file: name of the file.
        line: line of the file.
        chip: as the table calls it.
        target: name of the preset.
        variant: the preset in another size, else None.
        model: student or operator; rows of one model are left out together.
        work: what `latency` runs.
        setting: the row in words: lengths, number formats, runtime.
        quantities: what was measured.
        source: where the table has it from.
        confidence: the table's own words.
        assumed: what the row leaves open, and what was taken for it.
    """

    file: str
    line: int
    chip: str
    target: str
    variant: Target | None
    model: str
    work: Any
    setting: str
    quantities: tuple[Quantity, ...]
    source: str = ""
    confidence: str = ""
    assumed: tuple[str, ...] = ()

    @property
    def counted(self) -> dict[str, float]:
        """The times that are independent, reliable and no bounds, by name: what a fit may use."""
        return {q.name: q.value for q in self.quantities if q.counted and q.kind in TIMES}

    @property
    def machine(self) -> str | Target:
        """What `firsttoken.api.target_of` takes."""
        return self.variant if self.variant is not None else self.target


@dataclass(frozen=True, slots=True)
class Skipped:
    """One row that is not run, and why."""

    file: str
    line: int
    chip: str
    model: str
    reason: str


Row = Measurement | Skipped


def read(path: Path) -> tuple[Row, ...]:
    """Every row of a table of measurements, each run or skipped; raises MeasurementError for a malformed one."""
    return rows_of(read_table(path))


def parse(data: bytes, file: str) -> tuple[Row, ...]:
    """The same for the bytes of a table; `file` names it."""
    return rows_of(parse_table(data, file))


def rows_of(table: Table) -> tuple[Row, ...]:
    """The rows of a table; raises MeasurementError."""
    from firsttoken.validation import kernel_rows, model_rows

    if table.form == "models":
        return tuple(model_rows.row_of(line) for line in table.lines)
    readers = {"cycles": kernel_rows.cycles, "products": kernel_rows.product, "operators": kernel_rows.operator}
    found = [readers[table.form](line) for line in table.lines]
    return kernel_rows.slower_apart(found) if table.form == "operators" else tuple(found)


__all__ = ["KINDS", "TIMES", "UNITS", "Measurement", "MeasurementError", "Quantity", "Row", "Skipped", "parse", "read"]
