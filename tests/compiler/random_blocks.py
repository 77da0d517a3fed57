"""Random blocks of every type whose half-precision numbers are finite, and often odd."""

import numpy as np

from firsttoken_compiler.formats.types import BlockType

ODD = np.array([0, 0x8000, 1, 0x8001, 0x3FF, 0x400, 0x7BFF, 0xFBFF, 0x3C00, 0xBC01], np.uint16)
"""Zeros, the least and the largest subnormal, the least normal and the largest finite numbers, and numbers near one."""


def blocks_of(kind: BlockType, rows: int, per_row: int, seed: int) -> np.ndarray:
    """uint8 `[rows, bytes of a row]`."""
    chance = np.random.default_rng(seed)
    blocks = chance.integers(0, 256, (rows * per_row, kind.nbytes), np.uint8)
    for name in ("d", "dmin", "m"):
        if kind.plane(name) is not None:
            at = {"q6_k": 208, "q3_k": 108}.get(kind.name, 0) if name == "d" else 2
            values = chance.standard_normal(len(blocks)).astype(np.float16).view(np.uint16)
            values = np.where(chance.random(len(blocks)) < 0.3, chance.choice(ODD, len(blocks)), values)
            blocks[:, at : at + 2] = values.astype(np.uint16).view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, -1)
