"""The DRAM as the machine drives it: controllers that look ahead and place bursts, or that place every command.

Both run the program's table with the same queues, units and bus; which one a target has is `Target.dram_commands`.
"""

from typing import Protocol

import numpy as np

from firsttoken_compiler.target.target import Target
from firsttoken_simulator import kernels
from firsttoken_simulator.units import dram, layout


class Memory(Protocol):
    """One run's DRAM and the hot loop that goes with it."""

    activates: np.ndarray
    """Rows opened, by instruction."""

    def advance(self, program: tuple[np.ndarray, ...], budget: int) -> int:
        """Runs `program` (table, order, queues, result, constants, machine, ports, flight); results as in `kernels`."""
        ...

    def drain(self, total_fs: int) -> None:
        """Places what the controllers still hold."""
        ...

    def counters(self, total_fs: int) -> dict[str, int]:
        """Bursts, row hits, misses and conflicts, refreshes."""
        ...


def memory_of(target: Target, instructions: int, queues: int) -> Memory:
    """The DRAM of the target, at rest, for a program of that size."""
    if target.dram_commands is None:
        return LookAhead(target, instructions)
    from firsttoken_simulator.memory_commands import Commands

    return Commands(target, instructions, queues)


class LookAhead:
    """Controllers that decide everything about a burst when they accept it."""

    def __init__(self, target: Target, instructions: int) -> None:
        self.p = dram.resolve(target)
        self.state = dram.new_state(self.p)
        self.activates = np.zeros(max(1, instructions), np.int64)

    def advance(self, program: tuple[np.ndarray, ...], budget: int) -> int:
        """See `Memory`."""
        *others, flight = program
        return int(kernels.advance(*others, flight.ravel(), self.p, *self.state, self.activates, budget))

    def drain(self, total_fs: int) -> None:
        """See `Memory`."""
        kernels.drain(self.p, *self.state, self.activates, total_fs)

    def counters(self, total_fs: int) -> dict[str, int]:
        """See `Memory`."""
        words = self.state.words.reshape(-1, int(self.p[dram.P_WORDS]))
        hits, misses, conflicts = (int(words[:, at].sum()) for at in (dram.C_HITS, dram.C_MISSES, dram.C_CONFLICTS))
        return {
            "dram_bursts": hits + misses + conflicts,
            "dram_row_hits": hits,
            "dram_row_misses": misses,
            "dram_row_conflicts": conflicts,
            "dram_refreshes": int(self.p[dram.P_CHANNELS]) * (total_fs // int(self.p[dram.P_REFRESH])),
        }


def machine_state() -> np.ndarray:
    """The bus free, no completion expected."""
    machine = np.zeros(layout.M_FIELDS, np.int64)
    machine[layout.M_NEXT_COMPLETION] = dram.FAR
    return machine
