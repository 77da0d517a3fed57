"""The DRAM whose controllers place every command, as the machine drives it."""

import numpy as np

from firsttoken_compiler.target.target import Target
from firsttoken_simulator import kernels_commands as kernels
from firsttoken_simulator.units import dram
from firsttoken_simulator.units.dram_channels import A_CLOCK, new_channels
from firsttoken_simulator.units.dram_scheduler import S_CONFLICTS, S_HITS, S_MISSES, S_REFRESHES


class Commands:
    """Controllers of commands beside the queues; see `Memory`."""

    def __init__(self, target: Target, instructions: int, queues: int) -> None:
        self.p = dram.resolve(target)
        self.channels = new_channels(target)
        self.hold = np.zeros((queues, kernels.H_FIELDS), np.int64)
        self.returns = np.zeros((max(1, instructions), kernels.R_FIELDS), np.int64)
        self.state = np.zeros(kernels.D_FIELDS, np.int64)
        self.state[kernels.D_NEXT] = self.channels.next.min() * self.channels.a[A_CLOCK]
        self.activates = np.zeros(max(1, instructions), np.int64)

    def advance(self, program: tuple[np.ndarray, ...], budget: int) -> int:
        """See `Memory`."""
        return int(
            kernels.advance(
                *program, self.hold, self.returns, self.state, self.channels, self.p, self.activates, budget
            )
        )

    def drain(self, total_fs: int) -> None:
        """See `Memory`."""
        kernels.drain(self.channels, self.activates)

    def counters(self, total_fs: int) -> dict[str, int]:
        """See `Memory`."""
        s = self.channels.s.sum(axis=0)
        hits, misses, conflicts = (int(s[column]) for column in (S_HITS, S_MISSES, S_CONFLICTS))
        return {
            "dram_bursts": hits + misses + conflicts,
            "dram_row_hits": hits,
            "dram_row_misses": misses,
            "dram_row_conflicts": conflicts,
            "dram_refreshes": int(s[S_REFRESHES]),
        }
