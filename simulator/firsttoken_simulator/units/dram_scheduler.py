"""The controller of one DRAM channel, command by command: queues, first-ready first-come-first-served, refresh, pages.

Each clock, a free command bus takes one command. Which one depends on how requests queue:

- `shared`: a read and a write queue. A request whose row has been opened for it leaves the queue and is served first;
  then a refresh that is due, which holds everything else back; then the oldest request whose next command may be issued
  now. A row is not closed while an older request waits for it, nor before the request that opened it is served. Writes
  are drained when the write queue is fuller than `write_high` or no read waits, until it is emptier than `write_low`.
- `per-bank`: requests move one a clock from the read (or write) queue into a queue of their bank. Banks take turns; of
  a bank the first request whose next command may be issued now. A row is closed for the head of the queue only, when no
  other request of the queue hits it or it has been hit `row_hit_limit` times. Banks of a rank that is to be refreshed
  are closed one by one as they become free, while other ranks go on.

With the `closed` page policy a column command closes its row when no queued request hits it. LPDDR5's two-part activate
gives its second half a command slot when nothing else can go, and at the latest tAAD after the first; a burst that
finds the data clock (WCK) stopped is preceded by a CAS command that starts it.

All times are clocks. State is integer arrays, so that the compiled functions take arrays only.
"""

from typing import Final, NamedTuple

import numpy as np
from numba import njit

from firsttoken_compiler.target.target import Dram, DramCommands
from firsttoken_simulator.units.compiled import INNER
from firsttoken_simulator.units.dram_commands import (
    ACT,
    K_AAD,
    K_AT_ONCE,
    K_BANKS,
    K_BURST,
    K_BUSES,
    K_CL,
    K_CWL,
    K_GROUPS,
    K_PER_BANK,
    K_RANKS,
    K_REFI,
    K_WCK,
    PRE,
    PREA,
    RD,
    RDA,
    REF,
    REFB,
    WRA,
    Device,
    earliest,
    issue,
    needed,
    resolve,
)

NEVER: Final = 1 << 40
"""Later than any clock."""

E_BANK, E_ROW, E_WRITE, E_TAG, E_FIELDS = range(5)
"""Of a request: bank, row, whether it writes, the caller's number."""

(
    S_READS, S_WRITES, S_ACTIVE, S_FREE, S_DRAIN, S_ROBIN, S_REFRESH_AT, S_REFRESH_NEXT, S_OWED, S_HALF, S_HALF_UNTIL,
    S_SYNC, S_CLOCK_UNTIL, S_FINISHED, S_HITS, S_MISSES, S_CONFLICTS, S_REFRESHES,
    S_ACTIVATED, S_FIELDS,
) = range(20)  # fmt: skip
"""Of the controller: requests in the read queue, the write queue, and with a row opened for them; free slots; whether
writes are drained; bank whose turn it was; next refresh and its rank or bank; refreshes owed; slot whose activate is
half done and its latest clock; slot whose data clock has just been started; when the data clock stops; finished reads;
row hits, misses and conflicts by first command; refreshes; tag of the request for which the last `tick` has opened a
row, or -1."""

C_DEPTH, C_BANK_DEPTH, C_LIMIT, C_CLOSED, C_LOW, C_HIGH, C_FIELDS = range(7)
"""Settings: depth of each queue, of a bank's (0: shared), hits after which a row may be closed (0: none), whether rows
close behind their last hit, writes that end and start a drain."""


class Controller(NamedTuple):
    """The state of one channel's controller, as arrays."""

    s: np.ndarray
    """`S_*`."""
    c: np.ndarray
    """`C_*`."""
    entry: np.ndarray
    """`[slots, E_FIELDS]`."""
    free: np.ndarray
    """`[slots]`: the first `S_FREE` are slots not in use."""
    lines: np.ndarray
    """`[3, slots]`: slots by age of the read queue, the write queue, the requests whose row has been opened."""
    banked: np.ndarray
    """`[banks, bank depth + 1]`: number of requests in the bank's queue, then their slots by age."""
    counted: np.ndarray
    """`[slots]`: whether the request has been counted as hit, miss or conflict."""
    finished: np.ndarray
    """`[slots, 2]`: tag and clock of the last data of reads that the last `tick` has placed."""


