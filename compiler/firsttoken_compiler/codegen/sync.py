"""Semaphores: the fewest waits and signals that keep every hazard between queues in program order."""

import numpy as np
from numba import njit

from firsttoken_compiler.codegen.hazards import hazards
from firsttoken_compiler.errors import ProgramError
from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.types import ENGINES_PER_CORE, queue_name


def insert_semaphores(code: np.ndarray, queues: int | None = None) -> np.ndarray:
    """The same instructions, int64 `[n, WIDTH]`, with waits and signals under which any execution equals program order.

    Waits and signals already there are replaced. Every wait is necessary: dropping one leaves a hazard unordered.
    `queues` defaults to those of the cores in use. Raises ProgramError when an instruction needs more than `MAX_WAITS`.
    """
    code = np.ascontiguousarray(code, np.int64).copy()
    code[:, word.WAITS : word.WAITS + 2 * word.MAX_WAITS] = 0
    code[:, word.SIGNAL] = 0
    if queues is None:
        queues = (int(code[:, word.QUEUE].max(initial=0)) // ENGINES_PER_CORE + 1) * ENGINES_PER_CORE
    need = hazards(code, queues).need
    waits = np.full((len(code), word.MAX_WAITS), -1, np.int64)
    queue = np.ascontiguousarray(code[:, word.QUEUE])
    crowded = _reduce(queue, need, np.full_like(need, -1), waits)
    if crowded >= 0:
        others = ", ".join(queue_name(q) for q in np.flatnonzero(need[crowded] >= 0).tolist())
        raise ProgramError(
            f"instruction {crowded} on {queue_name(int(queue[crowded]))} has to wait for more than {word.MAX_WAITS} "
            f"queues ({others}); split its operand so that it depends on fewer cores, or use fewer cores"
        )
    _encode(code, queue, waits)
    return code


def _encode(code: np.ndarray, queue: np.ndarray, waits: np.ndarray) -> None:
    """Writes signals on awaited instructions and waits as counts of the signals up to the awaited one."""
    code[waits[waits >= 0], word.SIGNAL] = 1
    count = np.zeros(len(code), np.int64)
    for q in np.unique(queue):
        mine = queue == q
        count[mine] = np.cumsum(code[mine, word.SIGNAL])
    for slot in range(word.MAX_WAITS):
        used = np.flatnonzero(waits[:, slot] >= 0)
        producer = waits[used, slot]
        code[used, word.WAITS + 2 * slot] = queue[producer] + 1
        code[used, word.WAITS + 2 * slot + 1] = count[producer]


@njit(cache=True)
def _reduce(queue: np.ndarray, need: np.ndarray, clock: np.ndarray, waits: np.ndarray) -> int:
    """Fills `waits` with awaited instructions; returns the first instruction that needs too many, or -1.

    `clock[i, q]` is the last instruction of queue q known to be complete once i is: what its predecessor in the queue
    knew, what the instructions it waits for knew, and itself.
    """
    queues = need.shape[1]
    previous = np.full(queues, -1, np.int64)
    wanted = np.empty(queues, np.int64)
    for i in range(queue.shape[0]):
        own = queue[i]
        if previous[own] >= 0:
            clock[i] = clock[previous[own]]
        count = 0
        for q in range(queues):
            if need[i, q] > clock[i, q]:
                wanted[count] = q
                count += 1
        kept = 0
        for a in range(count):
            producer = need[i, wanted[a]]
            implied = False
            for b in range(count):
                if b != a and clock[need[i, wanted[b]], wanted[a]] >= producer:
                    implied = True
            if implied:
                continue
            if kept == waits.shape[1]:
                return i
            waits[i, kept] = producer
            kept += 1
        for slot in range(kept):
            clock[i] = np.maximum(clock[i], clock[waits[i, slot]])
        clock[i, own] = i
        previous[own] = i
    return -1
