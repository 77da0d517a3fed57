"""The ladder from the ideal to the actual time: every moment of a run belongs to one operator and one step.

While the matrix unit of a core works, the moment belongs to the operator whose product it computes, and the steps are
the parts of that instruction. While it stands still, the moment belongs to the instruction that holds the critical path
then, and the step is what that instruction does. So the steps of an operator sum to its time, the times of the
operators with the dispatch to the whole time, and no operator takes less than its MACs at peak. Work of the matrix unit
may be hidden: beside the steps stands what held the critical path in the operator's moments. With several cores each
core is counted so, and the table holds their mean.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np

from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.program import Program
from firsttoken_compiler.isa.types import ENGINES_PER_CORE, Engine
from firsttoken_compiler.target.target import Target
from firsttoken_simulator.report.critical import CriticalPath, is_dma
from firsttoken_simulator.report.dram_share import DramShare
from firsttoken_simulator.report.mapping import PARTS, matrix_parts_fs
from firsttoken_simulator.report.steps import HOLDERS, NAMES, OF_OPERATORS
from firsttoken_simulator.timeline import Timeline
from firsttoken_simulator.units.dma import resolve

_AT: Final = {name: index for index, name in enumerate(NAMES)}
_HOLDER: Final = np.array([HOLDERS.index(name) for name in ("dma", "dma", "matrix", "vector", "host")], np.int64)


@dataclass(frozen=True)
class Ladder:
    """Femtoseconds of every operator; the sum over either table is `timeline.total_fs`, and per operator both agree.

    Attributes:
        steps: int64 `[ops, OF_OPERATORS]`.
        critical: int64 `[ops, HOLDERS]`, by what held the critical path meanwhile.
    """

    steps: np.ndarray
    critical: np.ndarray


def ladder_of(program: Program, timeline: Timeline, target: Target, path: CriticalPath) -> Ladder:
    """The ladder of every operator of a run."""
    if not len(program):
        return Ladder(*(np.zeros((len(program.ops), len(names)), np.int64) for names in (OF_OPERATORS, HOLDERS)))
    op, count = program.code[:, word.OP], len(program.ops)
    matrix = np.flatnonzero(program.code[:, word.QUEUE] % ENGINES_PER_CORE == Engine.MATRIX)
    steps = _by_op(op[matrix], _matrix(program.code[matrix], timeline, target, matrix), count)
    waits = _Waits(program, timeline, target, path)
    critical = _by_op(op[matrix], waits.held(timeline.start_fs[matrix], timeline.end_fs[matrix]), count)
    for core in range(program.cores):
        idle = waits.idle(core, waits.begin, waits.end)
        critical += _by_op(op[path.instruction], idle[:, None] * waits.holder, count)
        steps += waits.of(core)
    return Ladder(*_mean(steps, critical, program.cores))


def _mean(steps: np.ndarray, critical: np.ndarray, cores: int) -> tuple[np.ndarray, np.ndarray]:
    """The mean over the cores in whole femtoseconds: of running sums, so that nothing is lost and both tables agree."""
    until = np.cumsum(steps.ravel()).reshape(steps.shape)
    before = np.concatenate([[0], until[:-1, -1]])[:, None]
    parts = (before + np.cumsum(critical, axis=1)) // cores
    mean = np.diff(until.ravel() // cores, prepend=0).reshape(steps.shape)
    return mean, np.diff(np.concatenate([before // cores, parts], axis=1), axis=1)


def _by_op(op: np.ndarray, rows: np.ndarray, count: int) -> np.ndarray:
    """Sums of the rows of each operator."""
    order = np.argsort(op, kind="stable")
    until = np.concatenate([np.zeros((1, rows.shape[1]), np.int64), np.cumsum(rows[order], axis=0)])
    return np.diff(until[np.searchsorted(op[order], np.arange(count + 1))], axis=0)


def _matrix(code: np.ndarray, timeline: Timeline, target: Target, index: np.ndarray) -> np.ndarray:
    """Steps of matrix instructions; each row sums to the instruction's run time."""
    span = timeline.end_fs[index] - timeline.start_fs[index]
    known = matrix_parts_fs(code, target)
    wanted = [("bank_conflicts", timeline.stall_spad_fs[index])]
    wanted += [(name, known[:, PARTS.index(name)]) for name in ("ideal", "padding", "array_load", "issue")]
    return _shared(span, wanted, "fill_drain")


def _shared(whole: np.ndarray, wanted: list[tuple[str, np.ndarray]], rest: str) -> np.ndarray:
    """Shares `whole` out among the steps in turn, each at most what is left; `rest` gets what remains."""
    shares = np.zeros((len(whole), len(OF_OPERATORS)), np.int64)
    left = whole.astype(np.int64).copy()
    for name, amount in wanted:
        taken = np.clip(amount, 0, left)
        shares[:, _AT[name]] += taken
        left -= taken
    shares[:, _AT[rest]] += left
    return shares


