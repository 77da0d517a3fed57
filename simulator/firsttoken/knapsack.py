"""One option of each item under a budget, with the least loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

STEPS: Final = 20_000
"""Costs are rounded up to this part of what there is to spend, so that a choice fits whatever rounding does."""


def choose(costs: Sequence[Sequence[float]], losses: Sequence[Sequence[float]], budget: float) -> list[int] | None:
    """The option of each item that makes the sum of losses least while the costs stay within the budget.

    Args:
        costs: by item and option, in the budget's unit.
        losses: by item and option.
        budget: most that the costs may add up to.

    Returns:
        The indices of the options; None where even the cheapest options exceed the budget. What fits exactly but not
        with every cost rounded up to a `STEPS`-th of the budget beyond the cheapest options is not found.
    """
    cheapest = [min(of) for of in costs]
    left = budget - sum(cheapest)
    if left < 0:
        return None
    unit = left / STEPS
    best = np.zeros(STEPS + 1)
    picks = []
    for cost, loss, least in zip(costs, losses, cheapest, strict=True):
        reached = np.full((len(cost), STEPS + 1), np.inf)
        for option, (price, harm) in enumerate(zip(cost, loss, strict=True)):
            steps = _steps(price - least, unit)
            if steps <= STEPS:
                reached[option, steps:] = best[: STEPS + 1 - steps] + harm
        picks.append(reached.argmin(axis=0))
        best = reached.min(axis=0)
    return _traced(picks, costs, cheapest, unit)


def _steps(price: float, unit: float) -> int:
    if price <= 0:
        return 0
    return STEPS + 1 if price > unit * STEPS else int(np.ceil(price / unit - 1e-9))


def _traced(
    picks: list[np.ndarray], costs: Sequence[Sequence[float]], cheapest: Sequence[float], unit: float
) -> list[int]:
    """The options that led to the best sum, from the last item back."""
    at, chosen = STEPS, []
    for pick, cost, least in zip(reversed(picks), reversed(costs), reversed(cheapest), strict=True):
        option = int(pick[at])
        chosen.append(option)
        at -= _steps(cost[option] - least, unit)
    return chosen[::-1]
