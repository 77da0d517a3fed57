"""Packing values by their lives: never two in one place at once, on their boundaries, near the lower bound."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from firsttoken_compiler.passes.arena import Piece, _Search, live_bytes, pack


@st.composite
def some_pieces(draw: st.DrawFn) -> list[Piece]:
    pieces = []
    for index in range(draw(st.integers(0, 30))):
        first = draw(st.integers(0, 20))
        last = first + draw(st.integers(0, 8))
        nbytes = draw(st.one_of(st.integers(0, 40), st.integers(0, 5000)))
        pieces.append(Piece(f"v{index}", nbytes, first, last, draw(st.sampled_from([1, 64, 128]))))
    return pieces


@settings(max_examples=200, deadline=None)
@given(some_pieces())
def test_pieces_are_aligned_and_apart_while_they_live(pieces: list[Piece]) -> None:
    found = pack(pieces)
    assert set(found.offsets) == {piece.name for piece in pieces}
    assert found.nbytes == max((found.offsets[p.name] + p.nbytes for p in pieces), default=0)
    assert found.nbytes >= live_bytes(pieces)
    for index, one in enumerate(pieces):
        at = found.offsets[one.name]
        assert at >= 0
        assert at % one.alignment == 0
        for other in pieces[:index]:
            if one.first <= other.last and other.first <= one.last:
                start = found.offsets[other.name]
                assert at + one.nbytes <= start or start + other.nbytes <= at


@settings(max_examples=50, deadline=None)
@given(some_pieces(), st.randoms())
def test_the_order_in_which_pieces_come_does_not_matter(pieces: list[Piece], source) -> None:
    found = pack(pieces)
    source.shuffle(pieces)
    assert pack(pieces) == found


@settings(max_examples=100, deadline=None)
@given(some_pieces())
def test_the_bound_is_what_is_live_at_the_fullest_moment(pieces: list[Piece]) -> None:
    moments = {piece.first for piece in pieces}
    expected = max((sum(p.nbytes for p in pieces if p.first <= at <= p.last) for at in moments), default=0)
    assert live_bytes(pieces) == expected


def test_layers_that_no_single_order_packs_tightly_reach_the_bound() -> None:
    """A decoder layer of SmolLM2 in int8 on 16 tokens: bytes, first and last launch; a new layer every 16 launches."""
    layer = [
        (40704, 0, 11), (64, 1, 4), (10176, 1, 4), (20352, 2, 5), (11904, 3, 6), (11904, 4, 9), (20352, 5, 9),
        (11904, 6, 9), (20352, 9, 10), (64, 10, 11), (10176, 10, 11), (40704, 11, 16), (64, 12, 14), (10176, 12, 14),
        (52992, 13, 14), (52992, 14, 15), (64, 15, 16), (26496, 15, 16),
    ]  # fmt: skip
    pieces = [
        Piece(f"{number}.{index}", nbytes, 16 * number + first, 16 * number + last, 64)
        for number in range(30)
        for index, (nbytes, first, last) in enumerate(layer)
    ]
    largest_first = _Search(sorted(pieces, key=lambda piece: (-piece.nbytes, piece.first)))
    assert largest_first.attempt(np.arange(len(pieces)))[0] > 1.05 * live_bytes(pieces)
    assert pack(pieces).nbytes == live_bytes(pieces)
