"""Packs values that live for a time into one piece of memory: two may share bytes when they are never live together.

First fit, in several orders, the best result is taken: placing what is large, or early, or what holds much memory for
long first. The bytes that are live at the fullest moment are a lower bound of every packing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np


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


_ORDERS: Final[tuple[Callable[[Piece], Any], ...]] = (
    lambda piece: (piece.first, -piece.nbytes),
    lambda piece: (-piece.nbytes, piece.first),
    lambda piece: (-piece.nbytes * piece.span, piece.first),
    lambda piece: (-piece.span, -piece.nbytes, piece.first),
)


def pack(pieces: Sequence[Piece]) -> Packed:
    """Offsets from 0; the smallest end that one of the orders reaches, the first of equal ones."""
    bound = live_bytes(pieces)
    best: Packed | None = None
    for order in _ORDERS:
        found = _first_fit(sorted(pieces, key=lambda piece: (*order(piece), piece.name)))
        if best is None or found.nbytes < best.nbytes:
            best = found
        if best.nbytes == bound:
            break
    assert best is not None
    return best


def _first_fit(pieces: Sequence[Piece]) -> Packed:
    placed = np.zeros((len(pieces), 4), np.int64)  # first, last, start, end
    offsets: dict[str, int] = {}
    most = 0
    for count, piece in enumerate(pieces):
        known = placed[:count]
        meets = (known[:, 0] <= piece.last) & (known[:, 1] >= piece.first)
        at = 0
        for start, end in sorted(known[meets, 2:].tolist()):
            if start - at >= piece.nbytes:
                break
            at = max(at, -(-end // piece.alignment) * piece.alignment)
        offsets[piece.name] = at
        placed[count] = piece.first, piece.last, at, at + piece.nbytes
        most = max(most, at + piece.nbytes)
    return Packed(offsets, most)
