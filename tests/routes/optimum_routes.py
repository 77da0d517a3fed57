"""Routes of optimum-onnx: its exporter on tiny random models."""

from __future__ import annotations

import tempfile
from pathlib import Path

import encoder_routes
import numpy as np
import onnx
import students
from zoo import Meta, save


def decoder(folder: Path, family: str, task: str, phase: str, size: str = "tiny") -> None:
    """`task`: text-generation or text-generation-with-past; `phase`: prefill or decode."""
    from optimum.exporters.onnx import onnx_export_from_model

    model = students.random_model(family, "eager", **students.SIZES[size])
    with tempfile.TemporaryDirectory() as work:
        onnx_export_from_model(model, work, task=task, do_validation=False, no_post_process=True)
        exported = onnx.load(next(Path(work).glob("*.onnx")))
    rows = students.PAST if phase == "decode" else 0
    tokens = 1 if rows else students.PROMPT
    random = np.random.default_rng(13)
    inputs: dict[str, np.ndarray] = {
        "input_ids": (np.arange(tokens, dtype=np.int64)[None] * 37 + 3) % students.SHAPE["vocab_size"],
        "attention_mask": np.ones((1, rows + tokens), np.int64),
        "position_ids": np.arange(rows, rows + tokens, dtype=np.int64)[None],
    }
    config = model.config
    shape = (1, config.num_key_value_heads, rows, config.hidden_size // config.num_attention_heads)
    for value in exported.graph.input:
        if value.name.startswith("past_key_values"):
            inputs[value.name] = random.standard_normal(shape).astype(np.float32)
    with_past = task.endswith("past")
    meta = Meta(folder.name, f"optimum-onnx, {family}, {task}, {phase}", "float32", prompt=tokens,
                past=rows if with_past else None)  # fmt: skip
    save(folder, exported, inputs, meta, external=size != "tiny")


def encoder(folder: Path) -> None:
    """BERT for feature extraction."""
    from optimum.exporters.onnx import onnx_export_from_model

    model = encoder_routes.tiny_bert("eager")
    with tempfile.TemporaryDirectory() as work:
        onnx_export_from_model(model, work, task="feature-extraction", do_validation=False)
        exported = onnx.load(next(Path(work).glob("*.onnx")))
    meta = Meta(folder.name, "optimum-onnx, BERT, feature-extraction", "float32", prompt=encoder_routes.TOKENS)
    save(folder, exported, {name: t.numpy() for name, t in encoder_routes.example().items()}, meta)
