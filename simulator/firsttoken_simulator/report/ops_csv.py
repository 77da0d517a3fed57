"""`ops.csv`: one line per operator, the columns of `OpRow`."""

import csv
import io
from collections.abc import Sequence

from firsttoken_simulator.report.document import OpRow


def ops_csv(rows: Sequence[OpRow]) -> str:
    """The text. A cell that a spreadsheet would run as a formula gets a leading apostrophe."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = list(OpRow.model_fields)
    writer.writerow(names)
    for row in rows:
        writer.writerow([_cell(getattr(row, name)) for name in names])
    return out.getvalue()


def _cell(value: object) -> object:
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return "'" + value
    return value
