"""The report's files: a self-contained page with plots and tables, and the same tables as CSV."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from firsttoken.validation.measurements import UNITS

if TYPE_CHECKING:
    from firsttoken.validation.run import Outcome, Validation
    from firsttoken.validation.statistics import Summary
    from firsttoken_compiler.target.target import Target

ROW_COLUMNS: Final = (
    "file", "line", "chip", "target", "model", "setting", "quantity", "unit", "measured", "bound", "predicted",
    "predicted_low", "predicted_high", "verdict", "error_pct", "counted", "why_apart", "confidence", "assumed",
    "source",
)  # fmt: skip
SUMMARY_COLUMNS: Final = (
    "chip", "kind", "n", "mape_pct", "median_pct", "mean_pct", "worst_pct", "within_10_pct", "within_20_pct",
    "rank_correlation", "leave_one_model_out_mape_pct",
)  # fmt: skip
FILES: Final = ("rows.csv", "summary.csv", "skipped.csv", "README.md", "index.html")


@dataclass(frozen=True)
class ChipNotes:
    """What a reader must know of one target.

    Attributes:
        name: of the target.
        description: its own line.
        fitted: values that were fitted, each with its source.
        fit: what they were fitted to, or an empty line.
        grades: how many values have which grade.
        not_modelled: what the target leaves out.
        causes: why some errors are large, written by hand.
    """

    name: str
    description: str
    fitted: tuple[tuple[str, str, str], ...]
    fit: str
    grades: tuple[tuple[str, int], ...]
    not_modelled: tuple[str, ...]
    causes: tuple[str, ...]


def write(folder: Path, validation: Validation, causes: dict[str, tuple[str, ...]]) -> list[Path]:
    """Writes the files, the page last; raises ReportError where the folder cannot be written."""
    from firsttoken.validation.summary_page import summary_page
    from firsttoken_simulator.report.folder import write_file

    files = {
        "rows.csv": csv_text(ROW_COLUMNS, row_cells(validation)),
        "summary.csv": csv_text(SUMMARY_COLUMNS, [summary_cells(s) for s in validation.summaries]),
        "skipped.csv": csv_text(
            ("file", "line", "chip", "model", "reason"),
            [[s.file, s.line, s.chip, s.model, s.reason] for s in validation.skipped],
        ),
        "README.md": summary_page(validation, causes),
        "index.html": page(validation, causes),
    }
    for name, text in files.items():
        write_file(folder / name, text)
    return [folder / name for name in files]


def csv_text(columns: tuple[str, ...], rows: list[list[object]]) -> str:
    """A table as CSV in which no cell is taken for a formula."""
    from firsttoken_simulator.report.plain import cell

    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([cell(value) for value in row] for row in rows)
    return out.getvalue()


def row_cells(validation: Validation) -> list[list[object]]:
    """Every quantity of every row that was run, in the columns `ROW_COLUMNS`."""
    found: list[list[object]] = []
    for outcome in validation.outcomes:
        row = outcome.row
        for quantity in row.quantities:
            predicted = outcome.predicted.get(quantity.name)
            error = None if predicted is None else round(100 * (predicted / quantity.value - 1), 3)
            found.append([
                row.file, row.line, row.chip, row.target, row.model, row.setting, quantity.name, UNITS[quantity.name],
                quantity.value, quantity.bound, _rounded(predicted),
                *map(_rounded, outcome.bands.get(quantity.name, (None, None))), outcome.verdict(quantity.name), error,
                quantity.counted, apart(outcome, quantity.name), row.confidence, "; ".join(row.assumed), row.source,
            ])  # fmt: skip
    return found


def _rounded(value: float | None) -> float | None:
    """Six digits."""
    return None if value is None else float(f"{value:.6g}")


def summary_cells(summary: Summary) -> list[object]:
    """One line of statistics, rounded."""
    return [value if not isinstance(value, float) else round(value, 3) for value in asdict(summary).values()]


def apart(outcome: Outcome, name: str) -> str:
    """Why a quantity is not counted, empty where it is."""
    quantity = next(q for q in outcome.row.quantities if q.name == name)
    if quantity.apart:
        return quantity.apart
    if quantity.bound:
        return "only an upper bound"
    return "" if name in outcome.predicted else "nothing is predicted for it"


def page(validation: Validation, causes: dict[str, tuple[str, ...]]) -> str:
    """The page; every text of a table is escaped by the template, and nothing is fetched when it is opened."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from firsttoken.validation.plots import plots
    from firsttoken_simulator.report.plain import plain

    environment = Environment(
        loader=PackageLoader("firsttoken.validation", "templates"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["plain"] = lambda value: plain(str(value))
    environment.filters["figure"] = lambda value: "" if value is None else f"{value:.4g}"
    environment.filters["percent"] = lambda value: "" if value is None else f"{value:.1f}"
    pairs = validation.pairs
    lines = [dict(zip(ROW_COLUMNS, cells, strict=True)) for cells in row_cells(validation)]
    return environment.get_template("validation.html.j2").render(
        version=validation.version,
        files=validation.files,
        summaries=validation.summaries,
        whole=next((s for s in validation.summaries if s.chip == "all" and s.kind == "all times"), None),
        plots=plots(pairs, [title(*found) for found in validation.titled]),
        rows=[line for line in lines if line["counted"] and line["predicted"] is not None],
        apart=[line for line in lines if not line["counted"] or line["predicted"] is None],
        skipped=validation.skipped,
        chips=[chip_notes(target, causes) for target in validation.targets],
    )


def title(outcome: Outcome, name: str) -> str:
    """What a dot shows."""
    row, predicted = outcome.row, outcome.predicted[name]
    measured = next(q.value for q in row.quantities if q.name == name)
    error = 100 * (predicted / measured - 1)
    return (
        f"{row.target}: {row.model}, {row.setting}: measured {measured:.4g}, predicted {predicted:.4g} {UNITS[name]} "
        f"({error:+.1f} %), {row.file} line {row.line}"
    )


def chip_notes(target: Target, causes: dict[str, tuple[str, ...]]) -> ChipNotes:
    """What the page says of a target."""
    from firsttoken.describe import unit_of

    grades: dict[str, int] = {}
    for provenance in target.provenance.values():
        grades[provenance.grade] = grades.get(provenance.grade, 0) + 1
    fitted = [(path, provenance.source) for path, provenance in target.provenance.items()
              if provenance.grade == "fitted"]  # fmt: skip
    return ChipNotes(
        target.name, target.description,
        tuple((path, f"{target.value(path)} {unit_of(path)}".strip(), source) for path, source in fitted),
        fit_text(target), tuple(sorted(grades.items())), tuple(target.not_modelled), causes.get(target.name, ()),
    )  # fmt: skip


def fit_text(target: Target) -> str:
    """What the fitted values of a target were fitted to."""
    fit = target.fit
    if fit is None:
        return ""
    outside = fit.leave_one_model_out_mape_pct
    left_out = "" if outside is None else f", {outside:.1f} % for models left out of the fit"
    files, models = ", ".join(fit.measurements), ", ".join(fit.models)
    apart = f", without {', '.join(fit.without)}" if fit.without else ""
    return f"{fit.rows} rows of {files}{apart} ({models}): MAPE {fit.mape_pct:.1f} %{left_out}"

