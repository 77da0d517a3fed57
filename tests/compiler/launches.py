"""The launch list of the tiny student, as the passes up to `lower` make it."""

from __future__ import annotations

from pathlib import Path

from cases import TINY

from firsttoken_compiler.frontend.importer import import_onnx
from firsttoken_compiler.frontend.onnx_file import from_model
from firsttoken_compiler.options import resolve
from firsttoken_compiler.passes.canonicalise import Canonicalise
from firsttoken_compiler.passes.lower import Launches, Lower
from firsttoken_compiler.passes.quantise import Quantise
from firsttoken_compiler.target.target import Target
from firsttoken_models.onnx_graph import build_graph


def tiny_launches(target: Target) -> Launches:
    """int4 weights in groups, a cache of 3 rows, 5 tokens."""
    imported = import_onnx(from_model(build_graph(TINY, tokens=5, past=3), Path(), "tiny"))
    precision = resolve("int4", None, "32", None)
    return Lower().run(Quantise(precision, target).run(Canonicalise().run(imported), imported.weights))
