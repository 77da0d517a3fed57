"""DRAM commands: which may follow which, and when. The device that a command-level controller drives.

Every JEDEC timing is a `Rule`: after one command, another must wait so many clocks, within a bank, a bank group, a rank
or the whole channel, or in the other ranks. `rules` writes them out for a target; `compile_rules` makes the table that
the compiled functions walk. The device answers two questions: when may a command be issued at the earliest
(`earliest`, changes nothing), and what follows from issuing it (`issue`).

All times are clocks of the command bus. A command of several clocks is dated by its first; timings count from its last,
as JEDEC counts them.
"""

import math
from typing import Final, NamedTuple

import numpy as np
from numba import njit

from firsttoken_compiler.target.target import Dram, DramCommands
from firsttoken_simulator.units.compiled import INNER

ACT, PRE, PREA, RD, WR, RDA, WRA, REF, REFB, COMMANDS = range(10)
"""Activate, precharge (a bank, all banks of a rank), read, write, the same with a precharge behind, refresh (of a rank,
of a bank)."""
READS: Final = (RD, RDA)
WRITES: Final = (WR, WRA)
NAMES: Final = ("ACT", "PRE", "PREA", "RD", "WR", "RDA", "WRA", "REF", "REFB")

BANK, GROUP, RANK, CHANNEL, OTHER_RANKS = range(5)
"""Where a rule holds: between commands to the same bank, group, rank or channel, or to different ranks."""

(
    K_BANKS, K_GROUPS, K_RANKS, K_PER_GROUP, K_FAW, K_BURST, K_CL, K_CWL, K_REFI, K_PER_BANK, K_AAD, K_WCK, K_BUSES,
    K_AT_ONCE, K_COUNT,
) = range(15)  # fmt: skip
"""Columns of the constants that `resolve` makes: banks and groups of the channel, ranks, banks of a group, then clocks:
the window of four activates, a burst, read and write latency, from one refresh command to the next; whether one bank is
refreshed at a time; the most clocks between the two halves of an activate (0: it is one command); those for which the
data clock runs on after a burst (0: it needs no start); command buses; refreshes that fall due at the same time."""

WINDOW: Final = 4
"""Activates that tFAW counts."""


class Rule(NamedTuple):
    """`after` waits `clocks` from any of `before`, where both address the same `level`."""

    level: int
    before: tuple[int, ...]
    after: tuple[int, ...]
    clocks: int


class Device(NamedTuple):
    """The state of one channel's banks, as arrays."""

    ready: np.ndarray
    """`[nodes, COMMANDS]`: earliest clock of each command by what the node has seen; banks, groups, ranks, channel."""
    row: np.ndarray
    """`[banks]`: the open row, -1 when closed."""
    hits: np.ndarray
    """`[banks]`: columns taken from the open row."""
    acts: np.ndarray
    """`[ranks, WINDOW]`: the newest activates, oldest first."""
    table: np.ndarray
    """`[rules, 3]`: level, command that waits, clocks."""
    first: np.ndarray
    """`[COMMANDS + 1]`: rows of `table` by the command that was issued."""
    k: np.ndarray
    """The constants `K_*`."""
    node: np.ndarray
    """`[banks, 2]`: where in `ready` the bank's group and rank are."""


def clocks(nanoseconds: float, clock_ns: float) -> int:
    """The fewest clocks that last `nanoseconds`; values that were rounded to picoseconds do not cost one more."""
    return max(0, math.ceil(nanoseconds / clock_ns - 0.02))


def burst_clocks(d: Dram, c: DramCommands) -> int:
    """Clocks of the data bus that one burst takes."""
    return max(1, round(d.burst_length * 1e3 / (d.data_rate_mtps * c.clock_ns)))


