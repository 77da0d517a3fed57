"""firsttoken_compiler.formats.groups: the bits of the numpy expressions that its docstrings state."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firsttoken_compiler.formats.groups import magnitudes, rounded, widened

SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 70), st.integers(1, 45), st.integers(0, 2**32))


def random_floats(k: int, n: int, seed: int) -> np.ndarray:
    """All kinds of finite numbers, subnormal ones and both zeros among them."""
    bits = np.random.default_rng(seed).integers(0, 1 << 32, (k, n), np.uint32)
    values = bits.view(np.float32).copy()
    values[~np.isfinite(values)] = -0.0
    return values


def test_every_half_is_widened() -> None:
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).reshape(256, 256)
    for turned in (halves, halves.T, halves[:, 3:200:2]):
        np.testing.assert_array_equal(widened(turned).view(np.uint32), turned.astype(np.float32).view(np.uint32))


@settings(deadline=None)
@given(SHAPES)
def test_magnitudes(shape: tuple[int, int, int, int]) -> None:
    k, n, group, seed = shape
    matrix = random_floats(k, n, seed)
    expected = [np.abs(matrix[first : first + group]).max(axis=0) for first in range(0, k, group)]
    np.testing.assert_array_equal(magnitudes(matrix, group), expected)


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_magnitudes_of_what_is_not_finite(value: float) -> None:
    matrix = np.ones((5, 3), np.float32)
    matrix[3, 1] = value
    assert np.isfinite(magnitudes(matrix, 2)).tolist() == [[True] * 3, [True, False, True], [True] * 3]


@settings(deadline=None)
@given(SHAPES, st.sampled_from([7, 127]))
def test_rounding(shape: tuple[int, int, int, int], qmax: int) -> None:
    k, n, group, seed = shape
    chance = np.random.default_rng(seed)
    matrix = chance.integers(-4 * qmax, 4 * qmax, (k, n)).astype(np.float32) / np.float32(2)  # many halves
    scales = chance.choice(np.float32([0.5, 1, 1.5, 3.25]), (-(-k // group), n))
    expected = np.clip(np.rint(matrix / np.repeat(scales, group, axis=0)[:k]), -qmax, qmax).astype(np.int8)
    np.testing.assert_array_equal(rounded(matrix, scales, group, qmax), expected)
