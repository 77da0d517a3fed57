"""`ops.csv`: one line per operator, the columns of `OpRow`."""

import csv
import io
from collections.abc import Sequence

from firsttoken_simulator.report.document import OpRow
from firsttoken_simulator.report.plain import cell


def ops_csv(rows: Sequence[OpRow]) -> str:
    """The text. A cell that a spreadsheet would run as a formula gets a leading apostrophe."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = list(OpRow.model_fields)
    writer.writerow(names)
    for row in rows:
        writer.writerow([cell(getattr(row, name)) for name in names])
    return out.getvalue()
