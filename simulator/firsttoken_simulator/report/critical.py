"""Why a run takes as long as it does: the dependence graph of a program, its critical path, and slack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from firsttoken_compiler.errors import ProgramError
from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.program import Program
from firsttoken_compiler.isa.types import ENGINES_PER_CORE, Engine, queue_name
from firsttoken_simulator.timeline import Timeline

if TYPE_CHECKING:
    import networkx as nx

QUEUE_EDGE: Final = 0
SEMAPHORE_EDGE: Final = 1

CAUSES: Final = ("dma", "matrix", "vector", "spad_conflict", "host")
"""What a moment of the critical path is spent on."""
_CAUSE_OF_ENGINE: Final = np.array(
    [CAUSES.index(name) for name in ("dma", "dma", "matrix", "vector", "host")], np.int64
)


@dataclass(frozen=True)
class CriticalPath:
    """Segments in order of time: instruction `instruction[j]` decides the time from `from_fs[j]` to `to_fs[j]`.

    They tile `[0, total_fs]` without gap or overlap.
    """

    instruction: np.ndarray
    from_fs: np.ndarray
    to_fs: np.ndarray

    @property
    def length_fs(self) -> np.ndarray:
        """Duration of each segment."""
        return np.asarray(self.to_fs - self.from_fs)


def dependences(program: Program) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Edges as (source, destination, kind): the order of each queue, and each wait on what satisfies it.

    Raises ProgramError for a wait that no instruction satisfies.
    """
    code = program.code
    queue = code[:, word.QUEUE]
    order = np.argsort(queue, kind="stable")
    adjacent = queue[order[1:]] == queue[order[:-1]]
    sources, targets = [order[:-1][adjacent]], [order[1:][adjacent]]
    kinds = [np.full(int(adjacent.sum()), QUEUE_EDGE, np.int64)]
    signals = order[code[order, word.SIGNAL] != 0]
    queues = int(queue.max(initial=0)) + 1
    counts = np.bincount(queue[signals], minlength=queues)
    first = np.concatenate([[0], np.cumsum(counts)])
    for slot in range(word.MAX_WAITS):
        waited = code[:, word.WAITS + 2 * slot] - 1
        value = code[:, word.WAITS + 2 * slot + 1]
        rows = np.flatnonzero((waited >= 0) & (value > 0))
        known = waited[rows] < queues
        unmet = rows[~known | (value[rows] > counts[np.where(known, waited[rows], 0)])]
        if len(unmet):
            i = int(unmet[0])
            raise ProgramError(
                f"instruction {i} waits for {queue_name(int(waited[i]))} to reach {value[i]}, which it never does"
            )
        sources.append(signals[first[waited[rows]] + value[rows] - 1])
        targets.append(rows)
        kinds.append(np.full(len(rows), SEMAPHORE_EDGE, np.int64))
    return np.concatenate(sources), np.concatenate(targets), np.concatenate(kinds)


def dependence_graph(program: Program, timeline: Timeline | None = None) -> nx.DiGraph:
    """The dependence graph: a node per instruction, edges with `kind` ("queue" or "semaphore").

    With a timeline, edges also carry `latency_fs`: from the start of the source until the edge is satisfied.
    """
    import networkx as nx

    source, target, kind = dependences(program)
    graph = nx.DiGraph()
    graph.add_nodes_from(range(len(program)))
    names = ("queue", "semaphore")
    latency = [0] * len(source) if timeline is None else _latency(timeline, source, kind).tolist()
    # Of two edges between the same nodes the semaphore's, which is later in the list and binds later, stays.
    for a, b, k, fs in zip(source.tolist(), target.tolist(), kind.tolist(), latency, strict=True):
        if timeline is None:
            graph.add_edge(a, b, kind=names[k])
        else:
            graph.add_edge(a, b, kind=names[k], latency_fs=fs)
    return graph


def _latency(timeline: Timeline, source: np.ndarray, kind: np.ndarray) -> np.ndarray:
    until = np.where(kind == QUEUE_EDGE, timeline.issue_end_fs[source], timeline.end_fs[source])
    return np.asarray(until - timeline.start_fs[source])


