"""Blocks of GGUF as planes, and back: one array `[k / per, n]` for each plane of a type, an element to a byte."""

from typing import Final

import numpy as np

from firsttoken_compiler.formats import fields
from firsttoken_compiler.formats.fields import Fields
from firsttoken_compiler.formats.types import BlockType

Planes = dict[str, np.ndarray]

_PAIRS: Final = (("low", "high", "q"), ("scale_low", "scale_high", "scale"), ("min_low", "min_high", "minimum"))
"""Planes of the low and of the high bits of a field."""
_WHOLE: Final = (("scale", "scale"), ("d", "d"), ("dmin", "m"), ("m", "m"))
"""Planes that are a field."""


def split(blocks: np.ndarray, kind: BlockType) -> Planes:
    """The planes of a matrix by their names, `[k / per, n]`, out of its rows of blocks, uint8 `[n, bytes of a row]`."""
    rows = len(blocks)
    found = fields.read(blocks.reshape(-1, kind.nbytes), kind)
    parts = {}
    for low, high, name in _PAIRS:
        plane, values = kind.plane(low), getattr(found, name)
        if plane is not None and kind.plane(high) is not None:
            parts[low], parts[high] = values & np.uint8((1 << plane.bits) - 1), values >> np.uint8(plane.bits)
        elif plane is not None:
            parts[low] = values
    parts.update({plane: getattr(found, name) for plane, name in _WHOLE if kind.plane(plane) is not None})
    return {plane.name: np.ascontiguousarray(parts[plane.name].reshape(rows, -1).T) for plane in kind.planes}


def join(planes: Planes, kind: BlockType) -> np.ndarray:
    """Inverse of `split`: rows of blocks out of all planes of a type."""
    rows = planes["d"].shape[1]
    per = {plane.name: kind.block // plane.per for plane in kind.planes}
    parts = {name: np.ascontiguousarray(planes[name].T).reshape(-1, count) for name, count in per.items()}
    found = Fields(parts["low"], parts["d"].reshape(-1))
    for low, high, name in _PAIRS:
        plane = kind.plane(low)
        if plane is not None:
            values = parts[low] | parts[high] << np.uint8(plane.bits) if high in parts else parts[low]
            setattr(found, name, values)
    if "scale" in parts:
        found.scale = parts["scale"]
    for name in ("m", "dmin"):
        if name in parts:
            found.m = parts[name].reshape(-1)
    return fields.write(found, kind).reshape(rows, -1)
