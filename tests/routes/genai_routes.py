"""Routes of onnxruntime-genai's model builder, on a local folder with a tiny random checkpoint."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import students
from students import PAST, PROMPT
from zoo import Meta, save

PRECISIONS = {"fp32": "float32", "fp16": "float16", "int4": "int4", "int8": "int8"}
WIDE = {"128": {"hidden_size": 128, "intermediate_size": 256}, "256": {"hidden_size": 256, "intermediate_size": 512}}
"""Blocks of 128 or 256 need as many columns."""


def genai(
    folder: Path, family: str, precision: str, provider: str, phase: str, extra: dict[str, str], size: str = "tiny"
) -> None:
    """`phase`: prefill with a past of 0 rows, or decode of one token."""
    shape = WIDE.get(extra.get("block_size", ""), {"hidden_size": 64})  # a head has 16 features at least
    model = students.random_model(family, **{**shape, **students.SIZES[size]})
    with tempfile.TemporaryDirectory() as work:
        checkpoint, built = Path(work) / "checkpoint", Path(work) / "built"
        model.save_pretrained(checkpoint)
        _tokenizer().save_pretrained(checkpoint)
        options = [f"{name}={value}" for name, value in extra.items()]
        command = [
            sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint), "-o", str(built),
            "-p", precision, "-e", provider, "-c", str(Path(work) / "cache"),
            *(["--extra_options", *options] if options else []),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError("\n".join((done.stdout + done.stderr).splitlines()[-12:]))
        exported = onnx.load(built / "model.onnx")
    rows = PAST if phase == "decode" else 0
    tokens = 1 if rows else PROMPT
    meta = Meta(
        folder.name,
        f"onnxruntime_genai.models.builder -p {precision} -e {provider} {' '.join(options)}, {family}, {phase}",
        PRECISIONS[precision], prompt=tokens, past=rows,
    )  # fmt: skip
    if precision.startswith("int"):
        # onnxruntime's kernel for MatMulNBits quantises activations at accuracy level 4, firsttoken's machine does not.
        for node in exported.graph.node:
            for attribute in node.attribute:
                if attribute.name == "accuracy_level":
                    attribute.i = 0
        meta.notes = "accuracy_level set to 0, so that onnxruntime computes what the file says"
    inputs = _inputs(exported, tokens, rows, model.config)
    save(folder, exported, inputs, meta, external=size != "tiny")


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"t{i}": i for i in range(students.SHAPE["vocab_size"])}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="t0")), unk_token="t0")


def _inputs(model: onnx.ModelProto, tokens: int, rows: int, config: Any) -> dict[str, np.ndarray]:
    random = np.random.default_rng(13)
    found: dict[str, np.ndarray] = {
        "input_ids": (np.arange(tokens, dtype=np.int64)[None] * 37 + 3) % students.SHAPE["vocab_size"],
        "attention_mask": np.ones((1, rows + tokens), np.int64),
        "position_ids": np.arange(rows, rows + tokens, dtype=np.int64)[None],
    }
    for value in model.graph.input:
        if value.name.startswith("past_key_values"):
            dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            shape = (1, config.num_key_value_heads, rows, config.hidden_size // config.num_attention_heads)
            found[value.name] = random.standard_normal(shape).astype(dtype)
    return found
