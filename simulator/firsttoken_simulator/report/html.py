"""`report.html`: one self-contained page, drawn from the run document alone; its SVG geometry is computed here."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from firsttoken_simulator.report.cores import core_lines
from firsttoken_simulator.report.document import OpRow, RunDocument
from firsttoken_simulator.report.explain import explain, verdict
from firsttoken_simulator.report.screen import ROWS, amount, row_name
from firsttoken_simulator.report.tables import pattern_of

MAX_OPS: Final = 200
MAX_BARS: Final = 160
MAX_LINKS: Final = 300
COLOURS: Final = {
    "dma": "#3b6ea5", "matrix": "#4f9d69", "vector": "#d9a441", "spad_conflict": "#b5523b", "host": "#7a6f9b",
    "dispatch": "#a8a29a", "host_fallback": "#7a6f9b", "mac": "#4f9d69", "sram": "#8fb8a0", "dram": "#3b6ea5",
    "bus": "#7fa3c7", "static": "#a8a29a",
}  # fmt: skip
"""By cause of time or component of energy."""
PHASES: Final = (("prompt", False), ("a token", True))
STEP_COLOURS: Final = {
    "matrix unit": "#4f9d69", "DRAM bandwidth": "#3b6ea5", "bus": "#7fa3c7", "DMA engine": "#5b8fc7",
    "DRAM latency": "#8fb3d9", "DRAM efficiency": "#a9c4e0", "vector unit": "#d9a441", "scratchpad": "#b5523b",
    "synchronisation": "#c9b79c", "host": "#7a6f9b",
}  # fmt: skip
"""By resource."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A rectangle of a chart, with the text that it shows when pointed at."""

    x: float
    y: float
    width: float
    height: float
    fill: str
    title: str


@dataclass(frozen=True, slots=True)
class Point:
    """A dot of a chart."""

    x: float
    y: float
    title: str


@dataclass(frozen=True, slots=True)
class Line:
    """A straight line of a chart with its label at the end."""

    x1: float
    y1: float
    x2: float
    y2: float
    label: str


