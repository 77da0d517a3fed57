"""The bytes that instructions touch, in the fewest runs: what hazards and the memory plan are checked by."""

from __future__ import annotations

import numpy as np
from numba import njit

from firsttoken_compiler.isa.forms import ADDRESSES, forms_of
from firsttoken_compiler.isa.instruction import REGION_COLUMNS
from firsttoken_compiler.isa.opcodes import regions

GRANULE = 64
"""Bytes; two accesses conflict when they touch the same granule."""
INSTRUCTION, WRITE, SPACE, ADDRESS = range(4)
RUN = REGION_COLUMNS.index("run")
FIRST_AXIS = REGION_COLUMNS.index("c0")
AXES = tuple((REGION_COLUMNS.index(f"c{axis}"), REGION_COLUMNS.index(f"s{axis}")) for axis in range(3))


def footprints(code: np.ndarray) -> np.ndarray:
    """Footprints with dense axes merged into their runs, each instruction's reads before its writes.

    Merging keeps the set of granules: a gap of less than a granule between runs cannot hide one. Each form of
    instructions is merged once; its footprints lie where the operands of an instruction do.
    """
    forms = forms_of(code)
    table, operand = _of_forms(code[forms.first])
    count = np.bincount(table[:, INSTRUCTION], minlength=len(forms.first))[forms.of]
    end = np.cumsum(count)
    begin = np.searchsorted(table[:, INSTRUCTION], np.arange(len(forms.first)))[forms.of]
    number = np.repeat(np.arange(len(code)), count)
    at = np.arange(len(number)) + np.repeat(begin - (end - count), count)
    found = np.take(table, at, axis=0)
    found[:, INSTRUCTION] = number
    found[:, ADDRESS] += code[number, np.array(ADDRESSES)[operand[at]]]
    return found


def _of_forms(code: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Footprints of some instructions, with addresses from those of their operands on, and whose these are."""
    code = code.copy()
    code[:, ADDRESSES] = 0
    beside = regions(code)
    code[:, ADDRESSES] = np.arange(len(ADDRESSES))
    numbered = np.column_stack([beside, regions(code)[:, ADDRESS] - beside[:, ADDRESS]])
    numbered = numbered[: _dense(numbered)]
    return np.ascontiguousarray(numbered[:, :-1]), numbered[:, -1]


@njit(cache=True)
def _dense(table: np.ndarray) -> int:
    """Merges and orders footprints in place, which come by instruction; how many touch any byte."""
    kept = begin = 0
    writes = np.empty_like(table)
    while begin < len(table):
        end = begin
        while end < len(table) and table[end, INSTRUCTION] == table[begin, INSTRUCTION]:
            end += 1
        later = 0
        for r in range(begin, end):
            row = table[r]
            if row[FIRST_AXIS] <= 0 or row[FIRST_AXIS + 2] <= 0 or row[FIRST_AXIS + 4] <= 0 or row[RUN] <= 0:
                continue
            for axis in range(FIRST_AXIS, FIRST_AXIS + 6, 2):
                if row[axis + 1] < 0:
                    row[ADDRESS] += (row[axis] - 1) * row[axis + 1]
                    row[axis + 1] = -row[axis + 1]
            for _ in range(3):
                for axis in range(FIRST_AXIS, FIRST_AXIS + 6, 2):
                    if row[axis] > 1 and row[axis + 1] < row[RUN] + GRANULE:
                        row[RUN] += (row[axis] - 1) * row[axis + 1]
                        row[axis] = 1
            if row[WRITE] != 0:
                writes[later] = row
                later += 1
            else:
                table[kept] = row
                kept += 1
        table[kept : kept + later] = writes[:later]
        kept += later
        begin = end
    return kept


def bounds(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First byte and one past the last byte of each footprint (of `footprints`, whose strides are not negative)."""
    low = table[:, ADDRESS]
    high = low + table[:, RUN]
    for count, stride in AXES:
        high += (table[:, count] - 1) * table[:, stride]
    return low, high