READ_LINE, WRITE_LINE, OPENED = range(3)


def new_controller(d: Dram, c: DramCommands) -> Controller:
    """Empty queues; the first refresh falls due one interval from now."""
    banks = c.ranks * d.bank_groups * d.banks_per_group
    depth = c.bank_queue_depth if c.queue == "per-bank" else 0
    slots = 2 * d.queue_depth + banks * (depth + 1)
    s = np.zeros(S_FIELDS, np.int64)
    s[S_FREE], s[S_HALF], s[S_SYNC], s[S_ROBIN] = slots, -1, -1, banks - 1
    settings = np.zeros(C_FIELDS, np.int64)
    settings[[C_DEPTH, C_BANK_DEPTH, C_LIMIT]] = d.queue_depth, depth, c.row_hit_limit
    settings[C_CLOSED] = int(c.page == "closed")
    settings[[C_LOW, C_HIGH]] = int(c.write_low * d.queue_depth), int(c.write_high * d.queue_depth)
    made = Controller(
        s=s, c=settings, entry=np.zeros((slots, E_FIELDS), np.int64), free=np.arange(slots, dtype=np.int64),
        lines=np.zeros((3, slots), np.int64), banked=np.zeros((banks, depth + 1), np.int64),
        counted=np.zeros(slots, np.int64), finished=np.zeros((slots, 2), np.int64),
    )  # fmt: skip
    s[S_REFRESH_AT] = int(resolve(d, c)[K_REFI]) or NEVER
    return made


@njit(**INNER)
def _remove(line: np.ndarray, count: int, at: int) -> None:
    """Closes the gap at position `at` of a line of `count` slots."""
    for i in range(at, count - 1):
        line[i] = line[i + 1]


@njit(**INNER)
def offer(con: Controller, bank: int, row: int, write: bool, tag: int) -> bool:
    """Puts a request into its queue, to be looked at from the next clock on; False when the queue is full."""
    s = con.s
    kind = S_WRITES if write else S_READS
    count = s[kind]
    if count >= con.c[C_DEPTH]:
        return False
    s[S_FREE] -= 1
    slot = con.free[s[S_FREE]]
    con.entry[slot, E_BANK] = bank
    con.entry[slot, E_ROW] = row
    con.entry[slot, E_WRITE] = 1 if write else 0
    con.entry[slot, E_TAG] = tag
    con.counted[slot] = 0
    con.lines[WRITE_LINE if write else READ_LINE, count] = slot
    s[kind] = count + 1
    return True


@njit(**INNER)
def transfer(con: Controller) -> bool:
    """With queues per bank: moves the oldest request whose bank has room; False when there is none."""
    s, depth = con.s, con.c[C_BANK_DEPTH]
    if depth == 0:
        return False
    if s[S_DRAIN] == 0 and s[S_WRITES] > 0 and (s[S_WRITES] >= con.c[C_HIGH] or s[S_READS] == 0):
        s[S_DRAIN] = s[S_WRITES]
    draining = s[S_DRAIN] > 0
    kind, line = (S_WRITES, WRITE_LINE) if draining else (S_READS, READ_LINE)
    for at in range(s[kind]):
        slot = con.lines[line, at]
        bank = con.entry[slot, E_BANK]
        room = con.banked[bank, 0]
        if room < depth:
            con.banked[bank, room + 1] = slot
            con.banked[bank, 0] = room + 1
            _remove(con.lines[line], s[kind], at)
            s[kind] -= 1
            if draining:
                s[S_DRAIN] -= 1
            return True
    return False


