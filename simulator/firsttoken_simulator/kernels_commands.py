"""The hot loop for a DRAM whose controllers place commands: when a read returns is not known when it is sent.

It is that of `kernels.py` but for the DRAM.

The controllers are actors beside the queues: each looks at its commands at the clocks that `dram_scheduler.tick` names.
A queue with a DMA instruction is held while the oldest slot of its ring is still in flight, while a gather's indices
are, or while the controller's queue is full. Of the queues that wait for the same controller the one that has waited
longest goes first. An instruction ends when it has left and its last read is back; completion is in order per queue.
"""

from pathlib import Path
from typing import Final

import numpy as np
from numba import njit

from firsttoken_simulator.kernels import begin, compute, fetch, forget_stale, signal, standstill
from firsttoken_simulator.units import bus, dma, scratchpad
from firsttoken_simulator.units.compiled import INNER
from firsttoken_simulator.units.dram import FAR
from firsttoken_simulator.units.dram_channels import (
    A_CLOCK,
    A_DELAY,
    Channels,
    controller_of,
    device_of,
    place,
)
from firsttoken_simulator.units.dram_scheduler import (
    C_DEPTH,
    NEVER,
    S_ACTIVATED,
    S_ACTIVE,
    S_FINISHED,
    S_HALF,
    S_READS,
    S_WRITES,
    look_for,
    offer,
    tick,
    transfer,
)
from firsttoken_simulator.units.layout import (
    FINISH,
    ISSUE,
    M_NEXT_COMPLETION,
    O_END,
    O_ISSUE_END,
    O_STALL_DRAM,
    O_STALL_SPAD,
    Q_AT,
    Q_BURST,
    Q_COMPLETED,
    Q_LAST,
    Q_PENDING,
    Q_PHASE,
    Q_SLOT,
    Q_TIME,
    SLICES,
    START,
    T_KIND,
    WRITE,
    X_BUS,
    X_ENGINES,
    X_LATENCY,
    X_OUTSTANDING,
    X_PORTS,
    X_SETUP,
)

H_FOR, H_SINCE, H_TICKET, H_BOOKED, H_CHANNEL, H_FIELDS = range(6)
"""Of a queue: what it is held for, since when, its place in the line, whether its request has the bus, the channel."""
FREE, FOR_SLOT, FOR_DATA, FOR_ROOM = range(4)
"""What a queue is held for: nothing, its ring's next slot, all its data, room in a controller's queue."""
D_NEXT, D_TICKET, D_OPEN, D_FIELDS = range(4)
"""Of the DRAM: time of the next look of any controller, places given out, reads in flight and queues held for room."""
R_OUT, R_LATEST, R_FIELDS = range(3)
"""Of an instruction: reads in flight, latest return so far."""
TAG: Final = 32
"""A request's tag: its instruction above this bit, its slot (queue times ring plus place in the ring) below."""


@njit(**INNER)
def _next_completion(queues: np.ndarray, order: np.ndarray, result: np.ndarray, machine: np.ndarray) -> None:
    at = FAR
    for q in range(queues.shape[0]):
        if queues[q, Q_PENDING] < queues[q, Q_AT]:
            at = min(at, result[order[queues[q, Q_PENDING]], O_END])
    machine[M_NEXT_COMPLETION] = at


@njit(**INNER)
def _complete(
    table: np.ndarray, order: np.ndarray, queues: np.ndarray, result: np.ndarray, x: np.ndarray,
    machine: np.ndarray,
) -> None:  # fmt: skip
    """Completes the instruction that is next to complete, counts its signal and wakes the queues that wait."""
    best, at = int(-1), int(FAR)
    for q in range(queues.shape[0]):
        if queues[q, Q_PENDING] < queues[q, Q_AT]:
            end = result[order[queues[q, Q_PENDING]], O_END]
            if end < at:
                at, best = end, q
    i = order[queues[best, Q_PENDING]]
    queues[best, Q_PENDING] += 1
    queues[best, Q_COMPLETED] = at
    if queues[best, Q_PENDING] < queues[best, Q_AT]:
        following = order[queues[best, Q_PENDING]]
        result[following, O_END] = max(result[following, O_END], at)
    signal(table, order, queues, x, best, i, at)
    _next_completion(queues, order, result, machine)


