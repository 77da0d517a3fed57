"""Meaning of the operators on images in numpy; an image is a matrix `[height * width, channels]`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def taps(image: Array, a: Mapping[str, Any], outside: float) -> Array:
    """[pixels, taps, channels]: what each tap of the kernel meets, `outside` in the padding."""
    lines, width = len(image) // a["width"], a["width"]
    padded = np.full((1024, 1024, image.shape[1]), outside)
    padded[a["pad_y"] : a["pad_y"] + lines, a["pad_x"] : a["pad_x"] + width] = image.reshape(lines, width, -1)
    y, x = (np.arange(a[f"out_{axis}"]) * a[f"stride_{axis}"] for axis in "yx")
    met = [
        padded[np.ix_(y + ky * a["dilation_y"], x + kx * a["dilation_x"])]
        for ky in range(a["kernel_y"])
        for kx in range(a["kernel_x"])
    ]
    return np.stack([part.reshape(-1, image.shape[1]) for part in met], axis=1)


def windows(p: list[Array], a: Mapping[str, Any]) -> Array:
    """Rows of all that a kernel meets."""
    met = taps(p[0], a, 0.0)
    return met.reshape(len(met), -1).astype(a["out"])


def pool(p: list[Array], a: Mapping[str, Any]) -> Array:
    """The largest, or the scaled sum."""
    if a["mode"] == "max":
        return np.asarray(taps(p[0], a, -np.inf).max(axis=1).astype(a["out"]))
    if a["mode"] == "depthwise":
        return np.asarray(((taps(p[0], a, 0.0) * p[1][:-1]).sum(axis=1) + p[1][-1]).astype(a["out"]))
    factor = p[1] if len(p) > 1 else a["scale"]
    return np.asarray((taps(p[0], a, 0.0).sum(axis=1) * factor).astype(a["out"]))


def conv_weight(w: Array, a: Mapping[str, Any]) -> Array:
    """`[channels out, channels in, taps]`, in whatever matrix, as `[k, n]`."""
    return w.reshape(a["n"], -1, a["kernel"]).transpose(2, 1, 0).reshape(a["k"], a["n"])
