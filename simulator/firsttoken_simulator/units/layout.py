"""Columns of the integer arrays that the hot loop and the units share."""

from typing import Final

from firsttoken_compiler.isa import word

NONE, READ, WRITE, GATHER, COMPUTE = range(5)
"""Kinds of instruction, column `T_KIND`. `NONE` takes no time."""

T_KIND, T_SIGNAL = 0, 1
T_HEAD, T_SLICES, T_SLICE, T_PORTS, T_BANKS, T_TAIL = range(2, 8)
"""Compute: femtoseconds before the slices, their number; per slice its length, port and bank time; then the tail."""
T_ADDRESS, T_N0, T_S0, T_N1, T_S1, T_RUN = range(2, 8)
"""DMA: `n0 * n1` DRAM runs of `run` bytes at `address + i * s0 + j * s1`; for a gather those of its indices."""
T_TABLE, T_TABLE_S0, T_TABLE_ROWS, T_TABLE_RUN, T_TABLE_COUNT = range(8, 13)
"""Gather: the table's address, stride and rows; bytes per row and rows to read."""
T_WAITS: Final = 13
"""`word.MAX_WAITS` pairs (queue or -1, value)."""
T_FIELDS: Final = T_WAITS + 2 * word.MAX_WAITS

BLOCKED, START, SLICES, FINISH, ISSUE, DONE = range(6)
"""What a queue does next."""

Q_AT, Q_END, Q_SEMAPHORE, Q_PHASE, Q_TIME, Q_COUNT = range(6)
"""Of a queue: position in `Table.order`, its end, the semaphore's count, phase, time of the next event, slices left."""
Q_PENDING, Q_COMPLETED, Q_LATEST, Q_SLOT = range(6, 10)
"""Of a queue with DMA: oldest instruction in flight, when the newest one completes, latest return so far of the
present one, and the slot of the ring of requests in flight that is used next."""
Q_I, Q_J, Q_BASE, Q_BURST, Q_LAST, Q_GATHER = range(10, 16)
"""The walk over a descriptor: run (i, j), base address of i, next and last burst of the run, whether in a gather's
table."""
Q_FIELDS: Final = 16

O_HEAD, O_START, O_ISSUE_END, O_END, O_STALL_SPAD, O_STALL_DRAM, O_FIELDS = range(7)
"""Columns of the result; see `Timeline`."""

M_BUS_FREE, M_NEXT_COMPLETION, M_FIELDS = range(3)
"""Of the machine: when the bus is free, and when the next DMA instruction completes."""

X_PERIOD, X_ENGINES, X_SETUP, X_OUTSTANDING, X_BUS, X_LATENCY, X_PORTS, X_STRETCHES, X_FIELDS = range(9)
"""Constants: clock period, queues per core, DMA setup, requests in flight, bus time and latency, port time per
burst, whether stretches of a stream may be sent at once (tests compare the times of both)."""
