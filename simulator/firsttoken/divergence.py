"""How far one distribution of the next token is from another, over the tokens of a text; all in float64, in nats."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


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
        fields = ("kl", "same", "loss", "reference_loss")
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in fields))


def log_probabilities(logits: NDArray[np.floating]) -> Floats:
    """The logarithm of the softmax of each row."""
    shifted = np.asarray(logits, np.float64)
    shifted = shifted - shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def score(logits: NDArray[np.floating], reference: NDArray[np.floating], following: tuple[int, ...]) -> Scores:
    """Compares logits `[tokens, vocabulary]` with the reference's, given the tokens that follow in the text."""
    found, expected = log_probabilities(logits), log_probabilities(reference)
    at = (np.arange(len(following)), np.array(following))
    kl = (np.exp(expected) * (expected - found)).sum(axis=-1)
    return Scores(np.maximum(kl, 0.0), found.argmax(axis=-1) == expected.argmax(axis=-1), -found[at], -expected[at])


def standard_error(values: NDArray[np.floating | np.bool_]) -> float:
    """Standard error of the mean of values that are taken as independent; 0 for a single one."""
    samples = np.asarray(values, np.float64)
    return float(samples.std(ddof=1) / np.sqrt(samples.size)) if samples.size > 1 else 0.0
