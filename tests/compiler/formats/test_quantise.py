"""firsttoken_compiler.formats.quantise: the library's bits where it has a quantiser, else less error."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from firsttoken_compiler.errors import StudentError
from firsttoken_compiler.formats import quantise as module
from firsttoken_compiler.formats.dequantise import dequantise
from firsttoken_compiler.formats.quantise import quantise
from firsttoken_compiler.formats.types import BLOCK_TYPES, BlockType

PLAIN = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")
SEARCHED = ("q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl")


def rows_of(kind: BlockType, rows: int, per_row: int, seed: int, scale: float) -> np.ndarray:
    """Random weights: groups of differing spread and offset, with zeros and repeated numbers among them."""
    chance = np.random.default_rng(seed)
    x = chance.standard_normal((rows * per_row, kind.block // kind.group, kind.group))
    x = x * chance.uniform(0, 2, (*x.shape[:2], 1)) + chance.choice([0, 0, 1, -1], (*x.shape[:2], 1))
    x[chance.random(x.shape) < 0.1] = 0
    x[chance.random(x.shape[:2]) < 0.1] = 0.75
    return (x.reshape(rows, -1) * scale + 0.0).astype(np.float32)  # + 0.0: no zeros of the other sign


def error_of(x: np.ndarray, kind: BlockType, tries: int = module.TRIES) -> float:
    """Relative root mean square error."""
    left = dequantise(quantise(x, kind, tries), kind).astype(np.float64) - x
    return float(np.sqrt((left**2).sum() / (x.astype(np.float64) ** 2).sum()))


@pytest.mark.parametrize("name", PLAIN)
@settings(deadline=None)
@given(st.integers(1, 20), st.integers(1, 3), st.integers(0, 2**32), st.sampled_from([1e-6, 1e-3, 0.02, 1.0, 300.0]))
def test_bits_are_the_librarys(name: str, rows: int, per_row: int, seed: int, scale: float) -> None:
    kind = BLOCK_TYPES[name]
    x = rows_of(kind, rows, per_row, seed, scale)
    np.testing.assert_array_equal(quantise(x, kind), quantize(x, GGMLQuantizationType(kind.ggml)))


@pytest.mark.parametrize("name", PLAIN)
@settings(deadline=None)
@given(st.lists(st.floats(-1000, 1000, width=32), min_size=32, max_size=32))
def test_any_floats(name: str, values: list[float]) -> None:
    kind = BLOCK_TYPES[name]
    x = np.array([values], np.float32) + np.float32(0)
    x[np.abs(x) < 1e-30] = 0  # scales without an inverse: the library converts NaN to integers
    np.testing.assert_array_equal(quantise(x, kind), quantize(x, GGMLQuantizationType(kind.ggml)))


@pytest.mark.parametrize("name", SEARCHED)
@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**32), st.sampled_from([1e-2, 1.0, 300.0]))
def test_the_search_is_no_worse_than_rounding(name: str, rows: int, per_row: int, seed: int, scale: float) -> None:
    kind = BLOCK_TYPES[name]
    x = rows_of(kind, rows, per_row, seed, scale)
    if np.abs(x).max() == 0:
        return
    assert error_of(x, kind) <= error_of(x, kind, 0) * 1.02 + 1e-7  # errors count by their weights in the search
    np.testing.assert_array_equal(
        dequantise(quantise(x, kind), kind), dequantize(quantise(x, kind), GGMLQuantizationType(kind.ggml))
    )


@pytest.mark.parametrize(
    ("name", "rounded", "searched"),
    [("q3_k", 0.16, 0.147), ("q4_k", 0.08, 0.072), ("q5_k", 0.039, 0.0355), ("q6_k", 0.019, 0.0178),
     ("iq4_nl", 0.081, 0.0745)],
)  # fmt: skip
def test_errors_of_gaussian_weights(name: str, rounded: float, searched: float) -> None:
    kind = BLOCK_TYPES[name]
    x = (np.random.default_rng(7).standard_normal((64, 1024)) * 0.03).astype(np.float32)
    assert searched * 0.97 < error_of(x, kind) < searched < error_of(x, kind, 0) < rounded


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_rows_do_not_depend_on_each_other(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = BLOCK_TYPES[name]
    x = rows_of(kind, 13, 2, 5, 0.1)
    whole = quantise(x, kind)
    np.testing.assert_array_equal(np.concatenate([quantise(row[None], kind) for row in x]), whole)
    np.testing.assert_array_equal(quantise(np.asfortranarray(x), kind), whole)
    monkeypatch.setattr(module, "STEP", 4 * x.shape[1])
    np.testing.assert_array_equal(quantise(x, kind), whole)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_extremes(name: str) -> None:
    kind = BLOCK_TYPES[name]
    x = np.zeros((6, 256), np.float32)
    x[1] = 1e-8  # scales that half precision has as subnormals, or not at all
    x[2] = 1e-45
    x[3] = -2.5
    x[4, 100] = 1
    x[5, ::2], x[5, 1::2] = 3, -5
    back = dequantise(quantise(x, kind), kind)
    assert np.isfinite(back).all()
    assert not back[0].any()
    assert np.abs(back - x).max() <= 5 / 3
    np.testing.assert_allclose(back[3], -2.5, rtol=0.01)
    assert quantise(x[:0], kind).shape == (0, kind.row_bytes(256))


@pytest.mark.parametrize("name", BLOCK_TYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(name: str, value: float) -> None:
    x = np.ones((3, 256), np.float32)
    x[2, 17] = value
    with pytest.raises(StudentError, match="weights are not finite: repair"):
        quantise(x, BLOCK_TYPES[name])


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_values_beyond_half_precision(name: str) -> None:
    x = np.zeros((1, 256), np.float32)
    x[0, 3] = 1e9
    with pytest.raises(StudentError, match=r"weights up to 1e\+09 need a scale or minimum of .*, half precision"):
        quantise(x, BLOCK_TYPES[name])


def test_rows_that_blocks_do_not_fit() -> None:
    with pytest.raises(StudentError, match="rows of 576 weights are no multiple of the 256 of a block of q4_k"):
        quantise(np.zeros((2, 576), np.float32), BLOCK_TYPES["q4_k"])
