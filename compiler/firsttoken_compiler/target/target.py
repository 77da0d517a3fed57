"""The target: frozen sections of integers and rates, resolved from a TOML file by `load`."""

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from firsttoken_compiler.errors import TargetError
from firsttoken_compiler.isa.types import Space
from firsttoken_compiler.target.calibration import Fit, Tunable

GRADES = ("datasheet", "measured", "derived", "fitted", "assumed")
"""How a value is known. `assumed`: not public, chosen within physical bounds until it is calibrated."""


_OFF_AT_ZERO = (
    ("matrix", "windows"), ("matrix", "tile_columns"), ("matrix", "row_bytes_per_cycle"),
    ("vector", "stages"), ("vector", "narrow_cycles"), ("vector", "drain_cycles"), ("vector", "fold_cycles"),
    ("scratchpad", "accumulator_slots"),
)  # fmt: skip
"""Values that change nothing where they are 0; they count in the hash of a target only otherwise."""

DEFAULT_RUNTIME = "default"
"""Name of the runtime where a target states none."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """Matrix unit. `systolic`: rows x columns array, k along the rows. `tile`: m x k x n per issue."""

    kind: str
    rows: int
    """Systolic: array rows. Tile: k per issue."""
    columns: int
    """Systolic: array columns. Tile: n per issue."""
    tile_m: int
    """Tile: m per issue; 0 for systolic."""
    dataflow: str
    """`ws`, `os` or `is` for systolic: what stays in the array (weights, outputs, inputs); `tile` for tile."""
    double_buffered: bool
    """Systolic ws and is: the next operand that stays loads while the present one is in use."""
    macs_per_cycle: dict[str, int]
    """Peak by (activation, weight) pair, e.g. `int8xint4`; a pair that is absent is not supported."""
    fill_cycles: int
    """Tile: pipeline depth paid once per instruction. Systolic: 0, fill and drain follow from the array."""
    issue_cycles: int
    """Decode and issue per instruction."""
    arrays: int = 1
    """Systolic: arrays of rows x columns side by side, which divide the columns of a product (its rows with `is`)."""
    tile_bytes: int = 0
    """Boundary on which the weights that the unit reads begin, in scratchpad and DRAM; 0: none of its own."""
    weight_cycles: dict[str, float] = field(default_factory=dict)
    """Tile: cycles by pair to turn rows x columns weights into what the unit multiplies, each time they are read, while
    it waits; a pair that is absent takes none."""
    tile_columns: int = 0
    """Tile: columns that the unit makes side by side at most; of a product's columns it makes the widest half, quarter
    or multiple of `columns` that divides them. 0: as many as a schedule says."""
    row_bytes_per_cycle: float = 0.0
    """Tile: bytes of activations per cycle that reach it, again for every `tile_columns`; 0: as it needs them."""
    windows: bool = False
    """The unit walks the windows of an image in the scratchpad by itself: a convolution reads pixels where they lie."""


@dataclass(frozen=True, slots=True)
class Vector:
    """Vector unit: `lanes` fp32 lanes in each of `contexts` that share an instruction's rows."""

    lanes: int
    contexts: int
    startup_cycles: int
    cycles: dict[str, float]
    """Cycles per lane-vector by operation class (`COST_CLASSES`)."""
    byte_lanes: int = 0
    """Lanes for elements of a byte, where additions, products and look-ups of small integers fill registers so; 0: they
    take the lanes of fp32."""
    table_entries: int = 0
    """Entries of the largest table that the lanes look numbers up in by one operation; 0: they compare and select."""
    stages: int = 0
    """Operations of an instruction that a lane-vector passes in one cycle, where they are stages of a pipeline that
    takes the next lane-vector as soon as the slowest stage can; 0: one after the other."""
    narrow_cycles: float = 0.0
    """Cycles per lane-vector of results that are made of fewer bits than fp32; 0: the store ports narrow."""
    drain_cycles: float = 0.0
    """Cycles per lane-vector of sums that leave the accumulators; 0: they are read as fast as the scratchpad."""
    fold_cycles: float = 0.0
    """Cycles in which a reduction folds the lanes of a row into one number, a row per context at a time; 0: they are in
    `cycles.reduce`."""


