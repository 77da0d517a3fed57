"""A program and a target as plain integers: one row per instruction, in the hot loop's units (femtoseconds, bytes).

Everything is computed for whole columns or once per distinct instruction shape, never per instruction.
"""

from dataclasses import dataclass, fields

import numpy as np

from firsttoken_compiler.errors import ProgramError
from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.dma import Gather, Load, Store
from firsttoken_compiler.isa.host import HostLoad, HostRun, HostStore
from firsttoken_compiler.isa.matmul import Matmul
from firsttoken_compiler.isa.program import Program
from firsttoken_compiler.isa.types import ENGINES_PER_CORE, queue_name
from firsttoken_compiler.isa.vector import Vector
from firsttoken_compiler.target.target import Target
from firsttoken_simulator.units import compute, dma, host, matrix, scratchpad, vector
from firsttoken_simulator.units.dram import burst_fs
from firsttoken_simulator.units.layout import (
    COMPUTE,
    GATHER,
    READ,
    T_ADDRESS,
    T_FIELDS,
    T_HEAD,
    T_KIND,
    T_RUN,
    T_SIGNAL,
    T_SLICES,
    T_TABLE,
    T_TABLE_COUNT,
    T_WAITS,
    WRITE,
)

HOST_OPCODES = (HostLoad.OPCODE, HostRun.OPCODE, HostStore.OPCODE)


@dataclass(frozen=True)
class Account:
    """What every instruction does, known before it runs; int64 arrays named as in `Timeline`."""

    macs: np.ndarray
    vector_ops: np.ndarray
    dram_read_bytes: np.ndarray
    dram_write_bytes: np.ndarray
    spad_read_bytes: np.ndarray
    spad_write_bytes: np.ndarray
    acc_bytes: np.ndarray
    busy_fs: np.ndarray

    @staticmethod
    def empty(count: int) -> "Account":
        """All zero."""
        return Account(*(np.zeros(count, np.int64) for _ in fields(Account)))


@dataclass(frozen=True)
class Table:
    """The program for the hot loop."""

    rows: np.ndarray
    """int64 `[instructions, T_FIELDS]`."""
    order: np.ndarray
    """Instruction indices grouped by queue, in program order."""
    first: np.ndarray
    """`[queues + 1]`: queue q owns `order[first[q]:first[q + 1]]`."""
    bursts: int
    """DRAM requests of the whole program."""
    account: Account


def build(program: Program, target: Target) -> Table:
    """Translates the program; raises ProgramError when it needs a core the target lacks or computes from DRAM."""
    code = program.code
    queues = target.cores * ENGINES_PER_CORE
    outside = np.flatnonzero((code[:, word.QUEUE] < 0) | (code[:, word.QUEUE] >= queues))
    if len(outside):
        name = queue_name(int(code[outside[0], word.QUEUE]))
        raise ProgramError(
            f"instruction {outside[0]} is for {name}, target {target.name} has {target.cores} cores: "
            "compile for this target"
        )
    rows = np.zeros((len(code), T_FIELDS), np.int64)
    account = Account.empty(len(code))
    rows[:, T_SIGNAL] = code[:, word.SIGNAL]
    rows[:, T_WAITS:] = code[:, word.WAITS : word.WAITS + 2 * word.MAX_WAITS]
    rows[:, T_WAITS::2] -= 1
    opcode = code[:, word.OPCODE]
    bursts = 0
    for kind, cls in ((READ, Load), (WRITE, Store), (GATHER, Gather), (COMPUTE, Matmul), (COMPUTE, Vector)):
        index = np.flatnonzero(opcode == cls.OPCODE)
        if not len(index):
            continue
        rows[index, T_KIND] = kind
        if kind == COMPUTE:
            _compute(rows, account, index, program, target, cls is Matmul)
        elif kind == GATHER:
            bursts += _gather(rows, account, index, code[index], target)
        else:
            bursts += _copy(rows, account, index, code[index], target, kind)
    _host(rows, account, np.flatnonzero(np.isin(opcode, HOST_OPCODES)), program, target)
    queue = code[:, word.QUEUE]
    if not target.dma.decoupled:
        queue = _one_queue(rows, queue)
    order = np.argsort(queue, kind="stable")
    first = np.searchsorted(queue[order], np.arange(queues + 1))
    return Table(rows, order.astype(np.int64), first.astype(np.int64), bursts, account)


