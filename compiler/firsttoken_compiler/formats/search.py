"""Scales of the types that leave a choice, K-quants and IQ4_NL, by weighted least squares.

For each group, grids of several widths around the one that its largest weights span are tried; on each, the scale (and
minimum) that is best for the nearest codes is solved for, and the grid of least error is kept. Small scales are tried
together with their neighbours. An error counts by the root mean square of its group plus the magnitude of its weight.

Everything is float32 `[groups, weights of a group]`, or `[groups]`. Loops run over groups in lanes, so that they
vectorise without any freedom in the order of sums: the same bits on every machine.
"""

import numpy as np
from numba import njit

LANES = 64
STEP = np.float32(0.1)
"""Distance of the grids that are tried, in codes over the whole range."""
BOOK_STEP = np.float32(0.03)
"""The same for codebooks, as a share of the range."""
_HALF, _ZERO, _ONE, _TWO = np.float32(0.5), np.float32(0), np.float32(1), np.float32(2)


@njit(cache=True, error_model="numpy")
def _turned(x: np.ndarray, first: int, t: np.ndarray) -> int:
    """Some groups from `first` on into the lanes of t: `[0]` weights, `[1]` how much each error counts; how many."""
    count, width = min(LANES, len(x) - first), x.shape[1]
    t[:] = _ZERO
    for lane in range(count):
        total = _ZERO
        for i in range(width):
            value = x[first + lane, i]
            t[0, i, lane] = value
            total += value * value
        level = np.sqrt(total / np.float32(width))
        for i in range(width):
            t[1, i, lane] = level + abs(x[first + lane, i])
    return count


@njit(cache=True, error_model="numpy")
def with_minimum(x: np.ndarray, top: int, tries: int, scale: np.ndarray, minimum: np.ndarray) -> None:
    """Scales and minima, so that scale * q - minimum is near x; q is 0 to `top`, both are at least 0.

    Args:
        x: the weights.
        top: the largest code.
        tries: grids that are tried on each side; 0: the scale of the largest and least weights, as it is.
        scale: written.
        minimum: written.
    """
    t = np.empty((2, x.shape[1], LANES), np.float32)
    grid, sums = np.empty((3, LANES), np.float32), np.empty((6, LANES), np.float32)
    span, best = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    for first in range(0, len(x), LANES):
        count = _turned(x, first, t)
        for g in range(count):
            low = high = _ZERO
            for i in range(x.shape[1]):
                low, high = min(low, t[0, i, g]), max(high, t[0, i, g])
            grid[0, g], span[g], best[g] = low, high - low, np.float32(np.inf)
            scale[first + g], minimum[first + g] = span[g] / np.float32(top), -low
        for trial in range(-tries, tries + 1 if tries > 0 else -tries):
            codes = np.float32(top) + STEP * np.float32(trial)
            for g in range(LANES):
                grid[1, g] = span[g] / codes
                grid[2, g] = codes / span[g] if span[g] > 0 else _ZERO
            _sums_with_minimum(t, grid, np.float32(top), sums)
            for g in range(count):
                error, s, m = _solved(grid[0, g], grid[1, g], sums[:, g])
                if error < best[g]:
                    best[g], scale[first + g], minimum[first + g] = error, s, m


@njit(cache=True, error_model="numpy")
def _sums_with_minimum(t: np.ndarray, grid: np.ndarray, top: np.float32, sums: np.ndarray) -> None:
    """Weighted sums of 1, q, qq, u, uq, uu, where u is what a grid (low, unit, 1 / unit) leaves of the weights."""
    sums[:] = _ZERO
    for i in range(t.shape[1]):
        for g in range(LANES):
            above, w = t[0, i, g] - grid[0, g], t[1, i, g]
            q = min(max(np.floor(above * grid[2, g] + _HALF), _ZERO), top)
            u = above - grid[1, g] * q
            sums[0, g] += w
            sums[1, g] += w * q
            sums[2, g] += w * q * q
            sums[3, g] += w * u
            sums[4, g] += w * u * q
            sums[5, g] += w * u * u


