"""The hot loop: runs a program's table to the end, event by event, on integer arrays only.

Actors are the queues. The one with the earliest event acts next, the lowest index first when equal; completions of DMA
instructions come before anything else at the same time. An actor goes on acting while no other is due. Tests
run the plain twin of `advance`, with those of all that it calls.

Stretches of a stream that need no decision are sent at once (`units/stream.py`); `issue` is the general path.

What makes it fast: the units' innermost functions are inlined (`units/compiled.py`), reference counting is off (the
caller keeps the arrays alive), indices are unsigned, and there is no division per burst. Only the entry points `start`,
`advance` and `drain` are cached on disk.
"""

from pathlib import Path
from typing import Final

import numpy as np
from numba import njit

from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.types import ENGINES_PER_CORE
from firsttoken_simulator.units import bus, dma, scratchpad
from firsttoken_simulator.units.compiled import INLINED, INNER
from firsttoken_simulator.units.dram import (
    FAR,
    P_CHANNELS,
    P_ROUND,
    P_WINDOW,
    P_WORDS,
    U,
    flush,
    serve,
    stretch,
)
from firsttoken_simulator.units.layout import (
    BLOCKED,
    COMPUTE,
    DONE,
    FINISH,
    ISSUE,
    M_BUS_FREE,
    M_NEXT_COMPLETION,
    NONE,
    O_END,
    O_HEAD,
    O_ISSUE_END,
    O_STALL_DRAM,
    O_STALL_SPAD,
    O_START,
    Q_AT,
    Q_BURST,
    Q_COMPLETED,
    Q_COUNT,
    Q_END,
    Q_LAST,
    Q_LATEST,
    Q_PENDING,
    Q_PHASE,
    Q_SEMAPHORE,
    Q_SLOT,
    Q_TIME,
    SLICES,
    START,
    T_BANKS,
    T_FIELDS,
    T_HEAD,
    T_KIND,
    T_PORTS,
    T_SIGNAL,
    T_SLICE,
    T_SLICES,
    T_TAIL,
    T_WAITS,
    WRITE,
    X_BUS,
    X_LATENCY,
    X_OUTSTANDING,
    X_PERIOD,
    X_PORTS,
    X_SETUP,
)
from firsttoken_simulator.units.stream import hits

FINISHED: Final = 1
STUCK: Final = 2
"""Results of `advance`; 0 means that the budget of events ran out."""


