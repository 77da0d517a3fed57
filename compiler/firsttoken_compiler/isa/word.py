"""Layout of an encoded instruction: one row of int64, the same columns for every opcode.

A program is a matrix of such rows, so that relocation, dependence analysis and timing work on whole columns.
"""

from typing import Any, Final

OPCODE: Final = 0
QUEUE: Final = 1
"""Queue that issues the instruction; see `types.queue_index`."""
OP: Final = 2
"""Index into the program's operator table (provenance)."""
SIGNAL: Final = 3
"""1: completing increments the queue's semaphore."""
WAITS: Final = 4
"""`MAX_WAITS` pairs (queue + 1, value); a 0 in the first column marks an unused pair."""
MAX_WAITS: Final = 4
FLAGS: Final = WAITS + 2 * MAX_WAITS
DIMS: Final = FLAGS + 1
"""Three extents; their meaning belongs to the instruction."""
MAX_EXTENT: Final = 1 << 22
"""Largest extent."""
OPERANDS: Final = DIMS + 3
"""`MAX_OPERANDS` groups of (kind, address, s0, s1, s2); a 0 in the first column marks an absent one."""
OPERAND_WIDTH: Final = 5
MAX_OPERANDS: Final = 7
WIDTH: Final = OPERANDS + OPERAND_WIDTH * MAX_OPERANDS
KIND_BITS: Final = 8
"""Low bits of an operand's kind: its element type. Above them is its space."""


def kind(space: int, dtype: int) -> int:
    """The first field of an operand."""
    return space << KIND_BITS | dtype


def space_of(kinds: Any) -> Any:
    """Space of a kind, or of a column of kinds."""
    return kinds >> KIND_BITS


def dtype_of(kinds: Any) -> Any:
    """Element type of a kind, or of a column of kinds."""
    return kinds & ((1 << KIND_BITS) - 1)


def operand_column(index: int) -> int:
    """First column of operand `index`."""
    return OPERANDS + OPERAND_WIDTH * index