@dataclass(frozen=True, slots=True)
class Attention:
    """How the kernel of attention over a prompt is mapped, where a target has one of its own; else as any other."""

    rows: int
    """Rows of queries that its products take at a time, in place of `matrix.tile_m`."""
    contexts: int
    """Contexts that the vector work takes: it runs where the sums of its products lie, and pays no `drain_cycles`."""
    value_columns: int = 0
    """Columns of the values that scores are made for; they are made again for the next ones. 0: once for all."""
    skips_masked: bool = True
    """Whether keys that a causal mask hides from a whole tile of rows are left out; else they are worked on."""
    row_cycles: float = 0.0
    """Cycles per row of queries that nothing overlaps: it comes, its parts are merged, and it leaves."""


@dataclass(frozen=True, slots=True)
class Scratchpad:
    """Scratchpad of one core, banks interleaved by `bank_bytes`."""

    bytes: int
    banks: int
    bank_bytes: int
    """Bytes per bank and cycle; also the interleave unit."""
    alignment_bytes: int
    """Boundary on which every region of the scratchpad begins."""
    accumulator_bytes: int
    accumulator_slots: int = 0
    """Tiles of a product's sums that exist at a time; 1: the next products wait until the sums have left; 0: as many as
    keep the units busy."""


@dataclass(frozen=True, slots=True)
class Dma:
    """DMA engines of one core (one per direction) and the bus that all cores share."""

    setup_cycles: int
    """Descriptor fetch and decode before the first request of an instruction."""
    outstanding: int
    """Requests in flight per engine."""
    bus_bytes_per_cycle: int
    bus_latency_cycles: int
    decoupled: bool = True
    """Every engine of a core has a queue of its own; false: one sequencer issues all instructions in program order, so
    that loads, products and stores overlap only where one is issued before another one ends."""


@dataclass(frozen=True, slots=True)
class Dram:
    """External memory; times in nanoseconds, one request is one burst."""

    standard: str
    channels: int
    channel_bits: int
    data_rate_mtps: int
    burst_length: int
    bank_groups: int
    banks_per_group: int
    page_bytes: int
    interleave_bytes: int
    """Consecutive bytes on a channel before the next one."""
    map: str
    """Which banks consecutive bursts of a channel go round: all (`bank-interleaved`), one of each group
    (`group-interleaved`), or none (`row-linear`, a page at a time). With `DramCommands` any order of the fields of an
    address, e.g. `row-rank-group-bank-column`."""
    queue_depth: int
    """Requests that a channel's controller looks ahead over."""
    tcl_ns: float
    tcwl_ns: float
    trcd_ns: float
    trp_ns: float
    tras_ns: float
    twr_ns: float
    trtp_ns: float
    tccd_s_ns: float
    tccd_l_ns: float
    twtr_ns: float
    trtw_ns: float
    trrd_ns: float
    tfaw_ns: float
    trefi_ns: float
    trfc_ns: float
    refresh: str
    """`all-bank` or `per-bank`."""
    controller_ns: float
    """Fixed delay of controller, PHY and return path, added to every read."""
    alignment_bytes: int = 64
    """Boundary on which every region begins."""

    @property
    def burst_bytes(self) -> int:
        """Bytes of one burst on one channel."""
        return self.channel_bits * self.burst_length // 8

    @property
    def peak_bytes_per_s(self) -> float:
        """All channels together."""
        return self.channels * self.channel_bits / 8 * self.data_rate_mtps * 1e6


@dataclass(frozen=True, slots=True)
class DramCommands:
    """What a controller that places every DRAM command needs beyond `Dram`: finer timings, and how it schedules.

    Without it the controller is the one that looks ahead over its queue and places bursts (`queue_depth`, in order of
    arrival within a bank).
    """

    clock_ns: float
    """Clock of the command bus; every timing is rounded up to it."""
    ranks: int
    """Ranks of a channel, or the pseudo channels that share its command bus."""
    shared_data_bus: bool
    """Ranks share the data bus; pseudo channels do not."""
    command_buses: int
    """1, or 2 where commands to rows and to columns have a bus each (HBM)."""
    activate_clocks: int
    """Clocks of the command bus that an activate takes."""
    column_clocks: int
    """Clocks of the command bus that a read or write takes."""
    trc_ns: float
    trcd_wr_ns: float
    """Activate to write; `dram.trcd_ns` is activate to read."""
    trp_ab_ns: float
    """Precharge of all banks; `dram.trp_ns` is that of one."""
    tppd_ns: float
    """Precharge to precharge."""
    trrd_l_ns: float
    """Activates in one bank group; `dram.trrd_ns` is between groups."""
    tccd_l_wr_ns: float
    """Writes in one bank group; `dram.tccd_l_ns` is that of reads."""
    twtr_s_ns: float
    """Write to read of another bank group; `dram.twtr_ns` is within one."""
    trank_ns: float
    """Gap on the data bus when another rank drives it."""
    stagger_refresh: bool
    """Ranks are refreshed in turn, evenly spread, not all at the same time."""
    trfc_pb_ns: float
    """Refresh of one bank; `dram.trfc_ns` is that of all banks, whichever `dram.refresh` asks for."""
    tpbr2act_ns: float
    """Refresh of one bank to an activate of another."""
    tpbr2pbr_ns: float
    """Refresh of one bank to that of another."""
    taad_ns: float
    """Most time between the two halves of an activate; 0: it is one command."""
    twck_post_ns: float
    """How long the data clock runs on after a burst; 0: it needs no start."""
    queue: str
    """`shared`: one queue each for reads and writes. `per-bank`: behind these, one for each bank."""
    bank_queue_depth: int
    """Requests in a bank's queue (`per-bank`)."""
    row_hit_limit: int
    """Hits after which a row may be closed although another request hits it (`per-bank`); 0: never."""
    page: str
    """`open`: a row stays until another is wanted. `closed`: it closes behind its last queued hit."""
    write_low: float
    """Share of the write queue at which a drain ends."""
    write_high: float
    """Share of the write queue at which a drain begins."""


