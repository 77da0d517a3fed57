"""Builds the run document from a program, its timeline and its energy."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass
from importlib import metadata
from typing import Any, Final

import numpy as np

from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.program import Program
from firsttoken_compiler.isa.types import ENGINES_PER_CORE, Engine
from firsttoken_compiler.target.target import Target
from firsttoken_simulator.energy import COMPONENTS, EnergyResult
from firsttoken_simulator.report.advice import advise, ladder
from firsttoken_simulator.report.cores import core_rows
from firsttoken_simulator.report.critical import CAUSES, CriticalPath, critical_path
from firsttoken_simulator.report.document import (
    WHOLE,
    DecodeSection,
    HostCallRow,
    LayerRow,
    OpRow,
    Path,
    PathLink,
    RunDocument,
    StepTable,
    TargetValue,
)
from firsttoken_simulator.report.energy_table import energy_bands
from firsttoken_simulator.report.ladder import Ladder, ladder_of
from firsttoken_simulator.report.occupancy import arenas, occupancy, occupancy_points, spills
from firsttoken_simulator.report.steps import HOLDERS, OF_OPERATORS
from firsttoken_simulator.report.tables import OpTable, bound_word, dram_bytes_by_kind, fold, layer_of, whole_cycles
from firsttoken_simulator.timeline import Timeline

MAX_LINKS: Final = 1000
_META: Final = (
    "prompt_tokens", "past", "weights", "activations", "group", "norm_cache", "kv_cache", "acts_range", "seed",
    "student", "phase",
)  # fmt: skip
_TEXTS: Final = ("student", "weights", "activations", "group", "norm_cache", "kv_cache", "acts_range", "phase")


@dataclass(frozen=True)
class Phase:
    """One graph execution folded for reporting: the prompt, or one decoded token."""

    program: Program
    timeline: Timeline
    energy: EnergyResult
    target: Target
    path: CriticalPath
    table: OpTable
    steps: Ladder

    @property
    def dispatch_fs(self) -> int:
        """Host time before the first instruction."""
        return round(self.target.host.dispatch_us * 1e9)

    @property
    def fallbacks(self) -> list[str]:
        """ONNX nodes that the host computes."""
        return [node for call in self.program.hosts for node in call.nodes]

    @property
    def host_fs(self) -> int:
        """Host time outside the program: the dispatch. Calls of the host are part of the timeline."""
        return self.dispatch_fs

    @property
    def total_fs(self) -> int:
        """Host and NPU."""
        return self.host_fs + self.timeline.total_fs

    @property
    def cycles(self) -> np.ndarray:
        """Cycles of the host, then of each operator: whole numbers that sum to the cycles of the total, rounded up."""
        parts = np.concatenate([[self.host_fs], self.table.attributed_fs])
        return whole_cycles(parts, self.timeline.period_fs)

    @property
    def mac_util_pct(self) -> float:
        """Share of the NPU's time that its matrix units would need at their peak rates."""
        return float(_percent(self.table.ideal_matrix_fs.sum(), self.timeline.total_fs))

    @property
    def power_w(self) -> float:
        """Mean over host and NPU time."""
        return self.energy.total_fj / self.total_fs if self.total_fs else 0.0

    def time_by_bound_ms(self) -> dict[str, float]:
        """Critical time by cause, host first; the parts sum to the total."""
        parts = {"dispatch": self.dispatch_fs, "host_fallback": 0}
        parts |= {name: int(fs) for name, fs in zip(CAUSES, self.table.time_fs.sum(axis=0), strict=True)}
        parts["host_fallback"] = parts.pop("host")
        return {name: fs / 1e12 for name, fs in parts.items()}


def make_phase(program: Program, timeline: Timeline, target: Target, energy: EnergyResult) -> Phase:
    """Folds one execution."""
    path = critical_path(program, timeline)
    steps = ladder_of(program, timeline, target, path)
    return Phase(program, timeline, energy, target, path, fold(program, timeline, target, path), steps)


