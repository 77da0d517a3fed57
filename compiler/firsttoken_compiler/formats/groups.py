"""Loops over matrices whose rows share scales in groups: what `codegen.weights` quantises with.

Each is one pass over memory, and gives the bits of the numpy expression that its docstring states.
"""

import functools

import numpy as np
from numba import njit


def widened(halves: np.ndarray) -> np.ndarray:
    """`halves.astype(float32)` of float16 `[k, n]`, row-major, whatever the order of halves."""
    made = np.empty(halves.shape, np.float32)
    _look_up(halves.view(np.uint16), _floats(), made)
    return made


@functools.cache
def _floats() -> np.ndarray:
    """The float32 of each number that half precision has, by its bits."""
    return np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)


@njit(cache=True)
def _look_up(places: np.ndarray, table: np.ndarray, made: np.ndarray) -> None:
    for row in range(len(places)):
        source, out = places[row], made[row]
        for i in range(source.size):
            out[i] = table[source[i]]


def magnitudes(matrix: np.ndarray, group: int) -> np.ndarray:
    """`abs(rows of a group).max(axis=0)` for each group, float32 `[ceil(k / group), n]`; NaN where one is."""
    made = np.zeros((-(-len(matrix) // group), matrix.shape[1]), np.int32)
    _largest(matrix.view(np.int32), group, made)
    return made.view(np.float32)


@njit(cache=True)
def _largest(bits: np.ndarray, group: int, made: np.ndarray) -> None:
    """Magnitudes are ordered like their bits, and NaN is the largest of them."""
    for row in range(bits.shape[0]):
        source, out = bits[row], made[row // group]
        for i in range(source.size):
            out[i] = max(out[i], source[i] & np.int32(0x7FFF_FFFF))


def rounded(matrix: np.ndarray, scales: np.ndarray, group: int, qmax: int) -> np.ndarray:
    """`clip(rint(matrix / scales of its group), -qmax, qmax)`, int8 like matrix."""
    made = np.empty(matrix.shape, np.int8)
    _round(matrix, scales, group, np.float32(qmax), made)
    return made


@njit(cache=True, error_model="numpy")
def _round(matrix: np.ndarray, scales: np.ndarray, group: int, qmax: np.float32, made: np.ndarray) -> None:
    for row in range(matrix.shape[0]):
        source, scale, out = matrix[row], scales[row // group], made[row]
        for i in range(source.size):
            out[i] = np.int8(min(max(np.rint(source[i] / scale[i]), -qmax), qmax))
