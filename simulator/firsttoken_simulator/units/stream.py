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
    P_ALIKE,
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
def _used(p: np.ndarray, d: np.ndarray, groups: int, banks: int, end: int, at: int, tail: int, count: int) -> None:
    """Notes in banks and groups the newest of `count` columns up to the word `tail`; the next burst's bank is `at`."""
    alike, ccd_l, rtp = p[P_ALIKE], p[P_CCD_L], p[P_RTP]
    for k in range(min(count, p[P_ROUND])):
        if at == banks:
            at = end
        at -= BANK_WORDS
        when = d[U(tail - 2 * k)]
        d[U(at + B_COLUMN)] = when + ccd_l
        d[U(at + B_PRECHARGE)] = max(d[U(at + B_PRECHARGE)], when + rtp)
        if k < alike:
            d[U(groups + d[U(at + B_GROUP)])] = when


@njit(**INLINED)
def hits(
    p: np.ndarray, d: np.ndarray, x: np.ndarray, flight: np.ndarray, slot: int, latest: int, o: int, first: int,
    turn: int, row: int, count: int, t: int, limit: int, bus: int, port: int,
) -> tuple[int, int, int, int, int, int, int, int]:  # fmt: skip
    """Sends up to `count` reads from `t` on, until another actor is due at `limit`.

    `slot` is that of the next request in `flight`, with `count` to the end of the ring; the channel's record is at `o`,
    the row's banks are those from `first` on, the next burst is in that at `turn`. Returns (bursts sent, turn, time,
    when bus and ports are free, latest return, stall for slots, when the newest burst has left the bus). The wait for a
    slot follows every burst but the last of `count`.
    """
    start, banks = max(t, bus), o + p[P_AT_BANKS] + first * BANK_WORDS
    at, end = banks + turn * BANK_WORDS, banks + p[P_ROUND] * BANK_WORDS
    if d[U(at + B_ROW)] != row or port > start or x[X_PORTS] > x[X_BUS] or x[X_STRETCHES] == 0:
        return 0, turn, t, bus, port, latest, 0, t
    sure, groups = _open(p, d, o, first, turn, row, count), o + C_GROUPS
    occupied, ccd_s, ccd_l, around, alike = x[X_BUS], p[P_CCD_S], p[P_CCD_L], p[P_ROUND], p[P_ALIKE]
    back = p[P_CL] + p[P_BURST] + p[P_CONTROLLER] + x[X_LATENCY]
    tight = alike * ccd_s < ccd_l
    low = make_room(p, d, o, sure)
    tail = o + p[P_AT_COLUMNS] + 2 * (low + p[P_WINDOW] - 1)
    entry = tail + 2 - 2 * p[P_DEPTH]
    hole, floor, due = d[U(o + C_GAP)] - ccd_s, d[U(o + C_READ_FLOOR)], d[U(o + C_REFRESH_AT)]
    k, now, free, soonest = 0, start, t, d[U(tail)] + ccd_s
    while True:
        room = d[U(entry + 2 * k)]
        accept = max(now, room)
        early = max(accept, floor)
        if early <= hole:
            own = d[U(tail + 2 * (k - around) + 2)] + ccd_l if k >= around else d[U(at + B_COLUMN)]
            early = max(early, own)
        if accept >= due or early <= hole:
            break
        g = d[U(at + B_GROUP)]
        when = max(early, soonest)
        if k < alike:
            when = max(when, d[U(groups + g)] + ccd_l)
        elif tight:
            when = max(when, d[U(tail + 2 * (k - alike) + 2)] + ccd_l)
        if when >= soonest + ccd_s:
            hole = when - ccd_s
        soonest = when + ccd_s
        d[U(tail + 2 * k + 2)] = when
        d[U(tail + 2 * k + 3)] = g
        flight[U(slot + k)] = when + back
        at += BANK_WORDS
        if at == end:
            at = banks
        free = now + occupied
        k += 1
        if k == count:
            now = max(free, accept)
            break
        now = max(free, max(room, flight[U(slot + k)]))  # which two are ready before `now` is
        if now >= limit or k == sure:
            break
    d[U(o + C_LOW)] = low + k
    if k == 0:
        return 0, turn, t, bus, port, latest, 0, t
    d[U(o + C_GAP)] = hole + ccd_s
    d[U(o + C_HITS)] += k
    d[U(o + C_WROTE)] = 0
    _used(p, d, groups, banks, end, at, tail + 2 * k, k)
    sent = free - occupied
    port = (max(t, port) if k == 1 else sent) + x[X_PORTS]
    waited = sent - start - (k - 1) * occupied + (now - free if k < count else 0)
    return k, (at - banks) // BANK_WORDS, now, free, port, max(latest, soonest - ccd_s + back), waited, free