def rules(d: Dram, c: DramCommands) -> list[Rule]:
    """Every timing of the device, by JEDEC's names."""

    def n(nanoseconds: float) -> int:
        return clocks(nanoseconds, c.clock_ns)

    burst, cl, cwl = burst_clocks(d, c), n(d.tcl_ns), n(d.tcwl_ns)
    ras, rp, rc, rtp, wr = n(d.tras_ns), n(d.trp_ns), n(c.trc_ns), n(d.trtp_ns), cwl + burst + n(d.twr_ns)
    rp_ab, rfc, rfc_pb = n(c.trp_ab_ns), n(d.trfc_ns), n(c.trfc_pb_ns)
    columns = READS + WRITES
    bus = CHANNEL if c.shared_data_bus else RANK
    found = [
        Rule(bus, READS, READS, burst), Rule(bus, WRITES, WRITES, burst),
        Rule(RANK, READS, READS, n(d.tccd_s_ns)), Rule(GROUP, READS, READS, n(d.tccd_l_ns)),
        Rule(RANK, WRITES, WRITES, n(d.tccd_s_ns)), Rule(GROUP, WRITES, WRITES, n(c.tccd_l_wr_ns)),
        Rule(RANK, READS, WRITES, n(d.trtw_ns)),
        Rule(RANK, WRITES, READS, cwl + burst + n(c.twtr_s_ns)), Rule(GROUP, WRITES, READS, cwl + burst + n(d.twtr_ns)),
        Rule(RANK, (ACT,), (ACT,), n(d.trrd_ns)), Rule(GROUP, (ACT,), (ACT,), n(c.trrd_l_ns)),
        Rule(BANK, (ACT,), (ACT,), rc), Rule(BANK, (ACT,), READS, n(d.trcd_ns)),
        Rule(BANK, (ACT,), WRITES, n(c.trcd_wr_ns)),
        Rule(BANK, (ACT,), (PRE,), ras), Rule(RANK, (ACT,), (PREA,), ras),
        Rule(BANK, (RD,), (PRE,), rtp), Rule(RANK, (RD,), (PREA,), rtp),
        Rule(BANK, (WR,), (PRE,), wr), Rule(RANK, (WR,), (PREA,), wr),
        Rule(BANK, (PRE,), (ACT,), rp), Rule(RANK, (PREA,), (ACT,), rp_ab),
        Rule(RANK, (PRE, PREA), (PRE, PREA), n(c.tppd_ns)),
        Rule(BANK, (RDA,), (ACT, REFB), rtp + rp), Rule(BANK, (WRA,), (ACT, REFB), wr + rp),
        Rule(RANK, (RDA,), (REF,), rtp + rp), Rule(RANK, (WRA,), (REF,), wr + rp),
        Rule(RANK, (ACT,), (REF,), rc), Rule(RANK, (PRE,), (REF,), rp), Rule(RANK, (PREA,), (REF,), rp_ab),
        Rule(RANK, (REF,), (ACT, PREA, REF, REFB), rfc),
        Rule(BANK, (ACT,), (REFB,), rc), Rule(BANK, (PRE,), (REFB,), rp), Rule(RANK, (PREA,), (REFB,), rp_ab),
        Rule(BANK, (REFB,), (ACT, REF), rfc_pb), Rule(RANK, (REFB,), (ACT,), n(c.tpbr2act_ns)),
        Rule(RANK, (REFB,), (REFB,), n(c.tpbr2pbr_ns)), Rule(RANK, (REFB,), (REF,), rfc_pb),
    ]  # fmt: skip
    if c.ranks > 1 and c.shared_data_bus:
        gap = burst + n(c.trank_ns)
        found += [
            Rule(OTHER_RANKS, READS, READS, gap), Rule(OTHER_RANKS, WRITES, WRITES, gap),
            Rule(OTHER_RANKS, READS, WRITES, cl + gap - cwl), Rule(OTHER_RANKS, WRITES, READS, max(1, cwl + gap - cl)),
        ]  # fmt: skip
    length = {command: 1 for command in range(COMMANDS)}
    length |= {ACT: c.activate_clocks} | dict.fromkeys(columns, c.column_clocks)
    counted = [
        Rule(rule.level, (before,), (after,), rule.clocks + length[before] - length[after])
        for rule in found for before in rule.before for after in rule.after
    ]  # fmt: skip
    return counted + _bus_rules(length, c.command_buses)


def _bus_rules(length: dict[int, int], buses: int) -> list[Rule]:
    """A command occupies its bus for its clocks: one bus for all, or one for rows and one for columns."""
    columns = READS + WRITES
    rows = tuple(command for command in range(COMMANDS) if command not in columns)
    sharing = (rows, columns) if buses == 2 else (rows + columns,)
    return [
        Rule(CHANNEL, (command,), group, length[command])
        for group in sharing for command in group if length[command] > 1
    ]  # fmt: skip


def compile_rules(found: list[Rule]) -> tuple[np.ndarray, np.ndarray]:
    """`Device.table` and `Device.first`; of rules between the same commands at the same level the longest counts."""
    longest: dict[tuple[int, int, int], int] = {}
    for rule in found:
        for before in rule.before:
            for after in rule.after:
                key = (before, rule.level, after)
                longest[key] = max(longest.get(key, 0), rule.clocks)
    rows = sorted((*key, value) for key, value in longest.items() if value > 0)
    table = np.array([row[1:] for row in rows], np.int64).reshape(-1, 3)
    table = np.ascontiguousarray(table)
    first = np.searchsorted([row[0] for row in rows], np.arange(COMMANDS + 1))
    return table, np.asarray(first, np.int64)


