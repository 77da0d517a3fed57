"""The first screen: one run, or two side by side, as rich tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from firsttoken_simulator.report.cores import core_lines
from firsttoken_simulator.report.document import DecodeSection, RunDocument
from firsttoken_simulator.report.energy_table import banded
from firsttoken_simulator.report.explain import short
from firsttoken_simulator.report.plain import plain

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_UNITS: Final = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def amount(count: float) -> str:
    """Bytes in decimal units, e.g. `1.23 GB`."""
    for scale, unit in _UNITS:
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count:.0f} B"


def _bound(run: RunDocument) -> str:
    parts = sorted(run.time_by_bound_ms.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {ms:.2f} ({100 * ms / run.ttft_ms:.0f} %)" for name, ms in parts if ms > 0) or "-"


def _tpot(run: RunDocument) -> str:
    return "-" if run.tpot_ms is None else f"{run.tpot_ms:.2f} ms ({run.tokens_per_s:.1f} tokens/s)"


def _energy(run: RunDocument | DecodeSection) -> str:
    """Typical, and in brackets with all values of the target at their low and at their high bounds."""
    return banded(run.energy_mj, None if run.energy_bands is None else run.energy_bands.npu_mj, "mJ")


def _token_energy(run: RunDocument) -> str:
    return "-" if run.decode is None else _energy(run.decode)


def _power(run: RunDocument) -> str:
    return banded(run.average_power_w, None if run.energy_bands is None else run.energy_bands.npu_power_w, "W")


def _polling(run: RunDocument) -> str:
    """What the host takes beside NPU and DRAM."""
    bands = run.energy_bands
    if bands is None or bands.host_note:
        return "not modelled"
    return banded(bands.host_mj.typical, bands.host_mj, "mJ")


def _group(run: RunDocument) -> str:
    """Only integers that the options make have groups of that size."""
    ours = any(row.format.startswith("int") and not row.stored for row in run.weight_formats)
    return f" (group {run.group})" if ours else ""


def _formats(run: RunDocument) -> str:
    """Formats that are in use, with bytes."""
    return ", ".join(
        f"{row.format}{' as stored' * row.stored} ({row.matrices}, {amount(row.bytes)})" for row in run.weight_formats
        if row.matrices
    ) or "-"  # fmt: skip


def _scales(run: RunDocument) -> str:
    return ", static scales" if run.acts_range == "static" else ""


def _kept(run: RunDocument) -> str:
    """Their type, and what they take in DRAM."""
    if not run.kv_bytes:
        return "-"
    rows = max(1, run.past + run.prompt_tokens)
    return f"{run.kv_cache or 'fp16'}, {amount(run.kv_bytes)} ({amount(run.kv_bytes // rows)} per token)"


def _kinds(run: RunDocument) -> str:
    return ", ".join(f"{name} {amount(count)}" for name, count in run.dram_bytes_by_kind.items())


MOST_CALLS: Final = 3
MOST_NODES: Final = 6
MOST_DECISIONS: Final = 6
"""Calls of the host and nodes of each that the screen names; run.json has all."""


def _fallbacks(run: RunDocument) -> str:
    if not run.host_calls:
        return "none"
    nodes = len(run.host_fallbacks)
    return f"{nodes} node{'s' * (nodes > 1)} in {len(run.host_calls)} calls, {sum(c.ms for c in run.host_calls):.3g} ms"


ROWS: Final[tuple[tuple[str, Callable[[RunDocument], str]], ...]] = (
    ("student", lambda r: plain(r.student)),
    ("target", lambda r: f"{r.target} ({r.target_hash})"),
    ("prompt", lambda r: r.read + (f" after {r.past}" if r.past else "")),
    ("weights / activations", lambda r: f"{r.weights}{_group(r)} / {r.activations}{_scales(r)}"),
    ("  matrices by format", _formats),
    ("norm cache", lambda r: r.norm_cache),
    ("keys and values", _kept),
    ("time to first token", lambda r: f"{r.ttft_ms:.2f} ms ({r.ttft_cycles:,} cycles)"),
    ("  NPU + host", lambda r: f"{r.npu_ms:.2f} ms + {r.host_ms:.2f} ms"),
    ("time per output token", _tpot),
    ("energy per prompt", _energy),
    ("  host polling, beside", _polling),
    ("energy per token", _token_energy),
    ("average power", _power),
    ("DRAM read / written", lambda r: f"{amount(r.dram_read_bytes)} / {amount(r.dram_write_bytes)}"),
    ("  by kind", _kinds),
    ("scratchpad peak", lambda r: amount(r.sram_peak_bytes)),
    ("weights in DRAM", lambda r: amount(r.weight_bytes)),
    ("multiply-accumulates", lambda r: f"{r.macs:,}"),
    ("matrix unit utilisation", lambda r: f"{r.mac_util_pct:.1f} %"),
    ("time by bound, ms", _bound),
    ("from ideal to actual", short),
    ("host fallbacks", _fallbacks),
)


_NAMES: Final = {
    "input": {"time to first token": "time", "energy per prompt": "energy", "prompt": "input"},
    "inference": {
        "time to first token": "time of an inference", "energy per prompt": "energy per inference", "prompt": "input",
    },
}  # fmt: skip
"""What rows are called where nothing but encoders ran, or image networks: their result is whole, no token."""


def row_name(name: str, runs: list[RunDocument]) -> str:
    """What a row is called for these runs."""
    units = {run.unit for run in runs}
    if "prompt" in units:
        return name
    return _NAMES[units.pop() if len(units) == 1 else "input"].get(name, name)


def first_screen(runs: list[RunDocument]) -> Table:
    """One column per run; with two or more the last one is followed by the ratio of first to last."""
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    for _ in runs:
        table.add_column(overflow="fold")
    for name, show in ROWS:
        table.add_row(row_name(name, runs), *(Text(show(run)) for run in runs))
    if len(runs) > 1 and runs[-1].ttft_ms > 0 and runs[-1].energy_mj > 0:
        first, last = runs[0], runs[-1]
        ratio = f"{first.ttft_ms / last.ttft_ms:.2f}x time, {first.energy_mj / last.energy_mj:.2f}x energy"
        table.add_row("first / last", *([""] * (len(runs) - 1)), Text(ratio))
    return table


def norm_decisions(lines: Sequence[str]) -> list[str]:
    """Decisions on norms, those that are alike as one line; what else was considered is in run.json."""
    alike: dict[str, list[str]] = {}
    for line in lines:
        name, _, decision = line.partition(": ")
        alike.setdefault(decision.partition(";")[0], []).append(name)
    shown = [
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {decision}"
        for decision, names in alike.items()
    ]
    return [*shown[:MOST_DECISIONS], *(["reasons of each in run.json"] if lines else [])]


def show(console: Console, runs: list[RunDocument]) -> None:
    """Prints the screen, advice, decisions on norm caching, and what is not modelled."""
    from rich.text import Text

    console.print(first_screen(runs))
    for run in runs:
        title = f"{run.weights}/{run.activations}" if len(runs) > 1 else "run"
        console.print(Text(f"Costliest operators ({title})", style="bold"))
        for line in run.advice:
            console.print(Text(f"  {plain(line)}"))
        for call in sorted(run.host_calls, key=lambda call: -call.ms)[:MOST_CALLS]:
            shown = ", ".join(plain(node) for node in call.nodes[:MOST_NODES])
            more = f" and {len(call.nodes) - MOST_NODES} more" if len(call.nodes) > MOST_NODES else ""
            console.print(Text(f"  on the host: {shown}{more} ({call.ms:.3g} ms): {plain(call.reason)}"))
        for line in run.stored_weights:
            console.print(Text(f"  {plain(line)}"))
        for line in run.schedule:
            console.print(Text(f"  schedule: {plain(line)}"))
        for line in norm_decisions(run.norm_cache_decisions):
            console.print(Text(f"  norm cache: {plain(line)}"))
        for line in (*core_lines(run.cores), *run.core_decisions):
            console.print(Text(f"  {plain(line)}"))
    console.print(Text("Not modelled", style="bold"))
    for line in dict.fromkeys(line for run in runs for line in run.not_modelled):
        console.print(Text(f"  {plain(line)}"))
