"""Which formats a program's weights are in, and which of the options took effect."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from firsttoken_compiler.isa.program import Tensor
from firsttoken_compiler.passes.lower import Launches
from firsttoken_compiler.passes.quantise import BESIDE, Kept

VECTORS: Final = "vectors"
"""Norms, biases, angles, and what the host reads: weights that are no matrices of products and no gathered tables."""


def format_rows(formats: dict[str, Kept], tensors: Iterable[Tensor]) -> list[dict[str, Any]]:
    """By format, most bytes first: how many matrices, their bytes, and whether that is how the graph stores them."""
    matrices: dict[tuple[str, bool], set[str]] = {}
    nbytes: dict[tuple[str, bool], int] = {}
    for tensor in tensors:
        if tensor.kind in ("weight", "constant"):
            kept = formats.get(tensor.name, Kept("", VECTORS))
            key = (kept.format, kept.stored)
            matrices.setdefault(key, set()).update(set(kept.matrix.split(BESIDE)) - {""})
            nbytes[key] = nbytes.get(key, 0) + tensor.nbytes
    ordered = sorted(nbytes, key=lambda key: (key[0] == VECTORS, -nbytes[key], key))
    return [
        {"format": key[0], "stored": key[1], "matrices": len(matrices[key]), "bytes": nbytes[key]} for key in ordered
    ]


def in_effect(rows: list[dict[str, Any]], launches: Launches) -> dict[str, str]:
    """What stands in reports for weights and activations that were asked for where no product has them."""
    own = [row for row in rows if row["matrices"] and not row["stored"] and row["format"] not in ("fp16", "fp32")]
    products = [launch.spec for launch in launches.launches if launch.spec.kind in ("linear", "conv")]
    if not products or own or not all(spec.get("stored") for spec in products):
        return {}
    names = dict.fromkeys(row["format"] for row in rows if row["stored"])
    return {"weights": ", ".join(names), "activations": ", ".join(sorted({str(spec["acts"]) for spec in products}))}
