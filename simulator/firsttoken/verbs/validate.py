"""`firsttoken validate`: what is predicted beside what was measured, by machine and quantity."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from firsttoken.progress import Bar
from firsttoken_compiler.errors import OptionError

if TYPE_CHECKING:
    from firsttoken.validation.measurements import Row
    from firsttoken.validation.run import Validation

FOLDER: Final = Path("reports/validation")
SUMMARY: Final = ("machine", "quantity", "n", "MAPE %", "median %", "mean %", "within 10 %", "within 20 %", "rank",
                  "left out %")  # fmt: skip
ROWS: Final = ("row", "machine", "what", "how", "quantity", "measured", "predicted", "error %")


def validate(
    measurements: Annotated[
        list[Path] | None,
        typer.Option("--measurements", metavar="FILE", help="A CSV table of measurements; repeatable."),
    ] = None,
    more: Annotated[list[Path] | None, typer.Argument(metavar="[FILE]...", help="Further tables.")] = None,
    target: Annotated[list[str] | None, typer.Option("--target", help="Only rows of this target; repeatable.")] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, max=256, help="Processes that compile and simulate.")] = 2,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the report.")] = FOLDER,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False,
) -> None:
    """Predict every row of tables of measurements, or of the figures that come with the package; report errors."""
    from firsttoken.cli import print_json
    from firsttoken.validation import run
    from firsttoken.validation.causes import read_causes
    from firsttoken.validation.report import write
    from firsttoken_simulator.report.folder import prepared

    rows = _chosen(rows_from([*(measurements or []), *(more or [])]), target or [])
    causes = read_causes(out)
    with prepared(out), Bar() as bar:
        found = run.validate(rows, jobs, bar.update)
        write(out, found, causes)
    if as_json:
        print_json(document(found))
        return
    show(found)
    print(f"wrote {out}")


def rows_from(files: list[Path]) -> list[Row]:
    """Rows of tables, or the package's own figures where there are none; raises MeasurementError."""
    from firsttoken.validation.measurements import read
    from firsttoken.validation.published import published

    return [row for file in files for row in read(file)] if files else list(published())


def _chosen(rows: list[Row], targets: list[str]) -> list[Row]:
    """The rows of these targets; raises OptionError where there are none."""
    from firsttoken.validation.measurements import Measurement

    if not targets:
        return rows
    known = dict.fromkeys(row.target for row in rows if isinstance(row, Measurement))
    for name in targets:
        if name not in known:
            raise OptionError(f"--target {name!r:.80}: no row is of it; rows are of {', '.join(known) or 'no target'}")
    return [row for row in rows if isinstance(row, Measurement) and row.target in targets]


def document(found: Validation) -> dict[str, Any]:
    """The whole result as one JSON document."""
    from firsttoken.validation.report import ROW_COLUMNS, SUMMARY_COLUMNS, row_cells, summary_cells

    return {
        "version": found.version,
        "files": list(found.files),
        "summary": [dict(zip(SUMMARY_COLUMNS, summary_cells(s), strict=True)) for s in found.summaries],
        "rows": [dict(zip(ROW_COLUMNS, cells, strict=True)) for cells in row_cells(found)],
        "skipped": [
            {"file": s.file, "line": s.line, "chip": s.chip, "model": s.model, "reason": s.reason}
            for s in found.skipped
        ],
        "not_modelled": {target.name: list(target.not_modelled) for target in found.targets},
    }


def show(found: Validation) -> None:
    """Prints the rows, the statistics, and what is not in them."""
    from firsttoken.cli import table
    from firsttoken.validation.report import ROW_COLUMNS, row_cells
    from firsttoken_simulator.report.plain import plain

    lines = [dict(zip(ROW_COLUMNS, cells, strict=True)) for cells in row_cells(found)]
    counted = [line for line in lines if line["counted"] and line["predicted"] is not None]
    apart = [line for line in lines if line not in counted]
    if counted:
        table([*ROWS], [_cells(line) for line in counted])
    if apart:
        print("Shown apart, in no statistic:")
        table([*ROWS, "why"], [[*_cells(line), str(line["why_apart"])] for line in apart])
    for skipped in found.skipped:
        print(f"not run: {plain(f'{skipped.file}:{skipped.line} {skipped.chip}, {skipped.model}: {skipped.reason}')}")
    if found.summaries:
        table([*SUMMARY], [
            [s.chip, s.kind, str(s.n), f"{s.mape:.1f}", f"{s.median:.1f}", f"{s.mean:+.1f}", f"{s.within_10:.0f}",
             f"{s.within_20:.0f}", "" if s.rank is None else f"{s.rank:.3f}",
             "" if s.left_out is None else f"{s.left_out:.1f}"]
            for s in found.summaries
        ])  # fmt: skip
    for target in found.targets:
        print(f"{target.name} does not model: {'; '.join(target.not_modelled)}")


def _cells(line: dict[str, Any]) -> list[str]:
    predicted, error = line["predicted"], line["error_pct"]
    return [
        f"{line['file']}:{line['line']}", line["target"], line["model"], line["setting"], line["quantity"],
        f"{line['bound']}{line['measured']:.4g}", "" if predicted is None else f"{predicted:.4g}",
        "" if error is None else f"{error:+.1f}{', ' if line['verdict'] else ''}{line['verdict']}",
    ]  # fmt: skip
