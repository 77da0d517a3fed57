"""Streams of reads against one DRAM channel: what bandwidth and latency its controller gives, nothing else in the way.

A stream is an array of places (bank, row) in order; columns do not matter to timing. Streams by order of addresses:

- `interleaved`: consecutive bursts go to another bank each, then to the next column, then to the next row;
- `row_linear`: all columns of a row, then the next bank, then the next row;
- `random_runs`: a random row of a random bank, `run` bursts of it.
"""

from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numba import njit

from firsttoken_compiler.target.target import Dram, DramCommands
from firsttoken_simulator.kernels import forget_stale
from firsttoken_simulator.units.dram_commands import Device, new_device
from firsttoken_simulator.units.dram_scheduler import (
    C_DEPTH,
    NEVER,
    S_CONFLICTS,
    S_FINISHED,
    S_HITS,
    S_MISSES,
    S_READS,
    Controller,
    new_controller,
    offer,
    tick,
    transfer,
)

ROWS: Final = 1 << 14
"""Rows that random streams draw from; any number that is large beside the queue gives the same."""


class Measured(NamedTuple):
    """What a stream got."""

    reads: int
    """Reads whose data came back."""
    clocks: int
    gigabytes_per_s: float
    latency_ns: float
    """Mean, from a read's acceptance to its last byte."""
    hits: int
    misses: int
    conflicts: int


class Channel(NamedTuple):
    """One channel to measure."""

    dram: Dram
    commands: DramCommands
    device: Device
    controller: Controller


def channel(dram: Dram, commands: DramCommands) -> Channel:
    """A channel at rest."""
    return Channel(dram, commands, new_device(dram, commands), new_controller(dram, commands))


def banks(c: Channel) -> int:
    """Banks of the channel, all ranks together."""
    return c.commands.ranks * c.dram.bank_groups * c.dram.banks_per_group


def bank_numbers(c: Channel) -> np.ndarray:
    """The banks in the order in which consecutive ones differ in rank, then in group, where they can."""
    shape = (c.commands.ranks, c.dram.bank_groups, c.dram.banks_per_group)
    return np.arange(banks(c)).reshape(shape).transpose(2, 1, 0).ravel()


def page_bursts(c: Channel) -> int:
    """Bursts in one row."""
    return max(1, c.dram.page_bytes // c.dram.burst_bytes)


def interleaved(c: Channel, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(bank, row) of `count` bursts, another bank each."""
    i = np.arange(count)
    return bank_numbers(c)[i % banks(c)], i // (banks(c) * page_bursts(c))


def row_linear(c: Channel, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(bank, row) of `count` bursts, row after row."""
    i = np.arange(count) // page_bursts(c)
    return bank_numbers(c)[i % banks(c)], i // banks(c)


def random_runs(c: Channel, count: int, run: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """(bank, row) of `count` bursts in runs of `run`, drawn evenly."""
    draws = np.random.default_rng(seed)
    starts = -(-count // run)
    bank, row = draws.integers(0, banks(c), starts), draws.integers(0, ROWS, starts)
    return np.repeat(bank, run)[:count], np.repeat(row, run)[:count]


def saturate(c: Channel, places: tuple[np.ndarray, np.ndarray], clocks: int = 0, per_clock: int = 0) -> Measured:
    """Feeds reads as fast as the controller takes them, `per_clock` at most in each clock (0: no limit).

    Ends when the last one has been taken, or after `clocks` (0: no limit); reads in flight then do not count.
    """
    limit = clocks or NEVER
    found = _run(c.device, c.controller, *places, limit, per_clock or NEVER, 1, False)
    return _measured(c, *found)


def paced(c: Channel, places: tuple[np.ndarray, np.ndarray], every: int, clocks: int = 0) -> Measured:
    """Feeds one read every `every` clocks."""
    return _measured(c, *_run(c.device, c.controller, *places, clocks or NEVER, 1, every, False))


def one_by_one(c: Channel, places: tuple[np.ndarray, np.ndarray]) -> Measured:
    """Feeds the next read when the data of the one before is back."""
    return _measured(c, *_run(c.device, c.controller, *places, NEVER, 1, 1, True))


def _measured(c: Channel, reads: int, clocks: int, waited: int) -> Measured:
    s, period = c.controller.s, c.commands.clock_ns
    return Measured(
        reads, clocks, reads * c.dram.burst_bytes / max(1, clocks) / period, waited * period / max(1, reads),
        int(s[S_HITS]), int(s[S_MISSES]), int(s[S_CONFLICTS]),
    )  # fmt: skip


@njit(cache=True, error_model="numpy")
def _run(
    device: Device, con: Controller, bank: np.ndarray, row: np.ndarray, limit: int, per_clock: int, every: int,
    chained: bool,
) -> tuple[int, int, int]:  # fmt: skip
    """(reads done, clocks, sum of their latencies in clocks)."""
    total, sent, back, t, ready_at = len(bank), 0, 0, 0, 0
    taken = np.zeros(total, np.int64)
    done = np.zeros(total, np.int64)
    awaited = chained or every > 1
    while t < limit and (sent < total or (awaited and back < total)):
        soon = tick(device, con, t)
        for i in range(con.s[S_FINISHED]):
            tag = con.finished[i, 0]
            done[tag] = con.finished[i, 1]
            back += 1
            if chained:
                ready_at = done[tag]
        count = 0
        while sent < total and count < per_clock and t >= ready_at and offer(con, bank[sent], row[sent], False, sent):
            taken[sent] = t
            sent += 1
            count += 1
            if chained:
                ready_at = NEVER
            elif every > 1:
                ready_at += every
        moved = transfer(con)
        if count > 0 or moved or (sent < total and con.s[S_READS] < con.c[C_DEPTH] and t + 1 >= ready_at):
            soon = t + 1
        elif sent < total and ready_at > t:
            soon = min(soon, ready_at)
        t = min(soon, limit)
    if awaited and back == total:
        t = max(t, done.max())
    reads, waited = 0, 0
    for i in range(sent):
        if 0 < done[i] <= t:
            reads += 1
            waited += done[i] - taken[i]
    return reads, t, waited


forget_stale(Path(_run.stats.cache_path), Path(__file__).stem)