def build_run(
    program: Program,
    timeline: Timeline,
    target: Target,
    energy: EnergyResult,
    *,
    decode: tuple[Program, Timeline, EnergyResult] | None = None,
    options: Any = None,
) -> RunDocument:
    """The document of one run. `options` (a mapping or a dataclass) overrides what `program.meta` says of the options.

    `decode` is one token's execution on the same target; without it `tpot_ms` is None.
    """
    phase = make_phase(program, timeline, target, energy)
    section = None if decode is None else _decode_section(make_phase(decode[0], decode[1], target, decode[2]))
    document = {
        **_identity(phase, options),
        **_totals(phase),
        "ttft_ms": phase.total_fs / 1e12,
        "ttft_cycles": int(phase.cycles.sum()),
        "host_cycles": int(phase.cycles[0]),
        "tpot_ms": None if section is None else section.tpot_ms,
        "tokens_per_s": None if section is None else section.tokens_per_s,
        "dispatch_energy_nj": energy.dispatch_fj / 1e6,
        "dram_counters": {name: int(timeline.counters[name]) for name in sorted(timeline.counters)},
        "sram_peak_bytes": program.spad_bytes,
        "accumulator_peak_bytes": program.acc_bytes,
        "weight_bytes": sum(tensor.nbytes for tensor in program.tensors if tensor.kind in ("weight", "constant")),
        "kv_bytes": sum(tensor.nbytes for tensor in program.of_kind("kv")),
        "instructions": len(program),
        "arenas": arenas(program),
        "sram_occupancy": occupancy_points(occupancy(program, timeline), timeline.total_fs),
        "spilled": spills(program),
        "advice": advise(program, phase.table, target, timeline, phase.steps.steps),
        "ladder": ladder(phase.table, timeline, target, phase.host_fs, program.cores, _whole(program)),
        "critical_path": _path(phase),
        "layers": _layers(phase),
        "decode": section,
        "ops": op_rows(phase),
    }
    return RunDocument.model_validate(document)


def _steps(phase: Phase) -> StepTable:
    """Where the time of every operator goes."""
    return StepTable(
        names=list(OF_OPERATORS), dispatch_fs=phase.dispatch_fs, rows=phase.steps.steps.tolist(), holders=list(HOLDERS),
        critical=phase.steps.critical.tolist(),
    )  # fmt: skip


def _whole(program: Program) -> str:
    """What the whole time passes until."""
    return "result" if program.meta.get("phase") in WHOLE else "first token"


def _identity(phase: Phase, options: Any) -> dict[str, Any]:
    """What was run on what, with which options."""
    target, program = phase.target, phase.program
    meta: dict[str, Any] = {**dict.fromkeys(_META, ""), "prompt_tokens": 0, "past": 0, "seed": 0}
    meta |= {key: value for key, value in program.meta.items() if key in _META and value is not None}
    meta |= _options(options)
    rate = target.clock_hz * target.cores
    return {
        "tool_version": _version(),
        **{key: str(meta[key]) for key in _TEXTS},
        **{key: int(meta[key]) for key in ("prompt_tokens", "past", "seed")},
        "target": target.name,
        "target_hash": target.content_hash,
        "target_description": target.description,
        "clock_hz": target.clock_hz,
        "peak_macs_per_s": {pair: macs * rate for pair, macs in target.matrix.macs_per_cycle.items()},
        "dram_peak_bytes_per_s": target.dram.peak_bytes_per_s,
        "host_fallbacks": phase.fallbacks,
        "host_calls": _host_calls(phase),
        "norm_cache_decisions": [str(line) for line in program.meta.get("norm_decisions", [])],
        "cores": core_rows(program, phase.timeline),
        "core_decisions": [str(line) for line in program.meta.get("cores", [])],
        "mix": [str(rule) for rule in program.meta.get("mix", [])],
        "weight_formats": program.meta.get("weight_formats", []),
        "stored_weights": [str(line) for line in program.meta.get("stored_weights", [])],
        "not_modelled": list(target.not_modelled),
        "target_values": _target_values(target),
    }


