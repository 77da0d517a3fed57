"""Blocks of GGUF taken apart into numbers and put together again: the layouts of bits, in one place.

Sources: ggml-common.h (layouts) and the loops of ggml-quants.c.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numba import njit

from firsttoken_compiler.formats.types import BlockType


@dataclass(slots=True)
class Fields:
    """Numbers of blocks, a block to a row."""

    q: np.ndarray
    """Codes, `[blocks, weights of a block]`: uint8, as they are stored; int8 where a code takes eight bits."""
    d: np.ndarray
    """float16 `[blocks]`."""
    m: np.ndarray | None = None
    """Second half-precision number, `dmin` or `m`: float16 `[blocks]`."""
    scale: np.ndarray | None = None
    """Small scales `[blocks, groups of a block]`: uint8 of 6 bits as they are stored, or int8."""
    minimum: np.ndarray | None = None
    """Small minima of 6 bits, like the scales."""


@dataclass(frozen=True, slots=True)
class _Bits:
    """Numbers of some bits: of every `unit` bytes first the lowest bits of each, then the next higher ones, ..."""

    at: int
    """First byte in a block."""
    bits: int
    unit: int


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where a type keeps what: first bytes of halves, and of scales that are whole bytes or `_six_bits`."""

    d: int
    low: _Bits
    high: _Bits | None = None
    m: int | None = None
    scale: int | None = None
    small: tuple[_Bits, _Bits] | None = None
    """Low and high bits of small scales, where these are `_Bits`."""


_SIX_BITS: Final = 4
"""First byte of the twelve that hold eight scales and minima of 6 bits."""
_LAYOUTS: Final = {
    "q4_0": _Layout(0, _Bits(2, 4, 16)),
    "q4_1": _Layout(0, _Bits(4, 4, 16), m=2),
    "q5_0": _Layout(0, _Bits(6, 4, 16), _Bits(2, 1, 1)),
    "q5_1": _Layout(0, _Bits(8, 4, 16), _Bits(4, 1, 1), m=2),
    "q8_0": _Layout(0, _Bits(2, 8, 32)),
    "q3_k": _Layout(108, _Bits(32, 2, 32), _Bits(0, 1, 32), small=(_Bits(96, 4, 8), _Bits(104, 2, 4))),
    "q4_k": _Layout(0, _Bits(16, 4, 32), m=2, scale=_SIX_BITS),
    "q5_k": _Layout(0, _Bits(48, 4, 32), _Bits(16, 1, 32), m=2, scale=_SIX_BITS),
    "q6_k": _Layout(208, _Bits(0, 4, 64), _Bits(128, 2, 32), scale=192),
    "iq4_nl": _Layout(0, _Bits(2, 4, 16)),
}


def read(data: np.ndarray, kind: BlockType) -> Fields:
    """The numbers of blocks, uint8 `[blocks, bytes of a block]`."""
    layout = _LAYOUTS[kind.name]
    q = _numbers(data, kind.block, layout.low, layout.high)
    made = Fields(q.view(np.int8) if layout.low.bits == 8 else q, _half(data, layout.d))
    if layout.m is not None:
        made.m = _half(data, layout.m)
    groups = kind.block // kind.group
    if layout.small is not None:
        made.scale = _numbers(data, groups, *layout.small)
    elif kind.plane("scale_low") is not None:
        made.scale, made.minimum = _six_bits(data[:, _SIX_BITS : _SIX_BITS + 12])
    elif layout.scale is not None:
        made.scale = data[:, layout.scale : layout.scale + groups].view(np.int8)
    return made


def write(fields: Fields, kind: BlockType) -> np.ndarray:
    """Inverse of `read`."""
    layout = _LAYOUTS[kind.name]
    data = np.zeros((len(fields.q), kind.nbytes), np.uint8)
    _put_numbers(data, fields.q.view(np.uint8), layout.low, layout.high)
    for at, values in ((layout.d, fields.d), (layout.m, fields.m)):
        if at is not None and values is not None:
            data[:, at : at + 2] = np.ascontiguousarray(values).view(np.uint8).reshape(-1, 2)
    if fields.scale is None:
        return data
    if layout.small is not None:
        _put_numbers(data, fields.scale, *layout.small)
    elif fields.minimum is not None:
        data[:, _SIX_BITS : _SIX_BITS + 12] = _as_six_bits(fields.scale, fields.minimum)
    elif layout.scale is not None:
        data[:, layout.scale : layout.scale + fields.scale.shape[1]] = fields.scale.view(np.uint8)
    return data


