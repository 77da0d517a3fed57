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
from firsttoken_simulator.units.compiled import INLINED, INNER

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
    P_CCD_L, P_WTR, P_RTW, P_RRD, P_FAW, P_BURST, P_CONTROLLER, P_REFRESH, P_RFC, P_PER_BANK, P_WINDOW, P_WORDS,
    P_AT_BANKS, P_AT_BUFFER, P_AT_COLUMNS, P_ROOM, P_ALIKE, P_COUNT,
) = range(42)  # fmt: skip
"""Columns of the parameter array made by `resolve`; the last are the layout of a channel's state: its words, where the
banks, the buffered writes and the column commands begin, how many of these fit; and after how many bursts of a stretch
a bank group comes again."""

(
    C_LOW, C_GAP, C_READ_FLOOR, C_WRITE_FLOOR, C_WROTE, C_REFRESH_AT, C_REFRESH_BANK, C_BUFFERED, C_ACT_LOW, C_HITS,
    C_MISSES, C_CONFLICTS, C_OPEN,
) = range(13)
"""Of a channel: first column command in its window, end of the last usable gap, earliest read and write, whether the
newest command is a write, when refresh falls due and for which bank, buffered writes, the oldest activate kept, and
what requests have found, and a set of banks known to have one row open
(`row * banks + first bank`, or -1)."""
C_ACTS: Final = 16
"""The activates kept: `ACTS` of `ACT_ROOM` words from `C_ACT_LOW` on, ascending."""
ACT_ROOM: Final = 48
C_GROUPS: Final = C_ACTS + ACT_ROOM
"""The newest column command of each bank group."""

B_ROW, B_COLUMN, B_PRECHARGE, B_ACTIVATE, B_GROUP = range(5)
"""Of a bank: open row (-1 none), earliest column, earliest precharge, earliest activate once closed, bank group."""
BANK_WORDS: Final = 8

U: Final = np.uint64
"""Indices that are cast to this are known not to be negative, which spares the compiled code a test."""


class DramState(NamedTuple):
    """The DRAM and its controllers."""

    words: np.ndarray
    """A record of `P_WORDS` for each channel: `C_*`, groups, banks, posted writes (bank, row, instruction), and
    (time, bank group) of the newest column commands, ascending, in a sliding window."""


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
    p[P_ROUND], p[P_ALIKE] = together, min(together, d.bank_groups)
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
    p[P_ROOM] = 3 * p[P_WINDOW]
    p[P_AT_BANKS] = C_GROUPS + d.bank_groups
    p[P_AT_BUFFER] = p[P_AT_BANKS] + banks * BANK_WORDS
    p[P_AT_COLUMNS] = p[P_AT_BUFFER] + 3 * p[P_BATCH]
    p[P_WORDS] = p[P_AT_COLUMNS] + 2 * p[P_ROOM]
    return p


def burst_fs(target: Target) -> int:
    """Femtoseconds that one burst occupies the data bus of its channel."""
    return round(target.dram.burst_length * 1e9 / target.dram.data_rate_mtps)


def new_state(p: np.ndarray) -> DramState:
    """All banks closed, nothing pending, first refresh one interval from now."""
    words = np.zeros((int(p[P_CHANNELS]), int(p[P_WORDS])), np.int64)
    words[:, C_GAP] = PAST
    words[:, C_OPEN] = -1
    words[:, C_REFRESH_AT] = p[P_REFRESH]
    words[:, C_ACTS : p[P_AT_BANKS]] = PAST
    words[:, p[P_AT_COLUMNS] :] = PAST
    banks = words[:, p[P_AT_BANKS] : p[P_AT_BUFFER]].reshape(len(words), -1, BANK_WORDS)
    banks[:, :, B_ROW] = -1
    banks[:, :, B_GROUP] = np.arange(banks.shape[1]) % int(p[P_GROUPS])
    return DramState(words.ravel())


@njit(**INLINED)
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


