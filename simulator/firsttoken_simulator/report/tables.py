"""Per-instruction results folded into per-operator columns: the numbers behind every report."""

import re
from dataclasses import dataclass
from typing import Final

import numpy as np

from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.dma import Gather, Load, Store
from firsttoken_compiler.isa.host import HostLoad, HostStore
from firsttoken_compiler.isa.program import Program
from firsttoken_compiler.isa.types import ENGINES_PER_CORE, Engine, Space
from firsttoken_compiler.target.target import Target
from firsttoken_simulator.energy import by_pair
from firsttoken_simulator.report.critical import CAUSES, CriticalPath, is_dma, op_time_by_cause, slack_fs
from firsttoken_simulator.timeline import Timeline

DRAM_KINDS: Final = ("weights", "activations", "kv")
_KIND_OF_TENSOR: Final = {
    "weight": 0, "constant": 0, "input": 1, "output": 1, "activation": 1, "kv": 2,
}  # fmt: skip


@dataclass(frozen=True)
class OpTable:
    """Columns of length `len(program.ops)`; times in femtoseconds, sizes in bytes."""

    start_fs: np.ndarray
    end_fs: np.ndarray
    time_fs: np.ndarray
    """Critical-path time by cause, int64 `[ops, CAUSES]`; the sum over everything is the total time."""
    matrix_fs: np.ndarray
    matrix_busy_fs: np.ndarray
    """Time that the matrix unit itself needs, without waiting for the scratchpad."""
    vector_fs: np.ndarray
    dma_fs: np.ndarray
    """Run time of DMA instructions until their last request, summed (queues overlap)."""
    stall_dma_fs: np.ndarray
    stall_spad_fs: np.ndarray
    stall_sync_fs: np.ndarray
    slack_fs: np.ndarray
    """Least slack of the operator's instructions."""
    macs: np.ndarray
    ideal_matrix_fs: np.ndarray
    """Time of the multiply-accumulates at the unit's peak rate for their types."""
    compute_span_fs: np.ndarray
    """From the first start to the last end of the operator's matrix instructions."""
    dram_read_bytes: np.ndarray
    dram_write_bytes: np.ndarray
    spad_read_bytes: np.ndarray
    spad_write_bytes: np.ndarray

    @property
    def attributed_fs(self) -> np.ndarray:
        """Critical-path time per operator."""
        return np.asarray(self.time_fs.sum(axis=1))


def fold(program: Program, timeline: Timeline, target: Target, path: CriticalPath) -> OpTable:
    """All columns of the operators of one run."""
    op = program.code[:, word.OP]
    count = len(program.ops)
    queue = program.code[:, word.QUEUE]
    engine = queue % ENGINES_PER_CORE
    matrix, vector, dma = engine == Engine.MATRIX, engine == Engine.VECTOR, is_dma(queue)
    span = timeline.end_fs - timeline.start_fs

    def total(values: np.ndarray, where: np.ndarray | None = None) -> np.ndarray:
        chosen = values if where is None else np.where(where, values, 0)
        result = np.zeros(count, np.int64)
        np.add.at(result, op, chosen)
        return result

    def extreme(values: np.ndarray, least: bool, where: np.ndarray | None = None) -> np.ndarray:
        limit = np.iinfo(np.int64).max if least else -1
        result = np.full(count, limit, np.int64)
        rows = np.arange(len(op)) if where is None else np.flatnonzero(where)
        (np.minimum if least else np.maximum).at(result, op[rows], values[rows])
        result[result == limit] = 0
        return result

    rate = by_pair(program, target, target.matrix.macs_per_cycle, "matrix.macs_per_cycle")
    ideal = np.rint(timeline.macs * timeline.period_fs / np.maximum(rate, 1) / program.cores).astype(np.int64)
    return OpTable(
        start_fs=extreme(timeline.start_fs, True),
        end_fs=extreme(timeline.end_fs, False),
        time_fs=op_time_by_cause(program, path, timeline),
        matrix_fs=total(span, matrix),
        matrix_busy_fs=total(timeline.busy_fs, matrix),
        vector_fs=total(span, vector),
        dma_fs=total(timeline.issue_end_fs - timeline.start_fs, dma),
        stall_dma_fs=total(timeline.stall_dram_fs),
        stall_spad_fs=total(timeline.stall_spad_fs),
        stall_sync_fs=total(timeline.start_fs - timeline.head_fs),
        slack_fs=extreme(slack_fs(program, timeline), True),
        macs=total(timeline.macs),
        ideal_matrix_fs=total(ideal),
        compute_span_fs=extreme(timeline.end_fs, False, matrix) - extreme(timeline.start_fs, True, matrix),
        dram_read_bytes=total(timeline.dram_read_bytes),
        dram_write_bytes=total(timeline.dram_write_bytes),
        spad_read_bytes=total(timeline.spad_read_bytes),
        spad_write_bytes=total(timeline.spad_write_bytes),
    )


