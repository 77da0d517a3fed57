"""firsttoken_models.resnet_graph: the shapes of ResNet-50, and small networks of the same form."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from firsttoken.student import StudentProvider
from firsttoken_models.image_networks import RESNET_50
from firsttoken_models.registry import PROVIDER
from firsttoken_models.resnet_graph import build_resnet, ranged_tensors
from firsttoken_models.students import student
from firsttoken_models.weights import WEIGHTS_FILE

SMALL = replace(RESNET_50, name="small", side=32, stem=8, stages=((1, 4), (2, 8)), classes=10)


def shapes(model: onnx.ModelProto) -> dict[str, list[int]]:
    """Every tensor that the graph makes."""
    values = [*model.graph.value_info, *model.graph.output]
    return {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values}


def test_it_is_a_student_of_the_provider() -> None:
    provider: StudentProvider = PROVIDER
    for name in ("resnet-50", "ResNet50", "microsoft/resnet-50"):
        assert student(name) is RESNET_50
    assert "resnet-50" in PROVIDER.names()
    assert provider.image_graph(RESNET_50) == build_resnet(RESNET_50)
    assert (PROVIDER.weights("resnet-50"), PROVIDER.tokenizer("resnet-50")) == (None, None)


def test_resnet_50_has_the_published_shapes_and_parameters(tmp_path: Path) -> None:
    model = build_resnet(RESNET_50)
    with (tmp_path / WEIGHTS_FILE).open("wb") as file:
        file.truncate(1 << 27)
    onnx.save(model, tmp_path / "resnet.onnx")
    onnx.checker.check_model(str(tmp_path / "resnet.onnx"), full_check=True)
    made, kernels = shapes(model), [n for n in model.graph.node if n.op_type == "Conv"]
    assert made["stem.MaxPool"] == [1, 64, 56, 56]
    assert [made[f"layers.{i}.{last}.Relu"] for i, last in enumerate((2, 3, 5, 2))] == [
        [1, 256, 56, 56], [1, 512, 28, 28], [1, 1024, 14, 14], [1, 2048, 7, 7],
    ]  # fmt: skip
    assert made["logits"] == [1, 1000]
    assert (len(kernels), RESNET_50.layers, RESNET_50.hidden) == (49 + 4, 50, 2048)
    weights = {w.name: w for w in model.graph.initializer}
    elements = sum(math.prod(w.dims) for w in weights.values())
    biases = sum(math.prod(weights[kernel.input[2]].dims) for kernel in kernels)
    assert elements + biases == RESNET_50.parameters == 25_557_032  # an offset in the graph, and a factor beside it
    macs = sum(math.prod(made[k.output[0]]) * math.prod(weights[k.input[1]].dims[1:]) for k in kernels)
    assert round((macs + 2048 * 1000) / 1e9, 2) == 4.09  # as torchvision.models gives it


def test_weights_lie_one_after_another() -> None:
    end = 0
    for weight in build_resnet(SMALL).graph.initializer:
        place = {entry.key: entry.value for entry in weight.external_data}
        assert int(place["offset"]) == end
        end += int(place["length"])
        assert int(place["length"]) == 4 * math.prod(weight.dims)


def test_ranges_are_of_tensors_in_the_graph() -> None:
    model, tensors = build_resnet(SMALL), ranged_tensors(SMALL)
    multiplied = {n.input[0] for n in model.graph.node if n.op_type in ("Conv", "Gemm")}
    shortcuts = {n.output[0] for n in model.graph.node if "shortcut" in n.name}
    assert set(tensors) == multiplied | shortcuts
    assert len(shortcuts) == 2  # of the first block of each stage


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"side": 31}, "an image of 31 pixels a side; it takes 32 to 1024"),
        ({"side": 1025}, "an image of 1025 pixels a side"),
        ({"side": 64.0}, "side is 64.0, must be an integer"),
        ({"stages": ()}, "stages is empty"),
        ({"stages": ((0, 8),)}, "blocks of a stage is 0"),
        ({"stages": ((1, 0),)}, "channels of a stage is 0"),
        ({"classes": 0}, "classes is 0"),
        ({"family": "vgg"}, "family is 'vgg', must be one of"),
    ],
)
def test_what_is_no_network(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


def test_content_is_of_the_graph_alone() -> None:
    assert replace(SMALL, name="other", source="elsewhere").canonical_json() == SMALL.canonical_json()
    texts = {replace(SMALL, **change).canonical_json() for change in ({}, {"side": 64}, {"classes": 9}, {"stem": 16})}
    assert len(texts) == 4
