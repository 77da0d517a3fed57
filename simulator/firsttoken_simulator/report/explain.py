"""One operator, the same operator of all layers, or a whole run, as the ladder from its ideal to its actual time."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from firsttoken_simulator.report.document import DecodeSection, OpRow, RunDocument, StepTable
from firsttoken_simulator.report.errors import ReportError
from firsttoken_simulator.report.steps import HOLDERS, OF_OPERATORS, STEPS, Step
from firsttoken_simulator.report.tables import parts_of, pattern_of

WHOLE: Final = "the whole run"
RESOURCES: Final = {
    "dma": ("DRAM bandwidth", "bus", "DMA engine", "DRAM latency", "DRAM efficiency"),
    "matrix": ("matrix unit", "scratchpad"), "vector": ("vector unit", "scratchpad"), "host": ("host",),
}  # fmt: skip
"""Resources behind what holds the critical path."""
REMEDY: Final = {
    "matrix unit": "fewer multiplies, types with a higher rate, or larger tiles that fill the unit",
    "DRAM bandwidth": "move fewer bytes (narrower weights, more tokens a pass), or more channels",
    "bus": "a wider bus to the DRAM",
    "DMA engine": "more requests in flight, longer descriptors, or earlier prefetch",
    "DRAM latency": "prefetch earlier, so that streams do not start empty",
    "DRAM efficiency": "longer runs of bytes, fewer streams at once, deeper queues",
    "vector unit": "fuse it into its neighbour, overlap it with products, or more lanes",
    "scratchpad": "other strides, or more banks",
    "synchronisation": "fewer instructions",
    "host": "replace the operator by one that the NPU runs, or dispatch less often",
}  # fmt: skip
"""What helps against each resource."""
MOST_SHAPES: Final = 3
MOST_FS: Final = 1 << 62
"""Longest time of a step, about 4600 s: more is no run of this machine."""


@dataclass(frozen=True, slots=True)
class Rung:
    """One step of a ladder."""

    step: Step
    fs: int
    cycles: int
    """Whole cycles that sum to those of the total."""
    percent: float
    """Of the total."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """Where the time of some operators goes.

    Attributes:
        name: what was asked for.
        ops: the operators, in program order.
        rungs: every step in the order of the ladder, those without time too; they sum to `total_fs`.
        total_fs: their time; of the whole run with the dispatch.
        period_fs: of a clock cycle.
        critical: the same time by what held the critical path meanwhile, the largest first.
        run_fs: time of the whole run.
        dram_fs: time of their DRAM traffic at the peak of the bus.
    """

    name: str
    ops: tuple[OpRow, ...]
    rungs: tuple[Rung, ...]
    total_fs: int
    period_fs: int
    critical: dict[str, int]
    run_fs: int
    dram_fs: int

    def fs(self, step: str) -> int:
        """Time of one step."""
        return next(rung.fs for rung in self.rungs if rung.step.name == step)

    @property
    def whole(self) -> bool:
        """Whether it is the whole run, with the dispatch."""
        return self.name == WHOLE

    @property
    def bound_fs(self) -> int:
        """The longer of the MACs and the DRAM traffic, each at peak."""
        return max(self.fs("ideal"), self.dram_fs)

    @property
    def by_resource(self) -> dict[str, int]:
        """Femtoseconds by resource, the largest first; ties in the order of the ladder."""
        found: dict[str, int] = {}
        for rung in self.rungs:
            found[rung.step.resource] = found.get(rung.step.resource, 0) + rung.fs
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    @property
    def binding(self) -> str:
        """The resource that decides: of those of what holds the critical path for longest, the one of most time.

        Work of the matrix unit that hides behind another engine does not make it the binding one.
        """
        holder = next(iter(self.critical))
        return next(name for name in self.by_resource if name in RESOURCES[holder])


def explain(run: RunDocument, op: str | None = None, *, decode: bool = False) -> Explanation:
    """The ladder of the operators that `op` names (see `select`), or of the whole run.

    Raises ReportError for a document without ladders or with impossible ones, and for a name that nothing has.
    """
    part = section(run, decode)
    table = checked(part)
    period = period_fs(run)
    members = range(len(part.ops)) if op is None else select(part.ops, op)
    totals = [0] * len(STEPS)
    for name, values in zip(table.names, zip(*table.rows, strict=True), strict=False):
        totals[[step.name for step in STEPS].index(name)] = sum(values[i] for i in members)
    totals[-1] = table.dispatch_fs if op is None else 0
    rows = tuple(part.ops[i] for i in members)
    moved = sum(row.dram_read_bytes + row.dram_write_bytes for row in rows)
    total, until, rungs = sum(totals), 0, []
    for step, fs in zip(STEPS, totals, strict=True):
        cycles = -(-(until + fs) // period) - -(-until // period)
        rungs.append(Rung(step, fs, cycles, 100 * fs / total if total else 0.0))
        until += fs
    held = {name: sum(table.critical[i][at] for i in members) for at, name in enumerate(table.holders)}
    held["host"] += totals[-1]
    critical = dict(sorted(held.items(), key=lambda item: -item[1]))
    whole = sum(map(sum, table.rows)) + table.dispatch_fs
    dram = round(moved / run.dram_peak_bytes_per_s * 1e15)
    return Explanation(WHOLE if op is None else op, rows, tuple(rungs), total, period, critical, whole, dram)


def section(run: RunDocument, decode: bool) -> RunDocument | DecodeSection:
    """The prompt, or the decode step; raises ReportError when it was not measured."""
    if not decode:
        return run
    if run.decode is None:
        raise ReportError("the run has no decode step: run again with --decode N")
    return run.decode


def period_fs(run: RunDocument) -> int:
    """Femtoseconds of a clock cycle; raises ReportError for peaks that no machine has."""
    for name in ("clock_hz", "dram_peak_bytes_per_s"):
        value = getattr(run, name)
        if not (math.isfinite(value) and 1 <= value <= 1e15):
            raise ReportError(f"not a run document: {name} is {value}, expected 1 to 1e15; run again")
    return round(1e15 / run.clock_hz)


def checked(part: RunDocument | DecodeSection) -> StepTable:
    """The ladders of a document; raises ReportError when they are missing or contradict it."""
    table = part.steps
    if table is None:
        raise ReportError(
            "the run has no ladder ('steps' is missing), an earlier release wrote it: make it again with 'run -o'"
        )
    if len(set(table.names)) < len(table.names) or not set(table.names) <= set(OF_OPERATORS):
        raise ReportError(f"not a run document: steps.names has other names than {', '.join(OF_OPERATORS)}; run again")
    if table.holders != list(HOLDERS):
        raise ReportError(f"not a run document: steps.holders is not {', '.join(HOLDERS)}; run again")
    _check_rows("rows", table.rows, len(part.ops), len(table.names))
    _check_rows("critical", table.critical, len(part.ops), len(HOLDERS))
    if [sum(row) for row in table.rows] != [sum(row) for row in table.critical]:
        raise ReportError("not a run document: steps.rows and steps.critical have other sums; run again")
    total, said = sum(map(sum, table.rows)) + table.dispatch_fs, part.host_ms + part.npu_ms
    if not 0 <= table.dispatch_fs < MOST_FS or not abs(total / 1e12 - said) <= 1e-6 * max(said, 1.0):
        raise ReportError(f"not a run document: its steps sum to {total / 1e12} ms, its time is {said} ms; run again")
    return table


def _check_rows(name: str, rows: list[list[int]], count: int, width: int) -> None:
    if len(rows) != count:
        raise ReportError(f"not a run document: steps.{name} has {len(rows)} rows for {count} operators; run again")
    for i, row in enumerate(rows):
        if len(row) != width or not all(0 <= fs < MOST_FS for fs in row):
            raise ReportError(
                f"not a run document: steps.{name}.{i} must be {width} whole numbers from 0 to {MOST_FS}; run again"
            )


def select(ops: Sequence[OpRow], name: str) -> list[int]:
    """Operators of that name, or that the pattern covers: `*` stands for any text without a dot, as in advice.

    A product of several, `layers.3.mlp.gate_proj+up_proj`, is also known by the name of each. Raises ReportError naming
    the nearest when there is none.
    """
    found = [i for i, row in enumerate(ops) if row.op == name]
    if not found:
        pattern = re.compile(r"[^.]*".join(map(re.escape, name.split("*"))))
        found = [
            i for i, row in enumerate(ops)
            if any(pattern.fullmatch(part) or pattern_of(part) == name for part in (row.op, *parts_of(row.op)))
        ]  # fmt: skip
    if not found:
        known = list(dict.fromkeys(pattern_of(row.op) for row in ops))
        near = difflib.get_close_matches(pattern_of(name), known, n=5, cutoff=0.3) or known[:5]
        raise ReportError(f"no operator {name!r} in the run; nearest: {', '.join(near)}; all are in ops.csv")
    return found


def document(found: Explanation) -> dict[str, Any]:
    """The explanation as JSON values."""
    return {
        "op": found.name, "operators": len(found.ops), "total_fs": found.total_fs,
        "total_cycles": sum(rung.cycles for rung in found.rungs), "period_fs": found.period_fs, "run_fs": found.run_fs,
        "ideal_fs": found.fs("ideal"), "dram_peak_fs": found.dram_fs, "bound_fs": found.bound_fs,
        "binding": found.binding, "by_resource_fs": found.by_resource, "critical_fs": found.critical,
        "steps": [
            {
                "step": rung.step.name, "title": rung.step.title, "resource": rung.step.resource, "fs": rung.fs,
                "cycles": rung.cycles, "percent": rung.percent,
            }
            for rung in found.rungs
        ],
    }  # fmt: skip


def facts(found: Explanation) -> str:
    """What was asked for: how many operators, their kinds, extents and types, where these are few."""
    count = f"{len(found.ops)} operators" if len(found.ops) != 1 else "1 operator"
    if found.whole or not found.ops:
        return f"{found.name}: {count}"
    kinds = ", ".join(dict.fromkeys(row.kind for row in found.ops))
    shapes = dict.fromkeys(_shape(row) for row in found.ops)
    shown = "; ".join(list(shapes)[:MOST_SHAPES]) + ("; ..." if len(shapes) > MOST_SHAPES else "")
    share = 100 * found.total_fs / found.run_fs if found.run_fs else 0.0
    own = sum(row.cycles for row in found.ops)
    return (
        f"{found.name}: {count}, {kinds}, {shown}; {share:.1f} % of the run, "
        f"on the critical path for {own:,} cycles (as in ops.csv)"
    )


def _shape(row: OpRow) -> str:
    extents = f"m {row.m}, n {row.n}, k {row.k}" if row.macs else f"{row.m} x {row.n}"
    types = f", weights {row.w_bits} bit, activations {row.a_bits} bit" if row.w_bits else ""
    return extents + types + (f", tile {row.tile}" if row.tile else "")


def verdict(found: Explanation) -> list[str]:
    """The bounds and how far off they are, what held the critical path, the binding resource with its largest step."""
    if not found.total_fs:
        return ["it takes no time of its own: other work hides it"]
    ideal, dram = found.fs("ideal"), found.dram_fs
    lines = []
    if found.bound_fs:
        lines.append(
            f"MACs at peak {ideal / 1e9:,.3f} us, all DRAM bytes at peak {dram / 1e9:,.3f} us; this takes "
            f"{found.total_fs / found.bound_fs:.2f} times the longer"
        )
    held = ", ".join(f"{name} {100 * fs / found.total_fs:.0f} %" for name, fs in found.critical.items() if fs)
    works = found.by_resource["matrix unit"]
    hidden = max(0, works - found.critical["matrix"])
    lines.append(
        f"on the critical path meanwhile: {held}"
        + (f"; {hidden / 1e9:,.3f} of {works / 1e9:,.3f} us of the matrix unit hide behind others" if hidden else "")
    )
    mine = [rung for rung in found.rungs if rung.step.resource == found.binding]
    largest = max(mine, key=lambda rung: rung.fs)
    share = 100 * found.by_resource[found.binding] / found.total_fs
    lines.append(f"bound by: {found.binding} ({share:.0f} %, most of it {largest.step.title}); {REMEDY[found.binding]}")
    return lines


def short(run: RunDocument, most: int = 6) -> str:
    """The whole run's ladder in one line, its largest steps in their order; `-` of a document without one."""
    if run.steps is None:
        return "-"
    found = explain(run)
    largest = sorted((rung for rung in found.rungs if rung.percent >= 1), key=lambda rung: -rung.fs)[:most]
    named = [f"{rung.step.title} {rung.percent:.0f} %" for rung in found.rungs if rung in largest]
    rest = 100 - sum(rung.percent for rung in largest)
    return " + ".join(named) + (f" + other {rest:.0f} %" if rest >= 0.5 else "")