@njit(cache=True, error_model="numpy")
def _solved(low: np.float32, unit: np.float32, sums: np.ndarray) -> tuple[np.float32, np.float32, np.float32]:
    """Least squares of u = more * q + up, where low + up is at most 0: error, scale and minimum."""
    one, q, qq, u, uq, uu = sums[0], sums[1], sums[2], sums[3], sums[4], sums[5]
    det = one * qq - q * q
    if det <= 0:
        return np.float32(np.inf), _ZERO, _ZERO
    more, up = (one * uq - q * u) / det, (qq * u - q * uq) / det
    if low + up > 0:
        up = -low
        more = (uq - up * q) / qq
    error = uu - _TWO * more * uq - _TWO * up * u + more * more * qq + _TWO * more * up * q + up * up * one
    return error if unit + more > 0 else np.float32(np.inf), unit + more, -(low + up)


@njit(cache=True, error_model="numpy")
def small_with_minimum(
    x: np.ndarray, top: int, reach: int, d: np.ndarray, dmin: np.ndarray, scale: np.ndarray, minimum: np.ndarray
) -> None:
    """Scales and minima in units of d and dmin, whole numbers of 0 to 63: the best ones within `reach` of the nearest.

    Args:
        x: the weights.
        top: the largest code.
        reach: how far from the nearest one is looked.
        d: as half precision has it.
        dmin: like d.
        scale: what is wanted; overwritten with whole numbers.
        minimum: like scale.
    """
    t = np.empty((2, x.shape[1], LANES), np.float32)
    grid, best = np.zeros((4, LANES), np.float32), np.empty((3, LANES), np.float32)
    for first in range(0, len(x), LANES):
        count = _turned(x, first, t)
        best[0] = np.float32(np.inf)
        for up in range(-reach, reach + 1):
            for aside in range(-reach, reach + 1):
                for g in range(count):
                    at = first + g
                    a = d[at] * _small(scale[at], d[at], up, 0, 63)
                    grid[0, g] = dmin[at] * -_small(minimum[at], dmin[at], aside, 0, 63)
                    grid[1, g], grid[2, g] = a, _ONE / a if a > 0 else _ZERO
                _errors(t, grid, _ZERO, np.float32(top))
                for g in range(count):
                    if grid[3, g] < best[0, g]:
                        best[0, g] = grid[3, g]
                        best[1, g] = _small(scale[first + g], d[first + g], up, 0, 63)
                        best[2, g] = _small(minimum[first + g], dmin[first + g], aside, 0, 63)
        for g in range(count):
            scale[first + g], minimum[first + g] = best[1, g], best[2, g]


@njit(cache=True, error_model="numpy")
def _small(wanted: np.float32, d: np.float32, off: int, low: int, high: int) -> np.float32:
    """A whole number of units of d near what is wanted, in its range."""
    nearest = np.floor(wanted / d + _HALF) if d != 0 else _ZERO
    return min(max(nearest + np.float32(off), np.float32(low)), np.float32(high))


@njit(cache=True, error_model="numpy")
def _errors(t: np.ndarray, grid: np.ndarray, bottom: np.float32, top: np.float32) -> None:
    """Weighted squared errors on a grid (low, unit, 1 / unit), into its fourth row."""
    grid[3] = _ZERO
    for i in range(t.shape[1]):
        for g in range(LANES):
            above = t[0, i, g] - grid[0, g]
            q = min(max(np.floor(above * grid[2, g] + _HALF), bottom), top)
            u = above - grid[1, g] * q
            grid[3, g] += t[1, i, g] * u * u


