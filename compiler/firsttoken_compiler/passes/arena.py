"""Packs values that live for a time into one piece of memory: two may share bytes when they are never live together.

First fit, in several orders: what is large, or early, or what holds much memory for long first. Where none of these
reaches the lower bound, classes of values (of one size and span, such as the same value of every layer) change places
in the best order, as long as that packs no worse. The bound is what is live at the fullest moment.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numba import njit

MAX_ATTEMPTS: Final = 400
MAX_STEPS: Final = 2_000_000_000
"""Bound of attempts times pieces squared: seconds for a graph of ten thousand values."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A value that needs `nbytes` from a multiple of `alignment` on, from moment `first` to `last`, both included."""

    name: str
    nbytes: int
    first: int
    last: int
    alignment: int = 1

    @property
    def span(self) -> int:
        """Moments that it lives."""
        return self.last - self.first + 1


@dataclass(frozen=True)
class Packed:
    """Offsets of pieces by name, and the end of the highest one."""

    offsets: dict[str, int]
    nbytes: int


def live_bytes(pieces: Iterable[Piece]) -> int:
    """Bytes that are live at the fullest moment: no packing needs less."""
    changes: dict[int, int] = {}
    for piece in pieces:
        changes[piece.first] = changes.get(piece.first, 0) + piece.nbytes
        changes[piece.last + 1] = changes.get(piece.last + 1, 0) - piece.nbytes
    now = most = 0
    for moment in sorted(changes):
        now += changes[moment]
        most = max(most, now)
    return most


_ORDERS: Final[tuple[Callable[[Piece], tuple[int, ...]], ...]] = (
    lambda piece: (piece.first, -piece.nbytes),
    lambda piece: (-piece.nbytes, piece.first),
    lambda piece: (-piece.nbytes * piece.span, piece.first),
    lambda piece: (-piece.span, -piece.nbytes, piece.first),
)


def pack(pieces: Sequence[Piece]) -> Packed:
    """Offsets from 0 on, as low as the search finds; the same pieces in any order give the same offsets."""
    ordered = sorted(pieces, key=lambda piece: (piece.first, -piece.nbytes, piece.name))
    if not ordered:
        return Packed({}, 0)
    search = _Search(ordered)
    best = min((search.attempt(search.sorted_by(order)) for order in _ORDERS), key=lambda found: found[0])
    bound = live_bytes(search.rounded())
    if best[0] > bound:
        best = min(best, search.climb(best[1], bound), key=lambda found: found[0])
    search.attempt(best[1])
    return Packed({piece.name: int(at) for piece, at in zip(ordered, search.start, strict=True)}, best[0])


class _Search:
    """First fit of pieces in orders that are arrays of their positions."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.pieces = pieces
        columns = [(piece.nbytes, piece.first, piece.last, piece.alignment) for piece in pieces]
        self.table = np.array(columns, np.int64)
        self.start = np.zeros(len(pieces), np.int64)

    def sorted_by(self, key: Callable[[Piece], tuple[int, ...]]) -> np.ndarray:
        """An order; among equals the pieces stay as they are."""
        return np.array(sorted(range(len(self.pieces)), key=lambda index: key(self.pieces[index])))

    def rounded(self) -> list[Piece]:
        """The pieces up to the next boundary: no other one can begin before it."""
        return [replace(p, nbytes=-(-p.nbytes // p.alignment) * p.alignment) for p in self.pieces]

    def attempt(self, order: np.ndarray) -> tuple[int, np.ndarray]:
        """The end of the highest piece; offsets are in `start`."""
        return int(_first_fit(order, self.table, self.start)), order

    def climb(self, order: np.ndarray, bound: int) -> tuple[int, np.ndarray]:
        """A good order in which whole classes of pieces have changed places."""
        keys = [(piece.nbytes, piece.span) for piece in self.pieces]
        members: dict[tuple[int, int], list[int]] = {}
        for position, index in enumerate(order.tolist()):
            members.setdefault(keys[index], []).append(position)
        ranked = sorted(members, key=lambda key: sum(members[key]) / len(members[key]))
        number = {key: index for index, key in enumerate(ranked)}
        classes = np.array([number[key] for key in keys])
        rank, source = np.arange(len(ranked)), random.Random(0)
        best = self.attempt(np.argsort(rank[classes], kind="stable"))
        for _ in range(min(MAX_ATTEMPTS, MAX_STEPS // len(keys) ** 2)):
            if best[0] <= bound:
                break
            one, other = source.randrange(len(ranked)), source.randrange(len(ranked))
            changed = rank.copy()
            changed[[one, other]] = changed[[other, one]]
            found = self.attempt(np.argsort(changed[classes], kind="stable"))
            if found[0] <= best[0]:
                best, rank = found, changed
        return best


@njit(cache=True)
def _first_fit(order: np.ndarray, table: np.ndarray, start: np.ndarray) -> int:
    """Places pieces one by one at the lowest offset that is free while they live; returns the highest end."""
    low, high = np.empty(len(order), np.int64), np.empty(len(order), np.int64)
    most = 0
    for i in range(len(order)):
        nbytes, first, last, alignment = table[order[i]]
        count = 0
        for j in range(i):
            other = order[j]
            if table[other, 1] <= last and table[other, 2] >= first:
                at = count
                while at > 0 and low[at - 1] > start[other]:
                    low[at], high[at] = low[at - 1], high[at - 1]
                    at -= 1
                low[at], high[at] = start[other], start[other] + table[other, 0]
                count += 1
        offset = 0
        for j in range(count):
            if low[j] - offset >= nbytes:
                break
            offset = max(offset, -(-high[j] // alignment) * alignment)
        start[order[i]] = offset
        most = max(most, offset + nbytes)
    return most
