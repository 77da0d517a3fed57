"""Blocks of GGUF as floats, bit for bit those of ggml."""

from __future__ import annotations

from typing import Final

import numpy as np
from numba import njit

from firsttoken_compiler.errors import StudentError
from firsttoken_compiler.formats import fields
from firsttoken_compiler.formats.types import BlockType

STEP: Final = 1 << 18
"""Weights that are converted at a time, so that what lies between stays in a core's cache."""


def dequantise(blocks: np.ndarray, kind: BlockType) -> np.ndarray:
    """float32 `[n, k]` of rows of blocks, uint8 `[n, bytes of a row]`; raises StudentError for a row cut short."""
    rows, nbytes = blocks.shape
    if blocks.dtype != np.uint8 or nbytes % kind.nbytes:
        raise StudentError(
            f"rows of {nbytes} x {blocks.dtype} are no blocks of {kind.name}, which have {kind.nbytes} bytes each: "
            "convert the weights again"
        )
    data = np.ascontiguousarray(blocks).reshape(-1, kind.nbytes)
    made = np.empty((len(data), kind.block), np.float32)
    step = STEP // kind.block
    for first in range(0, len(data), step):
        part = slice(first, first + step)
        _floats(data[part], kind, made[part])
    return made.reshape(rows, nbytes // kind.nbytes * kind.block)


def _floats(data: np.ndarray, kind: BlockType, made: np.ndarray) -> None:
    """The formula of `formats.types`, in ggml's order of operations."""
    found = fields.read(data, kind)
    scale = found.d.astype(np.float32)[:, None]
    if found.scale is not None:
        scale = scale * (found.scale.astype(np.float32) - np.float32(kind.scale_zero))
    minimum = np.zeros_like(scale)
    if found.m is not None:
        m = found.m.astype(np.float32)[:, None]
        minimum = -m if found.minimum is None else m * found.minimum.astype(np.float32)
    q = np.array(kind.codebook, np.int8)[found.q] if kind.codebook else found.q
    grouped = (len(data), scale.shape[1], -1)
    _scaled(q.reshape(grouped), np.float32(kind.zero), scale, minimum, made.reshape(grouped))


@njit(cache=True)
def _scaled(q: np.ndarray, zero: np.float32, scale: np.ndarray, minimum: np.ndarray, made: np.ndarray) -> None:
    blocks, groups, width = q.shape
    for block in range(blocks):
        for group in range(groups):
            a, b = scale[block, group], minimum[block, group]
            for i in range(width):
                made[block, group, i] = a * (np.float32(q[block, group, i]) - zero) - b