def dram_kind(program: Program) -> np.ndarray:
    """Index into `DRAM_KINDS` per instruction, from the tensor that its DRAM address lies in.

    A gather counts for its table. An address outside every tensor counts as activations.
    """
    code = program.code
    operand = np.full(len(code), -1, np.int64)
    for kind, index in ((Load, 1), (Store, 0), (Gather, 2), (HostLoad, 0), (HostStore, 0)):
        operand[code[:, word.OPCODE] == kind.OPCODE] = index
    address = np.full(len(code), -1, np.int64)
    rows = np.flatnonzero(operand >= 0)
    address[rows] = code[rows, word.OPERANDS + word.OPERAND_WIDTH * operand[rows] + 1]
    tensors = sorted((t for t in program.tensors if t.space is Space.DRAM), key=lambda t: t.address)
    result = np.ones(len(code), np.int64)
    if not tensors:
        return result
    start = np.array([t.address for t in tensors], np.int64)
    end = start + np.array([t.nbytes for t in tensors], np.int64)
    kinds = np.array([_KIND_OF_TENSOR[t.kind] for t in tensors], np.int64)
    at = np.searchsorted(start, address, side="right") - 1
    inside = (at >= 0) & (address < end[at])
    result[inside] = kinds[at[inside]]
    return result


def dram_bytes_by_kind(program: Program, timeline: Timeline) -> dict[str, int]:
    """Bytes read and written by kind of tensor; they sum to all DRAM traffic."""
    kind = dram_kind(program)
    moved = timeline.dram_read_bytes + timeline.dram_write_bytes
    return {name: int(moved[kind == index].sum()) for index, name in enumerate(DRAM_KINDS)}


def whole_cycles(durations_fs: np.ndarray, period_fs: int) -> np.ndarray:
    """Durations as whole cycles whose sum is the cycles of the sum, rounded up: no part is lost to rounding."""
    until = np.concatenate([[0], np.cumsum(durations_fs)])
    return np.diff(-(-until // period_fs))


def bound_word(time_fs: np.ndarray) -> str:
    """What most of an operator's critical time is spent on; `hidden` when it never decides the time."""
    return CAUSES[int(np.argmax(time_fs))] if int(time_fs.sum()) > 0 else "hidden"


def layer_of(module: str, name: str) -> str:
    """`layers.3` for anything inside layer 3, else the operator's own name."""
    found = re.match(r"(?:.*?\b)?(layers\.\d+)\b", module)
    return found.group(1) if found else name


def parts_of(name: str) -> list[str]:
    """The products that are one: `mlp.gate_proj+up_proj` → `mlp.gate_proj`, `mlp.up_proj`; none of other names."""
    module, dot, leaves = name.rpartition(".")
    return [f"{module}{dot}{leaf}" for leaf in leaves.split("+")] if "+" in leaves else []


def pattern_of(name: str) -> str:
    """The name with every number replaced by `*`, which joins the same operator of all layers."""
    return re.sub(r"\d+", "*", name)
