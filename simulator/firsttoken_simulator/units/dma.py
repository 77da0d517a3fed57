"""DMA engine: a descriptor is walked request by request, one burst each, with a bounded number in flight.

After `setup_cycles` a descriptor sends its requests in address order; request i waits until request i - outstanding
has come back (slots free in order). The next descriptor starts when the last request is sent; completion is in order
per queue. Ports of the scratchpad and the bus are booked when a request is sent. Bursts are whole: a row that
starts or ends inside a burst costs that burst, and rows that touch in DRAM are one row.
A gather first reads its indices, waits for them, then reads the rows `spread(number)` of the table, where the number
of an index is its address over its size of 8 bytes, so that timing needs no data.
"""

import numpy as np
from numba import njit

from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.types import Space
from firsttoken_compiler.target.target import Target
from firsttoken_simulator.units.compiled import INNER
from firsttoken_simulator.units.dram import P_BURST_BYTES, P_POW2, P_SH_BURST
from firsttoken_simulator.units.layout import (
    GATHER,
    Q_BASE,
    Q_BURST,
    Q_GATHER,
    Q_I,
    Q_J,
    Q_LAST,
    Q_LATEST,
    T_ADDRESS,
    T_KIND,
    T_N0,
    T_N1,
    T_RUN,
    T_S0,
    T_S1,
    T_TABLE,
    T_TABLE_COUNT,
    T_TABLE_ROWS,
    T_TABLE_RUN,
    T_TABLE_S0,
)

_MASK = 0xFFFFFFFF


def resolve(target: Target) -> tuple[int, int]:
    """(setup in femtoseconds, requests in flight)."""
    return target.dma.setup_cycles * target.period_fs, target.dma.outstanding


@njit(_nrt=False, error_model="numpy")
def spread(number: int, rows: int) -> int:
    """Row of the table that stands for index `number`: a fixed integer hash (two multiply-xorshift rounds on 32 bits).

    Works on arrays too. The constants are those of Wellons' `lowbias32`, the second cut to 31 bits to stay within
    int64.
    """
    mixed = number & 0x7FFFFFFF
    mixed = ((mixed ^ (mixed >> 16)) * 0x7FEB352D) & _MASK
    mixed = ((mixed ^ (mixed >> 15)) * 0x46CA68B) & _MASK
    mixed = mixed ^ (mixed >> 16)
    return (mixed * rows) >> 32


def walk(code: np.ndarray, operand: int) -> tuple[np.ndarray, ...]:
    """(address, n0, s0, n1, s1, run) of the DRAM side of copies, touching rows merged; `code`: one opcode."""
    at = word.operand_column(operand)
    n0, n1, run = (code[:, word.DIMS + i].copy() for i in range(3))
    address, s0, s1 = (code[:, at + i].copy() for i in (1, 2, 3))
    joined = (n1 == 1) | (s1 == run)
    run = np.where(joined, run * n1, run)
    n1, s1 = np.where(joined, n0, n1), np.where(joined, s0, s1)
    n0, s0 = np.where(joined, 1, n0), np.where(joined, 0, s0)
    joined = (n0 == 1) & ((n1 == 1) | (s1 == run))
    run, n1 = np.where(joined, run * n1, run), np.where(joined, 1, n1)
    return address, n0, s0, n1, s1, run


def bursts(walked: tuple[np.ndarray, ...], burst_bytes: int) -> np.ndarray:
    """Requests per instruction of `walk`'s rows, exactly; rows that lie differently in a burst are counted singly."""
    address, n0, s0, n1, s1, run = walked

    def count(start: np.ndarray, length: np.ndarray) -> np.ndarray:
        return np.where(length > 0, (start + length - 1) // burst_bytes - start // burst_bytes + 1, 0)

    total = n0 * n1 * count(address, run)
    for i in np.flatnonzero(((s0 % burst_bytes != 0) & (n0 > 1)) | ((s1 % burst_bytes != 0) & (n1 > 1))):
        starts = address[i] + np.arange(n0[i])[:, None] * s0[i] + np.arange(n1[i])[None, :] * s1[i]
        total[i] = count(starts, run[i]).sum()
    return np.asarray(total, np.int64)


def in_dram(kind: np.ndarray) -> np.ndarray:
    """Whether operands of these kinds lie in DRAM."""
    return np.asarray(word.space_of(kind) == int(Space.DRAM))


@njit(**INNER)
def _set_run(queues: np.ndarray, q: int, address: int, length: int, p: np.ndarray) -> None:
    """Points the walk of queue `q` at the bursts of one run."""
    if p[P_POW2]:
        queues[q, Q_BURST] = address >> p[P_SH_BURST]
        queues[q, Q_LAST] = (address + length - 1) >> p[P_SH_BURST]
    else:
        queues[q, Q_BURST] = address // p[P_BURST_BYTES]
        queues[q, Q_LAST] = (address + length - 1) // p[P_BURST_BYTES]


@njit(**INNER)
def begin(table: np.ndarray, queues: np.ndarray, q: int, i: int) -> None:
    """Puts the walk of queue `q` before the first run of instruction `i`; `advance_run` follows."""
    queues[q, Q_I] = 0
    queues[q, Q_J] = -1
    queues[q, Q_BASE] = table[i, T_ADDRESS]
    queues[q, Q_GATHER] = 0
    queues[q, Q_LATEST] = 0


@njit(**INNER)
def advance_run(table: np.ndarray, queues: np.ndarray, q: int, i: int, p: np.ndarray) -> int:
    """Moves to the next run: 0 if there is none, 1 if it can go at once, 2 if it needs all earlier data first."""
    result = 1
    if queues[q, Q_GATHER] == 0:
        queues[q, Q_J] += 1
        if queues[q, Q_J] >= table[i, T_N1]:
            queues[q, Q_J] = 0
            queues[q, Q_I] += 1
            queues[q, Q_BASE] += table[i, T_S0]
        if table[i, T_RUN] > 0 and table[i, T_N1] > 0 and queues[q, Q_I] < table[i, T_N0]:
            _set_run(queues, q, queues[q, Q_BASE] + queues[q, Q_J] * table[i, T_S1], table[i, T_RUN], p)
            return 1
        if table[i, T_KIND] != GATHER or table[i, T_TABLE_RUN] <= 0:
            return 0
        queues[q, Q_GATHER] = 1
        queues[q, Q_I] = -1
        result = 2
    queues[q, Q_I] += 1
    if queues[q, Q_I] >= table[i, T_TABLE_COUNT]:
        return 0
    row = spread(table[i, T_ADDRESS] // 8 + queues[q, Q_I], table[i, T_TABLE_ROWS])
    _set_run(queues, q, table[i, T_TABLE] + row * table[i, T_TABLE_S0], table[i, T_TABLE_RUN], p)
    return result
