"""All channels of a DRAM whose controllers place commands: the address map, and the channels' states side by side.

The map sends chunks of `interleave_bytes` round the data buses. Within one, an address is cut into row, rank, bank,
group and column; `dram.map` says in which order, by name or as fields from the most significant to the least:

- `bank-interleaved`: row-column-rank-bank-group
- `group-interleaved`: row-rank-bank-column-group
- `row-linear`: row-rank-bank-group-column

Pseudo channels are data buses of their own, so that the chunk decides which of a channel's an address lies in.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from firsttoken_compiler.target.limits import DRAM_FIELDS, DRAM_MAPS
from firsttoken_compiler.target.target import Dram, Target
from firsttoken_simulator.units.compiled import INNER
from firsttoken_simulator.units.dram_commands import Device, new_device
from firsttoken_simulator.units.dram_scheduler import Controller, new_controller

(
    A_BURST, A_CHUNK, A_BUSES, A_PER_CHANNEL, A_BANKS_PER_RANK, A_PER_GROUP, A_CLOCK, A_DELAY, A_FIRST, A_COUNT,
) = (0, 1, 2, 3, 4, 5, 6, 7, 8, 18)  # fmt: skip
"""Columns of the address map: bytes of a burst, bursts of a chunk, data buses, those of one channel, banks of a rank
and of a group, femtoseconds of a clock, of the controller's delay; then five pairs (field, bits) from the least
significant."""

ROW, RANK, BANK, GROUP, COLUMN = range(5)


class Channels(NamedTuple):
    """The arrays of `Device` and `Controller` with the channel in front, and the map."""

    ready: np.ndarray
    row: np.ndarray
    hits: np.ndarray
    acts: np.ndarray
    table: np.ndarray
    first: np.ndarray
    k: np.ndarray
    node: np.ndarray
    s: np.ndarray
    c: np.ndarray
    entry: np.ndarray
    free: np.ndarray
    lines: np.ndarray
    banked: np.ndarray
    counted: np.ndarray
    finished: np.ndarray
    next: np.ndarray
    """`[channels]`: the clock of the next look."""
    a: np.ndarray
    """The address map `A_*`."""


def resolve(target: Target) -> np.ndarray:
    """The address map of the target's DRAM."""
    d, commands = target.dram, target.dram_commands
    assert commands is not None
    a = np.zeros(A_COUNT, np.int64)
    own_buses = 1 if commands.shared_data_bus else commands.ranks
    a[[A_BURST, A_CHUNK]] = d.burst_bytes, max(1, d.interleave_bytes // d.burst_bytes)
    a[[A_BUSES, A_PER_CHANNEL]] = d.channels, own_buses
    a[[A_BANKS_PER_RANK, A_PER_GROUP]] = d.bank_groups * d.banks_per_group, d.banks_per_group
    a[[A_CLOCK, A_DELAY]] = target.fs(commands.clock_ns), target.fs(d.controller_ns)
    sizes = {
        "rank": commands.ranks // own_buses, "bank": d.banks_per_group, "group": d.bank_groups, "column": _columns(d),
        "row": 1,
    }  # fmt: skip
    order = DRAM_MAPS.get(d.map, d.map).split("-")
    for at, name in enumerate(reversed(order)):
        a[A_FIRST + 2 * at : A_FIRST + 2 * at + 2] = DRAM_FIELDS.index(name), sizes[name].bit_length() - 1
    return a


def _columns(d: Dram) -> int:
    return max(1, d.page_bytes // d.burst_bytes)


def new_channels(target: Target) -> Channels:
    """All channels at rest."""
    assert target.dram_commands is not None
    a = resolve(target)
    count = int(a[A_BUSES] // a[A_PER_CHANNEL])
    device, controller = (
        new_device(target.dram, target.dram_commands),
        new_controller(target.dram, target.dram_commands),
    )
    shared = {"table", "first", "k", "node", "c"}
    arrays = {
        name: array if name in shared else np.stack([array] * count)
        for name, array in (device._asdict() | controller._asdict()).items()
    }
    return Channels(**arrays, next=np.ones(count, np.int64), a=a)


@njit(**INNER)
def device_of(ch: Channels, at: int) -> Device:
    """The device of channel `at`."""
    return Device(ch.ready[at], ch.row[at], ch.hits[at], ch.acts[at], ch.table, ch.first, ch.k, ch.node)


@njit(**INNER)
def controller_of(ch: Channels, at: int) -> Controller:
    """The controller of channel `at`."""
    return Controller(
        ch.s[at], ch.c, ch.entry[at], ch.free[at], ch.lines[at], ch.banked[at], ch.counted[at], ch.finished[at]
    )


@njit(**INNER)
def place(a: np.ndarray, burst: int) -> tuple[int, int, int]:
    """(channel, bank, row) of burst number `burst` (byte address over burst bytes)."""
    chunk = burst // a[A_CHUNK]
    bus = chunk % a[A_BUSES]
    inner = chunk // a[A_BUSES] * a[A_CHUNK] + burst % a[A_CHUNK]
    row, rank, bank, group = 0, 0, 0, 0
    for at in range(A_FIRST, A_COUNT, 2):
        field, bits = a[at], a[at + 1]
        if field == ROW:
            row = inner
            break
        digit = inner & ((1 << bits) - 1)
        inner >>= bits
        if field == RANK:
            rank = digit
        elif field == BANK:
            bank = digit
        elif field == GROUP:
            group = digit
    if a[A_PER_CHANNEL] > 1:
        rank = bus % a[A_PER_CHANNEL]
    return bus // a[A_PER_CHANNEL], rank * a[A_BANKS_PER_RANK] + group * a[A_PER_GROUP] + bank, row
