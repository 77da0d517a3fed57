"""The run document: what `run.json` holds, every report is drawn from, and `firsttoken diff` compares."""

from collections.abc import Callable
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict

from firsttoken_simulator.report.plain import plain_json

SCHEMA_VERSION: Final = 1
WHOLE: Final = {"encode": "input", "inference": "inference"}
"""Phases whose result is whole, with no first token of an answer, and what one of them is called."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class OpRow(_Part):
    """One operator. `cycles` is the time in which it alone decides the run; all rows sum to `ttft_cycles`.

    `start_cycle` and `end_cycle` span its first and last instruction and overlap with other operators.
    `compute_cycles`, `dma_cycles` and the stalls are sums over its instructions and may overlap too.
    """

    op: str
    kind: str
    onnx_node: str
    module: str
    engine: str
    w_bits: int
    a_bits: int
    m: int
    n: int
    k: int
    tile: str
    start_cycle: int
    end_cycle: int
    cycles: int
    cycles_pct: float
    compute_cycles: int
    dma_cycles: int
    stall_dma: int
    stall_sram_bank: int
    stall_sync: int
    slack_cycles: int
    bound: str
    macs: int
    macs_pct: float
    mac_util_pct: float
    mapping_eff_pct: float
    roofline_cycles: int
    dram_read_bytes: int
    dram_write_bytes: int
    sram_read_bytes: int
    sram_write_bytes: int
    energy_nj: float
    energy_mac_nj: float
    energy_vector_nj: float
    energy_sram_nj: float
    energy_dram_nj: float
    energy_bus_nj: float
    energy_static_nj: float
    instr_first: int
    instr_last: int


class LayerRow(_Part):
    """Operators of one layer (or one operator outside the layers): critical time by cause, energy, traffic."""

    name: str
    ms: float
    ms_by_bound: dict[str, float]
    energy_mj: float
    dram_bytes: int
    macs: int


class PathLink(_Part):
    """Consecutive instructions of one operator on the critical path."""

    op: str
    bound: str
    from_ms: float
    to_ms: float
    instructions: int


class Path(_Part):
    """The chain of instructions that decides the time, joined by operator."""

    instructions: int
    links: int
    chain: list[PathLink]
    """At most `MAX_LINKS` links from the start."""


class Rung(_Part):
    """One step from the ideal to the actual time."""

    name: str
    ms: float
    note: str


class StepTable(_Part):
    """The ladder from the ideal to the actual time of every operator: femtoseconds by step (docs/reports.md).

    The rows are in the order of `ops`; all of them with `dispatch_fs` sum to the whole time exactly.
    """

    names: list[str]
    dispatch_fs: int
    rows: list[list[int]]
    holders: list[str]
    critical: list[list[int]]
    """The same time of each operator by what held the critical path meanwhile, in the order of `holders`."""


class TargetValue(_Part):
    """One value of the target with where it comes from."""

    path: str
    value: float | int | str | bool
    grade: str
    source: str
    low: float | None = None
    """Bounds of an energy whose sources disagree."""
    high: float | None = None


class CoreRow(_Part):
    """What one core of several did: shares of the run's time in which its units worked, and its part of the sums."""

    core: int
    instructions: int
    macs: int
    matrix_pct: float
    vector_pct: float
    dram_read_bytes: int
    dram_write_bytes: int


class HostCallRow(_Part):
    """One call of the host: the ONNX nodes that the NPU cannot run, why, and what that costs."""

    name: str
    nodes: list[str]
    reason: str
    ms: float
    """Operands, dispatch, computation and results, as if nothing else ran."""
    dram_bytes: int


class WeightFormat(_Part):
    """Weights of one format."""

    format: str
    """`vectors`: norms, biases, rotary angles and what the host reads."""
    stored: bool
    """Whether the graph stores them so, whatever the options say."""
    matrices: int
    bytes: int


class ArenaRow(_Part):
    """How well the values between operators share one memory, in bytes: what they take, and what they must take."""

    memory: str
    values: int
    value_bytes: int
    bound_bytes: int
    """Of values that live at the same operator, at the fullest one."""
    peak_bytes: int
    ratio: float
    """Peak over bound."""
    reuse: float
    """Bytes of all values over the peak."""
    fragmentation: float
    """Share of the peak that no value holds at the fullest operator."""


class OccupancyPoint(_Part):
    """What the scratchpad holds at the fullest moment of a window that begins at `at_ms`."""

    at_ms: float
    resident_bytes: int
    """Values between operators."""
    working_bytes: int
    """What kernels work in."""


class SpillRow(_Part):
    """A value between operators that lies in DRAM, by the operator that writes it, and why."""

    value: str
    count: int
    bytes: int
    reason: str


class Range(_Part):
    """One quantity with every value of the target's energies at its low bound, as it is, and at its high bound.

    It says how far sources disagree; no probability belongs to it.
    """

    low: float
    typical: float
    high: float


class EnergyRow(_Part):
    """A component of the energy, or a part of one."""

    name: str
    part_of: str
    """The component that it is a part of; empty of a component."""
    low_mj: float
    typical_mj: float
    high_mj: float
    note: str
    """Why it is zero, or why it has no band."""


