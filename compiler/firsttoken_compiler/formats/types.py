"""Block types of GGUF: how many weights share what, in how many bits, and the formula that makes floats of them.

A matrix of n rows of k weights (GGUF's order) lies in blocks along k. Every type has one formula,

    w = d * (scale - scale_zero) * (code(q) - zero)  -  minimum,

where scale is 1 in types without one, and minimum is dmin * min, or -m, or 0. q and the 6-bit scales are sums of two
planes, low + 2^bits(low) * high. Sources: ggml-common.h (layouts) and ggml-quants.c (formulas) of llama.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

PLANE_BITS: Final = {"uint1": 1, "uint2": 2, "uint4": 4, "int8": 8, "float16": 16}


@dataclass(frozen=True, slots=True)
class Plane:
    """One array of a block-quantised matrix, `[k / per, n]`: an element for each `per` weights along k.

    Names: `low`, `high` (q), `scale`, `scale_low`, `scale_high`, `min_low`, `min_high`, `d`, `dmin` (times min), `m`
    (added as it is).
    """

    name: str
    dtype: str
    """A key of `PLANE_BITS`; elements of less than a byte are packed along n, the first one lowest."""
    per: int

    @property
    def bits(self) -> int:
        """Bits of an element."""
        return PLANE_BITS[self.dtype]


@dataclass(frozen=True, slots=True)
class BlockType:
    """A type of blocks."""

    name: str
    ggml: int
    """Number of the type in GGUF files."""
    block: int
    """Weights of a block, along k."""
    nbytes: int
    """Bytes of a block."""
    group: int
    """Weights that share a scale."""
    planes: tuple[Plane, ...]
    zero: int = 0
    """Subtracted from q."""
    scale_zero: int = 0
    """Subtracted from the 6-bit scale."""
    codebook: tuple[int, ...] = ()
    """What q stands for; empty: itself."""

    @property
    def bits(self) -> int:
        """Bits of q."""
        return sum(plane.bits for plane in self.planes if plane.name in ("low", "high"))

    @property
    def has_minimum(self) -> bool:
        """Whether something is subtracted from, or added to, the scaled weights."""
        return any(plane.name in ("dmin", "m") for plane in self.planes)

    def plane(self, name: str) -> Plane | None:
        """The plane of that name, if the type has one."""
        return next((plane for plane in self.planes if plane.name == name), None)

    def row_bytes(self, k: int) -> int:
        """Bytes of a row of k weights; k is a multiple of `block`."""
        return k // self.block * self.nbytes


_LOW, _D = Plane("low", "uint4", 1), Plane("d", "float16", 256)
_SIX_BIT = (Plane("scale_low", "uint4", 32), Plane("scale_high", "uint2", 32))
_SIX_BIT_MIN = (Plane("min_low", "uint4", 32), Plane("min_high", "uint2", 32))
_D32 = Plane("d", "float16", 32)
_IQ4_NL: Final = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

BLOCK_TYPES: Final = {
    made.name: made
    for made in (
        BlockType("q4_0", 2, 32, 18, 32, (_LOW, _D32), zero=8),
        BlockType("q4_1", 3, 32, 20, 32, (_LOW, _D32, Plane("m", "float16", 32))),
        BlockType("q5_0", 6, 32, 22, 32, (_LOW, Plane("high", "uint1", 1), _D32), zero=16),
        BlockType("q5_1", 7, 32, 24, 32, (_LOW, Plane("high", "uint1", 1), _D32, Plane("m", "float16", 32))),
        BlockType("q8_0", 8, 32, 34, 32, (Plane("low", "int8", 1), _D32)),
        BlockType(
            "q3_k", 11, 256, 110, 16,
            (
                Plane("low", "uint2", 1), Plane("high", "uint1", 1), Plane("scale_low", "uint4", 16),
                Plane("scale_high", "uint2", 16), _D,
            ),
            zero=4, scale_zero=32,
        ),
        BlockType(
            "q4_k", 12, 256, 144, 32, (_LOW, *_SIX_BIT, *_SIX_BIT_MIN, _D, Plane("dmin", "float16", 256)),
        ),
        BlockType(
            "q5_k", 13, 256, 176, 32,
            (_LOW, Plane("high", "uint1", 1), *_SIX_BIT, *_SIX_BIT_MIN, _D, Plane("dmin", "float16", 256)),
        ),
        BlockType(
            "q6_k", 14, 256, 210, 16, (_LOW, Plane("high", "uint2", 1), Plane("scale", "int8", 16), _D), zero=32,
        ),
        BlockType("iq4_nl", 20, 32, 18, 32, (_LOW, _D32), codebook=_IQ4_NL),
    )
}  # fmt: skip
