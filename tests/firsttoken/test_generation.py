"""firsttoken.generation: greedy loop, cache bookkeeping, the onnxruntime session."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from firsttoken.generation import MASKED, OrtSession, StaticCache, greedy
from firsttoken.student import StudentConfig
from firsttoken_models.registry import PROVIDER
from firsttoken_models.weights import write_random_weights


class Counting:
    """A session that always continues with the next number, and records what it was asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def prefill(self, ids: list[int]) -> NDArray[np.float32]:
        return np.eye(100, dtype=np.float32)[ids[-1] + 1]

    def decode(self, token: int, position: int) -> NDArray[np.float32]:
        self.calls.append((token, position))
        return np.eye(100, dtype=np.float32)[token + 1]


def test_greedy_stops_at_the_limit_or_the_end_token() -> None:
    session = Counting()
    assert greedy(session, [7, 8], 3, ()) == [9, 10, 11]
    assert session.calls == [(9, 2), (10, 3)]
    assert greedy(Counting(), [7, 8], 50, {12}) == [9, 10, 11]
    assert greedy(Counting(), [7, 8], 50, (9,)) == []
    assert greedy(Counting(), [7, 8], 0, ()) == []


def test_ort_session_generates_as_without_a_cache(tiny: StudentConfig, tmp_path: Path) -> None:
    weights = write_random_weights(tiny, tmp_path)
    prompt = [5, 77, 21, 8]
    session = OrtSession(PROVIDER, tiny, weights, capacity=10, threads=1)
    answer = greedy(session, prompt, 6, ())
    again = OrtSession(PROVIDER, tiny, weights, capacity=10, threads=1)
    expected: list[int] = []
    while len(expected) < 6:
        expected.append(int(again.prefill(prompt + expected).argmax()))
    assert answer == expected
    assert greedy(session, prompt, 6, ()) == expected


def test_decode_logits_match_prefill_logits(qwen2: StudentConfig, tmp_path: Path) -> None:
    weights = write_random_weights(qwen2, tmp_path)
    session = OrtSession(PROVIDER, qwen2, weights, capacity=4, threads=1)
    session.prefill([1, 2, 3])
    decoded = session.decode(4, 3)
    assert decoded.shape == (qwen2.vocab,)
    np.testing.assert_allclose(decoded, session.prefill([1, 2, 3, 4]), atol=2e-5)


def test_ort_session_errors(llama: StudentConfig, tmp_path: Path) -> None:
    session = OrtSession(PROVIDER, llama, write_random_weights(llama, tmp_path), capacity=3, threads=1)
    with pytest.raises(ValueError, match="the prompt is empty"):
        session.prefill([])
    with pytest.raises(ValueError, match=r"4 more tokens after 0 do not fit the cache of 3 rows; use .* at least 4"):
        session.prefill([1, 2, 3, 4])
    session.prefill([1, 2, 3])
    with pytest.raises(ValueError, match="position is 5, the next position is 3"):
        session.decode(1, 5)
    with pytest.raises(ValueError, match="1 more tokens after 3 do not fit"):
        session.decode(1, 3)


def test_static_cache_places_rows_and_masks_the_rest(uneven: StudentConfig) -> None:
    cache = StaticCache(uneven, 5, dtype="float16")
    assert [key.shape for key in cache.keys] == [(1, 2, 5, 24), (1, 1, 5, 24), (1, 3, 5, 24)]
    heads = (2, 1, 3)
    prompt = {
        f"present.{i}.{p}": np.full((1, h, 2, 24), 1.0 + i) for i, h in enumerate(heads) for p in ("key", "value")
    }
    cache.append(prompt, 2)
    step = {f"present.{i}.{p}": np.full((1, h, 6, 24), 7.0) for i, h in enumerate(heads) for p in ("key", "value")}
    cache.append(step, 1)
    for index, buffer in enumerate(cache.keys):
        assert buffer.dtype == np.float16
        np.testing.assert_array_equal(buffer[0, 0, :, 0], [1 + index, 1 + index, 7, 0, 0])
    np.testing.assert_array_equal(cache.mask()[0, 0, 0], [0, 0, 0, MASKED, MASKED, 0])
    mask = cache.mask(2)
    assert mask.shape == (1, 1, 2, 7)
    np.testing.assert_array_equal(mask[0, 0, :, 5:], [[0, MASKED], [0, 0]])
    assert cache.feeds([1, 2])["position_ids"].tolist() == [[3, 4]]
    cache.reset()
    assert cache.length == 0
    assert not any(buffer.any() for buffer in (*cache.keys, *cache.values))
    with pytest.raises(ValueError, match="capacity is 0 rows"):
        StaticCache(uneven, 0)
