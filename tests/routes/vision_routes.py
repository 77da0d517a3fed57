"""Routes beyond language: networks shaped like ResNet-50 and ViT, and control flow that a static shape decides."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import students
import torch
from onnx import TensorProto, helper
from torch import nn
from zoo import Meta, save


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions, each with BatchNorm, and a shortcut."""

    def __init__(self, wide: int, narrow: int, stride: int, out: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(wide, narrow, 1, bias=False), nn.BatchNorm2d(narrow), nn.ReLU(inplace=True),
            nn.Conv2d(narrow, narrow, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(narrow),
            nn.ReLU(inplace=True), nn.Conv2d(narrow, out, 1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip
        same = wide == out and stride == 1
        shortcut = nn.Sequential(nn.Conv2d(wide, out, 1, stride=stride, bias=False), nn.BatchNorm2d(out))
        self.shortcut: nn.Module = nn.Identity() if same else shortcut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet-50's stem, bottlenecks, global pooling and classifier, narrower and shallower."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2, padding=1),
        )  # fmt: skip
        self.stages = nn.Sequential(
            Bottleneck(16, 8, 1, 32), Bottleneck(32, 8, 1, 32), Bottleneck(32, 16, 2, 64), Bottleneck(64, 16, 1, 64)
        )
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(64, 32)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.head(torch.flatten(self.pool(self.stages(self.stem(pixel_values))), 1))


def resnet(folder: Path, exporter: str, opset: int, dtype: str = "fp32") -> None:
    """Exported in evaluation mode."""
    _image(folder, random_resnet(), exporter, opset, dtype, "a network shaped like ResNet-50")


def random_resnet() -> nn.Module:
    """Random weights, statistics of BatchNorm away from 0 and 1."""
    torch.manual_seed(7)
    model = ResNet().eval()
    students.randomise(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
            elif name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return model


def vit(folder: Path, exporter: str, opset: int, dtype: str = "fp32") -> None:
    """transformers' ViT: convolution over patches, class token, encoder layers, classifier."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, image_size=32, patch_size=8,
        num_labels=16, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(7)
    model = ViTForImageClassification(config).eval()
    students.randomise(model)
    _image(folder, Logits(model), exporter, opset, dtype, "ViT")


class Logits(nn.Module):
    """A classifier whose only output is its logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=pixel_values).logits


def _image(folder: Path, model: nn.Module, exporter: str, opset: int, dtype: str, what: str) -> None:
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(3)).to(students.DTYPES[dtype])
    graph = exported(model.to(students.DTYPES[dtype]).eval(), image, exporter, opset)
    kind = {"fp32": "float32", "fp16": "float16"}[dtype]
    meta = Meta(folder.name, f"torch.onnx.export ({exporter}), {what}", kind)
    save(folder, graph, {"pixel_values": image.numpy()}, meta)


def exported(model: nn.Module, image: torch.Tensor, exporter: str, opset: int) -> onnx.ModelProto:
    """A classifier as ONNX, with static shapes."""
    common: dict[str, Any] = {
        "opset_version": opset, "input_names": ["pixel_values"], "output_names": ["logits"],
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if exporter == "dynamo":
            return torch.onnx.export(model, (image,), dynamo=True, verbose=False, **common).model_proto
        target = io.BytesIO()
        torch.onnx.export(model, (image,), target, dynamo=False, **common)
    return onnx.load_from_string(target.getvalue())


def conditional(folder: Path) -> None:
    """A product behind an If whose condition follows from the shape of the input."""
    random = np.random.default_rng(3)
    taken, other = (random.standard_normal((64, 32)).astype(np.float32) for _ in range(2))

    def branch(name: str, weight: str) -> Any:
        node = helper.make_node("MatMul", ["x", weight], [f"{name}_y"], name=f"{name}/MatMul")
        return helper.make_graph([node], name, [], [helper.make_tensor_value_info(f"{name}_y", 1, ["rows", 32])])

    nodes = [
        helper.make_node("Shape", ["x"], ["shape"], name="Shape"),
        helper.make_node("Gather", ["shape", "zero"], ["rows"], name="Gather", axis=0),
        helper.make_node("Greater", ["rows", "four"], ["many"], name="Greater"),
        helper.make_node("If", ["many"], ["y"], name="If", then_branch=branch("then", "taken"),
                         else_branch=branch("else", "other")),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes, "conditional", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 32])],
        [onnx.numpy_helper.from_array(a, n) for n, a in
         (("taken", taken), ("other", other), ("zero", np.array(0, np.int64)), ("four", np.array(4, np.int64)))],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    meta = Meta(folder.name, "hand-made: If on a comparison of Shape", "float32", bind={"rows": 16})
    save(folder, model, {"x": random.standard_normal((16, 64)).astype(np.float32)}, meta)