@njit(cache=True, error_model="numpy")
def with_sign(x: np.ndarray, half: int, tries: int, scale: np.ndarray) -> None:
    """Scales of either sign, so that scale * q is near x; q is -half to half - 1.

    Args:
        x: the weights.
        half: half the number of codes.
        tries: as for `with_minimum`; 0: the largest weight is -half.
        scale: written.
    """
    t = np.empty((2, x.shape[1], LANES), np.float32)
    grid, sums = np.zeros((3, LANES), np.float32), np.empty((3, LANES), np.float32)
    extreme, best = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    bottom, top = np.float32(-half), np.float32(half - 1)
    for first in range(0, len(x), LANES):
        count = _turned(x, first, t)
        _extremes(t, extreme)
        for g in range(count):
            best[g], scale[first + g] = np.float32(np.inf), extreme[g] / bottom
        for trial in range(-tries, tries + 1 if tries > 0 else -tries):
            codes = bottom - STEP * np.float32(trial)
            for g in range(LANES):
                grid[1, g] = extreme[g] / codes
                grid[2, g] = codes / extreme[g] if extreme[g] != 0 else _ZERO
            _sums_with_sign(t, grid, bottom, top, sums)
            _keep(sums, grid, best[:count], scale[first : first + count])


@njit(cache=True, error_model="numpy")
def _extremes(t: np.ndarray, extreme: np.ndarray) -> None:
    """The weight of largest magnitude of each lane."""
    for g in range(LANES):
        extreme[g] = _ZERO
        for i in range(t.shape[1]):
            extreme[g] = t[0, i, g] if abs(t[0, i, g]) > abs(extreme[g]) else extreme[g]


@njit(cache=True, error_model="numpy")
def _sums_with_sign(t: np.ndarray, grid: np.ndarray, bottom: np.float32, top: np.float32, sums: np.ndarray) -> None:
    """Weighted sums of qq, uq and uu, where u is what a grid (-, unit, 1 / unit) leaves of the weights."""
    sums[:] = _ZERO
    for i in range(t.shape[1]):
        for g in range(LANES):
            value, w = t[0, i, g], t[1, i, g]
            q = min(max(np.floor(value * grid[2, g] + _HALF), bottom), top)
            u = value - grid[1, g] * q
            sums[0, g] += w * q * q
            sums[1, g] += w * u * q
            sums[2, g] += w * u * u


@njit(cache=True, error_model="numpy")
def _keep(sums: np.ndarray, grid: np.ndarray, best: np.ndarray, scale: np.ndarray) -> None:
    """Least squares of u = more * q, kept where the error is the least so far."""
    for g in range(len(best)):
        more = sums[1, g] / sums[0, g] if sums[0, g] > 0 else _ZERO
        error = sums[2, g] - more * sums[1, g]
        if error < best[g]:
            best[g], scale[g] = error, grid[1, g] + more


@njit(cache=True, error_model="numpy")
def small_with_sign(x: np.ndarray, half: int, reach: int, small_half: int, d: np.ndarray, scale: np.ndarray) -> None:
    """Scales in units of d, whole numbers of -small_half to small_half - 1; else like `small_with_minimum`."""
    t = np.empty((2, x.shape[1], LANES), np.float32)
    grid, best = np.zeros((4, LANES), np.float32), np.empty((2, LANES), np.float32)
    for first in range(0, len(x), LANES):
        count = _turned(x, first, t)
        best[0] = np.float32(np.inf)
        for up in range(-reach, reach + 1):
            for g in range(count):
                a = d[first + g] * _small(scale[first + g], d[first + g], up, -small_half, small_half - 1)
                grid[1, g], grid[2, g] = a, _ONE / a if a != 0 else _ZERO
            _errors(t, grid, np.float32(-half), np.float32(half - 1))
            for g in range(count):
                if grid[3, g] < best[0, g]:
                    best[0, g] = grid[3, g]
                    best[1, g] = _small(scale[first + g], d[first + g], up, -small_half, small_half - 1)
        for g in range(count):
            scale[first + g] = best[1, g]


