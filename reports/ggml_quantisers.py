"""ggml's own quantisers, out of a wheel that carries them built: what ours are held against.

The package gguf has none for K-quants. The wheel's Python code is not imported.
"""

from __future__ import annotations

import ctypes
import functools
from importlib import metadata
from pathlib import Path
from typing import Final

import numpy as np

from firsttoken_compiler.formats.types import BlockType

DISTRIBUTION: Final = "ctransformers"
TYPES: Final = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q3_k", "q4_k", "q5_k", "q6_k")


class _Memory(ctypes.Structure):
    _fields_ = (("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


@functools.cache
def library() -> tuple[ctypes.CDLL, str] | None:
    """The library and what to call it, or None where the wheel is not installed."""
    try:
        distribution = metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return None
    build = "avx2" if "avx2" in Path("/proc/cpuinfo").read_text(encoding="utf-8") else "basic"
    path = next(
        Path(str(entry.locate()))
        for entry in distribution.files or ()
        if entry.match(f"lib/{build}/libctransformers.so")
    )
    found = ctypes.CDLL(str(path))
    found.ggml_init.restype, found.ggml_init.argtypes = ctypes.c_void_p, [_Memory]
    found.ggml_init(_Memory(1 << 20, None, False))  # fills the tables that conversions of halves read
    pointer, number = ctypes.c_void_p, ctypes.c_int
    found.ggml_quantize_chunk.argtypes = [number, pointer, pointer, number, number, pointer]
    return found, f"that of {DISTRIBUTION} {distribution.version} ({build} build)"


def quantise(rows: np.ndarray, kind: BlockType) -> np.ndarray:
    """Blocks of float32 `[n, k]`; the library is there, and the type one of `TYPES`."""
    found = library()
    assert found is not None
    assert kind.name in TYPES
    x = np.ascontiguousarray(rows, np.float32)
    made, counts = np.zeros((len(x), kind.row_bytes(x.shape[1])), np.uint8), np.zeros(16, np.int64)
    found[0].ggml_quantize_chunk(kind.ggml, x.ctypes.data, made.ctypes.data, 0, x.size, counts.ctypes.data)
    return made
