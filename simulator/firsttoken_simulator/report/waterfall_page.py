"""`firsttoken diff --html`: one page with the waterfalls between two runs; its SVG geometry is computed here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from firsttoken_simulator.report.plain import plain
from firsttoken_simulator.report.waterfall import Contribution, Waterfall, largest, title

MOST_BARS: Final = 24
LEAST: Final = 5e-4
"""Of the longer time: smaller changes are shown together."""
LABEL: Final = 300.0
CHART: Final = 560.0
ROW: Final = 20.0
WHAT: Final = {"ttft": "time to first token", "tpot": "time per output token"}
COLOURS: Final = {"total": "#6b7280", "more": "#b5523b", "less": "#4f9d69"}


@dataclass(frozen=True, slots=True)
class Bar:
    """A row of a chart: its label, where it lies, its colour, and the text at its end."""

    label: str
    x: float
    y: float
    width: float
    colour: str
    text: str
    end: float
    """Where the line to the next row is drawn."""


def bars(found: Waterfall, rows: Sequence[Contribution]) -> list[Bar]:
    """The old time, every change from where the one before it ended, and the new time."""
    reach = max(found.old_fs, found.new_fs, 1)
    until = found.old_fs
    for row in rows:
        until += row.change_fs
        reach = max(reach, until)
    scale = CHART / reach

    def bar(label: str, begin: int, end: int, colour: str, text: str) -> Bar:
        x, width = min(begin, end) * scale, abs(end - begin) * scale
        return Bar(plain(label), round(LABEL + x, 2), ROW * len(made), round(max(width, 0.5), 2), COLOURS[colour], text,
                   round(LABEL + end * scale, 2))  # fmt: skip

    made: list[Bar] = []
    made.append(bar("old", 0, found.old_fs, "total", f"{found.old_fs / 1e12:,.3f} ms"))
    until = found.old_fs
    for row in rows:
        percent = f" ({100 * row.change_fs / found.old_fs:+.1f} %)" if found.old_fs else ""
        text = f"{row.change_fs / 1e12:+,.3f} ms{percent}"
        end = until + row.change_fs
        made.append(bar(title(row.name), until, end, "more" if row.change_fs > 0 else "less", text))
        until = end
    made.append(bar("new", 0, found.new_fs, "total", f"{found.new_fs / 1e12:,.3f} ms"))
    return made


def page(old: dict[str, Any], new: dict[str, Any], inputs: Sequence[str], found: Sequence[Waterfall]) -> str:
    """The page. Every name is escaped by the template; nothing is fetched when it is opened."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("firsttoken_simulator.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    charts = []
    for each in found:
        least = LEAST * max(each.old_fs, each.new_fs)
        for by, rows in (("step", each.by_step), ("operator", each.by_class)):
            made = bars(each, largest(rows, MOST_BARS, least))
            charts.append((WHAT[each.what], by, made, ROW * len(made)))
    names = [plain(f"{run.get('student')} on {run.get('target')}") for run in (old, new)]
    return environment.get_template("waterfall.html.j2").render(
        names=names, inputs=[plain(line) for line in inputs], charts=charts, width=LABEL + CHART + 200, label=LABEL,
        row=ROW,
    )  # fmt: skip
