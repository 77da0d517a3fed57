"""DRAM: banks, command timing, refresh, the controller's look-ahead and write buffer, and the address map.

A request is one burst on one channel. The controller of a channel is work-conserving and looks ahead over `queue_depth`
requests, so everything about a request is decided when the controller accepts it:

- the bank is precharged and activated as soon as its own timing (tRAS, tRTP, tWR, tRP) and the channel's (tRRD, tFAW)
  allow, before the data of earlier requests has moved;
- its column command takes the first slot that is free after that: tCCD_S from any other, tCCD_L from one of its bank
  group. Slots between already placed commands may be taken, so a request does not wait behind one whose row is still
  opening;
- a request never overtakes in its bank, and opening a row is decided in order of acceptance (no row-hit-first choice);
- writes are posted: they wait in a buffer of half the queue and are placed together, so that the bus turns
  around (tRTW, tWTR) once per batch; a write is acknowledged when the buffer takes it, so a program may end a few
  bursts before the last of its writes lies in the DRAM;
- refresh is issued when due and the channel (`all-bank`) or the next bank in turn (`per-bank`) has drained.

All times are femtoseconds. State lives in integer arrays so that the hot loop takes arrays only.
"""

from typing import Final, NamedTuple

import numpy as np
from numba import njit

from firsttoken_compiler.target.target import Target

FAR: Final = 1 << 61
"""Later than any event."""
PAST: Final = -(1 << 61)
ACTS: Final = 8
"""Recent activates kept per channel; tFAW needs four."""
SPARE: Final = 8
"""Column commands kept beyond the queue's depth, for tCCD_L against commands that have just left it."""

(
    P_CHANNELS, P_BANKS, P_GROUPS, P_PAGE, P_CHUNK, P_POW2, P_SH_BURST, P_SH_CHUNK, P_SH_CHANNEL, P_SH_BANK, P_SH_PAGE,
    P_ROUND, P_SH_ROUND, P_DEPTH, P_BATCH, P_BURST_BYTES, P_CL, P_CWL, P_RCD, P_RP, P_RAS, P_WR, P_RTP, P_CCD_S,
    P_CCD_L, P_WTR, P_RTW, P_RRD, P_FAW, P_BURST, P_CONTROLLER, P_REFRESH, P_RFC, P_PER_BANK, P_WINDOW, P_COUNT,
) = range(36)  # fmt: skip
"""Columns of the parameter array made by `resolve`."""

B_ROW, B_COLUMN, B_PRECHARGE, B_ACTIVATE, B_GROUP, B_FIELDS = range(6)
"""Of a bank: open row (-1 none), earliest column, earliest precharge, earliest activate once closed, bank group."""

C_LOW, C_GAP, C_READ_FLOOR, C_WRITE_FLOOR, C_WROTE, C_REFRESH_AT, C_REFRESH_BANK, C_BUFFERED, C_ACTS = range(9)
"""Of a channel: first column command in its window, end of the last usable gap, earliest read and write, whether the
newest command is a write, when refresh falls due and for which bank, buffered writes, and `ACTS` activate times,
ascending."""

S_HITS, S_MISSES, S_CONFLICTS, S_BURSTS, S_FIELDS = range(5)
"""Counters."""


class DramState(NamedTuple):
    """The arrays of the DRAM and its controllers."""

    bank: np.ndarray
    """`[channels * banks, B_FIELDS]`."""
    channel: np.ndarray
    """`[channels, C_ACTS + ACTS]`."""
    columns: np.ndarray
    """`[channels, capacity, 2]`: (time, bank group) of the newest column commands, ascending, in a sliding window."""
    group: np.ndarray
    """`[channels, groups]`: newest column command of the bank group."""
    buffer: np.ndarray
    """`[channels, batch, 3]`: posted writes (bank, row, instruction)."""
    stats: np.ndarray


def _shift(value: int) -> int:
    return value.bit_length() - 1 if value > 0 and value & (value - 1) == 0 else -1