def _host_calls(phase: Phase) -> list[HostCallRow]:
    """The program's calls of the host, in the order of their operators."""
    operators = [op for op in phase.program.ops if op.kind == "host"]
    line, rows = phase.timeline, []
    for call, op in zip(phase.program.hosts, operators, strict=True):
        mine = slice(op.first, op.last)
        moved = int(line.dram_read_bytes[mine].sum() + line.dram_write_bytes[mine].sum())
        ms = float(line.busy_fs[mine].sum()) / 1e12
        rows.append(HostCallRow(name=op.name, nodes=list(call.nodes), reason=call.reason, ms=ms, dram_bytes=moved))
    return rows


def _totals(phase: Phase) -> dict[str, Any]:
    """Quantities that the prompt and one decoded token share."""
    timeline, energy = phase.timeline, phase.energy
    return {
        "host_ms": phase.host_fs / 1e12,
        "npu_ms": timeline.total_ms,
        "energy_mj": energy.total_mj,
        "energy_by_component_mj": energy.by_component_mj,
        "energy_bands": energy_bands(energy, phase.target, phase.total_fs),
        "average_power_w": phase.power_w,
        "dram_read_bytes": int(timeline.dram_read_bytes.sum()),
        "dram_write_bytes": int(timeline.dram_write_bytes.sum()),
        "dram_bytes_by_kind": dram_bytes_by_kind(phase.program, timeline),
        "macs": int(timeline.macs.sum()),
        "mac_util_pct": phase.mac_util_pct,
        "time_by_bound_ms": phase.time_by_bound_ms(),
        "steps": _steps(phase),
    }


def _options(options: Any) -> dict[str, Any]:
    if options is None:
        return {}
    if is_dataclass(options) and not isinstance(options, type):
        options = asdict(options)
    if not isinstance(options, Mapping):
        raise TypeError(f"options must be a mapping or a dataclass, not {type(options).__name__}")
    named = {("activations" if key == "acts" else str(key)): value for key, value in options.items()}
    return {key: value for key, value in named.items() if key in _META and value is not None}


def _version() -> str:
    try:
        return metadata.version("firsttoken")
    except metadata.PackageNotFoundError:  # run from a source tree that is not installed
        return "unknown"


def _percent(part: np.ndarray, whole: np.ndarray | int) -> np.ndarray:
    """100 * part / whole, 0 where the whole is 0."""
    return np.asarray(100.0 * part / np.where(np.asarray(whole) == 0, np.inf, whole))