class _Waits:
    """What the segments of the critical path do, and how long the matrix unit of a core stands still meanwhile."""

    def __init__(self, program: Program, timeline: Timeline, target: Target, path: CriticalPath) -> None:
        self.program, self.timeline = program, timeline
        mine = path.instruction
        self.begin, self.end = path.from_fs, path.to_fs
        self.started = np.clip(timeline.start_fs[mine], self.begin, self.end)
        self.op = program.code[mine, word.OP]
        queue = program.code[mine, word.QUEUE]
        self.engine = queue % ENGINES_PER_CORE
        self.holder = np.eye(len(HOLDERS), dtype=np.int64)[_HOLDER[self.engine]]
        """Whether each segment is one of each of `HOLDERS`."""
        setup = np.where(is_dma(queue), resolve(target)[0], 0)
        self.ready = np.minimum(self.started + setup, self.end)
        span = np.maximum(timeline.end_fs[mine] - timeline.start_fs[mine], 1)
        self.conflict = np.minimum(timeline.stall_spad_fs[mine], span) / span
        dram = DramShare(program, timeline, target)
        self.behind = dram.flowing(self.started, self.ready)
        """Data of earlier requests that still flows while a descriptor is set up."""
        self.lost = dram.split(mine, self.ready, self.end)

    def of(self, core: int) -> np.ndarray:
        """Steps of every operator while the core's matrix unit stands still, int64 `[ops, OF_OPERATORS]`.

        What a stream lacks of the peak is shared out among its causes over all segments of an operator: data of one
        instruction flows behind the next one.
        """
        until_start = self.idle(core, self.begin, self.started)
        until_ready = self.idle(core, self.started, self.ready)
        work = self.idle(core, self.ready, self.end)
        behind = (self.behind * until_ready / np.maximum(self.ready - self.started, 1)).astype(np.int64)
        steps = _shared(until_start, [], "sync") + _shared(until_ready, [("dma_peak", behind)], "dma_setup")
        for engine, name in ((Engine.MATRIX, "sync"), (Engine.VECTOR, "vector"), (Engine.HOST, "host")):
            here = np.where(self.engine == engine, work, 0)
            conflict = here * self.conflict if engine == Engine.VECTOR else np.zeros(len(here))
            steps += _shared(here, [("bank_conflicts", conflict.astype(np.int64))], name)
        moving = np.where((self.engine == Engine.DMA_IN) | (self.engine == Engine.DMA_OUT), work, 0)
        share = moving / np.maximum(self.end - self.ready, 1)
        table = np.stack([moving, *((lost * share).astype(np.int64) for lost in self.lost.values())], axis=1)
        summed = _by_op(self.op, table, len(self.program.ops))
        wanted = list(zip(self.lost, summed.T[1:], strict=True))
        return np.asarray(_by_op(self.op, steps, len(self.program.ops)) + _shared(summed[:, 0], wanted, "dma_rows"))

    def held(self, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
        """What holds the critical path in each interval, int64 `[intervals, HOLDERS]`; exact, as the segments tile."""
        length = (self.end - self.begin)[:, None] * self.holder
        before = np.concatenate([np.zeros((1, len(HOLDERS)), np.int64), np.cumsum(length, axis=0)])

        def until(t: np.ndarray) -> np.ndarray:
            at = np.clip(np.searchsorted(self.begin, t, side="right") - 1, 0, len(self.begin) - 1)
            return np.asarray(before[at] + (t - self.begin[at])[:, None] * self.holder[at])

        return np.asarray(until(end) - until(begin))

    def idle(self, core: int, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
        """How much of each interval the core's matrix unit does not work; exact, as its instructions never overlap."""
        mine = np.flatnonzero(self.program.code[:, word.QUEUE] == core * ENGINES_PER_CORE + Engine.MATRIX)
        if not len(mine):
            return np.asarray(end - begin)
        order = mine[np.argsort(self.timeline.start_fs[mine], kind="stable")]
        first, last = self.timeline.start_fs[order], self.timeline.end_fs[order]
        before = np.concatenate([[0], np.cumsum(last - first)])

        def worked(t: np.ndarray) -> np.ndarray:
            at = np.searchsorted(first, t, side="right")
            now = np.where(at > 0, np.minimum(t, last[at - 1]) - first[at - 1], 0)
            return np.asarray(before[np.maximum(at - 1, 0)] + now)

        return np.asarray((end - begin) - (worked(end) - worked(begin)))