@njit(cache=True, error_model="numpy")
def codes(x: np.ndarray, zero: int, top: int, a: np.ndarray, b: np.ndarray, q: np.ndarray, sums: np.ndarray) -> None:
    """The nearest codes of a * (q - zero) - b, and the weighted sums that say how well they do.

    Args:
        x: the weights.
        zero: the code of 0, where b is.
        top: the largest code.
        a: the scales, of either sign.
        b: the minima.
        q: uint8 like x; written.
        sums: float64 `[6, groups]`: of 1, q, qq, xq, x and of the squared error, where q is less zero; written.
    """
    bottom, highest = np.float32(-zero), np.float32(top - zero)
    for group in range(len(x)):
        row, squares = x[group], _ZERO
        for value in row:
            squares += value * value
        level = np.sqrt(squares / np.float32(row.size))
        inverse = _ONE / a[group] if a[group] != 0 else _ZERO
        one = s = ss = xs = xx = error = 0.0
        for i in range(row.size):
            code = min(max(np.floor((row[i] + b[group]) * inverse + _HALF), bottom), highest)
            q[group, i] = np.uint8(code - bottom)
            w, left = level + abs(row[i]), row[i] + b[group] - a[group] * code
            one += w
            s += w * code
            ss += w * code * code
            xs += w * row[i] * code
            xx += w * row[i]
            error += w * left * left
        sums[0, group], sums[1, group], sums[2, group] = one, s, ss
        sums[3, group], sums[4, group], sums[5, group] = xs, xx, error


@njit(cache=True, error_model="numpy")
def of_codebook(x: np.ndarray, book: np.ndarray, tries: int, scale: np.ndarray) -> None:
    """Scales of either sign, so that scale * book[q] is near x.

    Args:
        x: the weights.
        book: 16 numbers, rising.
        tries: grids on each side of the two where the largest weight is the book's first, or last, number; 0: the
            first number, as it is.
        scale: written.
    """
    t = np.empty((2, x.shape[1], LANES), np.float32)
    grid, sums = np.zeros((3, LANES), np.float32), np.empty((3, LANES), np.float32)
    extreme, best = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    for first in range(0, len(x), LANES):
        count = _turned(x, first, t)
        _extremes(t, extreme)
        for g in range(count):
            best[g], scale[first + g] = np.float32(np.inf), extreme[g] / book[0]
        for trial in range(-tries, tries + 1 if tries > 0 else -tries):
            for end in (book[0], book[-1]):
                reach = end * (_ONE + BOOK_STEP * np.float32(trial))
                for g in range(LANES):
                    grid[1, g] = extreme[g] / reach
                    grid[2, g] = reach / extreme[g] if extreme[g] != 0 else _ZERO
                _sums_of_codebook(t, grid, book, sums)
                _keep(sums, grid, best[:count], scale[first : first + count])


@njit(cache=True, error_model="numpy")
def _sums_of_codebook(t: np.ndarray, grid: np.ndarray, book: np.ndarray, sums: np.ndarray) -> None:
    """Like `_sums_with_sign`, where q is the nearest number of the book."""
    sums[:] = _ZERO
    for i in range(t.shape[1]):
        for g in range(LANES):
            value, w = t[0, i, g], t[1, i, g]
            scaled, q = value * grid[2, g], book[0]
            for k in range(15):
                q += book[k + 1] - book[k] if scaled > (book[k] + book[k + 1]) * _HALF else _ZERO
            u = value - grid[1, g] * q
            sums[0, g] += w * q * q
            sums[1, g] += w * u * q
            sums[2, g] += w * u * u


@njit(cache=True, error_model="numpy")
def codebook_codes(x: np.ndarray, book: np.ndarray, d: np.ndarray, q: np.ndarray) -> None:
    """The places of the nearest numbers of the book: uint8 like x."""
    for group in range(len(x)):
        inverse = _ONE / d[group] if d[group] != 0 else _ZERO
        for i in range(x.shape[1]):
            place = 0
            for k in range(15):
                place += x[group, i] * inverse > (book[k] + book[k + 1]) * _HALF
            q[group, i] = place
