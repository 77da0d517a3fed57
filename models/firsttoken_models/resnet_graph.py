"""The ONNX graph of a ResNet of bottlenecks: one image, batch normalisation folded into the convolutions' biases.

Blocks reduce the image in their 3x3 convolution. Weights lie one after another in a file that need not be there.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

from firsttoken.image_network import EXPANSION, STEM_KERNEL
from firsttoken_models.weights import FLOAT32_BYTES, WEIGHTS_FILE

if TYPE_CHECKING:
    import onnx

    from firsttoken.image_network import ImageNetworkConfig

OPSET: Final = 17
IR_VERSION: Final = 8


def build_resnet(config: ImageNetworkConfig) -> onnx.ModelProto:
    """Return the static graph: input `pixels` [1, 3, side, side], output `logits` [1, classes]."""
    return _Network(config).model()


def ranged_tensors(config: ImageNetworkConfig) -> tuple[str, ...]:
    """Return the tensors whose ranges decide all static scales: what products read, and what shortcuts make."""
    return tuple(_Network(config).ranged)


class _Network:
    """Nodes and weights of a growing network."""

    def __init__(self, config: ImageNetworkConfig) -> None:
        self.config = config
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self.ranged: dict[str, None] = {}
        self._end = 0
        x = self._conv("pixels", "stem", (3, config.stem), STEM_KERNEL, 2)
        x = self._add("MaxPool", "stem.MaxPool", [x], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
        wide = config.stem
        for stage, (blocks, narrow) in enumerate(config.stages):
            for index in range(blocks):
                x = self._block(x, wide, stage, index)
                wide = EXPANSION * narrow
        x = self._add("Flatten", "head.Flatten", [self._add("GlobalAveragePool", "head.Pool", [x])])
        self.ranged[x] = None
        weights = [self._weight("head.weight", config.classes, wide), self._weight("head.bias", config.classes)]
        self._add("Gemm", "logits", [x, *weights], transB=1)

    def model(self) -> onnx.ModelProto:
        """The finished ONNX model, its shapes inferred."""
        import onnx
        from onnx import helper

        side = self.config.side
        values = [helper.make_tensor_value_info("pixels", 1, [1, 3, side, side])]
        made = [helper.make_tensor_value_info("logits", 1, [1, self.config.classes])]
        graph = helper.make_graph(self.nodes, self.config.name, values, made, self.weights)
        opsets = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="firsttoken")
        return onnx.shape_inference.infer_shapes(model)

    def _add(self, kind: str, name: str, inputs: list[str], **attributes: Any) -> str:
        """A node and the name of its result."""
        from onnx import helper

        self.nodes.append(helper.make_node(kind, inputs, [name], name=f"/{name.replace('.', '/')}", **attributes))
        return name

    def _weight(self, name: str, *shape: int) -> str:
        """A float32 weight in the file."""
        from onnx import TensorProto

        made = TensorProto(name=name, data_type=1, dims=shape, data_location=TensorProto.EXTERNAL)
        length = FLOAT32_BYTES * math.prod(shape)
        for key, value in (("location", WEIGHTS_FILE), ("offset", str(self._end)), ("length", str(length))):
            made.external_data.add(key=key, value=value)
        self.weights.append(made)
        self._end += length
        return name

    def _conv(self, x: str, name: str, shape: tuple[int, int], kernel: int, stride: int, *, relu: bool = True) -> str:
        """A convolution of (channels in, out) with bias."""
        inner, outer = shape
        self.ranged[x] = None
        inputs = [x, self._weight(f"{name}.weight", outer, inner, kernel, kernel), self._weight(f"{name}.bias", outer)]
        pads, sizes = [kernel // 2] * 4, [kernel, kernel]
        made = self._add("Conv", f"{name}.Conv", inputs, pads=pads, strides=[stride, stride], kernel_shape=sizes)
        return self._add("Relu", f"{name}.Relu", [made]) if relu else made

    def _block(self, x: str, wide: int, stage: int, index: int) -> str:
        """1x1, 3x3, 1x1 and the shortcut of a block that reads `wide` channels."""
        name, narrow = f"layers.{stage}.{index}", self.config.stages[stage][1]
        made, stride = EXPANSION * narrow, 2 if self.config.reduces(stage, index) else 1
        y = self._conv(x, f"{name}.conv1", (wide, narrow), 1, 1)
        y = self._conv(y, f"{name}.conv2", (narrow, narrow), 3, stride)
        y = self._conv(y, f"{name}.conv3", (narrow, made), 1, 1, relu=False)
        if self.config.convolves_shortcut(stage, index, wide):
            x = self._conv(x, f"{name}.shortcut", (wide, made), 1, stride, relu=False)
            self.ranged[x] = None
        return self._add("Relu", f"{name}.Relu", [self._add("Add", f"{name}.Add", [y, x])])
