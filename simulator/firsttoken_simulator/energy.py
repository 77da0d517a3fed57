"""Energy: action counts times the target's table, and static power times time, per operator and per component.

Sums are integers of femtojoules (one per operator and component, rounded once), so that the total equals the sum over
operators and the sum over components exactly.
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
from firsttoken_compiler.target.target import Target
from firsttoken_simulator.report.critical import critical_path, op_time
from firsttoken_simulator.timeline import Timeline

COMPONENTS: Final = ("mac", "vector", "sram", "dram", "bus", "static")
_FJ_PER_PJ: Final = 1000


@dataclass(frozen=True)
class EnergyResult:
    """Femtojoules: `fj[op, component]` in the order of `program.ops` and `COMPONENTS`.

    `dispatch_fj` is static power while the host dispatches the graph; no operator owns it.
    """

    fj: np.ndarray
    dispatch_fj: int

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
        """Millijoules by component; static includes dispatch."""
        totals = [int(value) for value in self.fj.sum(axis=0)]
        totals[COMPONENTS.index("static")] += self.dispatch_fj
        return {name: value / 1e12 for name, value in zip(COMPONENTS, totals, strict=True)}

    def nj(self, component: str) -> np.ndarray:
        """Nanojoules of one component per operator."""
        return np.asarray(self.fj[:, COMPONENTS.index(component)] / 1e6)

    @property
    def op_nj(self) -> np.ndarray:
        """Nanojoules per operator, all components."""
        return np.asarray(self.fj.sum(axis=1) / 1e6)


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


def energy(program: Program, timeline: Timeline, target: Target) -> EnergyResult:
    """Energy of one run of `program`; static power is shared by the time each operator holds the critical path.

    Raises OptionError when the energy table lacks a pair that the program multiplies.
    """
    table = target.energy
    mac_pj = by_pair(program, target, table.mac_pj, "energy.mac_pj")
    moved = timeline.dram_read_bytes + timeline.dram_write_bytes
    actions = (
        timeline.macs * mac_pj,
        timeline.vector_ops * table.vector_op_pj,
        timeline.spad_read_bytes * table.spad_read_pj_per_byte
        + timeline.spad_write_bytes * table.spad_write_pj_per_byte
        + timeline.acc_bytes * table.acc_pj_per_byte,
        moved * (8 * table.dram_pj_per_bit) + timeline.dram_activates * table.dram_activate_pj,
        moved * table.bus_pj_per_byte,
    )
    count = len(program.ops)
    op = program.code[:, word.OP]
    picojoules = [np.bincount(op, weights=action, minlength=count) for action in actions]
    fj = np.rint(np.stack(picojoules, axis=1) * _FJ_PER_PJ).astype(np.int64)
    time_fs = op_time(program, critical_path(program, timeline))
    # One watt is one femtojoule per femtosecond.
    static = np.rint(time_fs * table.static_w).astype(np.int64)
    dispatch = round(target.host.dispatch_us * 1e9 * table.static_w)
    return EnergyResult(np.concatenate([fj, static[:, None]], axis=1), dispatch)
