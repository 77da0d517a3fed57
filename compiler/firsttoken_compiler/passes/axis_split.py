"""How the axes of a broadcasting operator become rows and columns of matrices."""

import math
from typing import Final

from firsttoken_compiler.passes.views import UnsupportedView

LARGEST_ROW: Final = 1 << 15
"""Elements of a row that is not the tensor's own last axis: a row has to fit into the scratchpad."""

Shape = tuple[int, ...]


def split_axis(operands: list[Shape], shape: Shape) -> int:
    """Where to split the axes into rows and columns so that each operand is a matrix, a row, a column or a number.

    Raises UnsupportedView when no split does.
    """
    for at in range(max(0, len(shape) - 1), -1, -1):
        if at < len(shape) - 1 and math.prod(shape[at:]) > LARGEST_ROW:
            break
        if all(form(operand, shape, at) is not None for operand in operands):
            return at
    raise UnsupportedView(f"operands of shapes {[list(operand) for operand in operands]} make {list(shape)}")


def form(operand: Shape, shape: Shape, at: int) -> Shape | None:
    """The shape in which a matrix `[prod(shape[:at]), prod(shape[at:])]` takes an operand; None when it cannot."""
    operand = (1,) * (len(shape) - len(operand)) + tuple(operand)
    sizes = []
    for own, whole in ((operand[:at], shape[:at]), (operand[at:], shape[at:])):
        if own != whole and math.prod(own) != 1:
            return None
        sizes.append(math.prod(own))
    rows, width = sizes
    if rows == 1 and math.prod(shape[:at]) != 1:
        return (width,)
    return (rows, width)


def spread(operand: Shape, shape: Shape) -> Shape:
    """A constant's shape, repeated over all axes behind its first longer one; as it was where that makes it large."""
    operand = (1,) * (len(shape) - len(operand)) + tuple(operand)
    first = next((axis for axis, extent in enumerate(operand) if extent != 1), len(shape))
    whole = (*operand[:first], *shape[first:])
    return whole if math.prod(whole) <= LARGEST_ROW else operand


def common(operands: list[tuple[Shape, bool]], shape: Shape) -> bool:
    """Whether there is a split for operands of these shapes; those marked are constants, which may be spread."""
    plain = [operand for operand, _ in operands]
    for shapes in (plain, [spread(operand, shape) if constant else operand for operand, constant in operands]):
        try:
            split_axis(shapes, shape)
        except UnsupportedView:
            continue
        return True
    return False
