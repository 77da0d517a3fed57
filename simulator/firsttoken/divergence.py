"""How far one distribution of the next token is from another, over the tokens of a text; all in float64, in nats."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
ROWS: Final = 8
"""Tokens that are compared at a time, so that what lies between stays in a core's cache."""


@dataclass(frozen=True)
class Scores:
    """What is known of each token of a text, in its order.

    Attributes:
        kl: Kullback-Leibler divergence of the student's distribution from the reference's, KL(reference || student).
        same: whether the likeliest next token is the reference's.
        loss: minus the logarithm of the probability that the student gives to the token that follows.
        reference_loss: the same of the reference.
    """

    kl: Floats
    same: NDArray[np.bool_]
    loss: Floats
    reference_loss: Floats

    @classmethod
    def joined(cls, parts: list[Scores]) -> Scores:
        """The scores of several stretches of text as those of one."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in FIELDS))

    def cut(self, tokens: slice) -> Scores:
        """Those of a stretch of the text."""
        return Scores(*(getattr(self, name)[tokens] for name in FIELDS))


FIELDS: Final = tuple(field.name for field in fields(Scores))


def score(logits: NDArray[np.floating], reference: NDArray[np.floating], following: tuple[int, ...]) -> Scores:
    """Compares logits `[tokens, vocabulary]` with the reference's, given the tokens that follow in the text."""
    parts = []
    for first in range(0, len(following), ROWS):
        rows = slice(first, first + ROWS)
        parts.append(_score(logits[rows].astype(np.float64), reference[rows].astype(np.float64), following[rows]))
    return Scores.joined(parts)


def _score(found: Floats, expected: Floats, following: tuple[int, ...]) -> Scores:
    total, expected_total = log_sum(found), log_sum(expected)
    kl = (np.exp(expected - expected_total[:, None]) * (expected - found)).sum(axis=-1) + total - expected_total
    at = (np.arange(len(following)), np.array(following))
    return Scores(
        kl=np.maximum(kl, 0.0),
        same=found.argmax(axis=-1) == expected.argmax(axis=-1),
        loss=total - found[at],
        reference_loss=expected_total - expected[at],
    )


def log_sum(logits: Floats) -> Floats:
    """The logarithm of the sum of each row's exponentials; logits less that are logarithms of probabilities."""
    largest = logits.max(axis=-1)
    result: Floats = largest + np.log(np.exp(logits - largest[:, None]).sum(axis=-1))
    return result


def standard_error(values: NDArray[np.floating | np.bool_]) -> float:
    """Standard error of the mean of values that are taken as independent; 0 for a single one."""
    samples = np.asarray(values, np.float64)
    return float(samples.std(ddof=1) / np.sqrt(samples.size)) if samples.size > 1 else 0.0
