"""Floats as blocks of GGUF: ggml's own codes where its quantiser leaves no choice, least squares where it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from firsttoken_compiler.errors import StudentError
from firsttoken_compiler.formats import fields, nearest, search
from firsttoken_compiler.formats.fields import Fields
from firsttoken_compiler.formats.types import BlockType

TRIES: Final = 9
"""Grids that are tried on each side of the one that the largest weights span."""
STEP: Final = 1 << 20
"""Weights that are quantised at a time; what lies between takes about 4 bytes for each."""


def quantise(rows: np.ndarray, kind: BlockType, tries: int = TRIES) -> np.ndarray:
    """Blocks, uint8 `[n, bytes of a row]`, of weights float32 `[n, k]`.

    Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 have the bits of ggml's reference quantisers. K-quants and IQ4_NL are searched; with
    0 `tries` they too are rounded to the nearest codes on the grids of the largest weights. Raises StudentError for
    values that are not finite, or beyond the half-precision scales of blocks, and rows that blocks do not fit.
    """
    n, k = rows.shape
    if k % kind.block:
        raise StudentError(f"rows of {k} weights are no multiple of the {kind.block} of a block of {kind.name}")
    made = np.empty((n * k // kind.block, kind.nbytes), np.uint8)
    step, done = max(1, STEP // max(1, k)), 0
    for first in range(0, n if k else 0, step):
        x = np.ascontiguousarray(rows[first : first + step], np.float32)
        if not np.isfinite(x).all():
            raise StudentError("weights are not finite: repair the student's weights")
        found = _QUANTISERS[kind.name](x.reshape(-1, kind.block), kind, tries)
        made[done : done + len(found.q)] = fields.write(found, kind)
        done += len(found.q)
    return made.reshape(n, kind.row_bytes(k))


def _half(values: np.ndarray, x: np.ndarray) -> np.ndarray:
    """float16 of scales or minima; raises StudentError beyond its range."""
    with np.errstate(over="ignore"):
        made = values.astype(np.float16)
    if not np.isfinite(made).all():
        raise StudentError(
            f"weights up to {np.abs(x).max():g} need a scale or minimum of {np.abs(values).max():g}, half precision "
            "ends at 65504: store them as f32, or scale them down"
        )
    return made


def _nearest_half(values: np.ndarray) -> np.ndarray:
    """float16 of what may lie just beyond its range."""
    return np.clip(values, -65504, 65504).astype(np.float16)


def _signed(x: np.ndarray, kind: BlockType, _tries: int) -> Fields:
    q, d = np.empty(x.shape, np.uint8), np.empty(len(x), np.float32)
    nearest.signed(x, kind.zero, q, d)
    return Fields(q, _half(d, x))


def _spanned(x: np.ndarray, kind: BlockType, _tries: int) -> Fields:
    q, d, m = np.empty(x.shape, np.uint8), np.empty(len(x), np.float32), np.empty(len(x), np.float32)
    nearest.spanned(x, (1 << kind.bits) - 1, q, d, m)
    return Fields(q, _half(d, x), _half(m, x))


def _bytes(x: np.ndarray, _kind: BlockType, _tries: int) -> Fields:
    q, d = np.empty(x.shape, np.int8), np.empty(len(x), np.float32)
    nearest.bytes_of(x, q, d)
    return Fields(q, _half(d, x))


def _with_minimum(x: np.ndarray, kind: BlockType, tries: int) -> Fields:
    """Q4_K and Q5_K."""
    top, each = (1 << kind.bits) - 1, kind.block // kind.group
    groups = x.reshape(-1, kind.group)
    scale, minimum = np.empty((2, len(groups)), np.float32)
    search.with_minimum(groups, top, tries, scale, minimum)
    d, dmin = (_half(values.reshape(-1, each).max(axis=1) / np.float32(63), x) for values in (scale, minimum))
    spread, spread_min = (np.repeat(values.astype(np.float32), each) for values in (d, dmin))
    search.small_with_minimum(groups, top, min(1, tries), spread, spread_min, scale, minimum)
    small, least = scale.reshape(-1, each), minimum.reshape(-1, each)

    def coded(d: np.ndarray, dmin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        a, b = ((values.astype(np.float32)[:, None] * whole) for values, whole in ((d, small), (dmin, least)))
        return _coded(x, kind, a, b)

    q, sums = coded(d, dmin)
    if tries > 0:
        fitted = [_nearest_half(values) for values in _best_pair(sums, small, least)]
        refit, again = coded(*fitted)
        better = again[5].sum(axis=1) < sums[5].sum(axis=1)
        for mine, other in ((q, refit), (d, fitted[0]), (dmin, fitted[1])):
            mine[better] = other[better]
    return Fields(q, d, dmin, small.astype(np.uint8), least.astype(np.uint8))


def _coded(x: np.ndarray, kind: BlockType, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest codes like x, and the sums of `search.codes`, `[6, blocks, groups of a block]`."""
    q, sums = np.empty((a.size, kind.group), np.uint8), np.empty((6, a.size))
    search.codes(x.reshape(-1, kind.group), kind.zero, (1 << kind.bits) - 1, a.reshape(-1), b.reshape(-1), q, sums)
    return q.reshape(x.shape), sums.reshape(6, *a.shape)


