"""firsttoken.tuning.search: which choices are tried, in which order."""

from __future__ import annotations

import math

import pytest

from firsttoken.tuning.search import ROUND, Search, candidates
from firsttoken.tuning.whole import Graph
from firsttoken_compiler.schedule.choice import Choice, ProductChoice
from firsttoken_compiler.schedule.choosing import default_choice, ranked

SPACE = [
    ProductChoice(m, n, k, buffers=buffers)
    for m in (16, 32, 48, 64) for n in (128, 256, 384, 512, 768) for k in (128, 256, 384, 512) for buffers in (1, 2, 3)
]  # fmt: skip


def score(choice: Choice) -> float | None:
    """A valley around 48 x 384 x 256 with three buffers; deep tiles of many columns cannot be built."""
    assert isinstance(choice, ProductChoice)
    if choice.n * choice.k > 100_000:
        return None
    sides = ((choice.m, 48), (choice.n, 384), (choice.k, 256))
    return 100 * sum(abs(math.log2(a / b)) for a, b in sides) + 50 * (3 - choice.buffers) + 10


def run(search: Search) -> list[list[Choice]]:
    rounds = []
    for choices in search.rounds():
        rounds.append(choices)
        for choice in choices:
            search.tell(choice, score(choice))
    return rounds


def test_the_own_choice_comes_first_and_the_cheapest_after_it(prompt: Graph) -> None:
    for kernel in prompt.kernels:
        found = candidates(kernel)
        if found:
            assert found[0] == default_choice(kernel.spec, kernel.spaces, kernel.machine, kernel.room)
            costs = [ranked(kernel.spec, kernel.spaces, kernel.machine, choice) or 0.0 for choice in found[1:]]
            assert costs == sorted(costs)
            assert len(set(found)) == len(found)


def test_all_are_tried_where_the_budget_lets_it() -> None:
    search = Search(SPACE, len(SPACE) + 5, seed=0)
    tried = [choice for choices in run(search) for choice in choices]
    assert tried == SPACE
    assert search.best[0] == ProductChoice(48, 384, 256, buffers=3)


def test_the_budget_holds_and_nothing_is_tried_twice() -> None:
    search = Search(SPACE, 50, seed=0)
    rounds = run(search)
    tried = [choice for choices in rounds for choice in choices]
    assert tried[:25] == SPACE[:25]
    assert len(tried) == len(set(tried)) == 50
    assert max(map(len, rounds)) == ROUND


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_what_is_proposed_beats_the_list(seed: int) -> None:
    search = Search(SPACE, 60, seed)
    run(search)
    listed = min(value for value in map(score, SPACE[:30]) if value is not None)
    found = score(search.best[0])
    assert found is not None
    assert found < listed / 2


def test_a_seed_decides_everything() -> None:
    def tried(seed: int) -> list[list[Choice]]:
        return run(Search(SPACE, 48, seed))

    assert tried(3) == tried(3)
    assert tried(3) != tried(4)


def test_choices_that_cannot_be_built_are_no_result() -> None:
    search = Search(SPACE, 48, seed=0)
    run(search)
    assert all(score(choice) is not None for choice in search.best)
    assert any(value is None for value in search.scores.values())