def page(run: RunDocument) -> str:
    """The page. Every name is escaped by the template; nothing is fetched when it is opened."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("firsttoken_simulator.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    grades: dict[str, int] = {}
    for value in run.target_values:
        grades[value.grade] = grades.get(value.grade, 0) + 1
    costliest = sorted(run.ops, key=lambda row: (-row.cycles, row.instr_first))[:MAX_OPS]
    return environment.get_template("report.html.j2").render(
        run=run,
        colours=COLOURS,
        first_screen=[(row_name(name, [run]).strip(), show(run)) for name, show in ROWS],
        layers=_stacked([(row.name, row.ms_by_bound) for row in run.layers[:MAX_BARS]]),
        layers_left_out=max(0, len(run.layers) - MAX_BARS),
        time=_split(run.time_by_bound_ms, "ms"),
        energy=_split(run.energy_by_component_mj, "mJ"),
        bands=[(run.unit, run.energy_bands)]
        + ([("token", run.decode.energy_bands)] if run.decode is not None else []),
        ladder=_ladder(run),
        steps=[(what, chart) for what, decode in PHASES if (chart := step_chart(run, decode)) is not None],
        roofline=roofline(run),
        occupancy=occupancy_chart(run),
        cores=[*core_lines(run.cores), *run.core_decisions],
        links=run.critical_path.chain[:MAX_LINKS],
        ops=costliest,
        ops_left_out=len(run.ops) - len(costliest),
        grades=sorted(grades.items()),
        amount=amount,
    )


def _split(parts: dict[str, float], unit: str, width: float = 760.0) -> list[Shape]:
    """One bar divided into its parts."""
    total = sum(parts.values())
    shapes, x = [], 0.0
    for name, value in sorted(parts.items(), key=lambda item: -item[1]):
        if value > 0:
            part = value / total * width
            title = f"{name}: {value:.3f} {unit} ({100 * value / total:.1f} %)"
            shapes.append(Shape(round(x, 2), 0, round(part, 2), 26, COLOURS[name], title))
            x += part
    return shapes


def _stacked(
    rows: Sequence[tuple[str, dict[str, float]]], width: float = 560.0
) -> list[tuple[str, float, list[Shape]]]:
    """(name, total, shapes) for horizontal bars on one scale."""
    longest = max((sum(parts.values()) for _, parts in rows), default=0.0)
    bars = []
    for name, parts in rows:
        x, shapes = 0.0, []
        for cause, ms in parts.items():
            if ms > 0:
                part = ms / longest * width
                shapes.append(Shape(round(x, 2), 0, round(part, 2), 12, COLOURS[cause], f"{cause}: {ms:.4f} ms"))
                x += part
        bars.append((name, sum(parts.values()), shapes))
    return bars


def _ladder(run: RunDocument, width: float = 420.0) -> list[tuple[str, float, str, float]]:
    """(name, ms, note, bar width)."""
    longest = max((rung.ms for rung in run.ladder), default=0.0)
    return [(r.name, r.ms, r.note, round(r.ms / longest * width, 2) if longest else 0.0) for r in run.ladder]


def step_chart(run: RunDocument, decode: bool = False, width: float = 420.0) -> dict[str, Any] | None:
    """Every step of the whole run as a bar that begins where the one before it ends; None of a run without them."""
    part = run.decode if decode else run
    if part is None or part.steps is None:
        return None
    found = explain(run, decode=decode)
    rows, until, scale = [], 0, width / max(found.total_fs, 1)
    for rung in found.rungs:
        if rung.fs:
            fill = STEP_COLOURS[rung.step.resource]
            rows.append((rung, Shape(round(until * scale, 2), 0, round(rung.fs * scale, 2), 12, fill, "")))
        until += rung.fs
    return {"rows": rows, "total": found, "width": width, "verdict": verdict(found)}


def occupancy_chart(run: RunDocument, width: float = 760.0, height: float = 160.0) -> dict[str, Any] | None:
    """Two stacked outlines of bytes over time, values below, working memory above; None where nothing is known."""
    points = run.sram_occupancy
    capacity = next((int(v.value) for v in run.target_values if v.path == "scratchpad.bytes"), 0)
    if not points or not capacity:
        return None
    step = width / len(points)

    def outline(heights: list[int]) -> str:
        corners = [f"0,{height:g}"]
        for index, held in enumerate(heights):
            y = round((1 - min(held, capacity) / capacity) * height, 1)
            corners += [f"{index * step:.1f},{y:g}", f"{(index + 1) * step:.1f},{y:g}"]
        return " ".join([*corners, f"{width:g},{height:g}"])

    both = [point.resident_bytes + point.working_bytes for point in points]
    return {
        "width": width, "height": height, "capacity": capacity, "fullest": max(both),
        "residents": outline([point.resident_bytes for point in points]), "kernels": outline(both),
    }  # fmt: skip


def roofline(run: RunDocument, width: float = 760.0, height: float = 320.0) -> dict[str, Any] | None:
    """Dots and roofs in logarithmic axes: multiply-accumulates per DRAM byte against per second; None without any."""
    groups: dict[str, list[OpRow]] = {}
    for row in run.ops:
        if row.macs and row.cycles and row.dram_read_bytes + row.dram_write_bytes:
            groups.setdefault(pattern_of(row.op), []).append(row)
    if not groups:
        return None
    dots = []
    for name, rows in groups.items():
        macs = sum(row.macs for row in rows)
        moved = sum(row.dram_read_bytes + row.dram_write_bytes for row in rows)
        seconds = sum(row.cycles for row in rows) / run.clock_hz
        dots.append((macs / moved, macs / seconds, name))
    peaks = sorted(set(run.peak_macs_per_s.values()))
    bandwidth = run.dram_peak_bytes_per_s
    low_x = min(min(dot[0] for dot in dots), peaks[0] / bandwidth) / 4
    high_x = max(max(dot[0] for dot in dots), peaks[-1] / bandwidth) * 4
    low_y, high_y = min(min(dot[1] for dot in dots), low_x * bandwidth) / 2, peaks[-1] * 3

    def place(x: float, y: float) -> tuple[float, float]:
        across = math.log(x / low_x) / math.log(high_x / low_x)
        up = math.log(y / low_y) / math.log(high_y / low_y)
        return round(across * width, 1), round((1 - up) * height, 1)

    lines = [Line(*place(low_x, low_x * bandwidth), *place(peaks[-1] / bandwidth, peaks[-1]), "")]
    for peak in peaks:
        pairs = " ".join(pair for pair, value in run.peak_macs_per_s.items() if value == peak)
        lines.append(Line(*place(peak / bandwidth, peak), *place(high_x, peak), f"{peak / 1e12:.2f} TMAC/s {pairs}"))
    points = [Point(*place(x, min(y, high_y)), f"{name}: {x:.1f} MAC/B, {y / 1e12:.3f} TMAC/s") for x, y, name in dots]
    return {"width": width, "height": height, "lines": lines, "points": points, "bandwidth": bandwidth / 1e9}
