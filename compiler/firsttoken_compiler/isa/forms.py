"""Instructions but for addresses: what they are made of, and which instructions of a program are made alike.

Kernels of repeated layers differ in addresses alone, so a program of 100,000 instructions has some hundred forms. What
follows from an instruction without its addresses is found once per form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from firsttoken_compiler.isa import word

ADDRESSES: Final = tuple(word.operand_column(index) + 1 for index in range(word.MAX_OPERANDS))
"""Columns of the addresses."""
COLUMNS: Final = tuple(
    column
    for column in (word.OPCODE, word.FLAGS, *range(word.DIMS, word.WIDTH))
    if column not in ADDRESSES
)  # fmt: skip
"""Columns that make the form: neither queue and operator, nor signal and waits, nor addresses."""


@dataclass(frozen=True)
class Forms:
    """The forms of some code, numbered."""

    first: np.ndarray
    """By form, an instruction of it."""
    of: np.ndarray
    """By instruction, its form."""


def forms_of(code: np.ndarray) -> Forms:
    """The forms of encoded instructions. Instructions have one form exactly when they are equal in `COLUMNS`."""
    rows = np.ascontiguousarray(code[:, list(COLUMNS)])
    _, first, of = np.unique(_mixed(rows), return_index=True, return_inverse=True)
    if not np.array_equal(rows, rows[first][of]):  # two forms of one mixture
        _, first, of = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    return Forms(first, of.reshape(-1))


def _mixed(rows: np.ndarray) -> np.ndarray:
    """A number per row that is equal for equal rows, and for hardly any others."""
    factors = np.random.default_rng(0).integers(1, 1 << 62, rows.shape[1], np.int64) * 2 + 1
    with np.errstate(over="ignore"):
        return np.asarray(rows @ factors)
