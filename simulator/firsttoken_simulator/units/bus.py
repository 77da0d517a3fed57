"""The bus between the DMA engines of all cores and the DRAM controllers: one server, first come first served.

A request books the time that its data takes (burst bytes over bus bytes per cycle) when it is sent, whichever way the
data flows; the latency is paid once, on the way back.
"""

import numpy as np
from numba import njit

from firsttoken_compiler.target.target import Target
from firsttoken_simulator.units.compiled import INLINED
from firsttoken_simulator.units.layout import M_BUS_FREE


def resolve(target: Target) -> tuple[int, int]:
    """(femtoseconds that one burst occupies the bus, latency in femtoseconds)."""
    burst = -(-target.dram.burst_bytes * target.period_fs // target.dma.bus_bytes_per_cycle)
    return burst, target.dma.bus_latency_cycles * target.period_fs


@njit(**INLINED)
def book(machine: np.ndarray, t: int, occupancy: int) -> int:
    """When the transfer that asks at `t` gets the bus; books it."""
    at = max(t, machine[M_BUS_FREE])
    machine[M_BUS_FREE] = at + occupancy
    return at
