"""firsttoken.divergence against sums written out."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from firsttoken.divergence import ROWS, Scores, log_sum, score, standard_error

LOGITS = arrays(np.float32, (3, 5), elements=st.floats(-80, 80, width=32))


def test_two_distributions_by_hand() -> None:
    reference, found = np.log([[0.5, 0.25, 0.25]]), np.log([[0.25, 0.5, 0.25]])
    scores = score(found, reference, (0,))
    assert scores.kl[0] == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2))
    assert not scores.same[0]
    assert scores.loss[0] == pytest.approx(math.log(4))
    assert scores.reference_loss[0] == pytest.approx(math.log(2))


@given(LOGITS)
def test_probabilities_sum_to_one(logits: np.ndarray) -> None:
    np.testing.assert_allclose(np.exp(logits - log_sum(logits.astype(float))[:, None]).sum(axis=-1), 1.0, rtol=1e-5)


def test_many_tokens_are_scored_as_each_is() -> None:
    found, reference = np.random.default_rng(0).normal(size=(2, 2 * ROWS + 3, 7))
    following = tuple(index % 7 for index in range(len(found)))
    whole = score(found, reference, following)
    each = [score(found[i : i + 1], reference[i : i + 1], following[i : i + 1]) for i in range(len(found))]
    np.testing.assert_allclose(whole.kl, [one.kl[0] for one in each], rtol=1e-9)
    np.testing.assert_allclose(whole.loss, [one.loss[0] for one in each])


@given(LOGITS, LOGITS)
def test_divergence_is_never_negative_and_zero_of_itself(found: np.ndarray, reference: np.ndarray) -> None:
    assert (score(found, reference, (0, 1, 2)).kl >= 0).all()
    itself = score(reference, reference, (0, 1, 2))
    assert itself.kl.max() < 1e-12
    assert itself.same.all()


def test_scores_of_stretches_are_joined_in_order() -> None:
    parts = [score(np.array([[0.0, a]]), np.array([[0.0, 0.0]]), (1,)) for a in (0.0, 1.0, 2.0)]
    joined = Scores.joined(parts)
    assert joined.kl.tolist() == [part.kl[0] for part in parts]
    assert joined.loss.shape == (3,)


def test_standard_error() -> None:
    assert standard_error(np.array([1.0, 2.0, 3.0, 4.0])) == pytest.approx(math.sqrt(5 / 3) / 2)
    assert standard_error(np.array([True, False])) == pytest.approx(0.5)
    assert standard_error(np.array([1.0])) == 0.0
