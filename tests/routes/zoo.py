"""A route's result on disk, and the reference numbers that onnxruntime computes for it.

A folder per route: `model.onnx`, `inputs.npz`, `expected.npz`, `meta.json`. Runs inside the exporters' environments, so
it needs onnx, onnxruntime and numpy only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime

PACKAGES: Final = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "onnxruntime-genai", "optimum-onnx")
TOLERANCES: Final = {"float32": (5e-3, 0.9999), "float16": (5e-3, 0.9999), "bfloat16": (1e-2, 0.9999)}
"""By the type of the weights: greatest difference over the range of the expected values, least cosine.

The machine computes in fp16 with fp32 sums where onnxruntime has fp32 throughout.
"""


@dataclass
class Meta:
    """What a check has to know about a model."""

    route: str
    how: str
    dtype: str
    opset: int = 0
    exporter: dict[str, str] = field(default_factory=dict)
    prompt: int | None = None
    past: int | None = None
    bind: dict[str, int] = field(default_factory=dict)
    compare: list[str] = field(default_factory=list)
    """Outputs whose numbers count; the others are caches and intermediate results."""
    max_rel: float = 0.0
    cosine: float = 0.0
    notes: str = ""


def strip_origins(model: onnx.ModelProto) -> None:
    """Drops what depends on the machine or repeats the source: stack traces, other node metadata, doc strings."""
    for graph in (model.graph, *model.functions):
        for node in graph.node:
            del node.metadata_props[:]
            node.doc_string = ""
        graph.doc_string = ""
        for value in graph.value_info:
            del value.metadata_props[:]
            value.doc_string = ""
    for holder in (model, model.graph, *model.graph.input, *model.graph.output, *model.graph.initializer):
        del holder.metadata_props[:]
        holder.doc_string = ""


def session(model: str | bytes, *, optimise: bool = False) -> onnxruntime.InferenceSession:
    """onnxruntime on the CPU, without rewriting the graph, and with int4 products in float."""
    options = onnxruntime.SessionOptions()
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def save(
    folder: Path, model: onnx.ModelProto, inputs: Mapping[str, np.ndarray], meta: Meta, *,
    reference: onnx.ModelProto | None = None, optimise: bool = False, external: bool = False,
) -> None:  # fmt: skip
    """Writes a route. `reference` is what onnxruntime runs where it cannot run the model itself (bfloat16)."""
    folder.mkdir(parents=True, exist_ok=True)
    strip_origins(model)
    path = folder / "model.onnx"
    (folder / "model.onnx.data").unlink(missing_ok=True)
    if external:
        onnx.save(model, str(path), save_as_external_data=True, location="model.onnx.data", size_threshold=1024)
    else:
        path.write_bytes(model.SerializeToString(deterministic=True))
    source: str | bytes = str(path) if reference is None else reference.SerializeToString()
    runner = session(source, optimise=optimise)
    names = [value.name for value in runner.get_outputs()]
    wanted = {value.name for value in runner.get_inputs()}
    results = runner.run(names, {name: array for name, array in inputs.items() if name in wanted})
    np.savez(folder / "inputs.npz", **{name: array for name, array in inputs.items() if name in wanted})
    np.savez(folder / "expected.npz", **dict(zip(names, results, strict=True)))
    meta.opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    meta.exporter = installed()
    meta.compare = meta.compare or names[:1]
    if not meta.max_rel:
        meta.max_rel, meta.cosine = TOLERANCES.get(meta.dtype, TOLERANCES["float32"])
    (folder / "meta.json").write_text(json.dumps(asdict(meta), indent=1) + "\n", encoding="utf-8")


def installed() -> dict[str, str]:
    """Versions of the packages that had a part in a model."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name).partition("+")[0]
        except PackageNotFoundError:
            continue
    return found


def widened(model: onnx.ModelProto) -> onnx.ModelProto:
    """A bfloat16 model in float32, weights as they are after rounding to bfloat16."""
    from onnx import TensorProto, numpy_helper

    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    graph = wide.graph
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.BFLOAT16:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type == TensorProto.BFLOAT16:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for node in graph.node:
        _widen_attributes(node)
    return wide


def _widen_attributes(node: Any) -> None:
    from onnx import TensorProto, numpy_helper

    for attribute in node.attribute:
        if attribute.name in ("to", "dtype") and attribute.i == TensorProto.BFLOAT16:
            attribute.i = TensorProto.FLOAT
        if attribute.HasField("t") and attribute.t.data_type == TensorProto.BFLOAT16:
            attribute.t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(attribute.t).astype(np.float32)))