def op_rows(phase: Phase) -> list[OpRow]:
    """One row per operator, in program order."""
    table, cycles = phase.table, phase.cycles
    dram_fs = (table.dram_read_bytes + table.dram_write_bytes) * (1e15 / phase.target.dram.peak_bytes_per_s)
    durations = {
        "end_cycle": table.end_fs,
        "compute_cycles": table.matrix_fs + table.vector_fs,
        "dma_cycles": table.dma_fs,
        "stall_dma": table.stall_dma_fs,
        "stall_sram_bank": table.stall_spad_fs,
        "stall_sync": table.stall_sync_fs,
        "slack_cycles": table.slack_fs,
        "roofline_cycles": np.maximum(table.ideal_matrix_fs, dram_fs.astype(np.int64)),
    }
    columns: dict[str, np.ndarray] = {
        "start_cycle": table.start_fs // phase.timeline.period_fs,
        **{name: -(-fs // phase.timeline.period_fs) for name, fs in durations.items()},
        "cycles": cycles[1:],
        "cycles_pct": _percent(cycles[1:], int(cycles.sum())),
        "macs": table.macs,
        "macs_pct": _percent(table.macs, int(table.macs.sum())),
        "mac_util_pct": _percent(table.ideal_matrix_fs, table.compute_span_fs),
        "mapping_eff_pct": _percent(table.ideal_matrix_fs * phase.program.cores, table.matrix_busy_fs),
        "dram_read_bytes": table.dram_read_bytes,
        "dram_write_bytes": table.dram_write_bytes,
        "sram_read_bytes": table.spad_read_bytes,
        "sram_write_bytes": table.spad_write_bytes,
        "energy_nj": phase.energy.op_nj,
        **{f"energy_{name}_nj": phase.energy.nj(name) for name in COMPONENTS},
    }
    lists = {name: values.tolist() for name, values in columns.items()}
    return [
        OpRow.model_validate(
            {
                **{name: values[i] for name, values in lists.items()},
                **{name: getattr(op, name) for name in ("kind", "module", "w_bits", "a_bits", "m", "n", "k", "tile")},
                "op": op.name,
                "onnx_node": " ".join(op.onnx_nodes),
                "engine": "host" if op.kind == "host" else _engine(table, i),
                "bound": bound_word(table.time_fs[i]),
                "instr_first": op.first,
                "instr_last": op.last,
            }
        )
        for i, op in enumerate(phase.program.ops)
    ]


def _engine(table: OpTable, i: int) -> str:
    """The engine that an operator is on for longest."""
    times = {"matrix": table.matrix_fs[i], "vector": table.vector_fs[i]}
    name = max(times, key=lambda key: int(times[key]))
    return name if times[name] else ("dma" if table.dma_fs[i] else "none")


def _path(phase: Phase) -> Path:
    """Neighbours of one operator join; a link's bound is the engine that holds most of it."""
    op = phase.program.code[phase.path.instruction, word.OP]
    engine = phase.program.code[phase.path.instruction, word.QUEUE] % ENGINES_PER_CORE
    bounds = np.flatnonzero(np.diff(op, prepend=-1))
    ends = np.append(bounds[1:], len(op))
    chain = []
    for first, last in list(zip(bounds.tolist(), ends.tolist(), strict=True))[:MAX_LINKS]:
        time = np.bincount(engine[first:last], weights=phase.path.length_fs[first:last], minlength=ENGINES_PER_CORE)
        time[Engine.DMA_IN] += time[Engine.DMA_OUT]
        chain.append(
            PathLink(
                op=phase.program.ops[op[first]].name,
                bound=("dma", "dma", "matrix", "vector", "host")[int(np.argmax(time))],
                from_ms=int(phase.path.from_fs[first]) / 1e12,
                to_ms=int(phase.path.to_fs[last - 1]) / 1e12,
                instructions=last - first,
            )
        )
    return Path(instructions=len(op), links=len(bounds), chain=chain)


def _layers(phase: Phase) -> list[LayerRow]:
    groups: dict[str, list[int]] = {}
    for i, op in enumerate(phase.program.ops):
        groups.setdefault(layer_of(op.module, op.name), []).append(i)
    rows, table = [], phase.table
    for name, members in groups.items():
        time = table.time_fs[members].sum(axis=0)
        rows.append(
            LayerRow(
                name=name,
                ms=int(time.sum()) / 1e12,
                ms_by_bound={cause: int(fs) / 1e12 for cause, fs in zip(CAUSES, time, strict=True)},
                energy_mj=int(phase.energy.fj[members].sum()) / 1e12,
                dram_bytes=int((table.dram_read_bytes + table.dram_write_bytes)[members].sum()),
                macs=int(table.macs[members].sum()),
            )
        )
    return rows


def _decode_section(phase: Phase) -> DecodeSection:
    total_ms = phase.total_fs / 1e12
    document = {
        **_totals(phase),
        "past": int(phase.program.meta.get("past", 0)),
        "tpot_ms": total_ms,
        "tpot_cycles": int(phase.cycles.sum()),
        "tokens_per_s": 1e3 / total_ms if total_ms else 0.0,
        "ops": op_rows(phase),
    }
    return DecodeSection.model_validate(document)


def _target_values(target: Target) -> list[TargetValue]:
    rows = []
    for path, known in target.provenance.items():
        low, high = target.bounds.get(path, (None, None))
        value = target.value(path)
        value = ", ".join(map(str, value)) if isinstance(value, tuple) else value
        rows.append(TargetValue(path=path, value=value, grade=known.grade, source=known.source, low=low, high=high))
    return rows
