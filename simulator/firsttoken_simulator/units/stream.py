"""The stretch of a stream that needs no decision: reads of one channel's open rows, each behind all commands so far.

`hits` does what the general path of a DMA engine does with such requests (bus, scratchpad ports, acceptance, column
command, ring of requests in flight), with the same arithmetic, but looks up once for the stretch what the general path
looks up for every burst. It starts where the ports are free no later than the bus, and a burst occupies them no longer
than the bus; then they stay so, and as the next request is never sent before the bus is free, it is sent when its turn
comes: neither has to be asked again. It stops before the first burst that is anything else: a row that is closed, a
refresh that is due, a command that may go between others. Nothing that it has not done is changed, so the general path
takes that burst over, and times are equal to the femtosecond.
"""

import numpy as np
from numba import njit

from firsttoken_simulator.units.compiled import INLINED
from firsttoken_simulator.units.dram import (
    B_COLUMN,
    B_GROUP,
    B_PRECHARGE,
    B_ROW,
    BANK_WORDS,
    C_GAP,
    C_GROUPS,
    C_HITS,
    C_LOW,
    C_OPEN,
    C_READ_FLOOR,
    C_REFRESH_AT,
    C_WROTE,
    P_AT_BANKS,
    P_AT_COLUMNS,
    P_BANKS,
    P_BURST,
    P_CCD_L,
    P_CCD_S,
    P_CL,
    P_CONTROLLER,
    P_DEPTH,
    P_ROUND,
    P_RTP,
    P_WINDOW,
    U,
    make_room,
)
from firsttoken_simulator.units.layout import X_BUS, X_LATENCY, X_PORTS, X_STRETCHES


@njit(**INLINED)
def _open(p: np.ndarray, d: np.ndarray, o: int, first: int, turn: int, row: int, count: int) -> int:
    """How many of the next `count` bursts find their row open."""
    name = row * p[P_BANKS] + first
    if d[U(o + C_OPEN)] == name:
        return count
    banks = o + p[P_AT_BANKS] + first * BANK_WORDS
    for k in range(min(count, p[P_ROUND])):
        if d[U(banks + turn * BANK_WORDS + B_ROW)] != row:
            return k
        turn += 1
        if turn == p[P_ROUND]:
            turn = 0
    if count >= p[P_ROUND]:
        d[U(o + C_OPEN)] = name
    return count


@njit(**INLINED)
def _used(p: np.ndarray, d: np.ndarray, banks: int, end: int, at: int, tail: int, count: int) -> None:
    """Notes in the banks the newest of `count` columns up to the word `tail`, the next burst being in the bank `at`."""
    for k in range(min(count, p[P_ROUND])):
        if at == banks:
            at = end
        at -= BANK_WORDS
        when = d[U(tail - 2 * k)]
        d[U(at + B_COLUMN)] = when + p[P_CCD_L]
        d[U(at + B_PRECHARGE)] = max(d[U(at + B_PRECHARGE)], when + p[P_RTP])


@njit(**INLINED)
def hits(
    p: np.ndarray, d: np.ndarray, x: np.ndarray, flight: np.ndarray, slot: int, latest: int, o: int, first: int,
    turn: int, row: int, count: int, t: int, limit: int, bus: int, port: int,
) -> tuple[int, int, int, int, int, int, int]:  # fmt: skip
    """Sends up to `count` reads from `t` on, until another actor is due at `limit`.

    `slot` is that of the next request in `flight`, with `count` to the end of the ring; the channel's record is at `o`,
    the row's banks are those from `first` on, the next burst is in that at `turn`. Returns (bursts sent, time, when bus
    and ports are free, latest return, stall for slots, when the newest burst has left the bus). The wait for a slot
    follows every burst but the last of `count`.
    """
    start, groups = max(t, bus), o + C_GROUPS
    banks = o + p[P_AT_BANKS] + first * BANK_WORDS
    at, end = banks + turn * BANK_WORDS, banks + p[P_ROUND] * BANK_WORDS
    if port > start or x[X_PORTS] > x[X_BUS] or x[X_STRETCHES] == 0:
        return 0, t, bus, port, latest, 0, t
    sure = _open(p, d, o, first, turn, row, count)
    if sure == 0:
        return 0, t, bus, port, latest, 0, t
    occupied, ccd_s, ccd_l, jump = x[X_BUS], p[P_CCD_S], p[P_CCD_L], 2 * p[P_CCD_S]
    back = p[P_CL] + p[P_BURST] + p[P_CONTROLLER] + x[X_LATENCY]
    low = make_room(p, d, o, sure)
    tail = o + p[P_AT_COLUMNS] + 2 * (low + p[P_WINDOW] - 1)
    entry = tail + 2 - 2 * p[P_DEPTH]
    newest, gap, floor, due = d[U(tail)], d[U(o + C_GAP)], d[U(o + C_READ_FLOOR)], d[U(o + C_REFRESH_AT)]
    k, now, free, around = 0, start, t, p[P_ROUND]
    while True:
        accept = max(now, d[U(entry + 2 * k)])
        early = max(accept, floor)
        if early + ccd_s <= gap:
            own = d[U(tail + 2 * (k - around) + 2)] + ccd_l if k >= around else d[U(at + B_COLUMN)]
            early = max(early, own)
        if accept >= due or early + ccd_s <= gap:
            break
        g = d[U(at + B_GROUP)]
        when = max(early, newest + ccd_s, d[U(groups + g)] + ccd_l)
        if when - newest >= jump:
            gap = when
        newest = when
        d[U(groups + g)] = when
        d[U(tail + 2 * k + 2)] = when
        d[U(tail + 2 * k + 3)] = g
        flight[U(slot + k)] = when + back
        at += BANK_WORDS
        if at == end:
            at = banks
        free = now + occupied
        now = max(free, accept)
        k += 1
        if k == count:
            break
        now = max(now, flight[U(slot + k)])
        if now >= limit or k == sure:
            break
    d[U(o + C_LOW)] = low + k
    if k == 0:
        return 0, t, bus, port, latest, 0, t
    d[U(o + C_GAP)] = gap
    d[U(o + C_HITS)] += k
    d[U(o + C_WROTE)] = 0
    _used(p, d, banks, end, at, tail + 2 * k, k)
    sent = free - occupied
    port = (max(t, port) if k == 1 else sent) + x[X_PORTS]
    waited = sent - start - (k - 1) * occupied + (now - free if k < count else 0)
    return k, now, free, port, max(latest, newest + back), waited, free
