"""What matrix and vector unit have in common: an instruction runs as equal slices that book scratchpad ports.

A slice lasts as long as the unit needs, or as long as the ports or the operands' banks need if that is longer; operand
buffers hide a wait that is shorter than the slice. The time by which a slice is longer is lost to the scratchpad.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np

SLICE_CYCLES = 32
"""Length of a slice, so that units and DMA interleave at the ports like this many cycles of each."""


@dataclass(frozen=True)
class ComputeCost:
    """Per instruction, int64 arrays of equal length."""

    head_cycles: np.ndarray
    """Issue and fill, before the ports are used."""
    body_cycles: np.ndarray
    tail_cycles: np.ndarray
    """Drain, after the ports are used."""
    bank_cycles: np.ndarray
    """Least time of the body for the operands' bank patterns, rounded up."""
    spad_read_bytes: np.ndarray
    spad_write_bytes: np.ndarray
    acc_bytes: np.ndarray
    operations: np.ndarray
    """Multiply-accumulates, or fp32 lane operations."""


def cut(cost: ComputeCost, period_fs: int, port_bytes_per_cycle: int) -> tuple[np.ndarray, ...]:
    """(head, slices, slice, slice's ports, slice's banks, tail) in femtoseconds; the tail takes the remainder."""
    body = cost.body_cycles * period_fs
    slices = np.maximum(1, -(-cost.body_cycles // SLICE_CYCLES))
    one = body // slices
    moved = cost.spad_read_bytes + cost.spad_write_bytes
    ports = -(-moved * period_fs // (port_bytes_per_cycle * slices))
    banks = -(-cost.bank_cycles * period_fs // slices)
    banks[cost.bank_cycles <= cost.body_cycles] = 0
    tail = cost.tail_cycles * period_fs + body - one * slices
    return cost.head_cycles * period_fs, slices, one, ports, banks, tail


_MIX: Final = 0x9E3779B97F4A7C15
"""An odd constant: multiplying by it spreads a number over 64 bits."""


def distinct(code: np.ndarray, index: np.ndarray, columns: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """(the different rows of `code[index][:, columns]`, which of them each is): `np.unique` by a hash of the rows."""
    mixed: np.ndarray = np.zeros(len(index), np.uint64)
    for column in columns:
        mixed ^= code[index, column].view(np.uint64)
        mixed *= np.uint64(_MIX)
        mixed ^= mixed >> np.uint64(29)
    _, first, inverse = np.unique(mixed, return_index=True, return_inverse=True)
    inverse = inverse.ravel()
    rows = code[index[first][:, None], columns]
    if all(np.array_equal(rows[inverse, at], code[index, column]) for at, column in enumerate(columns)):
        return rows, inverse
    rows, inverse = np.unique(code[index[:, None], columns], axis=0, return_inverse=True)  # two hashes met
    return rows, inverse.ravel()