def _one_queue(rows: np.ndarray, queue: np.ndarray) -> np.ndarray:
    """The queue of each instruction where one sequencer per core issues all; waits in `rows` become those on it.

    A wait for the n-th signal of an engine is one for all signals of the core up to that one, in program order.
    """
    core = queue - queue % ENGINES_PER_CORE
    signals = rows[:, T_SIGNAL] != 0
    ranks = np.zeros(len(rows), np.int64)
    for first in np.unique(core):
        ranks[core == first] = np.cumsum(signals[core == first])
    of_engine = {int(q): ranks[signals & (queue == q)] for q in np.unique(queue)}
    for column in range(T_WAITS, rows.shape[1], 2):
        for row in np.flatnonzero(rows[:, column] >= 0):
            other, count = int(rows[row, column]), int(rows[row, column + 1])
            raised = of_engine.get(other, ranks[:0])
            if count > 0:
                rows[row, column + 1] = raised[count - 1] if count <= len(raised) else len(rows) + 1  # never
            rows[row, column] = other - other % ENGINES_PER_CORE
    return np.asarray(core)


def _compute(
    rows: np.ndarray, account: Account, index: np.ndarray, program: Program, target: Target, matmul: bool
) -> None:
    code = program.code
    operands = range(word.operand_column(0), word.WIDTH, word.OPERAND_WIDTH)
    in_dram = np.zeros(len(index), bool)
    for at in operands:
        in_dram |= dma.in_dram(code[index, at])
    direct = np.flatnonzero(in_dram)
    if len(direct):
        raise ProgramError(
            f"instruction {index[direct[0]]} computes on an operand in DRAM; units reach the scratchpad only: "
            "load it first"
        )
    cost = matrix.resolve(code, index, target) if matmul else vector.resolve(code, index, target, program.kernels)
    for at, column in enumerate(compute.cut(cost, target.period_fs, scratchpad.width(target)), T_HEAD):
        rows[index, at] = column
    (account.macs if matmul else account.vector_ops)[index] = cost.operations
    account.spad_read_bytes[index] = cost.spad_read_bytes
    account.spad_write_bytes[index] = cost.spad_write_bytes
    account.acc_bytes[index] = cost.acc_bytes
    account.busy_fs[index] = (cost.head_cycles + cost.body_cycles + cost.tail_cycles) * target.period_fs


def _host(rows: np.ndarray, account: Account, index: np.ndarray, program: Program, target: Target) -> None:
    """The host computes in one slice that books no scratchpad ports; its bytes count as DRAM traffic."""
    code = program.code[index]
    rows[index, T_KIND] = COMPUTE
    rows[index, T_SLICES] = 1
    rows[index, T_HEAD] = account.busy_fs[index] = host.durations_fs(code, program.hosts, target)
    nbytes = host.traffic(code, program.hosts)
    account.dram_read_bytes[index] = nbytes * (code[:, word.OPCODE] == HostLoad.OPCODE)
    account.dram_write_bytes[index] = nbytes * (code[:, word.OPCODE] == HostStore.OPCODE)


def _copy(rows: np.ndarray, account: Account, index: np.ndarray, code: np.ndarray, target: Target, kind: int) -> int:
    walked = dma.walk(code, 1 if kind == READ else 0)
    rows[index, T_ADDRESS : T_RUN + 1] = np.stack(walked, axis=1)
    moved = code[:, word.DIMS : word.DIMS + 3].prod(axis=1)
    (account.dram_read_bytes if kind == READ else account.dram_write_bytes)[index] = moved
    (account.spad_write_bytes if kind == READ else account.spad_read_bytes)[index] = moved
    bursts = dma.bursts(walked, target.dram.burst_bytes)
    account.busy_fs[index] = bursts * burst_fs(target)
    return int(bursts.sum())


def _gather(rows: np.ndarray, account: Account, index: np.ndarray, code: np.ndarray, target: Target) -> int:
    indices, table = word.operand_column(1), word.operand_column(2)
    count, run = code[:, word.DIMS], code[:, word.DIMS + 2]
    direct = dma.in_dram(code[:, indices])
    one = np.ones_like(count)
    dense = code[:, indices + 2] == 8
    walked = (
        code[:, indices + 1], one, 0 * one, np.where(dense, 1, count), code[:, indices + 2],
        np.where(dense, 8 * count, 8) * direct,
    )  # fmt: skip
    rows[index, T_ADDRESS : T_RUN + 1] = np.stack(walked, axis=1)
    source = (code[:, table + 1], code[:, table + 2], code[:, table + 3], run, count)
    rows[index, T_TABLE : T_TABLE_COUNT + 1] = np.stack(source, axis=1)
    account.dram_read_bytes[index] = count * run + 8 * count * direct
    account.spad_read_bytes[index] = 8 * count * ~direct
    account.spad_write_bytes[index] = count * run
    bursts = dma.bursts(walked, target.dram.burst_bytes)
    burst = target.dram.burst_bytes
    for i in range(len(code)):  # a handful per program: the embedding
        numbers = code[i, indices + 1] // 8 + np.arange(count[i])
        starts = code[i, table + 1] + code[i, table + 2] * dma.spread.py_func(numbers, code[i, table + 3])
        bursts[i] += ((starts + run[i] - 1) // burst - starts // burst + 1).sum()
    account.busy_fs[index] = bursts * burst_fs(target)
    return int(bursts.sum())
