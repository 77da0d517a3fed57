"""Semaphores: the fewest waits and signals that keep every hazard between queues in program order."""

from collections.abc import Callable

import numpy as np
from numba import njit

from firsttoken_compiler.codegen.hazards import hazards
from firsttoken_compiler.errors import ProgramError
from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.types import ENGINES_PER_CORE, Engine, queue_name

Fence = Callable[[int, int], np.ndarray]
"""(core, operator) → an instruction on the core's `dma_in` that touches nothing that others do."""


def insert_semaphores(code: np.ndarray, queues: int | None = None, fence: Fence | None = None) -> np.ndarray:
    """The same instructions, int64 `[n, WIDTH]`, with waits and signals under which any execution equals program order.

    Waits and signals already there are replaced. Every wait is necessary: dropping one leaves a hazard unordered.
    `queues` defaults to those of the cores in use. An instruction that needs more than `MAX_WAITS` has a fence before
    it, which waits for some of them; without a way to make fences it raises ProgramError.
    """
    code = np.ascontiguousarray(code, np.int64).copy()
    code[:, word.WAITS : word.WAITS + 2 * word.MAX_WAITS] = 0
    code[:, word.SIGNAL] = 0
    if queues is None:
        queues = (int(code[:, word.QUEUE].max(initial=0)) // ENGINES_PER_CORE + 1) * ENGINES_PER_CORE
    need = hazards(code, queues).need
    waits = np.full((len(code), word.MAX_WAITS if fence is None else max(queues, word.MAX_WAITS)), -1, np.int64)
    queue = np.ascontiguousarray(code[:, word.QUEUE])
    crowded = _reduce(queue, need, np.full_like(need, -1), waits)
    if crowded >= 0:
        others = ", ".join(queue_name(q) for q in np.flatnonzero(need[crowded] >= 0).tolist())
        raise ProgramError(
            f"instruction {crowded} on {queue_name(int(queue[crowded]))} has to wait for more than {word.MAX_WAITS} "
            f"queues ({others}); split its operand so that it depends on fewer cores, or use fewer cores"
        )
    if fence is not None:
        code, waits = _fenced(code, waits, fence)
    _encode(code, np.ascontiguousarray(code[:, word.QUEUE]), waits)
    return code


def _fenced(code: np.ndarray, waits: np.ndarray, fence: Fence) -> tuple[np.ndarray, np.ndarray]:
    """Code with fences before every instruction of too many waits, and what each instruction waits for.

    Fences stand in `dma_in` of the instruction's core. An instruction of that queue is behind them anyway; any other
    waits for the last one.
    """
    crowded = np.flatnonzero((waits >= 0).sum(axis=1) > word.MAX_WAITS)
    before: list[np.ndarray] = []
    places: list[int] = []
    awaited: list[list[int]] = []
    behind: dict[int, int] = {}
    for i in crowded.tolist():
        queue, wanted = int(code[i, word.QUEUE]), waits[i][waits[i] >= 0].tolist()
        core, own = queue // ENGINES_PER_CORE, queue % ENGINES_PER_CORE == Engine.DMA_IN
        kept = word.MAX_WAITS if own else word.MAX_WAITS - 1
        waits[i] = -1
        waits[i, :kept] = wanted[:kept]
        for at in range(kept, len(wanted), word.MAX_WAITS):
            before.append(fence(core, int(code[i, word.OP])))
            places.append(i)
            awaited.append(wanted[at : at + word.MAX_WAITS])
        if not own:
            behind[i] = len(before) - 1
    waits = waits[:, : word.MAX_WAITS].copy()
    if not before:
        return code, waits
    moved = np.arange(len(code)) + np.searchsorted(places, np.arange(len(code)), side="right")
    made = np.insert(code, places, np.stack(before), axis=0)
    into = np.full((len(made), word.MAX_WAITS), -1, np.int64)
    into[moved] = np.where(waits >= 0, moved[waits], -1)
    at_fence = np.array(places) + np.arange(len(places))
    for number, wanted in zip(at_fence.tolist(), awaited, strict=True):
        into[number, : len(wanted)] = moved[wanted]
    for i, number in behind.items():
        into[moved[i], word.MAX_WAITS - 1] = at_fence[number]
    return made, into


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
