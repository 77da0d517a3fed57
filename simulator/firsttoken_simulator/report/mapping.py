"""Where the cycles of a matrix instruction go: to its multiplies, to padding, into and out of the array, to issue."""

from typing import Final

import numpy as np

from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.matmul import ATTENDS, Matmul
from firsttoken_compiler.isa.types import Dtype
from firsttoken_compiler.target.rates import ceil_div, matmul_cost, pair_name, tile_rows
from firsttoken_compiler.target.target import Target

PARTS: Final = ("ideal", "fill_drain", "array_load", "padding", "issue")
_A, _W = word.operand_column(1), word.operand_column(2)
_SHAPE: Final = [word.DIMS, word.DIMS + 1, word.DIMS + 2, _A, _W, word.FLAGS]


def streamed_cycles(target: Target, m: int, n: int, k: int, pair: str, attends: bool = False) -> int:
    """Cycles in which the unit multiplies, tiles rounded up to its rows, columns and depth; per pass."""
    unit = target.matrix
    if unit.kind == "tile":
        tile_m = tile_rows(target, attends)
        block = tile_m * unit.rows * unit.columns
        return ceil_div(m, tile_m) * max(1, ceil_div(block, unit.macs_per_cycle[pair]))
    repeat = max(1, ceil_div(unit.rows * unit.columns * unit.arrays, unit.macs_per_cycle[pair]))
    return repeat * {"os": k, "is": n}.get(unit.dataflow, m)


def split(
    target: Target, m: int, n: int, k: int, pair: str, attends: bool = False
) -> tuple[int, int, int, int]:  # fmt: skip
    """Cycles of `[m, k] x [k, n]` as (multiplying, fill and drain, loading the array, issue); they sum to all of it.

    Loading is what the unit waits for the operand that it holds: R cycles a pass where nothing overlaps them; with
    double-buffering the first R, and R - streamed of every later pass that streams less than R. Of a tile unit it is
    `weight_cycles`. Fill and drain is the rest of `matmul_cost`.
    """
    unit, cost = target.matrix, matmul_cost(target, m, n, k, pair, attends)
    streamed = streamed_cycles(target, m, n, k, pair, attends)
    if unit.kind == "tile":
        load = cost.passes * (cost.pass_cycles - streamed)
    elif unit.dataflow == "os":
        load = 0
    elif unit.double_buffered:
        load = unit.rows + (cost.passes - 1) * max(0, unit.rows - streamed)
    else:
        load = cost.passes * unit.rows
    busy = cost.passes * streamed
    return busy, cost.cycles - busy - load, load, unit.issue_cycles


def matrix_parts_fs(code: np.ndarray, target: Target) -> np.ndarray:
    """Femtoseconds of rows of matrix instructions in `PARTS`, int64 `[rows, PARTS]`, waits for the scratchpad apart.

    The ideal is the MACs over the unit's peak rate for their types, rounded down; padding is what the multiplying
    cycles exceed it by. Every distinct shape is computed once.
    """
    if (code[:, word.OPCODE] != Matmul.OPCODE).any():
        raise ValueError("only matrix instructions have these parts")
    distinct, inverse = np.unique(code[:, _SHAPE], axis=0, return_inverse=True)
    rows = []
    for m, n, k, a, w, flags in distinct.tolist():
        pair = pair_name(Dtype(word.dtype_of(a)), Dtype(word.dtype_of(w)))
        busy, fill, load, issue = (
            cycles * target.period_fs for cycles in split(target, m, n, k, pair, bool(flags & ATTENDS))
        )
        ideal = m * n * k * target.period_fs // target.matrix.macs_per_cycle[pair]
        rows.append((ideal, fill, load, busy - ideal, issue))
    return np.asarray(np.array(rows, np.int64).reshape(-1, len(PARTS))[inverse.reshape(-1)])
