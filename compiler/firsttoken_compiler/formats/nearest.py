"""Codes of the types without small scales: the nearest ones on the grid that a block's largest weights span.

The operations and their order are those of ggml's reference quantisers (ggml-quants.c), so that the bits are theirs.
"""

import numpy as np
from numba import njit

_HALF, _ONE, _ZERO = np.float32(0.5), np.float32(1), np.float32(0)


@njit(cache=True, error_model="numpy")
def signed(x: np.ndarray, zero: int, q: np.ndarray, d: np.ndarray) -> None:
    """Q4_0 and Q5_0: the weight of largest magnitude becomes code 0, that is -zero.

    Args:
        x: float32 `[blocks, weights]`.
        zero: the code of weight 0, half the number of codes.
        q: uint8 of the shape of x; written.
        d: float32 `[blocks]`, the scale before it is rounded; written.
    """
    top = 2 * zero - 1
    for block in range(len(x)):
        row = x[block]
        largest, extreme = _ZERO, _ZERO
        for value in row:
            if abs(value) > largest:
                largest, extreme = abs(value), value
        scale = extreme / np.float32(-zero)
        inverse = _inverse(scale)
        d[block] = scale
        for i in range(row.size):
            q[block, i] = min(np.int32(row[i] * inverse + (np.float32(zero) + _HALF)), top)


@njit(cache=True, error_model="numpy")
def spanned(x: np.ndarray, top: int, q: np.ndarray, d: np.ndarray, m: np.ndarray) -> None:
    """Q4_1 and Q5_1: the least weight becomes code 0, the largest `top`; `m` is the least one."""
    for block in range(len(x)):
        row = x[block]
        low = high = row[0]
        for value in row:
            low, high = min(low, value), max(high, value)
        scale = (high - low) / np.float32(top)
        inverse = _inverse(scale)
        d[block], m[block] = scale, low
        for i in range(row.size):
            q[block, i] = min(np.int32((row[i] - low) * inverse + _HALF), top)


@njit(cache=True, error_model="numpy")
def bytes_of(x: np.ndarray, q: np.ndarray, d: np.ndarray) -> None:
    """Q8_0: codes of -127 to 127, halves rounded away from zero."""
    for block in range(len(x)):
        row = x[block]
        largest = _ZERO
        for value in row:
            largest = max(largest, abs(value))
        scale = largest / np.float32(127)
        inverse = _inverse(scale)
        d[block] = scale
        for i in range(row.size):
            scaled = row[i] * inverse
            whole = np.floor(abs(scaled))
            rounded = np.int32(whole + np.floor(np.float32(2) * (abs(scaled) - whole)))
            q[block, i] = -rounded if scaled < 0 else rounded


@njit(cache=True, error_model="numpy")
def _inverse(scale: np.float32) -> np.float32:
    """1 / scale; 0 for 0, and for scales too small to have an inverse, which are 0 in half precision."""
    inverse = _ONE / scale if scale != 0 else _ZERO
    return inverse if abs(inverse) < np.float32(np.inf) else _ZERO
