"""Energy: action counts times the target's table, and static power times time, per operator and per component.

Sums are integers of femtojoules (one per operator and part, rounded once), so that the total equals the sum over
operators and the sum over components exactly. Totals come three times: with every value of the table as it is, with
every one at its low and with every one at its high bound. That is how far the sources disagree, no interval that
holds with a probability.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np

from firsttoken_compiler.errors import OptionError
from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.matmul import Matmul
from firsttoken_compiler.isa.program import Program
from firsttoken_compiler.isa.types import Dtype
from firsttoken_compiler.target.rates import pair_name
from firsttoken_compiler.target.target import Energy, Target
from firsttoken_simulator.report.critical import critical_path, op_time
from firsttoken_simulator.timeline import Timeline

COMPONENTS: Final = ("mac", "vector", "sram", "dram", "bus", "static")
PARTS: Final = {
    "mac": "mac", "vector": "vector", "spad_read": "sram", "spad_write": "sram", "accumulator": "sram",
    "dram_read": "dram", "dram_write": "dram", "dram_activate": "dram", "dram_refresh": "dram",
    "dram_background": "dram", "bus": "bus", "static": "static",
}  # fmt: skip
"""What is counted apart, and the component that it belongs to."""
BOUNDS: Final = ("low", "typical", "high")
_FJ_PER_PJ: Final = 1000
_MEMBERS: Final = np.array([[PARTS[part] == name for name in COMPONENTS] for part in PARTS], np.int64)


@dataclass(frozen=True, slots=True)
class Band:
    """One quantity with all values of the target at their low bounds, as they are, and at their high bounds."""

    low: float
    typical: float
    high: float

    def __add__(self, other: "Band") -> "Band":
        return Band(self.low + other.low, self.typical + other.typical, self.high + other.high)

    def scaled(self, factor: float) -> "Band":
        """Each bound times a factor of at least 0."""
        return Band(self.low * factor, self.typical * factor, self.high * factor)


@dataclass(frozen=True)
class EnergyResult:
    """Femtojoules: `fj[op, component]` in the order of `program.ops` and `COMPONENTS`.

    `dispatch_fj` is static power while the host dispatches the graph; no operator owns it. `parts_fj[bound, part]`, in
    the order of `BOUNDS` and `PARTS`, are sums over operators without dispatch. Everything but `host` and `system` is
    the NPU with its DRAM.
    """

    fj: np.ndarray
    dispatch_fj: int
    parts_fj: np.ndarray
    dispatch_parts_fj: np.ndarray
    """As `parts_fj`, while the host dispatches."""
    host_fj: np.ndarray
    """The host's polling from dispatch to the end, by bound."""

    @property
    def total_fj(self) -> int:
        """Everything, dispatch included."""
        return int(self.fj.sum()) + self.dispatch_fj

    @property
    def total_mj(self) -> float:
        """Everything in millijoules, dispatch included."""
        return self.total_fj / 1e12

    @property
    def by_component_mj(self) -> dict[str, float]:
        """Millijoules by component, dispatch included."""
        return {name: self.component(name).typical for name in COMPONENTS}

    @property
    def device(self) -> Band:
        """Millijoules from the first instruction to the last completion."""
        return _band(self.parts_fj.sum(axis=1))

    @property
    def total(self) -> Band:
        """Millijoules, dispatch included."""
        return _band((self.parts_fj + self.dispatch_parts_fj).sum(axis=1))

    @property
    def host(self) -> Band:
        """Millijoules of the host while it polls; zero where the target states no `energy.host_poll_w`."""
        return _band(self.host_fj)

    @property
    def system(self) -> Band:
        """Millijoules of NPU, DRAM and polling host."""
        return _band((self.parts_fj + self.dispatch_parts_fj).sum(axis=1) + self.host_fj)

    def component(self, name: str) -> Band:
        """Millijoules of one of `COMPONENTS`, dispatch included."""
        members = [part for part, owner in enumerate(PARTS.values()) if owner == name]
        return _band((self.parts_fj + self.dispatch_parts_fj)[:, members].sum(axis=1))

    def part(self, name: str) -> Band:
        """Millijoules of one of `PARTS`, dispatch included."""
        return _band((self.parts_fj + self.dispatch_parts_fj)[:, list(PARTS).index(name)])

    def nj(self, component: str) -> np.ndarray:
        """Nanojoules of one component per operator."""
        return np.asarray(self.fj[:, COMPONENTS.index(component)] / 1e6)

    @property
    def op_nj(self) -> np.ndarray:
        """Nanojoules per operator, all components."""
        return np.asarray(self.fj.sum(axis=1) / 1e6)


def _band(fj: np.ndarray) -> Band:
    low, typical, high = (int(value) / 1e12 for value in fj)
    return Band(low, typical, high)


def matmul_pairs(program: Program) -> tuple[np.ndarray, tuple[str, ...]]:
    """Operand types of the matrix instructions: index into the returned names per instruction, -1 for the others."""
    code = program.code
    is_matmul = code[:, word.OPCODE] == Matmul.OPCODE
    pairs = word.dtype_of(code[:, [word.operand_column(1), word.operand_column(2)]])[is_matmul]
    keys, inverse = np.unique(pairs, axis=0, return_inverse=True)
    which = np.full(len(code), -1, np.int64)
    which[is_matmul] = inverse.reshape(-1)
    return which, tuple(pair_name(Dtype(a), Dtype(w)) for a, w in keys.tolist())


