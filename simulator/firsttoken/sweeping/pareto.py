"""Which points no other point beats in everything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def front(costs: Sequence[Sequence[float]]) -> NDArray[np.bool_]:
    """Which of `costs` `[points, objectives]`, all to be small, lie on the Pareto front; equal points all do."""
    import numpy as np

    matrix = np.asarray(costs, dtype=np.float64)
    if matrix.size == 0:
        return np.zeros(len(costs), bool)
    order = np.lexsort(matrix.T[::-1])
    kept: list[int] = []
    on = np.zeros(len(matrix), bool)
    for at in order:  # a point can only be beaten by one before it in this order
        if kept:
            others = matrix[kept]
            beaten = ((others <= matrix[at]).all(axis=1) & (others < matrix[at]).any(axis=1)).any()
            if beaten:
                continue
        kept.append(int(at))
        on[at] = True
    return on