@dataclass(frozen=True, slots=True)
class Host:
    """The CPU beside the NPU: what a graph launch and a fallback cost."""

    dispatch_us: float
    """From the request to the first instruction, once per graph."""
    fallback_us: float
    """From the NPU's request to the start of a call of the host, once per call."""
    flops: float
    """Operations per second of a call's computation."""
    bytes_per_s: float
    """Rate of a call's operands, results and the tensors between its nodes."""


@dataclass(frozen=True, slots=True)
class Runtime:
    """How a runtime of the host cuts a language model into graphs and launches them; a table `[runtimes.NAME]`."""

    launch_us: float
    """Of the host per launch of a graph: dispatch, synchronisation, and what it does between two launches."""
    node_us: float = 0.0
    """Per operator of a graph, where the runtime dispatches them one by one."""
    chunk_tokens: int = 0
    """Rows of a graph that reads a part of the prompt; 0: the whole prompt is one graph."""
    context_buckets: tuple[int, ...] = ()
    """Contexts that graphs are compiled for, of which the smallest that holds all rows is launched; empty: graphs have
    the length that is needed."""
    host_roles: tuple[str, ...] = ()
    """Roles of weights whose operators the CPU computes, such as `token_embd` and `output`."""
    host_weight_bits: float = 16.0
    """Bits per weight of what lies on the CPU's side, scales included."""
    all_logits: bool = False
    """Whether the head computes every row of a graph; else only the last one, in the graph of every chunk."""
    concatenates_cache: bool = False
    """Whether graphs copy the rows before a chunk or a token and its own together, which attention then reads."""
    group_us: float = 0.0
    """Per group of weights of a product of int8 by int8, where each is a task whose sums the host adds up."""
    attention_us: float = 0.0
    """Per attention of several rows, beyond `node_us`: its kernel is a configuration that is loaded first."""
    turned_bytes_per_s: float = 0.0
    """Rate at which the host turns rows of heads into heads of rows for an attention that makes a head in parts, and
    its results back; 0: nothing is turned."""