def resolve(target: Target) -> np.ndarray:
    """The parameters of the target's DRAM as integers (femtoseconds, counts, shifts)."""
    d = target.dram
    p = np.zeros(P_COUNT, np.int64)
    burst = d.burst_bytes
    chunk, page = max(1, d.interleave_bytes // burst), max(1, d.page_bytes // burst)
    banks = d.bank_groups * d.banks_per_group
    together = {"bank-interleaved": banks, "group-interleaved": d.bank_groups, "row-linear": 1}.get(d.map, 1)
    shifts = [_shift(value) for value in (burst, chunk, d.channels, banks, page, together)]
    p[P_CHANNELS], p[P_BANKS], p[P_GROUPS], p[P_PAGE], p[P_CHUNK] = d.channels, banks, d.bank_groups, page, chunk
    p[P_POW2] = int(min(shifts) >= 0)
    p[[P_SH_BURST, P_SH_CHUNK, P_SH_CHANNEL, P_SH_BANK, P_SH_PAGE, P_SH_ROUND]] = np.maximum(shifts, 0)
    p[P_ROUND] = together
    p[P_DEPTH], p[P_BATCH], p[P_BURST_BYTES] = d.queue_depth, max(1, d.queue_depth // 2), burst
    for column, nanoseconds in (
        (P_CL, d.tcl_ns), (P_CWL, d.tcwl_ns), (P_RCD, d.trcd_ns), (P_RP, d.trp_ns), (P_RAS, d.tras_ns),
        (P_WR, d.twr_ns), (P_RTP, d.trtp_ns), (P_WTR, d.twtr_ns), (P_RTW, d.trtw_ns), (P_RRD, d.trrd_ns), (P_FAW,
        d.tfaw_ns), (P_CONTROLLER, d.controller_ns), (P_RFC, d.trfc_ns),
    ):  # fmt: skip
        p[column] = target.fs(nanoseconds)
    p[P_BURST] = burst_fs(target)
    p[P_CCD_S] = max(target.fs(d.tccd_s_ns), int(p[P_BURST]))
    p[P_CCD_L] = max(target.fs(d.tccd_l_ns), int(p[P_CCD_S]))
    p[P_PER_BANK] = int(d.refresh == "per-bank")
    interval = target.fs(d.trefi_ns) // (banks if p[P_PER_BANK] else 1)
    p[P_REFRESH] = interval if interval > 0 else FAR
    p[P_WINDOW] = d.queue_depth + SPARE
    return p


def burst_fs(target: Target) -> int:
    """Femtoseconds that one burst occupies the data bus of its channel."""
    return round(target.dram.burst_length * 1e9 / target.dram.data_rate_mtps)


def new_state(p: np.ndarray) -> DramState:
    """All banks closed, nothing pending, first refresh one interval from now."""
    channels = int(p[P_CHANNELS])
    bank = np.zeros((channels * int(p[P_BANKS]), B_FIELDS), np.int64)
    bank[:, B_ROW] = -1
    bank[:, B_GROUP] = np.arange(len(bank)) % int(p[P_BANKS]) % int(p[P_GROUPS])
    channel = np.zeros((channels, C_ACTS + ACTS), np.int64)
    channel[:, C_ACTS:] = PAST
    channel[:, C_GAP] = PAST
    channel[:, C_REFRESH_AT] = p[P_REFRESH]
    columns = np.full((channels, 4 * int(p[P_WINDOW]), 2), PAST, np.int64)
    return DramState(
        bank, channel, columns, np.full((channels, int(p[P_GROUPS])), PAST, np.int64),
        np.zeros((channels, int(p[P_BATCH]), 3), np.int64), np.zeros(S_FIELDS, np.int64),
    )  # fmt: skip


@njit(_nrt=False, error_model="numpy", inline="always")
def locate(p: np.ndarray, burst: int) -> tuple[int, int, int]:
    """(channel, bank, row) of burst number `burst` (byte address over burst bytes).

    Chunks of `interleave_bytes` go round the channels. Within a channel consecutive bursts go round a set of banks
    until their pages are full, then round the next set: all banks (`bank-interleaved`), one of each bank group
    (`group-interleaved`), or a single one (`row-linear`). Consecutive banks belong to different bank groups.
    """
    if p[P_POW2]:
        chunk = burst >> p[P_SH_CHUNK]
        channel = chunk & (p[P_CHANNELS] - 1)
        inner = ((chunk >> p[P_SH_CHANNEL]) << p[P_SH_CHUNK]) | (burst & (p[P_CHUNK] - 1))
        row = inner >> (p[P_SH_BANK] + p[P_SH_PAGE])
        bank = ((inner >> (p[P_SH_ROUND] + p[P_SH_PAGE])) << p[P_SH_ROUND]) | (inner & (p[P_ROUND] - 1))
        return channel, bank & (p[P_BANKS] - 1), row
    chunk = burst // p[P_CHUNK]
    channel = chunk % p[P_CHANNELS]
    inner = (chunk // p[P_CHANNELS]) * p[P_CHUNK] + burst % p[P_CHUNK]
    row = inner // (p[P_BANKS] * p[P_PAGE])
    bank = inner // (p[P_ROUND] * p[P_PAGE]) * p[P_ROUND] + inner % p[P_ROUND]
    return channel, bank % p[P_BANKS], row


@njit(_nrt=False, error_model="numpy")
def _activate(p: np.ndarray, state_channel: np.ndarray, c: int, candidate: int) -> int:
    """First time from `candidate` at which an activate keeps tRRD and tFAW with all others; records it."""
    acts = state_channel[c, C_ACTS:]
    rrd, faw = p[P_RRD], p[P_FAW]
    at = candidate
    while True:
        pos = ACTS
        while pos > 0 and acts[pos - 1] > at:
            pos -= 1
        if pos > 0 and at - acts[pos - 1] < rrd:
            at = acts[pos - 1] + rrd
            continue
        if pos < ACTS and acts[pos] - at < rrd:
            at = acts[pos] + rrd
            continue
        later = at
        for before in range(5):  # every window of five activates that would hold this one
            if pos - before < 0 or pos + 3 - before >= ACTS:
                continue
            first = acts[pos - before] if before else at
            last = acts[pos + 3 - before] if before < 4 else at
            if last - first < faw:
                later = first + faw if before == 4 else acts[pos] + rrd
                break
        if later == at:
            break
        at = later
    if pos > 0:
        for i in range(pos - 1):
            acts[i] = acts[i + 1]
        acts[pos - 1] = at
    return at


@njit(_nrt=False, error_model="numpy", inline="always")
def _place(
    p: np.ndarray, channel: np.ndarray, columns: np.ndarray, group: np.ndarray, c: int, g: int, early: int,
) -> int:  # fmt: skip
    """Time of the first free column slot from `early` for bank group `g`; takes it."""
    ccd_s, ccd_l, window = p[P_CCD_S], p[P_CCD_L], p[P_WINDOW]
    low = channel[c, C_LOW]
    top = low + window - 1
    newest = columns[c, top, 0]
    if top + 1 >= columns.shape[1]:
        for i in range(window):
            columns[c, i, 0] = columns[c, low + i, 0]
            columns[c, i, 1] = columns[c, low + i, 1]
        low = 0
        top = window - 1
    channel[c, C_LOW] = low + 1
    at = early
    append = early + ccd_s > channel[c, C_GAP]
    if not append:
        i = top
        while i > low and columns[c, i, 0] > early - ccd_l:
            i -= 1
        same = PAST
        while i <= top:
            other = columns[c, i, 0]
            if columns[c, i, 1] == g:
                if other >= at + ccd_l:
                    break
                if other > at - ccd_l:
                    at = other + ccd_l
                same = other
            elif other >= at + ccd_l:
                break
            elif other > at - ccd_s and other < at + ccd_s:
                at = max(other + ccd_s, same + ccd_l)
            i += 1
        append = at > newest
    if append:
        at = max(at, newest + ccd_s, group[c, g] + ccd_l)
        if at - newest >= 2 * ccd_s:
            channel[c, C_GAP] = at
        i = top + 1
    else:
        i = top + 1
        while i > low + 1 and columns[c, i - 1, 0] > at:
            columns[c, i, 0] = columns[c, i - 1, 0]
            columns[c, i, 1] = columns[c, i - 1, 1]
            i -= 1
    columns[c, i, 0] = at
    columns[c, i, 1] = g
    if at > group[c, g]:
        group[c, g] = at
    return at


@njit(_nrt=False, error_model="numpy", inline="always")
def _access(
    p: np.ndarray, bank: np.ndarray, channel: np.ndarray, columns: np.ndarray, group: np.ndarray, stats:
    np.ndarray, activates: np.ndarray, c: int, b: int, row: int, t: int, floor: int, instruction: int, write:
    bool,
) -> int:  # fmt: skip
    """Opens the row if need be and places the column command of one burst; returns the command's time."""
    at = c * p[P_BANKS] + b
    early = max(t, floor)
    open_row = bank[at, B_ROW]
    stats[S_BURSTS] += 1
    if open_row == row:
        stats[S_HITS] += 1
        early = max(early, bank[at, B_COLUMN])
    else:
        if open_row >= 0:
            stats[S_CONFLICTS] += 1
            ready = max(t, bank[at, B_PRECHARGE]) + p[P_RP]
        else:
            stats[S_MISSES] += 1
            ready = max(t, bank[at, B_ACTIVATE])
        act = _activate(p, channel, c, ready)
        activates[instruction] += 1
        bank[at, B_ROW] = row
        bank[at, B_COLUMN] = act + p[P_RCD]
        bank[at, B_PRECHARGE] = act + p[P_RAS]
        early = max(early, act + p[P_RCD])
    when = _place(p, channel, columns, group, c, bank[at, B_GROUP], early)
    bank[at, B_COLUMN] = when + p[P_CCD_L]
    closes = when + (p[P_CWL] + p[P_BURST] + p[P_WR] if write else p[P_RTP])
    if closes > bank[at, B_PRECHARGE]:
        bank[at, B_PRECHARGE] = closes
    return when


@njit(_nrt=False, error_model="numpy")
def _refresh(p: np.ndarray, bank: np.ndarray, channel: np.ndarray, c: int, t: int) -> None:
    """Carries out the refreshes of channel `c` that fell due up to `t`."""
    banks = p[P_BANKS]
    per_bank = p[P_PER_BANK] != 0
    interval, rp, rfc = p[P_REFRESH], p[P_RP], p[P_RFC]
    round_fs = interval * (banks if per_bank else 1)
    idle = (t - channel[c, C_REFRESH_AT]) // round_fs - 1
    if idle > 0:  # whole rounds in which nothing was asked: only their closing of the rows is left to see
        channel[c, C_REFRESH_AT] += idle * round_fs
        for b in range(c * banks, (c + 1) * banks):
            if bank[b, B_ROW] >= 0:
                bank[b, B_ACTIVATE] = bank[b, B_PRECHARGE] + rp
                bank[b, B_ROW] = -1
    while channel[c, C_REFRESH_AT] <= t:
        first = c * banks + (channel[c, C_REFRESH_BANK] if per_bank else 0)
        last = first + (1 if per_bank else banks)
        start = channel[c, C_REFRESH_AT]
        for b in range(first, last):
            free = bank[b, B_PRECHARGE] + rp if bank[b, B_ROW] >= 0 else bank[b, B_ACTIVATE]
            start = max(start, free)
        for b in range(first, last):
            bank[b, B_ROW] = -1
            bank[b, B_ACTIVATE] = start + rfc
        if per_bank:
            channel[c, C_REFRESH_BANK] = (channel[c, C_REFRESH_BANK] + 1) % banks
        channel[c, C_REFRESH_AT] += interval


@njit(_nrt=False, error_model="numpy")
def flush(
    p: np.ndarray, bank: np.ndarray, channel: np.ndarray, columns: np.ndarray, group: np.ndarray, buffer:
    np.ndarray, stats: np.ndarray, activates: np.ndarray, c: int, t: int,
) -> None:  # fmt: skip
    """Places the buffered writes of channel `c`, after the turnaround of the data bus."""
    count = channel[c, C_BUFFERED]
    if count == 0:
        return
    top = channel[c, C_LOW] + p[P_WINDOW] - 1
    if channel[c, C_WROTE] == 0:
        channel[c, C_WRITE_FLOOR] = max(channel[c, C_WRITE_FLOOR], columns[c, top, 0] + p[P_RTW])
        channel[c, C_WROTE] = 1
    for i in range(count):
        _access(
            p, bank, channel, columns, group, stats, activates, c, buffer[c, i, 0], buffer[c, i, 1], t,
            channel[c, C_WRITE_FLOOR], buffer[c, i, 2], True,
        )  # fmt: skip
    channel[c, C_BUFFERED] = 0
    newest = columns[c, channel[c, C_LOW] + p[P_WINDOW] - 1, 0]
    channel[c, C_READ_FLOOR] = newest + p[P_CWL] + p[P_BURST] + p[P_WTR]


@njit(_nrt=False, error_model="numpy", inline="always")
def request(
    p: np.ndarray, bank: np.ndarray, channel: np.ndarray, columns: np.ndarray, group: np.ndarray, buffer:
    np.ndarray, stats: np.ndarray, activates: np.ndarray, burst: int, write: bool, instruction: int, t: int,
) -> tuple[int, int]:  # fmt: skip
    """One burst that reaches its controller at `t`: (when the controller accepts it, when it is done).

    Done: the last byte of a read has left the controller; a write lies in the controller's buffer.
    """
    c, b, row = locate(p, burst)
    accept = max(t, columns[c, channel[c, C_LOW] + p[P_WINDOW] - p[P_DEPTH], 0])
    if accept >= channel[c, C_REFRESH_AT]:
        _refresh(p, bank, channel, c, accept)
    if write:
        slot = channel[c, C_BUFFERED]
        buffer[c, slot, 0] = b
        buffer[c, slot, 1] = row
        buffer[c, slot, 2] = instruction
        channel[c, C_BUFFERED] = slot + 1
        if slot + 1 == p[P_BATCH]:
            flush(p, bank, channel, columns, group, buffer, stats, activates, c, accept)
        return accept, accept
    channel[c, C_WROTE] = 0
    floor = channel[c, C_READ_FLOOR]
    when = _access(p, bank, channel, columns, group, stats, activates, c, b, row, accept, floor, instruction, False)
    return accept, when + p[P_CL] + p[P_BURST] + p[P_CONTROLLER]
