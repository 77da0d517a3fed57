"""Rows of int8 caches in numpy: the same numbers, bit for bit, that a program computes when it appends keys and values.

A row is one token of one head. Its scale is fp16(max(max(|x|) / 127, 2^-14)), the smallest being fp16's smallest normal
number; its integers are round-half-even(x * (1 / scale)), all in fp32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

SCALES: Final = ".scales"
"""Follows the name of a cache in the name of its scales."""
_SMALLEST: Final = np.float32(2.0**-14)
_STEP: Final = np.float32(1.0 / 127.0)


def quantise_rows(rows: NDArray[Any]) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """(integers, scales [..., 1]) of rows [..., width], rounded to fp16 first, as the machine reads them."""
    with np.errstate(all="ignore"):  # inf and nan are values here, as on the machine
        wide = np.asarray(rows).astype(np.float16).astype(np.float32)
        peak = np.abs(wide).max(axis=-1, keepdims=True)
        scales = np.maximum(peak * _STEP, _SMALLEST).astype(np.float16)
        values = np.rint(wide * (np.float32(1.0) / scales.astype(np.float32)))
        integers = np.clip(np.nan_to_num(values), -128, 127).astype(np.int8)
    return integers, scales


def dequantise_rows(integers: NDArray[Any], scales: NDArray[Any]) -> NDArray[np.float32]:
    """The fp32 rows that integers [..., width] and scales [..., 1] stand for."""
    return integers.astype(np.float32) * scales.astype(np.float32)
