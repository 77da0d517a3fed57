"""ResNet-50 as something to compile: its shapes, batch normalisation folded, weights that nobody reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from firsttoken.options import RunOptions
from firsttoken.validation.fixed_graph import FixedGraph, absent_weight
from firsttoken_compiler.errors import OptionError

if TYPE_CHECKING:
    from firsttoken_compiler.frontend.onnx_file import OnnxStudent

STAGES: Final = ((3, 64), (4, 128), (6, 256), (3, 512))
"""(blocks, channels inside a block)."""
SIDES: Final = (32, 1024)
"""Smallest and largest side of an image."""
OPSET: Final = 17


@dataclass(frozen=True, slots=True)
class ResNet50(FixedGraph):
    """ResNet-50 for one square image; satisfies `latency.Kernel` and `firsttoken.subject.Subject`."""

    side: int = 224

    def __post_init__(self) -> None:
        if not SIDES[0] <= self.side <= SIDES[1]:
            raise OptionError(f"an image of {self.side} pixels a side: ResNet-50 takes {SIDES[0]} to {SIDES[1]}")

    @property
    def name(self) -> str:
        """See `Subject`."""
        return "resnet50"

    @property
    def kind(self) -> str:
        """See `Subject`."""
        return "an image network"

    def subject(self) -> ResNet50:
        """What is compiled."""
        return self

    def options(self, weights: str, acts: str) -> RunOptions:
        """Number formats; integer activations with static scales, as there are no windows of rows then."""
        ranges = tuple((name, 1.0) for name in _network(self.side).read) if acts != "fp16" else ()
        return RunOptions(weights=weights, acts=acts, group="channel", ranges=ranges)

    def content(self) -> str:
        """See `Subject`."""
        return f"image network {self}"

    def open(self, tokens: int, past: int) -> OnnxStudent:
        """See `Subject`."""
        import onnx

        from firsttoken_compiler.frontend.onnx_file import from_model

        return from_model(onnx.shape_inference.infer_shapes(_network(self.side).model(self.side)), Path(), self.name)


@dataclass
class _Network:
    """Nodes and weights of a growing network; `read` are the tensors that products read."""

    nodes: list[Any] = field(default_factory=list)
    weights: list[Any] = field(default_factory=list)
    read: dict[str, None] = field(default_factory=dict)

    def add(self, kind: str, name: str, inputs: list[str], **attributes: Any) -> str:
        """A node and the name of its result."""
        from onnx import helper

        self.nodes.append(helper.make_node(kind, inputs, [name], name=f"/{name.replace('.', '/')}", **attributes))
        return name

    def weight(self, name: str, *shape: int) -> str:
        """A weight whose bytes need not be there."""
        self.weights.append(absent_weight(name, 1, shape, 4, "resnet50.bin"))
        return name

    def conv(self, x: str, name: str, shape: tuple[int, int], kernel: int, stride: int, *, relu: bool = True) -> str:
        """A convolution of (channels in, out) with bias."""
        inner, outer = shape
        self.read[x] = None
        inputs = [x, self.weight(f"{name}.weight", outer, inner, kernel, kernel), self.weight(f"{name}.bias", outer)]
        pads, sizes = [kernel // 2] * 4, [kernel, kernel]
        made = self.add("Conv", f"{name}.Conv", inputs, pads=pads, strides=[stride, stride], kernel_shape=sizes)
        return self.add("Relu", f"{name}.Relu", [made]) if relu else made

    def block(self, x: str, name: str, width: tuple[int, int], stride: int) -> str:
        """1x1, 3x3, 1x1 and the shortcut, for (channels in, channels inside)."""
        wide, narrow = width
        y = self.conv(x, f"{name}.conv1", (wide, narrow), 1, 1)
        y = self.conv(y, f"{name}.conv2", (narrow, narrow), 3, stride)
        y = self.conv(y, f"{name}.conv3", (narrow, 4 * narrow), 1, 1, relu=False)
        if wide != 4 * narrow or stride > 1:
            x = self.conv(x, f"{name}.shortcut", (wide, 4 * narrow), 1, stride, relu=False)
            self.read[x] = None
        return self.add("Relu", f"{name}.Relu", [self.add("Add", f"{name}.Add", [y, x])])

    def model(self, side: int) -> Any:
        """The finished ONNX model."""
        from onnx import helper

        values = [helper.make_tensor_value_info("pixels", 1, [1, 3, side, side])]
        made = [helper.make_tensor_value_info("logits", 1, [1, 1000])]
        graph = helper.make_graph(self.nodes, "resnet50", values, made, self.weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)


def _network(side: int) -> _Network:
    """The whole network for one image."""
    net = _Network()
    x = net.conv("pixels", "stem", (3, 64), 7, 2)
    x = net.add("MaxPool", "stem.MaxPool", [x], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    wide = 64
    for stage, (blocks, narrow) in enumerate(STAGES):
        for index in range(blocks):
            x = net.block(x, f"layers.{stage}.{index}", (wide, narrow), 2 if stage and not index else 1)
            wide = 4 * narrow
    x = net.add("Flatten", "head.Flatten", [net.add("GlobalAveragePool", "head.Pool", [x])])
    net.read[x] = None
    net.add("Gemm", "logits", [x, net.weight("head.weight", 1000, wide), net.weight("head.bias", 1000)], transB=1)
    return net
