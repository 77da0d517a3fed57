"""firsttoken_compiler.formats.planes: the planes of random blocks make the library's floats, and the blocks again."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from random_blocks import blocks_of

from firsttoken_compiler.formats.planes import Planes, join, split
from firsttoken_compiler.formats.types import BLOCK_TYPES, BlockType


def floats(planes: Planes, kind: BlockType) -> np.ndarray:
    """The formula of `formats.types`, in the order of ggml: `[n, k]`."""
    wide = {name: values.astype(np.float32) for name, values in planes.items()}

    def joined(low: str, high: str) -> np.ndarray:
        plane = kind.plane(low)
        return wide[low] + (wide[high] * 2**plane.bits if high in wide else 0)

    def spread(values: np.ndarray, per: int) -> np.ndarray:
        return np.repeat(values, per, axis=0)

    q = joined("low", "high")
    q = np.float32(kind.codebook)[q.astype(int)] if kind.codebook else q - np.float32(kind.zero)
    per = kind.plane("d").per
    scale = wide["d"]
    if "scale" in wide or "scale_low" in wide:
        small = joined("scale" if "scale" in wide else "scale_low", "scale_high") - np.float32(kind.scale_zero)
        scale, per = spread(scale, kind.block // kind.group) * small, kind.group
    made = spread(scale, per) * q
    if "m" in wide:
        made = made + spread(wide["m"], kind.group)
    if "dmin" in wide:
        minima = spread(wide["dmin"], kind.block // kind.group) * joined("min_low", "min_high")
        made = made - spread(minima, kind.group)
    return made.T


@pytest.mark.parametrize("name", BLOCK_TYPES)
@settings(deadline=None)  # the first example compiles
@given(rows=st.integers(1, 5), per_row=st.integers(1, 3), seed=st.integers(0, 2**32))
def test_planes_of_random_blocks(name: str, rows: int, per_row: int, seed: int) -> None:
    kind = BLOCK_TYPES[name]
    blocks = blocks_of(kind, rows, per_row, seed)
    planes = split(blocks, kind)
    k = per_row * kind.block
    for plane in kind.planes:
        values = planes[plane.name]
        assert values.shape == (k // plane.per, rows)
        assert plane.bits >= 8 or int(values.max()) < 1 << plane.bits
    expected = dequantize(blocks, GGMLQuantizationType(kind.ggml))
    np.testing.assert_array_equal(floats(planes, kind), expected)
    np.testing.assert_array_equal(join(planes, kind), blocks)
