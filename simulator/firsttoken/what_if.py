"""What would help: the same program on a machine that is better in one way, simulated again.

The program is not compiled anew, so an effect is that of the machine alone; a schedule for the better machine may gain
more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from firsttoken_compiler.target.changed import with_values
from firsttoken_simulator.report.errors import ReportError
from firsttoken_simulator.report.explain import RESOURCES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from firsttoken_compiler.isa.program import Program
    from firsttoken_compiler.target.target import Target
    from firsttoken_simulator.report.explain import Explanation

LEAST_PERCENT: Final = 2.0
"""Of the time: a step below it is not worth a change."""
MOST: Final = 6
"""Steps that changes are tried for, the largest first."""


@dataclass(frozen=True, slots=True)
class Change:
    """Another value of a target, and the step that it is meant for.

    Attributes:
        step: of the ladder.
        text: path, old and new value.
        values: by dotted path.
        at_stake_fs: what the step takes, as far as it can hold the critical path: about what can be gained.
    """

    step: str
    text: str
    values: dict[str, Any]
    at_stake_fs: int


@dataclass(frozen=True, slots=True)
class Effect:
    """What a change does to the operators in question and to the whole run; femtoseconds, None if not simulated."""

    change: Change
    op_fs: int | None
    run_fs: int | None


def changes(target: Target, found: Explanation) -> list[Change]:
    """Changes of the target for the largest steps of a ladder, the largest first."""
    rungs = sorted((r for r in found.rungs if r.percent >= LEAST_PERCENT), key=lambda rung: -rung.fs)[:MOST]
    made: list[Change] = []
    for rung in rungs:
        for values, why in _OF_STEP.get(rung.step.name, _none)(target):
            if any(change.values == values for change in made):
                continue
            text = ", ".join(_texts(target, values)) + (f" ({why})" if why else "")
            made.append(Change(rung.step.name, text, values, min(rung.fs, _exposed(found, rung.step.resource))))
    return made


def _exposed(found: Explanation, resource: str) -> int:
    """Time in which a resource may hold the critical path: what hides behind another one helps nobody."""
    holders = [name for name, known in RESOURCES.items() if resource in known]
    return sum(found.critical[name] for name in holders) if holders else found.total_fs


def _texts(target: Target, values: dict[str, Any]) -> list[str]:
    """`path old -> new`; entries of a table that change by one factor are one text."""
    texts: dict[str, None] = {}
    for path, new in values.items():
        table, _, entry = path.rpartition(".")
        old = target.value(path)
        factor = table in ("matrix.macs_per_cycle", "matrix.weight_cycles") and entry
        texts[f"{table} x {new / old:g}" if factor else f"{path} {_shown(old)} -> {_shown(new)}"] = None
    return list(texts)


def effects(
    program: Program, target: Target, found: Explanation, progress: Callable[[float], None] | None = None
) -> list[Effect]:
    """Each change simulated, the most helpful for the operators first.

    Raises ReportError when the program is not that of the run.
    """
    members = _members(program, found)
    if _times(program, target, members)[1] + dispatch_fs(target) != found.run_fs:
        raise ReportError(f"the program takes another time on {target.name} than the run says")
    wanted = changes(target, found)
    done = []
    for index, change in enumerate(wanted):
        machine = with_values(target, change.values)
        op, npu = _times(program, machine, members)
        own = dispatch_fs(machine) if found.whole else 0
        done.append(Effect(change, op + own, npu + dispatch_fs(machine)))
        if progress is not None:
            progress((index + 1) / len(wanted))
    return sorted(done, key=lambda effect: (effect.op_fs or 0, effect.change.text))


def dispatch_fs(target: Target) -> int:
    """Femtoseconds before the first instruction."""
    return round(target.host.dispatch_us * 1e9)


def _members(program: Program, found: Explanation) -> list[int]:
    """The operators in question; ReportError when the program has others."""
    place = {op.name: index for index, op in enumerate(program.ops)}
    missing = next((row.op for row in found.ops if row.op not in place), None)
    if missing is not None:
        raise ReportError(f"the program has no operator {missing!r}")
    return [place[row.op] for row in found.ops]


def _times(program: Program, target: Target, members: Sequence[int]) -> tuple[int, int]:
    """Femtoseconds of some operators, as the ladder counts them, and of the whole program."""
    from firsttoken_simulator.machine import simulate_program
    from firsttoken_simulator.report.critical import critical_path
    from firsttoken_simulator.report.ladder import ladder_of

    timeline = simulate_program(program, target)
    rows = ladder_of(program, timeline, target, critical_path(program, timeline)).steps
    return int(rows[list(members)].sum()), timeline.total_fs


Values = list[tuple[dict[str, Any], str]]


def _none(_: Target) -> Values:
    return []


def _scaled(path: str, factor: float, why: str = "") -> Callable[[Target], Values]:
    """One number times a factor, whole where it is whole; nothing where that changes nothing."""

    def values(target: Target) -> Values:
        old = target.value(path)
        new = max(int(old * factor), 1 if factor < 1 and old > 1 else 0) if type(old) is int else old * factor
        return [({path: new}, why)] if new != old else []

    return values


def _rate(target: Target) -> Values:
    """Twice the multiplies per cycle; of an array that is twice as many arrays."""
    rates = target.matrix.macs_per_cycle
    values: dict[str, Any] = {f"matrix.macs_per_cycle.{pair}": 2 * rate for pair, rate in rates.items()}
    if target.matrix.kind == "systolic":
        values["matrix.arrays"] = 2 * target.matrix.arrays
    return [(values, "")]


def _array(target: Target) -> Values:
    """What the unit waits for while operands enter it."""
    unit = target.matrix
    if unit.kind == "tile":
        halved = {f"matrix.weight_cycles.{pair}": cycles / 2 for pair, cycles in unit.weight_cycles.items() if cycles}
        return [(halved, "")] if halved else []
    if not unit.double_buffered and unit.dataflow != "os":
        return [({"matrix.double_buffered": True}, "the next operand loads behind the present one")]
    found = _smaller(target)
    if unit.dataflow == "ws":
        found.append(({"matrix.dataflow": "os"}, "no operand is held in the array"))
    return found


def _smaller(target: Target) -> Values:
    """The same rate in four arrays of half the rows and columns, which load, fill and drain sooner."""
    unit = target.matrix
    if unit.rows % 2 or unit.columns % 2:
        return []
    halves = {"matrix.rows": unit.rows // 2, "matrix.columns": unit.columns // 2, "matrix.arrays": 4 * unit.arrays}
    return [(halves, "the same rate in smaller arrays")]


def _fill(target: Target) -> Values:
    if target.matrix.kind == "tile":
        return _scaled("matrix.fill_cycles", 0.5)(target)
    return _smaller(target) if target.matrix.double_buffered else _array(target)


def _padding(target: Target) -> Values:
    """Tiles of half the rows of m at the same rate; an array's extents are its rate and cannot change alone."""
    return _scaled("matrix.tile_m", 0.5)(target) if target.matrix.kind == "tile" else []