@njit(**INNER)
def _leave(
    table: np.ndarray, order: np.ndarray, queues: np.ndarray, result: np.ndarray, x: np.ndarray, machine: np.ndarray,
    returns: np.ndarray, q: int, t: int,
) -> None:  # fmt: skip
    """The instruction of queue `q` leaves the issue stage at `t`; it ends when its last read is back."""
    i = order[queues[q, Q_AT]]
    result[i, O_ISSUE_END] = t
    result[i, O_END] = FAR if returns[i, R_OUT] > 0 else max(t, returns[i, R_LATEST], queues[q, Q_COMPLETED])
    queues[q, Q_AT] += 1
    _next_completion(queues, order, result, machine)
    fetch(table, order, queues, result, x, q, t)


@njit(**INNER)
def _return(
    order: np.ndarray, queues: np.ndarray, result: np.ndarray, machine: np.ndarray, flight: np.ndarray,
    hold: np.ndarray,
    returns: np.ndarray, dram: np.ndarray, tag: int, when: int,
) -> None:  # fmt: skip
    """A read's data is back at `when`: frees its slot, may end its instruction and let its queue go on."""
    i, ring = tag >> TAG, tag & ((1 << TAG) - 1)
    q, slot = ring // flight.shape[1], ring % flight.shape[1]
    flight[q, slot] = when
    dram[D_OPEN] -= 1
    returns[i, R_OUT] -= 1
    returns[i, R_LATEST] = max(returns[i, R_LATEST], when)
    if returns[i, R_OUT] == 0 and result[i, O_END] == FAR:
        result[i, O_END] = max(returns[i, R_LATEST], result[i, O_ISSUE_END], queues[q, Q_COMPLETED])
        _next_completion(queues, order, result, machine)
    waits = hold[q, H_FOR]
    if waits == FOR_SLOT and queues[q, Q_SLOT] == slot:
        queues[q, Q_TIME] = max(hold[q, H_SINCE], when)
    elif waits == FOR_DATA and order[queues[q, Q_AT]] == i and returns[i, R_OUT] == 0:
        queues[q, Q_TIME] = max(hold[q, H_SINCE], returns[i, R_LATEST])


@njit(**INNER)
def _look(
    table: np.ndarray, order: np.ndarray, queues: np.ndarray, result: np.ndarray, x: np.ndarray, machine: np.ndarray,
    flight: np.ndarray, hold: np.ndarray, returns: np.ndarray, dram: np.ndarray, ch: Channels, activates: np.ndarray,
) -> None:  # fmt: skip
    """The controller that is due looks at its commands; what has come back goes to its queue."""
    clock = ch.a[A_CLOCK]
    c, at = int(0), int(FAR)
    for other in range(ch.next.shape[0]):
        if ch.next[other] < at:
            c, at = other, ch.next[other]
    device, con = device_of(ch, c), controller_of(ch, c)
    soon = tick(device, con, at)
    s = con.s
    if s[S_ACTIVATED] >= 0:
        activates[s[S_ACTIVATED] >> TAG] += 1
    for n in range(s[S_FINISHED]):
        when = con.finished[n, 1] * clock + ch.a[A_DELAY] + x[X_LATENCY]
        _return(order, queues, result, machine, flight, hold, returns, dram, con.finished[n, 0], when)
    if transfer(con):
        soon = at + 1
    ch.next[c] = soon
    oldest, ticket = -1, FAR
    for q in range(queues.shape[0]):
        if hold[q, H_FOR] == FOR_ROOM and hold[q, H_CHANNEL] == c and queues[q, Q_TIME] == FAR:
            kind = S_WRITES if table[order[queues[q, Q_AT]], T_KIND] == WRITE else S_READS
            if s[kind] < con.c[C_DEPTH] and hold[q, H_TICKET] < ticket:
                oldest, ticket = q, hold[q, H_TICKET]
    if oldest >= 0:
        queues[oldest, Q_TIME] = at * clock
    first = FAR
    for other in range(ch.next.shape[0]):
        first = min(first, ch.next[other])
    dram[D_NEXT] = first * clock if first < NEVER else FAR