def by_pair(program: Program, target: Target, table: dict[str, float] | dict[str, int], what: str) -> np.ndarray:
    """A table's value per instruction, 0 for those that are no matrix instruction.

    Raises OptionError when the table lacks a pair that the program multiplies.
    """
    which, names = matmul_pairs(program)
    for name in names:
        if name not in table:
            raise OptionError(f"target {target.name} has no {what} for {name}; it has {', '.join(table)}")
    values = np.array([*(float(table[name]) for name in names), 0.0])
    return np.asarray(values[which])


@dataclass(frozen=True)
class _Actions:
    """What each operator does, whatever it costs."""

    macs: dict[str, np.ndarray]
    """By pair of element types."""
    vector_ops: np.ndarray
    spad_read: np.ndarray
    spad_write: np.ndarray
    acc: np.ndarray
    dram_read: np.ndarray
    dram_write: np.ndarray
    activates: np.ndarray
    time_fs: np.ndarray
    refreshes: int
    total_fs: int

    @staticmethod
    def of(program: Program, timeline: Timeline) -> "_Actions":
        op, count = program.code[:, word.OP], len(program.ops)
        which, names = matmul_pairs(program)

        def per_op(values: np.ndarray) -> np.ndarray:
            return np.bincount(op, weights=values, minlength=count)

        line = timeline
        return _Actions(
            {name: per_op(np.where(which == index, line.macs, 0)) for index, name in enumerate(names)},
            per_op(line.vector_ops), per_op(line.spad_read_bytes), per_op(line.spad_write_bytes),
            per_op(line.acc_bytes), per_op(line.dram_read_bytes), per_op(line.dram_write_bytes),
            per_op(line.dram_activates), op_time(program, critical_path(program, line)),
            int(line.counters.get("dram_refreshes", 0)), line.total_fs,
        )  # fmt: skip

    def fj(self, table: Energy) -> np.ndarray:
        """Femtojoules by operator and part."""
        bit = 8 * table.dram_pj_per_bit
        refresh_fj = table.dram_refresh_pj * self.refreshes * _FJ_PER_PJ
        none = np.zeros(len(self.time_fs))
        femtojoules = {
            "mac": sum((macs * table.mac_pj[name] for name, macs in self.macs.items()), none) * _FJ_PER_PJ,
            "vector": self.vector_ops * table.vector_op_pj * _FJ_PER_PJ,
            "spad_read": self.spad_read * table.spad_read_pj_per_byte * _FJ_PER_PJ,
            "spad_write": self.spad_write * table.spad_write_pj_per_byte * _FJ_PER_PJ,
            "accumulator": self.acc * table.acc_pj_per_byte * _FJ_PER_PJ,
            "dram_read": self.dram_read * bit * _FJ_PER_PJ,
            "dram_write": self.dram_write * bit * _FJ_PER_PJ,
            "dram_activate": self.activates * table.dram_activate_pj * _FJ_PER_PJ,
            "dram_refresh": self.time_fs * (refresh_fj / self.total_fs) if self.total_fs else none,
            # One watt is one femtojoule per femtosecond.
            "dram_background": self.time_fs * table.dram_background_w,
            "bus": (self.dram_read + self.dram_write) * table.bus_pj_per_byte * _FJ_PER_PJ,
            "static": self.time_fs * table.static_w,
        }
        return np.rint(np.stack([femtojoules[part] for part in PARTS], axis=1)).astype(np.int64)


def energy(program: Program, timeline: Timeline, target: Target) -> EnergyResult:
    """Energy of one run of `program`; what lasts as long as the run is shared by the time on the critical path.

    Raises OptionError when the energy table lacks a pair that the program multiplies.
    """
    by_pair(program, target, target.energy.mac_pj, "energy.mac_pj")
    actions = _Actions.of(program, timeline)
    dispatch_fs = target.host.dispatch_us * 1e9
    tables = [target.energy_at(bound) for bound in BOUNDS]
    fj = [actions.fj(table) for table in tables]
    dispatch = np.zeros((len(BOUNDS), len(PARTS)), np.int64)
    names = list(PARTS)
    dispatch[:, names.index("static")] = [round(dispatch_fs * table.static_w) for table in tables]
    dispatch[:, names.index("dram_background")] = [round(dispatch_fs * table.dram_background_w) for table in tables]
    host = [round((dispatch_fs + timeline.total_fs) * table.host_poll_w) for table in tables]
    typical = BOUNDS.index("typical")
    return EnergyResult(
        fj[typical] @ _MEMBERS,
        int(dispatch[typical].sum()),
        np.stack([each.sum(axis=0) for each in fj]),
        dispatch,
        np.array(host, np.int64),
    )


def standing_w(target: Target) -> tuple[Band, Band]:
    """Watts that flow whatever happens: of the NPU with its DRAM while it is on, and of the host while it polls."""
    tables = [target.energy_at(bound) for bound in BOUNDS]
    low, typical, high = (table.static_w + table.dram_background_w for table in tables)
    return Band(low, typical, high), Band(*(table.host_poll_w for table in tables))