@njit(**INNER)
def _count(device: Device, con: Controller, slot: int) -> None:
    """Counts a request as hit, miss or conflict, by what it finds at its first command."""
    if con.counted[slot]:
        return
    con.counted[slot] = 1
    row = device.row[con.entry[slot, E_BANK]]
    if row == con.entry[slot, E_ROW]:
        con.s[S_HITS] += 1
    elif row < 0:
        con.s[S_MISSES] += 1
    else:
        con.s[S_CONFLICTS] += 1


@njit(**INNER)
def _finish(device: Device, con: Controller, slot: int, t: int) -> None:
    """The column command of a request goes out at `t`; the request is done with its data."""
    s, k = con.s, device.k
    write = con.entry[slot, E_WRITE]
    if k[K_WCK] > 0:
        latency = k[K_CWL] if write else k[K_CL]
        s[S_CLOCK_UNTIL] = max(s[S_CLOCK_UNTIL], t + latency + k[K_BURST] + k[K_WCK])
    if not write:
        at = s[S_FINISHED]
        con.finished[at, 0] = con.entry[slot, E_TAG]
        con.finished[at, 1] = t + k[K_CL] + k[K_BURST]
        s[S_FINISHED] = at + 1
    con.free[s[S_FREE]] = slot
    s[S_FREE] += 1


@njit(**INNER)
def _last_hit(con: Controller, slot: int, line: int, count: int) -> bool:
    """Under the closed page policy: whether no other queued request of the line wants the same row."""
    if not con.c[C_CLOSED]:
        return False
    bank, row = con.entry[slot, E_BANK], con.entry[slot, E_ROW]
    for at in range(count):
        other = con.lines[line, at]
        if other != slot and con.entry[other, E_BANK] == bank and con.entry[other, E_ROW] == row:
            return False
    for at in range(con.s[S_ACTIVE]):
        other = con.lines[OPENED, at]
        if other != slot and con.entry[other, E_BANK] == bank:
            return False
    return True