@njit(**INLINED)
def stretch(p: np.ndarray, burst: int, last: int) -> tuple[int, int, int, int, int]:
    """Bursts from `burst` to `last` at most that go round one channel's banks of one row, and no further.

    (channel, first of these banks, place of `burst` among them, row, how many bursts).
    """
    if p[P_POW2]:
        chunk = burst >> p[P_SH_CHUNK]
        at = burst & (p[P_CHUNK] - 1)
        channel = chunk & (p[P_CHANNELS] - 1)
        inner = ((chunk >> p[P_SH_CHANNEL]) << p[P_SH_CHUNK]) | at
        shift = p[P_SH_ROUND] + p[P_SH_PAGE]
        row = inner >> (p[P_SH_BANK] + p[P_SH_PAGE])
        first = ((inner >> shift) << p[P_SH_ROUND]) & (p[P_BANKS] - 1)
        turn = inner & (p[P_ROUND] - 1)
        left = (1 << shift) - (inner & ((1 << shift) - 1))
    else:
        chunk = burst // p[P_CHUNK]
        at = burst - chunk * p[P_CHUNK]
        around = chunk // p[P_CHANNELS]
        channel = chunk - around * p[P_CHANNELS]
        inner = around * p[P_CHUNK] + at
        together = p[P_ROUND] * p[P_PAGE]
        place = inner // together
        row = inner // (p[P_BANKS] * p[P_PAGE])
        first = place * p[P_ROUND] % p[P_BANKS]
        turn = inner % p[P_ROUND]
        left = together - (inner - place * together)
    return channel, first, turn, row, min(left, p[P_CHUNK] - at, last - burst + 1)


@njit(**INNER)
def _activate(p: np.ndarray, d: np.ndarray, o: int, candidate: int) -> int:
    """First time from `candidate` at which an activate keeps tRRD and tFAW with all others; records it."""
    low = d[U(o + C_ACT_LOW)]
    if low + ACTS >= ACT_ROOM:
        for i in range(ACTS):
            d[U(o + C_ACTS + i)] = d[U(o + C_ACTS + low + i)]
        low = 0
    acts = o + C_ACTS + low
    rrd, faw = p[P_RRD], p[P_FAW]
    newest = d[U(acts + ACTS - 1)]
    if candidate >= newest:
        at = max(candidate, newest + rrd, d[U(acts + ACTS - 4)] + faw)
        d[U(acts + ACTS)] = at
        d[U(o + C_ACT_LOW)] = low + 1
        return at
    at = candidate
    while True:
        pos = ACTS
        while pos > 0 and d[U(acts + pos - 1)] > at:
            pos -= 1
        if pos > 0 and at - d[U(acts + pos - 1)] < rrd:
            at = d[U(acts + pos - 1)] + rrd
            continue
        if pos < ACTS and d[U(acts + pos)] - at < rrd:
            at = d[U(acts + pos)] + rrd
            continue
        later = at
        for before in range(5):  # every window of five activates that would hold this one
            if pos - before < 0 or pos + 3 - before >= ACTS:
                continue
            first = d[U(acts + pos - before)] if before else at
            last = d[U(acts + pos + 3 - before)] if before < 4 else at
            if last - first < faw:
                later = first + faw if before == 4 else d[U(acts + pos)] + rrd
                break
        if later == at:
            break
        at = later
    if pos > 0:
        for i in range(ACTS, pos, -1):
            d[U(acts + i)] = d[U(acts + i - 1)]
        d[U(acts + pos)] = at
        d[U(o + C_ACT_LOW)] = low + 1
    else:
        d[U(o + C_ACT_LOW)] = low
    return at


@njit(**INLINED)
def make_room(p: np.ndarray, d: np.ndarray, o: int, count: int) -> int:
    """Where the window of column commands begins, once there is room for `count` more behind it."""
    low = d[U(o + C_LOW)]
    if low + p[P_WINDOW] + count > p[P_ROOM]:
        at = o + p[P_AT_COLUMNS]
        for i in range(2 * p[P_WINDOW]):
            d[U(at + i)] = d[U(at + 2 * low + i)]
        low = 0
    return low


@njit(**INNER)
def _between(p: np.ndarray, d: np.ndarray, first: int, top: int, g: int, early: int) -> int:
    """First time from `early` between the commands at words `first` to `top` that a command of group `g` may take."""
    ccd_s, ccd_l = p[P_CCD_S], p[P_CCD_L]
    i = top
    while i > first and d[U(i)] > early - ccd_l:
        i -= 2
    at, same = early, PAST
    while i <= top:
        other = d[U(i)]
        if other >= at + ccd_l:
            break
        if d[U(i + 1)] == g:
            if other > at - ccd_l:
                at = other + ccd_l
            same = other
        elif other > at - ccd_s and other < at + ccd_s:
            at = max(other + ccd_s, same + ccd_l)
        i += 2
    return at


