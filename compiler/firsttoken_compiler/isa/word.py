"""Layout of an encoded instruction: one row of int64, the same columns for every opcode.

A program is a matrix of such rows, so that relocation, dependence analysis and timing work on whole columns.
"""

from typing import Final

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
OPERANDS: Final = DIMS + 3
"""`MAX_OPERANDS` groups of (space * 16 + dtype, address, s0, s1, s2); a 0 in the first column marks an absent one."""
OPERAND_WIDTH: Final = 5
MAX_OPERANDS: Final = 7
WIDTH: Final = OPERANDS + OPERAND_WIDTH * MAX_OPERANDS


def operand_column(index: int) -> int:
    """First column of operand `index`."""
    return OPERANDS + OPERAND_WIDTH * index
