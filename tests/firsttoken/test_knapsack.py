"""firsttoken.knapsack against the best of all choices."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firsttoken.knapsack import STEPS, choose

ITEMS = st.lists(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=4), min_size=1, max_size=5
)


def best(items: list[list[tuple[int, int]]], budget: float) -> int | None:
    sums = [tuple(map(sum, zip(*choice, strict=True))) for choice in itertools.product(*items)]
    return min((loss for cost, loss in sums if cost <= budget), default=None)


@given(ITEMS, st.integers(0, 150))
def test_the_least_loss_within_the_budget(items: list[list[tuple[int, int]]], budget: int) -> None:
    costs, losses = ([[option[part] for option in item] for item in items] for part in (0, 1))
    chosen = choose(costs, losses, budget)
    if chosen is None:
        assert best(items, budget) is None
        return
    spent = sum(cost[option] for cost, option in zip(costs, chosen, strict=True))
    loss = sum(loss[option] for loss, option in zip(losses, chosen, strict=True))
    assert spent <= budget
    rounded = budget - len(items) * (budget / STEPS)
    assert best(items, budget) <= loss <= best(items, max(rounded, sum(map(min, costs))))


def test_costs_below_zero_leave_more_for_others() -> None:
    assert choose([[0.0, -2.0], [0.0, 2.0]], [[0.0, 1.0], [5.0, 0.0]], 0.0) == [1, 1]


@pytest.mark.parametrize("budget", [2.9, 0.0, -1.0])
def test_what_nothing_fits_is_none(budget: float) -> None:
    assert choose([[1.0, 4.0], [2.0, 3.0]], [[0.0, 0.0], [0.0, 0.0]], budget) is None