@njit(**INLINED)
def _place(p: np.ndarray, d: np.ndarray, o: int, g: int, early: int) -> int:
    """Time of the first free column slot from `early` for bank group `g`; takes it."""
    ccd_s = p[P_CCD_S]
    low = make_room(p, d, o, int(1))
    first = o + p[P_AT_COLUMNS] + 2 * low
    i = first + 2 * p[P_WINDOW]
    d[U(o + C_LOW)] = low + 1
    newest = d[U(i - 2)]
    group = o + C_GROUPS + g
    at = early
    if early + ccd_s <= d[U(o + C_GAP)]:
        at = _between(p, d, first, i - 2, g, early)
        if at <= newest:
            while i > first + 2 and d[U(i - 2)] > at:
                d[U(i)] = d[U(i - 2)]
                d[U(i + 1)] = d[U(i - 1)]
                i -= 2
            d[U(i)] = at
            d[U(i + 1)] = g
            if at > d[U(group)]:
                d[U(group)] = at
            return at
    at = max(at, newest + ccd_s, d[U(group)] + p[P_CCD_L])
    if at - newest >= 2 * ccd_s:
        d[U(o + C_GAP)] = at
    d[U(i)] = at
    d[U(i + 1)] = g
    d[U(group)] = at
    return at


@njit(**INLINED)
def _access(
    p: np.ndarray, d: np.ndarray, activates: np.ndarray, o: int, b: int, row: int, t: int, floor: int, instruction: int,
    write: bool,
) -> int:  # fmt: skip
    """Opens the row if need be and places the column command of one burst; returns the command's time."""
    at = o + p[P_AT_BANKS] + b * BANK_WORDS
    early = max(t, floor)
    open_row = d[U(at + B_ROW)]
    if open_row == row:
        d[U(o + C_HITS)] += 1
        early = max(early, d[U(at + B_COLUMN)])
    else:
        if open_row >= 0:
            d[U(o + C_CONFLICTS)] += 1
            ready = max(t, d[U(at + B_PRECHARGE)]) + p[P_RP]
        else:
            d[U(o + C_MISSES)] += 1
            ready = max(t, d[U(at + B_ACTIVATE)])
        act = _activate(p, d, o, ready)
        d[U(o + C_OPEN)] = -1
        activates[instruction] += 1
        d[U(at + B_ROW)] = row
        d[U(at + B_PRECHARGE)] = act + p[P_RAS]
        early = max(early, act + p[P_RCD])
    when = _place(p, d, o, d[U(at + B_GROUP)], early)
    d[U(at + B_COLUMN)] = when + p[P_CCD_L]
    closes = when + (p[P_CWL] + p[P_BURST] + p[P_WR] if write else p[P_RTP])
    if closes > d[U(at + B_PRECHARGE)]:
        d[U(at + B_PRECHARGE)] = closes
    return when


@njit(**INNER)
def _refresh(p: np.ndarray, d: np.ndarray, o: int, t: int) -> None:
    """Carries out the refreshes of the channel at `o` that fell due up to `t`."""
    banks = p[P_BANKS]
    per_bank = p[P_PER_BANK] != 0
    interval, rp, rfc = p[P_REFRESH], p[P_RP], p[P_RFC]
    round_fs = interval * (banks if per_bank else 1)
    at = o + p[P_AT_BANKS]
    d[o + C_OPEN] = -1
    idle = (t - d[o + C_REFRESH_AT]) // round_fs - 1
    if idle > 0:  # whole rounds in which nothing was asked: only their closing of the rows is left to see
        d[o + C_REFRESH_AT] += idle * round_fs
        for b in range(at, at + banks * BANK_WORDS, BANK_WORDS):
            if d[b + B_ROW] >= 0:
                d[b + B_ACTIVATE] = d[b + B_PRECHARGE] + rp
                d[b + B_ROW] = -1
    while d[o + C_REFRESH_AT] <= t:
        first = at + (d[o + C_REFRESH_BANK] * BANK_WORDS if per_bank else 0)
        last = first + (1 if per_bank else banks) * BANK_WORDS
        start = d[o + C_REFRESH_AT]
        for b in range(first, last, BANK_WORDS):
            free = d[b + B_PRECHARGE] + rp if d[b + B_ROW] >= 0 else d[b + B_ACTIVATE]
            start = max(start, free)
        for b in range(first, last, BANK_WORDS):
            d[b + B_ROW] = -1
            d[b + B_ACTIVATE] = start + rfc
        if per_bank:
            d[o + C_REFRESH_BANK] = (d[o + C_REFRESH_BANK] + 1) % banks
        d[o + C_REFRESH_AT] += interval