@njit(**INNER)
def _hold(queues: np.ndarray, hold: np.ndarray, q: int, reason: int, since: int) -> None:
    """Queue `q` goes on when something else lets it; the wait counts from `since`."""
    hold[q, H_FOR], hold[q, H_SINCE] = reason, since
    queues[q, Q_TIME] = FAR


@njit(**INNER)
def _send(
    table: np.ndarray, order: np.ndarray, queues: np.ndarray, result: np.ndarray, x: np.ndarray, machine: np.ndarray,
    ports: np.ndarray, flight: np.ndarray, hold: np.ndarray, returns: np.ndarray, dram: np.ndarray, ch: Channels,
    p: np.ndarray, q: int, t: int,
) -> None:  # fmt: skip
    """Sends the next request of the DMA instruction of queue `q`, as far as it gets at `t`."""
    i = order[queues[q, Q_AT]]
    write = table[i, T_KIND] == WRITE
    if hold[q, H_FOR] in (FOR_SLOT, FOR_DATA):
        result[i, O_STALL_DRAM] += t - hold[q, H_SINCE]
        hold[q, H_FOR] = FREE
    if queues[q, Q_BURST] > queues[q, Q_LAST]:
        _leave(table, order, queues, result, x, machine, returns, q, t)
        return
    if hold[q, H_BOOKED] == 0:
        sent = bus.book(machine, t, x[X_BUS])
        served = scratchpad.book(ports, q // x[X_ENGINES], t, x[X_PORTS])
        if served > sent:
            result[i, O_STALL_SPAD] += served - sent
            sent = served
        hold[q, H_BOOKED] = 1
        if sent > t:
            queues[q, Q_TIME] = sent
            return
    c, bank, row = place(ch.a, queues[q, Q_BURST])
    slot = queues[q, Q_SLOT]
    con = controller_of(ch, c)
    if not offer(con, bank, row, write, (i << TAG) | (q * flight.shape[1] + slot)):
        if hold[q, H_FOR] != FOR_ROOM:
            hold[q, H_TICKET], hold[q, H_CHANNEL] = dram[D_TICKET], c
            dram[D_TICKET] += 1
            dram[D_OPEN] += 1
            _hold(queues, hold, q, int(FOR_ROOM), t)
        queues[q, Q_TIME] = FAR
        return
    if hold[q, H_FOR] == FOR_ROOM:
        result[i, O_STALL_DRAM] += t - hold[q, H_SINCE]
        hold[q, H_FOR] = FREE
        dram[D_OPEN] -= 1
    clock = ch.a[A_CLOCK]
    ch.next[c] = min(ch.next[c], look_for(device_of(ch, c), con, bank, row, t // clock + 1))
    dram[D_NEXT] = min(dram[D_NEXT], ch.next[c] * clock)
    hold[q, H_BOOKED] = 0
    if write:
        flight[q, slot] = t + x[X_LATENCY]
        returns[i, R_LATEST] = max(returns[i, R_LATEST], t + x[X_LATENCY])
    else:
        flight[q, slot] = FAR
        returns[i, R_OUT] += 1
        dram[D_OPEN] += 1
    slot += 1
    if slot == x[X_OUTSTANDING]:
        slot = 0
    queues[q, Q_SLOT] = slot
    free = t + x[X_BUS]
    queues[q, Q_BURST] += 1
    if queues[q, Q_BURST] > queues[q, Q_LAST]:
        step = dma.advance_run(table, queues, q, i, p)
        if step == 0:
            _leave(table, order, queues, result, x, machine, returns, q, free)
            return
        if step == 2:
            if returns[i, R_OUT] > 0:
                _hold(queues, hold, q, int(FOR_DATA), free)
                return
            free = max(free, returns[i, R_LATEST])
    if flight[q, slot] == FAR:
        _hold(queues, hold, q, int(FOR_SLOT), free)
    else:
        queues[q, Q_TIME] = max(free, flight[q, slot])
        result[i, O_STALL_DRAM] += queues[q, Q_TIME] - free


@njit(cache=True, _nrt=False, error_model="numpy")
def advance(
    table: np.ndarray, order: np.ndarray, queues: np.ndarray, result: np.ndarray, x: np.ndarray, machine: np.ndarray,
    ports: np.ndarray, flight: np.ndarray, hold: np.ndarray, returns: np.ndarray, dram: np.ndarray, ch: Channels,
    p: np.ndarray, activates: np.ndarray, budget: int,
) -> int:  # fmt: skip
    """Runs until all queues are done, none can go on, or `budget` events have passed; results as in `kernels`."""
    while budget > 0:
        q, t, limit = int(-1), int(FAR), int(FAR)
        for other in range(queues.shape[0]):
            when = queues[other, Q_TIME]
            if when < t:
                limit, t, q = t, when, other
            elif when < limit:
                limit = when
        budget -= 1
        completion = machine[M_NEXT_COMPLETION]
        if t == FAR and completion == FAR and dram[D_OPEN] == 0:
            return standstill(queues)
        if dram[D_NEXT] <= min(t, completion):
            _look(table, order, queues, result, x, machine, flight, hold, returns, dram, ch, activates)
            continue
        if completion <= t:
            _complete(table, order, queues, result, x, machine)
            continue
        limit = min(limit, completion, dram[D_NEXT])
        i = order[queues[q, Q_AT]]
        phase = queues[q, Q_PHASE]
        if phase == START:
            begin(table, queues, result, x, p, q, i, t)
            if queues[q, Q_PHASE] == ISSUE:
                hold[q, H_FOR] = FREE
                if flight[q, queues[q, Q_SLOT]] == FAR:
                    _hold(queues, hold, q, int(FOR_SLOT), t + x[X_SETUP])
                else:
                    queues[q, Q_TIME] = max(queues[q, Q_TIME], flight[q, queues[q, Q_SLOT]])
        elif phase == SLICES:
            budget = compute(table, queues, result, ports, q // x[X_ENGINES], q, i, t, limit, budget)
        elif phase == FINISH:
            _leave(table, order, queues, result, x, machine, returns, q, t)
        else:
            _send(table, order, queues, result, x, machine, ports, flight, hold, returns, dram, ch, p, q, t)
    return 0


@njit(cache=True, _nrt=False, error_model="numpy")
def drain(ch: Channels, activates: np.ndarray) -> None:
    """Places what the controllers still hold, so that every burst is counted."""
    for c in range(ch.next.shape[0]):
        device, con = device_of(ch, c), controller_of(ch, c)
        s, t = con.s, ch.next[c]
        held = 1
        while held > 0:
            soon = tick(device, con, t)
            if s[S_ACTIVATED] >= 0:
                activates[s[S_ACTIVATED] >> TAG] += 1
            moved = transfer(con)
            held = s[S_READS] + s[S_WRITES] + s[S_ACTIVE] + (s[S_HALF] >= 0)
            for bank in range(con.banked.shape[0]):
                held += con.banked[bank, 0]
            t = t + 1 if moved else soon
        ch.next[c] = t


forget_stale(Path(advance.stats.cache_path), Path(__file__).stem)