def _best_pair(sums: np.ndarray, small: np.ndarray, least: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least squares of d and dmin for given codes, small scales and minima; 0 where there is none."""
    one, q, qq, xq, x, _ = sums
    s, m = small.astype(np.float64), least.astype(np.float64)
    ss, sm, mm = ((values).sum(axis=1) for values in (s * s * qq, -s * m * q, m * m * one))
    xs, xm = (s * xq).sum(axis=1), -(m * x).sum(axis=1)
    det = ss * mm - sm * sm
    alone = det <= 1e-6 * ss * mm
    det[alone] = 1
    d = np.where(alone, xs / np.where(ss > 0, ss, 1), (xs * mm - xm * sm) / det)
    dmin = np.where(alone, 0, (xm * ss - xs * sm) / det)
    return d, dmin


def _with_sign(x: np.ndarray, kind: BlockType, tries: int) -> Fields:
    """Q3_K and Q6_K."""
    each, half = kind.block // kind.group, kind.scale_zero or 128
    groups = x.reshape(-1, kind.group)
    scale = np.empty(len(groups), np.float32)
    search.with_sign(groups, kind.zero, tries, scale)
    small = scale.reshape(-1, each)
    largest = np.take_along_axis(small, np.abs(small).argmax(axis=1, keepdims=True), axis=1)[:, 0]
    d = _half(largest / np.float32(-half), x)
    search.small_with_sign(groups, kind.zero, min(1, tries), half, np.repeat(d.astype(np.float32), each), scale)

    def coded(d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return _coded(x, kind, d.astype(np.float32)[:, None] * small, np.zeros_like(small))

    q, sums = coded(d)
    if tries > 0:
        total = (small.astype(np.float64) ** 2 * sums[2]).sum(axis=1)
        fitted = _nearest_half((small * sums[3]).sum(axis=1) / np.where(total > 0, total, 1))
        refit, again = coded(fitted)
        better = again[5].sum(axis=1) < sums[5].sum(axis=1)
        q[better], d[better] = refit[better], fitted[better]
    stored = small.astype(np.int8) if kind.scale_zero == 0 else (small + np.float32(kind.scale_zero)).astype(np.uint8)
    return Fields(q, d, scale=stored)


def _of_codebook(x: np.ndarray, kind: BlockType, tries: int) -> Fields:
    """IQ4_NL."""
    book, scale = np.array(kind.codebook, np.float32), np.empty(len(x), np.float32)
    search.of_codebook(x, book, -(-tries // 3), scale)
    d, q = _half(scale, x), np.empty(x.shape, np.uint8)
    search.codebook_codes(x, book, d.astype(np.float32), q)
    return Fields(q, d)


_QUANTISERS: Final[dict[str, Callable[[np.ndarray, BlockType, int], Fields]]] = {
    "q4_0": _signed, "q4_1": _spanned, "q5_0": _signed, "q5_1": _spanned, "q8_0": _bytes, "q3_k": _with_sign,
    "q4_k": _with_minimum, "q5_k": _with_minimum, "q6_k": _with_sign, "iq4_nl": _of_codebook,
}  # fmt: skip