@dataclass(frozen=True, slots=True)
class Energy:
    """Energy per action and static power; see each value's source for its process node."""

    mac_pj: dict[str, float]
    """Per multiply-accumulate by pair."""
    vector_op_pj: float
    """Per fp32 lane operation."""
    spad_read_pj_per_byte: float
    spad_write_pj_per_byte: float
    acc_pj_per_byte: float
    dram_pj_per_bit: float
    dram_activate_pj: float
    bus_pj_per_byte: float
    static_w: float
    """Leakage and clock tree while the NPU is on, and the DRAM's refresh and standby unless they are stated."""
    dram_refresh_pj: float = 0.0
    """Per refresh command; 0: within `static_w`."""
    dram_background_w: float = 0.0
    """The DRAM's standby power while the NPU is on; 0: within `static_w`."""
    host_poll_w: float = 0.0
    """The host while it polls for the end of a run, beside the NPU and its DRAM; 0: not modelled."""


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where one value comes from."""

    grade: str
    source: str


OPTIONAL_ENERGY = ("dram_refresh_pj", "dram_background_w", "host_poll_w")
"""Values of `Energy` that a file may leave out: what they stand for is then not told apart, or not modelled."""


@dataclass(frozen=True)
class Target:
    """An NPU. `Target.load(name_or_path)` reads a preset or a TOML file."""

    name: str
    description: str
    clock_hz: float
    cores: int
    matrix: Matrix
    vector: Vector
    scratchpad: Scratchpad
    dma: Dma
    dram: Dram
    host: Host
    energy: Energy
    attention: Attention | None = None
    """How attention is mapped; without it, like other kernels."""
    dram_commands: DramCommands | None = None
    """How the DRAM's controller places commands; without it, how `Dram` says."""
    runtimes: dict[str, Runtime] = field(default_factory=dict)
    """By name; `runtime` finds one."""
    not_modelled: tuple[str, ...] = ()
    provenance: dict[str, Provenance] = field(default_factory=dict)
    """Dotted path of every value in the file to its grade and source."""
    bounds: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Lowest and highest value, by dotted path, of those of `energy` whose sources disagree."""
    calibration: tuple[Tunable, ...] = ()
    """What a fit to measurements may change."""
    fit: Fit | None = None
    """What its values of grade `fitted` were fitted to."""

    @staticmethod
    def load(name: "str | Path") -> "Target":
        """A preset by name or a `.toml` file; raises TargetError with the nearest name or the offending key."""
        from firsttoken_compiler.target.load import load_target

        return load_target(name)

    @property
    def period_fs(self) -> int:
        """Clock period in femtoseconds, the simulator's unit of time."""
        return round(1e15 / self.clock_hz)

    def runtime(self, name: str | None = None) -> Runtime:
        """The runtime of that name; without one the first of the file, or whole graphs at `host.dispatch_us` each.

        Raises TargetError for a name that the target does not have, naming those that it has.
        """
        if name is None or (name == DEFAULT_RUNTIME and name not in self.runtimes):
            return next(iter(self.runtimes.values()), None) or Runtime(self.host.dispatch_us)
        if name not in self.runtimes:
            known = ", ".join(self.runtimes) or DEFAULT_RUNTIME
            raise TargetError(
                f"target {self.name} has no runtime {name!r}, it has {known}: describe another one in a .toml file"
            )
        return self.runtimes[name]

    @cached_property
    def content_hash(self) -> str:
        """Hash of every value that can change a program or its time (sources, descriptions and runtimes do not)."""
        document = asdict(self)
        for key in ("description", "provenance", "not_modelled", "runtimes", "calibration", "fit"):
            document.pop(key)
        for section in ("attention", "dram_commands"):
            if document[section] is None:
                document.pop(section)
        if self.dma.decoupled:
            document["dma"].pop("decoupled")
        if self.matrix.arrays == 1:
            document["matrix"].pop("arrays")
        for section, key in _OFF_AT_ZERO:
            if not document[section][key]:
                document[section].pop(key)
        if not self.matrix.weight_cycles:
            document["matrix"].pop("weight_cycles")
        if not self.bounds:
            document.pop("bounds")
        for key in OPTIONAL_ENERGY:
            if not document["energy"][key]:
                document["energy"].pop(key)
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:16]

    def energy_at(self, bound: str) -> Energy:
        """The energy section with every value at its `low` or `high` bound, or as it is (`typical`).

        A value without bounds stands as it is, and so does one that was replaced by a value outside of them.
        """
        if bound == "typical":
            return self.energy
        at = ("low", "high").index(bound)

        def moved(path: str, value: float) -> float:
            limits = self.bounds.get(path, (value, value))
            return limits[at] if limits[0] <= value <= limits[1] else value

        changes: dict[str, Any] = {}
        for entry in fields(Energy):
            value = getattr(self.energy, entry.name)
            if isinstance(value, dict):
                changes[entry.name] = {key: moved(f"energy.{entry.name}.{key}", one) for key, one in value.items()}
            else:
                changes[entry.name] = moved(f"energy.{entry.name}", value)
        return Energy(**changes)

    def value(self, path: str) -> Any:
        """The value at a dotted path of `provenance`, e.g. `matrix.macs_per_cycle.int8xint4`."""
        section, *rest = path.split(".")
        found: Any = self if section == "npu" else getattr(self, section)
        for part in rest:
            found = found[part] if isinstance(found, dict) else getattr(found, part)
        return found

    def alignment(self, space: Space, matrix_weights: bool = False) -> int:
        """The boundary of regions in a memory; that of weights of the matrix unit where they are."""
        own = {Space.DRAM: self.dram.alignment_bytes, Space.SPAD: self.scratchpad.alignment_bytes}.get(space, 1)
        return max(own, self.matrix.tile_bytes) if matrix_weights else own

    def fs(self, nanoseconds: float) -> int:
        """Nanoseconds to femtoseconds."""
        return round(nanoseconds * 1e6)