def _latency(target: Target) -> Values:
    """The longer part of the round trip."""
    own = target.dma.bus_latency_cycles * target.period_fs
    path = "dma.bus_latency_cycles" if own >= target.fs(target.dram.controller_ns) else "dram.controller_ns"
    return _scaled(path, 0.5)(target)


def _rows(target: Target) -> Values:
    found = _scaled("dram.queue_depth", 2)(target)
    if target.dram_commands is None and target.dram.map != "group-interleaved":
        found.append(({"dram.map": "group-interleaved"}, "a stream stays on few open rows"))
    return found


_OF_STEP: Final[dict[str, Callable[[Target], Values]]] = {
    "ideal": _rate,
    "fill_drain": _fill,
    "array_load": _array,
    "padding": _padding,
    "issue": _scaled("matrix.issue_cycles", 0.5),
    "dma_peak": _scaled("dram.channels", 2, "twice the bandwidth"),
    "dma_bus": _scaled("dma.bus_bytes_per_cycle", 2),
    "dma_outstanding": _scaled("dma.outstanding", 2),
    "dma_latency": _latency,
    "dma_setup": _scaled("dma.setup_cycles", 0.5),
    "dma_refresh": _scaled("dram.trefi_ns", 2, "half as many refreshes"),
    "dma_rows": _rows,
    "vector": _scaled("vector.contexts", 2),
    "bank_conflicts": _scaled("scratchpad.banks", 2),
    "host": _scaled("host.fallback_us", 0.5),
    "dispatch": _scaled("host.dispatch_us", 0.5),
}
"""What to try against each step. `sync` has no value of a target behind it."""


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
