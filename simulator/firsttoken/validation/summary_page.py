"""`README.md` of a report: the statistics as a table that a repository shows, without any text of the tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from firsttoken.validation.run import Validation
    from firsttoken.validation.statistics import Summary

COLUMNS: Final = (
    "machine", "quantity", "n", "MAPE %", "median %", "mean %", "within 10 %", "within 20 %", "rank correlation",
    "models left out, MAPE %",
)  # fmt: skip


def summary_page(validation: Validation, causes: dict[str, tuple[str, ...]]) -> str:
    """The page as Markdown."""
    run, left = len(validation.outcomes), len(validation.skipped)
    lines = [
        "# Beside measurements", "",
        f"Written by `firsttoken validate`: {run} rows are predicted, {left} are not run (`skipped.csv` says why). "
        "`index.html` has plots, every row, what counts and what the machines leave out; `rows.csv` and `summary.csv` "
        "have the numbers. The method is described in `docs/validation.md`.", "",
        f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}", *map(_line, validation.summaries), "",
        "Error: predicted over measured, less 1. MAPE and median are of absolute errors, the mean is of signed errors "
        "of times, above 0 where predictions are too slow. The last column is of rows that a fit without their model "
        "predicts.",
    ]  # fmt: skip
    for target in validation.targets:
        if found := causes.get(target.name):
            lines += ["", f"Causes of large errors on {target.name}:", "", *(f"- {line}" for line in found)]
    return "\n".join(lines) + "\n"


def _line(summary: Summary) -> str:
    cells = [
        summary.chip, summary.kind, str(summary.n), f"{summary.mape:.1f}", f"{summary.median:.1f}",
        f"{summary.mean:+.1f}", f"{summary.within_10:.0f}", f"{summary.within_20:.0f}",
        "" if summary.rank is None else f"{summary.rank:.3f}",
        "" if summary.left_out is None else f"{summary.left_out:.1f}",
    ]  # fmt: skip
    marked = [f"**{cell}**" if cell and summary.kind == "all times" else cell for cell in cells]
    return f"| {' | '.join(marked)} |"
