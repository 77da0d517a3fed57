"""What a wait for the DRAM is spent on: data at the peak rate, and what the stream lacks to reach it.

Data of an instruction flows between the end of the one before it in its queue (or, where nothing is on the way, a
round trip after its first request) and its own end, evenly. The rates of all queues add up, to the peak at most.
"""

from typing import Final

import numpy as np

from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.program import Program
from firsttoken_compiler.isa.types import ENGINES_PER_CORE, Engine
from firsttoken_compiler.target.target import Target
from firsttoken_simulator.report.critical import is_dma
from firsttoken_simulator.timeline import Timeline
from firsttoken_simulator.units import bus
from firsttoken_simulator.units.dma import resolve
from firsttoken_simulator.units.dram import burst_fs

Steps = tuple[np.ndarray, np.ndarray]
"""Moments in order, and how much has passed by each; linear between them."""
_NOTHING: Final[Steps] = (np.zeros(1), np.zeros(1))


class DramShare:
    """Data and round trips of one run, over time."""

    def __init__(self, program: Program, timeline: Timeline, target: Target) -> None:
        self.target, self.timeline = target, timeline
        self.queue = program.code[:, word.QUEUE]
        self.burst = burst_fs(target) / target.dram.channels
        """Femtoseconds of one burst at the peak of all channels."""
        every = []
        self.of_queue: dict[int, tuple[Steps, Steps]] = {}
        for queue in np.unique(self.queue[is_dma(self.queue)]).tolist():
            begin, end, rate, waits = self._windows(queue)
            every.append((begin, end, rate))
            self.of_queue[queue] = _passed(begin, end, rate), _passed(waits[0], waits[1], np.ones(len(begin)))
        self.together = _NOTHING
        if every:
            begins, ends, rates = (np.concatenate(parts) for parts in zip(*every, strict=True))
            self.together = _passed(begins, ends, rates, most=1.0)

    def flowing(self, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
        """Time of the data of all queues in each interval, at the peak, in femtoseconds."""
        return _between(self.together, begin, end)

    def split(self, instruction: np.ndarray, begin: np.ndarray, end: np.ndarray) -> dict[str, np.ndarray]:
        """Steps of the interval in which each instruction moves data, in femtoseconds and in the order of claims.

        Zero for instructions that move none; what they leave of the interval has no name here.
        """
        flowing = self.flowing(begin, end)
        own, first = np.zeros(len(begin)), np.zeros(len(begin))
        few = np.zeros(len(begin))
        queue = self.queue[instruction]
        for number, (data, waits) in self.of_queue.items():
            here = queue == number
            own[here] = _between(data, begin[here], end[here])
            first[here] = _between(waits, begin[here], end[here])
            few[here] = self._few(number) * own[here]
        moves = is_dma(queue)
        send = np.maximum(self.timeline.issue_end_fs - self.timeline.start_fs, 1)[instruction]
        conflict = self.timeline.stall_spad_fs[instruction] / send * (end - begin)
        narrow = max(0.0, bus.resolve(self.target)[0] / self.burst - 1)
        d = self.target.dram
        closed = d.trfc_ns / d.trefi_ns if d.refresh == "all-bank" and d.trefi_ns > d.trfc_ns else 0.0
        claims = {
            "dma_peak": flowing, "bank_conflicts": conflict, "dma_bus": flowing * narrow,
            "dma_outstanding": np.maximum(0, few - flowing * narrow), "dma_latency": first,
            "dma_refresh": flowing * (closed / (1 - closed)),
        }  # fmt: skip
        return {name: np.where(moves, claim, 0) for name, claim in claims.items()}

    def _round_trip(self, queue: int) -> float:
        """From a request to its first data, in femtoseconds, of an open row and with nothing in the way.

        A write is done when the controller has it.
        """
        d, fs = self.target.dram, bus.resolve(self.target)[1]
        writes = queue % ENGINES_PER_CORE == Engine.DMA_OUT
        return fs if writes else fs + self.target.fs(d.tcl_ns) + self.target.fs(d.controller_ns)

    def _few(self, queue: int) -> float:
        """By how much the requests in flight stretch the time of data at the peak: Little's law."""
        at_most = resolve(self.target)[1] * self.burst
        return max(0.0, (self._round_trip(queue) + burst_fs(self.target)) / at_most - 1)

    def _windows(self, queue: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]:
        """When data of each instruction of a queue flows, at which part of the peak, and its round trip before that."""
        line = self.timeline
        mine = np.flatnonzero(self.queue == queue)
        end = line.end_fs[mine].astype(np.float64)
        sent = np.minimum(line.start_fs[mine] + resolve(self.target)[0], end)
        before = np.concatenate([[0.0], end[:-1]])
        empty = before <= sent
        arrives = np.where(empty, np.minimum(sent + self._round_trip(queue), end), before)
        data = line.busy_fs[mine] / self.target.dram.channels
        length = end - arrives
        rate = np.divide(data, length, out=np.zeros(len(mine)), where=length > 0)
        return arrives, end, rate, (np.where(empty, sent, end), np.where(empty, arrives, end))


def _passed(begin: np.ndarray, end: np.ndarray, rate: np.ndarray, most: float = np.inf) -> Steps:
    """The integral of the sum of the rates, each between `begin` and `end`, the sum at most `most`."""
    times = np.concatenate([begin, end])
    change = np.concatenate([rate, -rate])
    order = np.argsort(times, kind="stable")
    times = times[order]
    slope = np.clip(np.cumsum(change[order]), 0, most)
    return times, np.concatenate([[0.0], np.cumsum(slope[:-1] * np.diff(times))])


def _between(steps: Steps, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """How much passes from `begin` to `end`."""
    times, passed = steps
    return np.asarray(np.interp(end, times, passed) - np.interp(begin, times, passed))