@njit(**INNER)
def flush(p: np.ndarray, d: np.ndarray, activates: np.ndarray, o: int, t: int) -> None:
    """Places the buffered writes of the channel at `o`, after the turnaround of the data bus."""
    count = d[U(o + C_BUFFERED)]
    if count == 0:
        return
    tail = o + p[P_AT_COLUMNS] + 2 * (p[P_WINDOW] - 1)
    if d[U(o + C_WROTE)] == 0:
        newest = d[U(tail + 2 * d[U(o + C_LOW)])]
        d[U(o + C_WRITE_FLOOR)] = max(d[U(o + C_WRITE_FLOOR)], newest + p[P_RTW])
        d[U(o + C_WROTE)] = 1
    floor = d[U(o + C_WRITE_FLOOR)]
    at = o + p[P_AT_BUFFER]
    for i in range(at, at + 3 * count, 3):
        bank, row, instruction = d[U(i)], d[U(i + 1)], d[U(i + 2)]
        _access(p, d, activates, o, bank, row, t, floor, instruction, bool(True))
    d[U(o + C_BUFFERED)] = 0
    newest = d[U(tail + 2 * d[U(o + C_LOW)])]
    d[U(o + C_READ_FLOOR)] = newest + p[P_CWL] + p[P_BURST] + p[P_WTR]


@njit(**INLINED)
def accepted(p: np.ndarray, d: np.ndarray, o: int, t: int) -> int:
    """When the controller of the channel at `o` takes a request that reaches it at `t`; refreshes due are done."""
    newest = o + p[P_AT_COLUMNS] + 2 * (d[U(o + C_LOW)] + p[P_WINDOW])
    accept = max(t, d[U(newest - 2 * p[P_DEPTH])])
    if accept >= d[U(o + C_REFRESH_AT)]:
        _refresh(p, d, o, accept)
    return accept


@njit(**INLINED)
def post(
    p: np.ndarray, d: np.ndarray, activates: np.ndarray, o: int, b: int, row: int, instruction: int, accept: int
) -> None:
    """Puts one write into the buffer of the channel at `o`, and writes it out when it is full."""
    slot = d[U(o + C_BUFFERED)]
    at = o + p[P_AT_BUFFER] + 3 * slot
    d[U(at)] = b
    d[U(at + 1)] = row
    d[U(at + 2)] = instruction
    d[U(o + C_BUFFERED)] = slot + 1
    if slot + 1 == p[P_BATCH]:
        flush(p, d, activates, o, accept)


@njit(**INLINED)
def serve(
    p: np.ndarray, d: np.ndarray, activates: np.ndarray, o: int, b: int, row: int, write: bool, instruction: int, t: int
) -> tuple[int, int]:
    """One burst for the channel at `o` that reaches it at `t`; see `request`."""
    accept = accepted(p, d, o, t)
    if write:
        post(p, d, activates, o, b, row, instruction, accept)
        return accept, accept
    d[U(o + C_WROTE)] = 0
    when = _access(p, d, activates, o, b, row, accept, d[U(o + C_READ_FLOOR)], instruction, bool(False))
    return accept, when + p[P_CL] + p[P_BURST] + p[P_CONTROLLER]


@njit(_nrt=False, error_model="numpy")
def request(
    p: np.ndarray, d: np.ndarray, activates: np.ndarray, burst: int, write: bool, instruction: int, t: int,
) -> tuple[int, int]:  # fmt: skip
    """One burst that reaches its controller at `t`: (when the controller accepts it, when it is done).

    Done: the last byte of a read has left the controller; a write lies in the controller's buffer.
    """
    c, b, row = locate(p, burst)
    return serve(p, d, activates, c * p[P_WORDS], b, row, write, instruction, t)