def resolve(d: Dram, c: DramCommands) -> np.ndarray:
    """The constants `K_*` of a channel."""
    k = np.zeros(K_COUNT, np.int64)
    k[K_RANKS] = c.ranks
    k[K_GROUPS], k[K_BANKS] = c.ranks * d.bank_groups, c.ranks * d.bank_groups * d.banks_per_group
    k[K_PER_GROUP] = d.banks_per_group
    k[K_FAW] = clocks(d.tfaw_ns, c.clock_ns)
    k[K_BURST] = burst_clocks(d, c)
    k[K_CL], k[K_CWL] = clocks(d.tcl_ns, c.clock_ns), clocks(d.tcwl_ns, c.clock_ns)
    k[K_PER_BANK] = int(d.refresh == "per-bank")
    turns = int(k[K_BANKS]) if k[K_PER_BANK] else c.ranks
    k[K_AT_ONCE] = 1 if c.stagger_refresh else c.ranks
    k[K_REFI] = clocks(d.trefi_ns, c.clock_ns) * int(k[K_AT_ONCE]) // turns
    k[K_AAD] = clocks(c.taad_ns, c.clock_ns)
    k[K_WCK] = clocks(c.twck_post_ns, c.clock_ns)
    k[K_BUSES] = c.command_buses
    return k


def new_device(d: Dram, c: DramCommands) -> Device:
    """All banks closed, every command allowed."""
    k = resolve(d, c)
    table, first = compile_rules(rules(d, c))
    nodes = int(k[K_BANKS] + k[K_GROUPS] + k[K_RANKS]) + 1
    bank = np.arange(k[K_BANKS])
    node = np.stack([k[K_BANKS] + bank // k[K_PER_GROUP], nodes - 1 - c.ranks + bank * c.ranks // k[K_BANKS]], axis=1)
    far = -(1 << 40)
    return Device(
        ready=np.zeros((nodes, COMMANDS), np.int64), row=np.full(int(k[K_BANKS]), -1, np.int64),
        hits=np.zeros(int(k[K_BANKS]), np.int64), acts=np.full((c.ranks, WINDOW), far, np.int64), table=table,
        first=first, k=k, node=node,
    )  # fmt: skip


@njit(**INNER)
def earliest(device: Device, command: int, bank: int) -> int:
    """The first clock at which `command` to `bank` (for a whole rank: to any bank of it) keeps every rule."""
    k, ready, node = device.k, device.ready, device.node
    rank = node[bank, 1]
    at = max(ready[rank, command], ready[ready.shape[0] - 1, command])
    if command == PREA:
        return at
    if command == REF:
        for b in range(k[K_BANKS]):
            if node[b, 1] == rank:
                at = max(at, ready[b, REF])
        return at
    at = max(at, ready[bank, command], ready[node[bank, 0], command])
    if command == ACT:
        at = max(at, device.acts[rank - k[K_BANKS] - k[K_GROUPS], 0] + k[K_FAW])
    return at


@njit(**INNER)
def needed(device: Device, bank: int, row: int, write: bool, last: bool) -> int:
    """The command that brings a request one step on; `last`: the row closes behind it."""
    open_row = device.row[bank]
    if open_row == row:
        if write:
            return WRA if last else WR
        return RDA if last else RD
    return ACT if open_row < 0 else PRE


@njit(**INNER)
def issue(device: Device, command: int, bank: int, row: int, t: int) -> None:
    """Issues `command` at clock `t`, which must not be before `earliest`."""
    k, ready, table = device.k, device.ready, device.table
    first_rank = k[K_BANKS] + k[K_GROUPS]
    group_node, rank_node = device.node[bank, 0], device.node[bank, 1]
    if command == ACT:
        rank = rank_node - first_rank
        device.row[bank] = row
        device.hits[bank] = 0
        for i in range(WINDOW - 1):
            device.acts[rank, i] = device.acts[rank, i + 1]
        device.acts[rank, WINDOW - 1] = t
    elif command == PRE:
        device.row[bank] = -1
    elif command == PREA:
        for b in range(k[K_BANKS]):
            if device.node[b, 1] == rank_node:
                device.row[b] = -1
    elif command != REF and command != REFB:
        device.hits[bank] += 1
        if command in (RDA, WRA):
            device.row[bank] = -1
    for i in range(device.first[command], device.first[command + 1]):
        level, after, until = table[i, 0], table[i, 1], t + table[i, 2]
        if level == OTHER_RANKS:
            for node in range(first_rank, first_rank + k[K_RANKS]):
                if node != rank_node:
                    ready[node, after] = max(ready[node, after], until)
            continue
        if level == BANK:
            node = bank
        elif level == GROUP:
            node = group_node
        elif level == RANK:
            node = rank_node
        else:
            node = ready.shape[0] - 1
        ready[node, after] = max(ready[node, after], until)