class EnergyBands(_Part):
    """Energy and mean power, low, typical and high. Components sum to `npu_mj`, that and `host_mj` to `system_mj`."""

    npu_mj: Range
    """NPU and DRAM, dispatch included: `energy_mj`."""
    host_mj: Range
    """The host while it polls for the end."""
    host_note: str
    """Why `host_mj` is zero."""
    system_mj: Range
    npu_power_w: Range
    system_power_w: Range
    rows: list[EnergyRow]


class DecodeSection(_Part):
    """One token after the prompt: the same quantities as for the prompt."""

    past: int
    tpot_ms: float
    tpot_cycles: int
    host_ms: float
    npu_ms: float
    tokens_per_s: float
    energy_mj: float
    energy_by_component_mj: dict[str, float]
    energy_bands: EnergyBands | None = None
    average_power_w: float
    dram_read_bytes: int
    dram_write_bytes: int
    dram_bytes_by_kind: dict[str, int]
    macs: int
    mac_util_pct: float
    time_by_bound_ms: dict[str, float]
    steps: StepTable | None = None
    ops: list[OpRow]


class RunDocument(_Part):
    """One run. Times include the host's dispatch; `ttft_ms = host_ms + npu_ms`.

    Totals equal sums: `ops[].cycles` (with `host_cycles`) to `ttft_cycles`, `energy_by_component_mj` to `energy_mj`,
    `ops[].energy_nj` with `dispatch_energy_nj` to `energy_mj`, `dram_bytes_by_kind` to bytes read and written,
    `time_by_bound_ms` to `ttft_ms`.
    """

    schema_version: Literal[1] = 1
    tool_version: str
    student: str
    target: str
    target_hash: str
    target_description: str
    clock_hz: float
    peak_macs_per_s: dict[str, float]
    dram_peak_bytes_per_s: float
    phase: str
    prompt_tokens: int
    past: int
    weights: str
    activations: str
    group: str
    norm_cache: str
    kv_cache: str = ""
    acts_range: str = ""
    seed: int
    ttft_ms: float
    ttft_cycles: int
    host_ms: float
    host_cycles: int
    npu_ms: float
    tpot_ms: float | None
    tokens_per_s: float | None
    energy_mj: float
    dispatch_energy_nj: float
    energy_by_component_mj: dict[str, float]
    energy_bands: EnergyBands | None = None
    """None of a document that an earlier release wrote."""
    average_power_w: float
    dram_read_bytes: int
    dram_write_bytes: int
    dram_bytes_by_kind: dict[str, int]
    dram_counters: dict[str, int]
    sram_peak_bytes: int
    accumulator_peak_bytes: int
    weight_bytes: int
    kv_bytes: int = 0
    """Keys and values in DRAM, for the rows in the cache and those of the prompt, with the scales of int8 ones."""
    macs: int
    mac_util_pct: float
    time_by_bound_ms: dict[str, float]
    instructions: int
    host_fallbacks: list[str]
    """ONNX nodes that the host computes."""
    host_calls: list[HostCallRow] = []
    norm_cache_decisions: list[str]
    cores: list[CoreRow] = []
    """Of a program that uses several cores."""
    core_decisions: list[str] = []
    """How work is divided over the cores of a target that has several."""
    mix: list[str] = []
    """Rules for the formats of some weights; the first that covers a matrix decides."""
    schedule: list[str] = []
    """What a given schedule covers of the run, and kernels of it that do not occur."""
    weight_formats: list[WeightFormat] = []
    """Formats that are in use; their bytes sum to `weight_bytes`."""
    stored_weights: list[str] = []
    """Products on weights that the graph stores quantised, which options do not touch: a line per type."""
    arenas: list[ArenaRow] = []
    sram_occupancy: list[OccupancyPoint] = []
    spilled: list[SpillRow] = []
    advice: list[str]
    not_modelled: list[str]
    ladder: list[Rung]
    steps: StepTable | None = None
    """None of a document that an earlier release wrote."""
    critical_path: Path
    layers: list[LayerRow]
    decode: DecodeSection | None
    target_values: list[TargetValue]
    ops: list[OpRow]

    @property
    def unit(self) -> str:
        """What times and energies are per."""
        return WHOLE.get(self.phase, "prompt")

    @property
    def read(self) -> str:
        """What the run reads."""
        return "one image" if self.phase == "inference" else f"{self.prompt_tokens} tokens"

    def to_json(self) -> str:
        """The text of `run.json`; the same run gives the same bytes."""
        return plain_json(self.model_dump_json(indent=1)) + "\n"

    @staticmethod
    def from_json(text: str | bytes) -> "RunDocument":
        """Inverse of `to_json`; raises ReportError naming the field that is wrong."""
        return _validated(RunDocument.model_validate_json, text)

    @staticmethod
    def from_document(document: dict[str, Any]) -> "RunDocument":
        """The same of parsed JSON."""
        return _validated(RunDocument.model_validate, document)

    def summary(self) -> dict[str, Any]:
        """Every field but the long tables."""
        return self.model_dump(exclude={"ops", "steps", "layers", "target_values", "critical_path"})


def _validated(read: Callable[[Any], RunDocument], given: Any) -> RunDocument:
    from pydantic import ValidationError

    from firsttoken_simulator.report.errors import ReportError

    try:
        return read(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "document"
        raise ReportError(
            f"not a run document of schema version {SCHEMA_VERSION}: {where}: {first['msg']} "
            f"({error.error_count()} problems); write one with 'firsttoken run -o'"
        ) from error