def _half(data: np.ndarray, at: int) -> np.ndarray:
    return np.ascontiguousarray(data[:, at : at + 2]).view(np.float16).reshape(-1)


def _numbers(data: np.ndarray, count: int, low: _Bits, high: _Bits | None) -> np.ndarray:
    made = np.empty((len(data), count), np.uint8)
    _take(*_lined_up(data, made, low), low.bits, 0)
    if high is not None and high.unit == 1:
        made |= np.unpackbits(data[:, high.at : high.at + count // 8], axis=1, bitorder="little") << np.uint8(low.bits)
    elif high is not None:
        _take(*_lined_up(data, made, high), high.bits, low.bits)
    return made


def _put_numbers(data: np.ndarray, numbers: np.ndarray, low: _Bits, high: _Bits | None) -> None:
    numbers = np.ascontiguousarray(numbers)
    _put(*_lined_up(data, numbers, low), low.bits, 0)
    if high is not None and high.unit == 1:
        bits = np.packbits(numbers >> np.uint8(low.bits), axis=1, bitorder="little")
        data[:, high.at : high.at + bits.shape[1]] = bits
    elif high is not None:
        _put(*_lined_up(data, numbers, high), high.bits, low.bits)


def _lined_up(data: np.ndarray, numbers: np.ndarray, bits: _Bits) -> tuple[np.ndarray, np.ndarray]:
    """Views: bytes `[blocks, runs, unit]`, and the numbers in them `[blocks, runs, numbers of a byte, unit]`."""
    blocks, count = numbers.shape
    each = 8 // bits.bits
    nbytes = count // each
    source = data[:, bits.at : bits.at + nbytes].reshape(blocks, nbytes // bits.unit, bits.unit)
    return source, numbers.reshape(blocks, nbytes // bits.unit, each, bits.unit)


@njit(cache=True)
def _take(source: np.ndarray, made: np.ndarray, bits: int, shift: int) -> None:
    """Some bits of all numbers: the lowest with `shift` 0, which go first, or those from bit `shift` on."""
    blocks, runs, each, unit = made.shape
    mask, left = np.uint8((1 << bits) - 1), np.uint8(shift)
    for block in range(blocks):
        for run in range(runs):
            for part in range(each):
                right = np.uint8(part * bits)
                if shift == 0:
                    for i in range(unit):
                        made[block, run, part, i] = source[block, run, i] >> right & mask
                else:
                    for i in range(unit):
                        made[block, run, part, i] |= (source[block, run, i] >> right & mask) << left


@njit(cache=True)
def _put(out: np.ndarray, numbers: np.ndarray, bits: int, shift: int) -> None:
    """Inverse of `_take`; the bytes are zero before."""
    blocks, runs, each, unit = numbers.shape
    mask, right = np.uint8((1 << bits) - 1), np.uint8(shift)
    for block in range(blocks):
        for run in range(runs):
            for part in range(each):
                left = np.uint8(part * bits)
                for i in range(unit):
                    out[block, run, i] |= (numbers[block, run, part, i] >> right & mask) << left


def _six_bits(s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """12 bytes to eight scales and eight minima."""
    first, second, third = s[:, :4], s[:, 4:8], s[:, 8:]
    scale = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=1)
    return scale, np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=1)


def _as_six_bits(scale: np.ndarray, minimum: np.ndarray) -> np.ndarray:
    """Inverse of `_six_bits`."""
    first, second = (values[:, :4] | values[:, 4:] >> 4 << 6 for values in (scale, minimum))
    return np.concatenate([first, second, scale[:, 4:] & 15 | (minimum[:, 4:] & 15) << 4], axis=1)
