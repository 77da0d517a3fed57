"""Matrix unit: cycles from `rates.matmul_cost` (SCALE-Sim's for systolic arrays), operands from the scratchpad.

Activations come in runs of `rows` elements of k, or of one word of a bank where that is longer (the unit keeps the word
for the steps that follow); weight rows are one panel wide (k long when transposed). The bank time is that of the slower
of the two streams. Instructions do not overlap: the drain of one ends before the next issues.
"""

import math

import numpy as np

from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.matmul import ATTENDS, TRANSPOSED
from firsttoken_compiler.isa.types import Dtype
from firsttoken_compiler.target.rates import ceil_div, matmul_cost, matmul_scratchpad_bytes, pair_name
from firsttoken_compiler.target.target import Target
from firsttoken_simulator.units.compute import ComputeCost, distinct
from firsttoken_simulator.units.scratchpad import stream_cycles

_A, _W = word.operand_column(1), word.operand_column(2)
_SHAPE = [word.DIMS, word.DIMS + 1, word.DIMS + 2, word.FLAGS, _A, _A + 2, _W, _W + 3, _W + 4]


def resolve(code: np.ndarray, index: np.ndarray, target: Target) -> ComputeCost:
    """Costs of the matmul instructions at `index`; every distinct shape is computed once."""
    rows, inverse = distinct(code, index, _SHAPE)
    table = np.array([_one(target, *row) for row in rows.tolist()], np.int64).reshape(-1, 8)
    return ComputeCost(*table.T[:, inverse])


def _one(
    target: Target, m: int, n: int, k: int, flags: int, a_kind: int, a_s0: int, w_kind: int, w_s1: int, w_s2: int
) -> tuple[int, ...]:
    a, w = Dtype(word.dtype_of(a_kind)), Dtype(word.dtype_of(w_kind))
    cost = matmul_cost(target, m, n, k, pair_name(a, w), bool(flags & ATTENDS))
    read, acc = matmul_scratchpad_bytes(target, m, n, k, a.bits, w.bits)
    unit = target.matrix
    times = 1 if unit.dataflow == "is" else ceil_div(n, unit.columns * unit.arrays)
    a_bytes = times * (m * k * a.bits // 8)
    fetch = max(unit.rows * a.bits // 8, target.scratchpad.bank_bytes)
    a_run = max(1, min(k * a.bits // 8, fetch))
    w_run = max(1, (k if flags & TRANSPOSED else min(n, w_s2 or n)) * w.bits // 8)
    banks = max(
        stream_cycles(target, a_bytes, a_run, a_s0 if m > 1 else a_run),
        stream_cycles(target, read - a_bytes, w_run, w_s1),
    )
    head, body = unit.issue_cycles + cost.head_cycles, cost.passes * cost.pass_cycles
    return head, body, cost.tail_cycles, math.ceil(banks), read, 0, acc, m * n * k
