"""Blocks of GGUF taken apart into planes: one array `[k / per, n]` for each plane of a type, an element to a byte.

Sources: ggml-common.h (layouts) and the loops of ggml-quants.c.
"""

from collections.abc import Callable
from typing import Final

import numpy as np

from firsttoken_compiler.formats.types import BlockType

Planes = dict[str, np.ndarray]


def split(blocks: np.ndarray, kind: BlockType) -> Planes:
    """The planes of a matrix by their names, `[k / per, n]`, out of its rows of blocks, uint8 `[n, bytes of a row]`."""
    rows = len(blocks)
    fields = _SPLITS[kind.name](blocks.reshape(-1, kind.nbytes))
    return {name: np.ascontiguousarray(fields[name].reshape(rows, -1).T) for name in (p.name for p in kind.planes)}


def _half(data: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(data).view(np.float16)


def _nibbles(data: np.ndarray) -> np.ndarray:
    """Bytes `[blocks, b]`: all low halves, then all high ones."""
    return np.concatenate([data & 15, data >> 4], axis=1)


def _bits(data: np.ndarray) -> np.ndarray:
    """Bytes `[blocks, b]` to their bits, the lowest first."""
    return np.unpackbits(np.ascontiguousarray(data), axis=1, bitorder="little")


def _q4_0(b: np.ndarray) -> Planes:
    return {"d": _half(b[:, :2]), "low": _nibbles(b[:, 2:])}


def _q4_1(b: np.ndarray) -> Planes:
    return {"d": _half(b[:, :2]), "m": _half(b[:, 2:4]), "low": _nibbles(b[:, 4:])}


def _q5_0(b: np.ndarray) -> Planes:
    return {"d": _half(b[:, :2]), "high": _bits(b[:, 2:6]), "low": _nibbles(b[:, 6:])}


def _q5_1(b: np.ndarray) -> Planes:
    return {"d": _half(b[:, :2]), "m": _half(b[:, 2:4]), "high": _bits(b[:, 4:8]), "low": _nibbles(b[:, 8:])}


def _q8_0(b: np.ndarray) -> Planes:
    return {"d": _half(b[:, :2]), "low": b[:, 2:].view(np.int8)}


def _chunks(qs: np.ndarray) -> np.ndarray:
    """128 bytes: of every 32 the low halves, then the high ones."""
    parts = qs.reshape(len(qs), 4, 1, 32) >> np.array([0, 4], np.uint8).reshape(2, 1)
    return np.asarray((parts & 15).reshape(len(qs), 256))


def _six_bits(s: np.ndarray) -> Planes:
    """12 bytes of eight scales and minima of 6 bits."""
    first, second, third = s[:, :4], s[:, 4:8], s[:, 8:]
    return {
        "scale_low": np.concatenate([first & 15, third & 15], axis=1),
        "scale_high": np.concatenate([first >> 4 & 3, first >> 6], axis=1),
        "min_low": np.concatenate([second & 15, third >> 4], axis=1),
        "min_high": np.concatenate([second >> 4 & 3, second >> 6], axis=1),
    }


def _q4_k(b: np.ndarray) -> Planes:
    return {"d": _half(b[:, :2]), "dmin": _half(b[:, 2:4]), **_six_bits(b[:, 4:16]), "low": _chunks(b[:, 16:])}


def _q5_k(b: np.ndarray) -> Planes:
    high = b[:, 16:48].reshape(-1, 1, 32) >> np.arange(8, dtype=np.uint8).reshape(8, 1) & 1
    head = {"d": _half(b[:, :2]), "dmin": _half(b[:, 2:4]), **_six_bits(b[:, 4:16])}
    return {**head, "high": high.reshape(-1, 256), "low": _chunks(b[:, 48:])}


def _q6_k(b: np.ndarray) -> Planes:
    low = b[:, :128].reshape(-1, 2, 1, 64) >> np.array([0, 4], np.uint8).reshape(2, 1) & 15
    high = b[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8).reshape(4, 1) & 3
    scale, d = b[:, 192:208].view(np.int8), _half(b[:, 208:])
    return {"low": low.reshape(-1, 256), "high": high.reshape(-1, 256), "scale": scale, "d": d}


def _q3_k(b: np.ndarray) -> Planes:
    high = b[:, :32].reshape(-1, 1, 32) >> np.arange(8, dtype=np.uint8).reshape(8, 1) & 1
    low = b[:, 32:96].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8).reshape(4, 1) & 3
    scales = b[:, 104:108].reshape(-1, 1, 4) >> np.array([0, 2, 4, 6], np.uint8).reshape(4, 1) & 3
    return {
        "low": low.reshape(-1, 256), "high": high.reshape(-1, 256), "scale_low": _nibbles(b[:, 96:104]),
        "scale_high": scales.reshape(-1, 16), "d": _half(b[:, 108:]),
    }  # fmt: skip


_SPLITS: Final[dict[str, Callable[[np.ndarray], Planes]]] = {
    "q4_0": _q4_0, "q4_1": _q4_1, "q5_0": _q5_0, "q5_1": _q5_1, "q8_0": _q8_0, "q3_k": _q3_k, "q4_k": _q4_k,
    "q5_k": _q5_k, "q6_k": _q6_k, "iq4_nl": _q4_0,
}  # fmt: skip
