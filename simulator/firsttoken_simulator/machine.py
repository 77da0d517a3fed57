"""The timing machine, in the order of its block diagram: program table, queues, units, DRAM, hot loop."""

from collections.abc import Callable

import numpy as np

from firsttoken_compiler.errors import ProgramError
from firsttoken_compiler.isa.opcodes import decode
from firsttoken_compiler.isa.program import Program
from firsttoken_compiler.isa.types import ENGINES_PER_CORE
from firsttoken_compiler.target.target import Target
from firsttoken_simulator import kernels, table
from firsttoken_simulator.memory import machine_state, memory_of
from firsttoken_simulator.timeline import Timeline
from firsttoken_simulator.units import bus, dma, layout, scratchpad

_EVENTS_PER_CALL = 20_000_000
"""Events between two calls of `progress`, about a second."""


def simulate_program(program: Program, target: Target, progress: Callable[[float], None] | None = None) -> Timeline:
    """Runs `program` on `target` and reports when every instruction ran; weight values are never read.

    `progress` is called with the fraction of instructions that have left their queues. Raises ProgramError when
    semaphores can never let the program finish, naming the blocked instructions.
    """
    return _Machine(program, target).run(progress)


class _Machine:
    """All state of one run, as arrays."""

    def __init__(self, program: Program, target: Target) -> None:
        self.program, self.target = program, target
        self.table = table.build(program, target)
        self.x = _constants(target)
        self.ports = np.zeros(target.cores, np.int64)
        self.machine = machine_state()
        queues = target.cores * ENGINES_PER_CORE
        self.memory = memory_of(target, len(program), queues)
        self.flight = np.zeros((queues, int(self.x[layout.X_OUTSTANDING])), np.int64)
        self.result = np.zeros((len(program), layout.O_FIELDS), np.int64)
        self.queues = np.zeros((queues, layout.Q_FIELDS), np.int64)
        self.queues[:, layout.Q_AT] = self.queues[:, layout.Q_PENDING] = self.table.first[:-1]
        self.queues[:, layout.Q_END] = self.table.first[1:]

    def run(self, progress: Callable[[float], None] | None) -> Timeline:
        """From the first fetch to the last completion."""
        rows, order = self.table.rows, self.table.order
        kernels.start(rows, order, self.queues, self.result, self.x)
        state = (rows, order, self.queues, self.result, self.x, self.machine, self.ports, self.flight)
        status = 0
        while not status:
            status = self.memory.advance(state, _EVENTS_PER_CALL)
            if progress is not None:
                left = int((self.queues[:, layout.Q_AT] - self.table.first[:-1]).sum())
                progress(left / max(1, len(rows)))
        if status == kernels.STUCK:
            raise self._deadlock()
        return self._timeline()

    def _deadlock(self) -> ProgramError:
        heads = self.queues[self.queues[:, layout.Q_PHASE] == layout.BLOCKED, layout.Q_AT]
        blocked = sorted(int(self.table.order[at]) for at in heads)
        lines = "".join(f"\n  {i}: {decode(self.program.code[i])}" for i in blocked)
        return ProgramError(
            f"deadlock: {len(blocked)} queues wait for semaphores that no instruction can raise any more:{lines}\n"
            "signal the awaited instructions, or lower the awaited counts; 'firsttoken verify' finds the cycle"
        )

    def _timeline(self) -> Timeline:
        end = self.result[:, layout.O_END]
        total = int(end.max(initial=0))
        self.memory.drain(total)
        columns = self.result.T
        return Timeline(
            head_fs=columns[layout.O_HEAD],
            start_fs=columns[layout.O_START],
            issue_end_fs=columns[layout.O_ISSUE_END],
            end_fs=end,
            stall_spad_fs=columns[layout.O_STALL_SPAD],
            stall_dram_fs=columns[layout.O_STALL_DRAM],
            dram_activates=self.memory.activates[: len(self.program)],
            completion_order=np.argsort(end, kind="stable"),
            period_fs=self.target.period_fs,
            total_fs=total,
            counters=self.memory.counters(total),
            **vars(self.table.account),
        )


def _constants(target: Target) -> np.ndarray:
    x = np.zeros(layout.X_FIELDS, np.int64)
    x[layout.X_PERIOD], x[layout.X_ENGINES], x[layout.X_STRETCHES] = target.period_fs, ENGINES_PER_CORE, 1
    x[layout.X_SETUP], x[layout.X_OUTSTANDING] = dma.resolve(target)
    x[layout.X_BUS], x[layout.X_LATENCY] = bus.resolve(target)
    x[layout.X_PORTS] = -(-target.dram.burst_bytes * target.period_fs // scratchpad.width(target))
    return x