@njit(**INNER)
def try_start(table: np.ndarray, order: np.ndarray, queues: np.ndarray, x: np.ndarray, q: int, t: int) -> None:
    """Lets the instruction at the head of queue `q` start on the next clock edge from `t` if its waits hold."""
    i = order[queues[q, Q_AT]]
    for w in range(T_WAITS, T_FIELDS, 2):
        other = table[i, w]
        if other < 0:
            break
        if queues[other, Q_SEMAPHORE] < table[i, w + 1]:
            queues[q, Q_PHASE] = BLOCKED
            queues[q, Q_TIME] = FAR
            return
    queues[q, Q_PHASE] = START
    queues[q, Q_TIME] = -(-t // x[X_PERIOD]) * x[X_PERIOD]


@njit(**INNER)
def fetch(
    table: np.ndarray, order: np.ndarray, queues: np.ndarray, result: np.ndarray, x: np.ndarray, q: int, t: int,
) -> None:  # fmt: skip
    """Brings the next instruction of queue `q` to its head at `t`."""
    if queues[q, Q_AT] >= queues[q, Q_END]:
        queues[q, Q_PHASE] = DONE
        queues[q, Q_TIME] = FAR
        return
    result[order[queues[q, Q_AT]], O_HEAD] = t
    try_start(table, order, queues, x, q, t)


@njit(**INNER)
def _leave(
    table: np.ndarray, order: np.ndarray, queues: np.ndarray, result: np.ndarray, x: np.ndarray, machine:
    np.ndarray, q: int, t: int, end: int,
) -> None:  # fmt: skip
    """The instruction of queue `q` leaves the issue stage at `t`; it completes at `end`, after its predecessor."""
    i = order[queues[q, Q_AT]]
    end = max(end, queues[q, Q_COMPLETED])
    queues[q, Q_COMPLETED] = end
    result[i, O_ISSUE_END] = t
    result[i, O_END] = end
    queues[q, Q_AT] += 1
    machine[M_NEXT_COMPLETION] = min(machine[M_NEXT_COMPLETION], end)
    fetch(table, order, queues, result, x, q, t)


@njit(**INNER)
def signal(
    table: np.ndarray, order: np.ndarray, queues: np.ndarray, x: np.ndarray, q: int, i: int, t: int,
) -> None:  # fmt: skip
    """Counts the signal of instruction `i` of queue `q`, complete at `t`, and wakes the queues that wait."""
    if table[i, T_SIGNAL]:
        queues[q, Q_SEMAPHORE] += 1
        for other in range(queues.shape[0]):
            if queues[other, Q_PHASE] == BLOCKED:
                try_start(table, order, queues, x, other, t)


@njit(**INNER)
def _complete(
    table: np.ndarray, order: np.ndarray, queues: np.ndarray, result: np.ndarray, x: np.ndarray, machine:
    np.ndarray,
) -> None:  # fmt: skip
    """Completes the instruction that is next to complete, counts its signal and wakes the queues that wait."""
    best, at, after = int(-1), int(FAR), int(FAR)
    for q in range(queues.shape[0]):
        pending = queues[q, Q_PENDING]
        if pending < queues[q, Q_AT]:
            end = result[order[pending], O_END]
            if end < at:
                after, at, best = at, end, q
            elif end < after:
                after = end
    i = order[queues[best, Q_PENDING]]
    queues[best, Q_PENDING] += 1
    if queues[best, Q_PENDING] < queues[best, Q_AT]:
        after = min(after, result[order[queues[best, Q_PENDING]], O_END])
    machine[M_NEXT_COMPLETION] = after
    signal(table, order, queues, x, best, i, at)


@njit(**INNER)
def standstill(queues: np.ndarray) -> int:
    """What it means that no event is left: FINISHED, or STUCK where a queue has more to do."""
    for q in range(queues.shape[0]):
        if queues[q, Q_PHASE] != DONE:
            return STUCK
    return FINISHED


@njit(**INNER)
def begin(
    table: np.ndarray, queues: np.ndarray, result: np.ndarray, x: np.ndarray, p: np.ndarray, q: int, i: int, t: int,
) -> None:  # fmt: skip
    """Instruction `i` at the head of queue `q` starts at `t`."""
    result[i, O_START] = t
    kind = table[i, T_KIND]
    if kind == COMPUTE:
        queues[q, Q_COUNT] = table[i, T_SLICES]
        queues[q, Q_PHASE] = SLICES
        queues[q, Q_TIME] = t + table[i, T_HEAD]
    elif kind == NONE:
        queues[q, Q_PHASE] = FINISH
    else:
        dma.begin(table, queues, q, i)
        if dma.advance_run(table, queues, q, i, p) == 0:
            queues[q, Q_BURST], queues[q, Q_LAST] = 1, 0
        queues[q, Q_PHASE] = ISSUE
        queues[q, Q_TIME] = t + x[X_SETUP]


@njit(**INNER)
def compute(
    table: np.ndarray, queues: np.ndarray, result: np.ndarray, ports: np.ndarray, core: int, q: int, i: int, t: int,
    limit: int, budget: int,
) -> int:  # fmt: skip
    """Runs slices of compute instruction `i` from `t` on until another actor is due; the budget that is left."""
    left, stall = queues[q, Q_COUNT], 0
    while True:
        served = scratchpad.book(ports, core, t, table[i, T_PORTS]) + table[i, T_PORTS]
        wanted = t + table[i, T_SLICE]
        t = max(wanted, served, t + table[i, T_BANKS])
        stall += t - wanted
        left -= 1
        budget -= 1
        if left == 0 or t >= limit:
            break
    result[i, O_STALL_SPAD] += stall
    queues[q, Q_COUNT] = left
    if left == 0:
        queues[q, Q_PHASE] = FINISH
        t += table[i, T_TAIL]
    queues[q, Q_TIME] = t
    return budget


@njit(cache=True, _nrt=False, error_model="numpy")
def start(table: np.ndarray, order: np.ndarray, queues: np.ndarray, result: np.ndarray, x: np.ndarray) -> None:
    """Brings the first instruction of every queue to its head at time 0."""
    for q in range(queues.shape[0]):
        fetch(table, order, queues, result, x, q, int(0))


@njit(**INLINED)
def issue(
    table: np.ndarray, queues: np.ndarray, result: np.ndarray, x: np.ndarray, machine: np.ndarray, ports: np.ndarray,
    flight: np.ndarray, p: np.ndarray, d: np.ndarray, activates: np.ndarray, core: int, q: int, i: int, t: int,
    limit: int, budget: int,
) -> tuple[int, int, int]:  # fmt: skip
    """Sends bursts of DMA instruction `i` from `t` on until another actor is due.

    (1 when it has sent its last, when, the budget that is left).
    """
    write = table[i, T_KIND] == WRITE
    burst, last = queues[q, Q_BURST], queues[q, Q_LAST]
    latest, slot = queues[q, Q_LATEST], queues[q, Q_SLOT]
    bus, port = machine[M_BUS_FREE], ports[core]
    ring = q * x[X_OUTSTANDING]
    stall_spad, stall_dram, ended, sent = 0, 0, 0, t
    left, o, first, turn, row = int(0), int(0), int(0), int(0), int(0)
    if burst > last:
        ended = 1
    while ended == 0:
        if left == 0:
            c, first, turn, row, left = stretch(p, burst, last)
            o = c * p[P_WORDS]
        count, k, free = min(left, p[P_WINDOW]), 0, t
        if not write:
            count = min(count, x[X_OUTSTANDING] - slot)
            k, turn, t, bus, port, latest, waits, free = hits(
                p, d, x, flight, ring + slot, latest, o, first, turn, row, count, t, limit, bus, port
            )
            stall_dram += waits
            burst += k
            left -= k
            budget -= k
            slot += k
            if slot == x[X_OUTSTANDING]:
                slot = 0
        if k < count:
            if t >= limit and k > 0:
                break
            start, served = max(t, bus), max(t, port)
            sent = max(start, served)
            stall_spad += sent - start
            bus, port = start + x[X_BUS], served + x[X_PORTS]
            accept, done = serve(p, d, activates, o, first + turn, row, write, i, sent)
            done += x[X_LATENCY]
            flight[U(ring + slot)] = done
            slot += 1
            if slot == x[X_OUTSTANDING]:
                slot = 0
            latest = max(latest, done)
            free = sent + x[X_BUS]
            t = max(free, accept)
            turn += 1
            if turn == p[P_ROUND]:
                turn = 0
            burst += 1
            left -= 1
            budget -= 1
        if burst > last:
            step = dma.advance_run(table, queues, q, i, p)
            if step == 0:
                ended, sent = 1, t
                break
            burst, last = queues[q, Q_BURST], queues[q, Q_LAST]
            if step == 2:
                t = max(t, latest)
        t = max(t, flight[U(ring + slot)])
        stall_dram += t - free
        if t >= limit:
            break
    machine[M_BUS_FREE], ports[core] = bus, port
    result[i, O_STALL_SPAD] += stall_spad
    result[i, O_STALL_DRAM] += stall_dram
    queues[q, Q_BURST] = burst
    queues[q, Q_LAST] = last
    queues[q, Q_LATEST] = latest
    queues[q, Q_SLOT] = slot
    queues[q, Q_TIME] = t
    return ended, sent, budget


@njit(cache=True, _nrt=False, error_model="numpy")
def drain(p: np.ndarray, d: np.ndarray, activates: np.ndarray, t: int) -> None:
    """Writes out at `t` what the controllers still buffer, so that every burst is counted."""
    for c in range(p[P_CHANNELS]):
        flush(p, d, activates, c * p[P_WORDS], t)


@njit(cache=True, _nrt=False, error_model="numpy")
def advance(
    table: np.ndarray, order: np.ndarray, queues: np.ndarray, result: np.ndarray, x: np.ndarray, machine: np.ndarray,
    ports: np.ndarray, flight: np.ndarray, p: np.ndarray, d: np.ndarray, activates: np.ndarray, budget: int,
) -> int:  # fmt: skip
    """Runs until all queues are done, none can go on, or `budget` events have passed; see the results above."""
    while budget > 0:
        q, t, limit = int(-1), int(FAR), int(FAR)
        for other in range(queues.shape[0]):
            when = queues[other, Q_TIME]
            if when < t:
                limit, t, q = t, when, other
            elif when < limit:
                limit = when
        budget -= 1
        if machine[M_NEXT_COMPLETION] <= t:
            if machine[M_NEXT_COMPLETION] == FAR:
                return standstill(queues)
            _complete(table, order, queues, result, x, machine)
            continue
        limit = min(limit, machine[M_NEXT_COMPLETION])
        i = order[queues[q, Q_AT]]
        core = q // ENGINES_PER_CORE
        phase = queues[q, Q_PHASE]
        if phase == START:
            begin(table, queues, result, x, p, q, i, t)
        elif phase == SLICES:
            budget = compute(table, queues, result, ports, core, q, i, t, limit, budget)
        elif phase == FINISH:
            _leave(table, order, queues, result, x, machine, q, t, t)
        else:
            ended, sent, budget = issue(
                table, queues, result, x, machine, ports, flight, p, d, activates, core, q, i, t, limit, budget
            )
            if ended:
                _leave(table, order, queues, result, x, machine, q, sent, max(queues[q, Q_LATEST], sent))
    return 0


def forget_stale(folder: Path, module: str = Path(__file__).stem) -> None:
    """Removes compiled entry points of `module` in `folder` that are older than what they were compiled from.

    Numba compares the stamp of the module's file only, but the units' functions are compiled into its entry points.
    """
    sources = [Path(word.__file__), Path(__file__), *Path(bus.__file__).parent.glob("*.py")]
    newest = max(source.stat().st_mtime_ns for source in sources)
    for index in folder.glob(f"{module}.*.nbi"):
        try:
            if index.stat().st_mtime_ns < newest:
                index.unlink()
        except OSError:  # another process was faster, or the folder cannot be written
            continue


forget_stale(Path(advance.stats.cache_path))