@njit(**INNER)
def _owed(device: Device, con: Controller) -> int:
    """The bank (its first, for a rank) of the oldest refresh that is owed."""
    k, s = device.k, con.s
    turns = k[K_BANKS] if k[K_PER_BANK] else k[K_RANKS]
    which = (s[S_REFRESH_NEXT] - s[S_OWED]) % turns
    return which if k[K_PER_BANK] else which * (k[K_BANKS] // k[K_RANKS])


@njit(**INNER)
def _any_open(device: Device, first: int, last: int) -> bool:
    open_rows = 0
    for bank in range(first, last):
        open_rows += device.row[bank] >= 0
    return open_rows > 0


@njit(**INNER)
def _busy(con: Controller, first: int, last: int) -> bool:
    """Whether a row has been opened in these banks for a request that has not been served."""
    for at in range(con.s[S_ACTIVE]):
        if first <= con.entry[con.lines[OPENED, at], E_BANK] < last:
            return True
    half = con.s[S_HALF]
    return half >= 0 and first <= con.entry[half, E_BANK] < last


@njit(**INNER)
def _refresh_shared(device: Device, con: Controller, t: int) -> tuple[bool, int]:
    """Brings the owed refresh one command on: (issued, when it could next be)."""
    k, s = device.k, con.s
    bank = _owed(device, con)
    one = k[K_PER_BANK] != 0
    last = bank + (1 if one else k[K_BANKS] // k[K_RANKS])
    if _any_open(device, bank, last):
        if _busy(con, bank, last):
            return False, NEVER
        command = PRE if one else PREA
    else:
        command = REFB if one else REF
    at = earliest(device, command, bank)
    if at > t:
        return False, at
    issue(device, command, bank, int(-1), t)
    if command in (REF, REFB):
        s[S_OWED] -= 1
        s[S_REFRESHES] += 1
    return True, t + 1


@njit(**INNER)
def _second_half(con: Controller) -> None:
    """The second part of the activate goes out: its request waits for its column command."""
    s = con.s
    con.lines[OPENED, s[S_ACTIVE]] = s[S_HALF]
    s[S_ACTIVE] += 1
    s[S_HALF] = -1


@njit(**INNER)
def _column(
    device: Device, con: Controller, line: int, kind: int, at: int, t: int, command: int,
) -> None:  # fmt: skip
    """Issues the column command of the request at position `at` of a line, or first the start of its data clock."""
    s, k = con.s, device.k
    slot = con.lines[line, at]
    if k[K_WCK] > 0 and t >= s[S_CLOCK_UNTIL] and s[S_SYNC] != slot:
        if s[S_HALF] >= 0 and s[S_HALF_UNTIL] <= t + 1:
            _second_half(con)
        else:
            s[S_SYNC] = slot
        return
    _count(device, con, slot)
    issue(device, command, con.entry[slot, E_BANK], con.entry[slot, E_ROW], t)
    _remove(con.lines[line], s[kind], at)
    s[kind] -= 1
    s[S_SYNC] = -1
    _finish(device, con, slot, t)


@njit(**INNER)
def _opened(device: Device, con: Controller, t: int) -> tuple[bool, int]:
    """The oldest request whose row has been opened for it and whose column command may go: (issued, next time)."""
    s, soon = con.s, NEVER
    for at in range(s[S_ACTIVE]):
        slot = con.lines[OPENED, at]
        bank, write = con.entry[slot, E_BANK], con.entry[slot, E_WRITE] != 0
        line, kind = (WRITE_LINE, S_WRITES) if write else (READ_LINE, S_READS)
        last = _last_hit(con, slot, line, s[kind])
        command = needed(device, bank, con.entry[slot, E_ROW], write, last)
        ready = earliest(device, command, bank)
        if ready <= t:
            _column(device, con, int(OPENED), int(S_ACTIVE), at, t, command)
            return True, t + 1
        soon = min(soon, ready)
    return False, soon


@njit(**INNER)
def _queued(device: Device, con: Controller, t: int, columns: bool, rows: bool) -> tuple[bool, int]:
    """The oldest request of the queue being served whose next command may go: (issued, next time)."""
    s, c, k = con.s, con.c, device.k
    if s[S_DRAIN] == 0:
        if s[S_WRITES] > c[C_HIGH] or (s[S_READS] == 0 and s[S_WRITES] > 0):
            s[S_DRAIN] = 1
    elif s[S_WRITES] == 0 or (s[S_WRITES] < c[C_LOW] and s[S_READS] > 0):
        s[S_DRAIN] = 0
    draining = s[S_DRAIN] > 0
    kind, line = (S_WRITES, WRITE_LINE) if draining else (S_READS, READ_LINE)
    count, soon, wanted = s[kind], NEVER, np.uint64(0)
    for at in range(count):
        slot = con.lines[line, at]
        bank = con.entry[slot, E_BANK]
        command = needed(device, bank, con.entry[slot, E_ROW], draining, bool(False))
        if command == PRE:
            if not rows or (wanted >> np.uint64(bank)) & np.uint64(1) or _busy(con, bank, bank + 1):
                continue
        elif command == ACT:
            if not rows or s[S_HALF] >= 0:
                continue
        else:
            wanted |= np.uint64(1) << np.uint64(bank)
            if not columns:
                continue
            if c[C_CLOSED] and _last_hit(con, slot, line, count):
                command = WRA if draining else RDA
        ready = earliest(device, command, bank)
        if ready > t:
            soon = min(soon, ready)
            continue
        if command != ACT and command != PRE:
            _column(device, con, line, kind, at, t, command)
            return True, t + 1
        _count(device, con, slot)
        issue(device, command, bank, con.entry[slot, E_ROW], t)
        if command == ACT:
            s[S_ACTIVATED] = con.entry[slot, E_TAG]
            _remove(con.lines[line], count, at)
            s[kind] -= 1
            if k[K_AAD] > 0:
                s[S_HALF], s[S_HALF_UNTIL] = slot, t + k[K_AAD]
            else:
                con.lines[OPENED, s[S_ACTIVE]] = slot
                s[S_ACTIVE] += 1
        return True, t + 1
    return False, soon


@njit(**INNER)
def _shared(device: Device, con: Controller, t: int, columns: bool, rows: bool) -> tuple[bool, int]:
    """One command slot of the shared queues: (issued, when something could next be)."""
    soon = NEVER
    if columns:
        issued, soon = _opened(device, con, t)
        if issued:
            return True, t + 1
    if con.s[S_OWED] > 0:
        if rows:
            issued, at = _refresh_shared(device, con, t)
            return issued, min(soon, at)
        return False, soon
    issued, at = _queued(device, con, t, columns, rows)
    return issued, min(soon, at)


@njit(**INNER)
def _split(device: Device, con: Controller, t: int) -> tuple[bool, int]:
    """One command slot of a device with two-part activates and a data clock that stops."""
    s = con.s
    if s[S_HALF] >= 0 and s[S_HALF_UNTIL] <= t:
        _second_half(con)
        return True, t + 1
    slot = s[S_SYNC]
    if slot >= 0:
        for line in range(3):
            kind = (S_READS, S_WRITES, S_ACTIVE)[line]
            for at in range(s[kind]):
                if con.lines[line, at] == slot:
                    bank = con.entry[slot, E_BANK]
                    command = needed(device, bank, con.entry[slot, E_ROW], con.entry[slot, E_WRITE] != 0, bool(False))
                    if earliest(device, command, bank) <= t:
                        _column(device, con, line, kind, at, t, command)
                    return True, t + 1
    issued, soon = _shared(device, con, t, bool(True), bool(True))
    if not issued and s[S_HALF] >= 0:
        _second_half(con)
        return True, t + 1
    return issued, soon


@njit(**INNER)
def _refresh_banked(device: Device, con: Controller, t: int) -> tuple[bool, int]:
    """Closes the next bank of the owed refresh that may be closed, or issues the refresh: (issued, next time)."""
    k, s, soon = device.k, con.s, NEVER
    first = _owed(device, con)
    one = k[K_PER_BANK] != 0
    last = first + (1 if one else k[K_BANKS] // k[K_RANKS])
    still = False
    for bank in range(first, last):
        if device.row[bank] >= 0:
            still = True
            at = earliest(device, int(PRE), bank)
            if at <= t:
                issue(device, int(PRE), bank, int(-1), t)
                return True, t + 1
            soon = min(soon, at)
    if still:
        return False, soon
    command = REFB if one else REF
    at = earliest(device, command, first)
    if at > t:
        return False, at
    issue(device, command, first, int(-1), t)
    s[S_OWED] -= 1
    s[S_REFRESHES] += 1
    return True, t + 1


@njit(**INNER)
def _may_close(device: Device, con: Controller, bank: int) -> bool:
    """Whether the head of a bank's queue may close its row."""
    for at in range(1, con.banked[bank, 0] + 1):
        if con.entry[con.banked[bank, at], E_ROW] == device.row[bank]:
            limit = con.c[C_LIMIT]
            return limit > 0 and device.hits[bank] >= limit
    return True


@njit(**INNER)
def _banked(device: Device, con: Controller, t: int, columns: bool, rows: bool) -> tuple[bool, int]:
    """The next command of the bank queues, which take turns: (issued, next time)."""
    k, s, soon = device.k, con.s, NEVER
    held_first, held_last = 0, 0
    if s[S_OWED] > 0:
        held_first = _owed(device, con)
        held_last = held_first + (1 if k[K_PER_BANK] else k[K_BANKS] // k[K_RANKS])
    for step in range(k[K_BANKS]):
        bank = (s[S_ROBIN] + 1 + step) % k[K_BANKS]
        count = con.banked[bank, 0]
        if count == 0 or held_first <= bank < held_last:
            continue
        for at in range(1, count + 1):
            slot = con.banked[bank, at]
            row, write = con.entry[slot, E_ROW], con.entry[slot, E_WRITE] != 0
            command = needed(device, bank, row, write, bool(False))
            ready = earliest(device, command, bank)
            if ready > t:
                soon = min(soon, ready)
                continue
            row_command = command in (ACT, PRE)
            if (row_command and not rows) or (not row_command and not columns):
                continue
            if command == PRE and (at > 1 or not _may_close(device, con, bank)):
                continue
            if not row_command and con.c[C_CLOSED]:
                alone = True
                for other in range(1, count + 1):
                    alone = alone and (other == at or con.entry[con.banked[bank, other], E_ROW] != row)
                if alone:
                    command = WRA if write else RDA
            _count(device, con, slot)
            issue(device, command, bank, row, t)
            s[S_ROBIN] = bank
            if command == ACT:
                s[S_ACTIVATED] = con.entry[slot, E_TAG]
            if not row_command:
                _remove(con.banked[bank], count + 1, at)
                con.banked[bank, 0] = count - 1
                _finish(device, con, slot, t)
            return True, t + 1
    return False, soon


@njit(**INNER)
def _quiet_until(device: Device, con: Controller, t: int) -> int:
    """After a command at `t`: the next clock at which another can go, where only hits to open rows are queued."""
    s, k, ready = con.s, device.k, device.ready
    if s[S_OWED] > 0 or s[S_ACTIVE] > 0 or s[S_WRITES] > 0 or s[S_HALF] >= 0 or s[S_SYNC] >= 0:
        return t + 1
    for at in range(s[S_READS]):
        slot = con.lines[READ_LINE, at]
        if device.row[con.entry[slot, E_BANK]] != con.entry[slot, E_ROW]:
            return t + 1
    if s[S_READS] == 0:
        return NEVER
    bound = NEVER
    for rank in range(k[K_BANKS] + k[K_GROUPS], ready.shape[0] - 1):
        bound = min(bound, ready[rank, RD])
    return max(t + 1, bound, ready[ready.shape[0] - 1, RD])


@njit(**INNER)
def tick(device: Device, con: Controller, t: int) -> int:
    """Issues what the rules allow at clock `t`; returns the next clock at which there may be more to issue.

    Reads whose data it has placed are in `finished`, `S_FINISHED` of them; the caller takes them before the next call.
    Clocks between `t` and the result need no call, unless a request is offered in between.
    """
    k, s = device.k, con.s
    s[S_FINISHED], s[S_ACTIVATED] = 0, -1
    if t >= s[S_REFRESH_AT]:
        turns = k[K_BANKS] if k[K_PER_BANK] else k[K_RANKS]
        s[S_OWED] += k[K_AT_ONCE]
        s[S_REFRESH_NEXT] = (s[S_REFRESH_NEXT] + k[K_AT_ONCE]) % turns
        s[S_REFRESH_AT] += k[K_REFI]
    if con.c[C_BANK_DEPTH] > 0:
        issued, soon = False, NEVER
        if s[S_OWED] > 0:
            issued, soon = _refresh_banked(device, con, t)
        if not issued:
            issued, at = _banked(device, con, t, bool(True), bool(True))
            soon = min(soon, at)
        if issued and k[K_BUSES] == 2:
            columns = s[S_FINISHED] == 0
            _banked(device, con, t, columns, not columns)
    elif k[K_BUSES] == 2:
        first, soon = _shared(device, con, t, bool(True), bool(False))
        second, at = _shared(device, con, t, bool(False), bool(True))
        issued, soon = first or second, min(soon, at)
    elif k[K_AAD] > 0 or k[K_WCK] > 0:
        issued, soon = _split(device, con, t)
    else:
        issued, soon = _shared(device, con, t, bool(True), bool(True))
    if issued:
        soon = t + 1 if con.c[C_BANK_DEPTH] > 0 else _quiet_until(device, con, t)
    return min(max(soon, t + 1), s[S_REFRESH_AT])


@njit(**INNER)
def look_for(device: Device, con: Controller, bank: int, row: int, t: int) -> int:
    """The first clock from `t` at which a request that has just been offered can change what the controller does."""
    s = con.s
    if con.c[C_BANK_DEPTH] > 0 or s[S_WRITES] > 0 or s[S_DRAIN] > 0:
        return t
    return max(t, earliest(device, needed(device, bank, row, bool(False), bool(False)), bank))
