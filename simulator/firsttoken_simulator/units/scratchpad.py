"""Scratchpad: banks interleaved by `bank_bytes`, each serving `bank_bytes` per cycle, shared by the units of a core.

Two rules. The bytes of matrix unit, vector unit and DMA together pass at most `banks * bank_bytes` per cycle, first
come first served. And one strided stream is limited by the bank it hits most: its rows queue there, while the other
banks stay free for other units. Accumulators have ports of their own.
"""

from functools import lru_cache

import numpy as np
from numba import njit

from firsttoken_compiler.target.target import Target
from firsttoken_simulator.units.compiled import INLINED


def width(target: Target) -> int:
    """Bytes per cycle over all banks."""
    return target.scratchpad.banks * target.scratchpad.bank_bytes


@lru_cache(maxsize=65536)
def conflict_factor(run: int, stride: int, banks: int, bank_bytes: int) -> float:
    """Cycles that a long stream of rows takes over the cycles that its bytes need: at least 1, at most bytes per cycle.

    Rows of `run` bytes start `stride` bytes apart, row 0 at a bank boundary. A word (`bank_bytes`) that two
    consecutive rows share is read once. Exact over one period of the pattern, `banks * bank_bytes / gcd(stride, banks
    * bank_bytes)` rows. Closed forms: run = stride = a multiple of all banks gives 1; a stride of all banks gives
    banks / (words per row).
    """
    span = banks * bank_bytes
    if run <= 0:
        return 1.0
    if stride == run:
        run, stride = span, span
    rows = span // int(np.gcd(abs(stride), span)) if stride else 1
    starts = np.arange(rows, dtype=np.int64) * abs(stride)
    first, last = starts // bank_bytes, (starts + run - 1) // bank_bytes
    if stride:
        first[1:] = np.maximum(first[1:], last[:-1] + (first[1:] == last[:-1]))
    words = np.maximum(last - first + 1, 0)
    load = np.full(banks, int((words // banks).sum()), np.int64)
    rest = words % banks
    edges = np.zeros(2 * banks + 1, np.int64)
    np.add.at(edges, first % banks, 1)
    np.add.at(edges, first % banks + rest, -1)
    covered = np.cumsum(edges[:-1])
    load += covered[:banks] + covered[banks:]
    return max(1.0, float(load.max()) * span / (rows * run))


def stream_cycles(target: Target, total_bytes: int, run: int, stride: int) -> float:
    """Cycles that one stream of `total_bytes` in rows of `run` bytes needs from the banks when nothing else runs."""
    pad = target.scratchpad
    return total_bytes * conflict_factor(run, stride, pad.banks, pad.bank_bytes) / width(target)


@njit(**INLINED)
def book(ports: np.ndarray, core: int, t: int, occupancy: int) -> int:
    """When the access that asks at `t` gets the ports of `core`; books them for `occupancy` femtoseconds."""
    at = max(t, ports[core])
    ports[core] = at + occupancy
    return at