def _determining(program: Program, timeline: Timeline) -> tuple[np.ndarray, np.ndarray]:
    """Per instruction the predecessor whose event came last before its start (-1: none), and the time of that event."""
    source, target, kind = dependences(program)
    event = np.where(kind == QUEUE_EDGE, timeline.issue_end_fs[source], timeline.end_fs[source])
    order = np.lexsort((kind, event, target))  # the last edge of each target wins; a semaphore over its own queue
    predecessor = np.full(len(program), -1, np.int64)
    time = np.zeros(len(program), np.int64)
    predecessor[target[order]] = source[order]
    time[target[order]] = np.minimum(event[order], timeline.start_fs[target[order]])
    return predecessor, time


def critical_path(program: Program, timeline: Timeline) -> CriticalPath:
    """The chain of instructions that decides the total time, walked back from the last completion.

    Raises ProgramError when the waits of the program form a cycle or cannot be met.
    """
    if not len(program):
        empty = np.zeros(0, np.int64)
        return CriticalPath(empty, empty, empty)
    predecessor, time = (array.tolist() for array in _determining(program, timeline))
    at = int(np.argmax(timeline.end_fs))
    until = timeline.total_fs
    chain: list[tuple[int, int, int]] = []
    while True:
        before = min(time[at], until) if predecessor[at] >= 0 else 0
        chain.append((at, before, until))
        if before == 0 or predecessor[at] < 0:
            break
        if len(chain) > len(program):
            raise ProgramError("the waits of the program form a cycle")
        at, until = predecessor[at], before
    table = np.array(chain[::-1], np.int64)
    return CriticalPath(table[:, 0], table[:, 1], table[:, 2])


def op_time(program: Program, path: CriticalPath) -> np.ndarray:
    """Femtoseconds of the critical path per operator, int64; they sum to the total."""
    return op_time_by_cause(program, path, None).sum(axis=1)


def op_time_by_cause(program: Program, path: CriticalPath, timeline: Timeline | None) -> np.ndarray:
    """Femtoseconds of the critical path, int64 `[ops, CAUSES]`: by engine, conflicts in the scratchpad apart.

    Without a timeline conflicts count for the engine.
    """
    result = np.zeros((len(program.ops), len(CAUSES)), np.int64)
    op = program.code[path.instruction, word.OP]
    cause = _CAUSE_OF_ENGINE[program.code[path.instruction, word.QUEUE] % ENGINES_PER_CORE]
    length = path.length_fs
    conflict = np.zeros_like(length)
    if timeline is not None:
        compute = (cause == CAUSES.index("matrix")) | (cause == CAUSES.index("vector"))
        conflict = np.where(compute, np.minimum(timeline.stall_spad_fs[path.instruction], length), 0)
    np.add.at(result, (op, cause), length - conflict)
    np.add.at(result, (op, np.full_like(op, CAUSES.index("spad_conflict"))), conflict)
    return result


def slack_fs(program: Program, timeline: Timeline) -> np.ndarray:
    """How much later each instruction could have started without a later end of the run, durations unchanged; int64.

    Raises ProgramError when the waits of the program form a cycle or cannot be met.
    """
    source, target, kind = dependences(program)
    latency = _latency(timeline, source, kind)
    order = np.argsort(target, kind="stable")
    first = np.searchsorted(target[order], np.arange(len(program) + 1)).tolist()
    source_of, latency_of = source[order].tolist(), latency[order].tolist()
    waiting = np.bincount(source, minlength=len(program)).tolist()
    late = (timeline.total_fs - (timeline.end_fs - timeline.start_fs)).tolist()
    ready = [i for i, count in enumerate(waiting) if count == 0]
    done = 0
    while ready:  # reverse topological order: an instruction after everything that depends on it
        at = ready.pop()
        done += 1
        for edge in range(first[at], first[at + 1]):
            before = source_of[edge]
            late[before] = min(late[before], late[at] - latency_of[edge])
            waiting[before] -= 1
            if not waiting[before]:
                ready.append(before)
    if done < len(program):
        raise ProgramError("the waits of the program form a cycle")
    return np.asarray(np.array(late, np.int64) - timeline.start_fs)


def is_dma(queue: np.ndarray) -> np.ndarray:
    """Which queues move data between DRAM and scratchpad."""
    engine = queue % ENGINES_PER_CORE
    return np.asarray((engine == Engine.DMA_IN) | (engine == Engine.DMA_OUT))
