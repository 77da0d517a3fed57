"""Runs of one student side by side: what each took, and the operators in which they differ most."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from firsttoken_simulator.report.document import RunDocument

MOST_OPERATORS: Final = 15


def _bytes_mb(run: RunDocument) -> float:
    return (run.dram_read_bytes + run.dram_write_bytes) / 1e6


def _dram_share(run: RunDocument) -> float:
    """Percent of the DRAM's peak that the NPU's time reached."""
    seconds = run.npu_ms / 1e3
    return 100 * _bytes_mb(run) * 1e6 / (seconds * run.dram_peak_bytes_per_s) if seconds else 0.0


def _bound(run: RunDocument, which: str) -> float:
    return run.time_by_bound_ms.get(which, 0.0)


QUANTITIES: Final[dict[str, Callable[[RunDocument], float | None]]] = {
    "TTFT ms": lambda run: run.ttft_ms, "cycles": lambda run: run.ttft_cycles, "NPU ms": lambda run: run.npu_ms,
    "host ms": lambda run: run.host_ms, "TPOT ms": lambda run: run.tpot_ms, "energy mJ": lambda run: run.energy_mj,
    "DRAM MB": _bytes_mb, "DRAM use %": _dram_share, "MAC use %": lambda run: run.mac_util_pct,
}  # fmt: skip


def quantities(runs: Sequence[RunDocument]) -> dict[str, list[float | None]]:
    """Every quantity of each run, then the time that each bound decides."""
    found = {name: [of(run) for run in runs] for name, of in QUANTITIES.items()}
    bounds = dict.fromkeys(name for run in runs for name in run.time_by_bound_ms)
    return found | {f"bound by {name} ms": [_bound(run, name) for run in runs] for name in bounds}


def operators(runs: Sequence[RunDocument]) -> list[tuple[str, list[float], list[str]]]:
    """(name, milliseconds in each run, its tiles in each run), layers together, largest difference first."""
    times = [_by_name(run) for run in runs]
    names = dict.fromkeys(name for found in times for name in found)
    rows = [
        (name, [found.get(name, (0.0, ""))[0] for found in times], [found.get(name, (0.0, ""))[1] for found in times])
        for name in names
    ]
    return sorted(rows, key=lambda row: (min(row[1]) - max(row[1]), row[0]))


def _by_name(run: RunDocument) -> dict[str, tuple[float, str]]:
    found: dict[str, tuple[float, str]] = {}
    for row in run.ops:
        name = re.sub(r"\blayers\.\d+\.", "layers.*.", row.op)
        before, tile = found.get(name, (0.0, row.tile))
        found[name] = before + 1e3 * row.cycles / run.clock_hz, tile if tile == row.tile else "several"
    return found


def document(labels: Sequence[str], runs: Sequence[RunDocument]) -> dict[str, Any]:
    """As JSON values: quantities, all metrics of `diff` against the first run, operators."""
    from firsttoken_simulator.report.diff import compare

    plain = [run.model_dump(mode="json") for run in runs]
    changes = [compare(plain[0], other) for other in plain[1:]]
    return {
        "runs": [
            {"label": label, "student": run.student, "target": run.target, "target_hash": run.target_hash,
             "prompt_tokens": run.prompt_tokens, "past": run.past, "weights": run.weights, "schedule": run.schedule}
            for label, run in zip(labels, runs, strict=True)
        ],
        "quantities": quantities(runs),
        "operators": [{"op": name, "ms": ms, "tiles": tiles} for name, ms, tiles in operators(runs)],
        "changes": [
            {row.metric: {"old": row.old, "new": row.new, "change": row.change} for row in found.values() if row.change}
            for found in changes
        ],
    }  # fmt: skip
