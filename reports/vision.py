"""ResNet-50 on `systolic-128`: time against two bounds, per format of weights and activations.

    python reports/vision.py

Writes reports/vision/README.md. The graph has ResNet-50's shapes, random weights, and batch normalisation folded.
"""

from collections import Counter
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from onnx import helper, numpy_helper

from firsttoken_compiler.frontend.onnx_file import OnnxStudent, from_model
from firsttoken_compiler.options import resolve
from firsttoken_compiler.pipeline import compile_onnx
from firsttoken_compiler.target.load import load_target
from firsttoken_simulator.machine import simulate_program

TARGET: Final = "systolic-128"
SIZE: Final = 224
STAGES: Final = ((3, 64), (4, 128), (6, 256), (3, 512))
"""(blocks, channels inside a block)."""
FORMATS: Final = (("fp16", "fp16"), ("int8", "fp16"), ("int4", "fp16"), ("int8", "int8"))
OUT: Final = Path(__file__).parent / "vision" / "README.md"


class Network:
    """ONNX nodes and weights of a growing network."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self.random = np.random.default_rng(0)

    def add(self, kind: str, name: str, inputs: list[str], **attributes: object) -> str:
        """A node and the name of its result."""
        self.nodes.append(helper.make_node(kind, inputs, [name], name=f"/{name.replace('.', '/')}", **attributes))
        return name

    def weight(self, name: str, *shape: int) -> str:
        """Random numbers whose products keep their size."""
        deep = int(np.prod(shape[1:])) if len(shape) > 1 else 100
        array = (self.random.standard_normal(shape) * np.sqrt(2 / deep)).astype(np.float32)
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def conv(self, x: str, name: str, shape: tuple[int, int], kernel: int, stride: int, *, relu: bool = True) -> str:
        """A convolution of (channels in, out) with bias."""
        inner, outer = shape
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
        return self.add("Relu", f"{name}.Relu", [self.add("Add", f"{name}.Add", [y, x])])


def resnet50() -> OnnxStudent:
    """The whole network for one image."""
    net = Network()
    x = net.conv("pixels", "stem", (3, 64), 7, 2)
    x = net.add("MaxPool", "stem.MaxPool", [x], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    wide = 64
    for stage, (blocks, narrow) in enumerate(STAGES):
        for index in range(blocks):
            x = net.block(x, f"layers.{stage}.{index}", (wide, narrow), 2 if stage and not index else 1)
            wide = 4 * narrow
    x = net.add("Flatten", "head.Flatten", [net.add("GlobalAveragePool", "head.Pool", [x])])
    inputs = [x, net.weight("head.weight", 1000, wide), net.weight("head.bias", 1000)]
    net.add("Gemm", "logits", inputs, transB=1)
    values = (helper.make_tensor_value_info("pixels", 1, [1, 3, SIZE, SIZE]),)
    made = (helper.make_tensor_value_info("logits", 1, [1, 1000]),)
    graph = helper.make_graph(net.nodes, "resnet50", values, made, net.weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return from_model(onnx.shape_inference.infer_shapes(model), Path(), "resnet50")


def row(student: OnnxStudent, weights: str, acts: str) -> str:
    """A line of the table."""
    target = load_target(TARGET)
    program = compile_onnx(student, target, resolve(weights, acts, "channel", None))
    assert program is not None
    assert not program.hosts
    line = simulate_program(program, target)
    macs = sum(op.macs for op in program.ops)
    packed = sum(tensor.nbytes for tensor in program.of_kind("weight"))
    unit = macs / target.matrix.macs_per_cycle[f"{acts}x{weights}"] / target.clock_hz * 1e3
    stream = packed / target.dram.peak_bytes_per_s * 1e3
    moved = int(np.sum(line.dram_read_bytes) + np.sum(line.dram_write_bytes))
    kinds = Counter(op.kind for op in program.ops)
    made = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    return (
        f"| {weights} | {acts} | {macs / 1e9:.2f} | {unit:.2f} | {stream:.2f} | {moved / 1e6:.0f} "
        f"| {moved / target.dram.peak_bytes_per_s * 1e3:.2f} | **{line.total_ms:.2f}** | {made} |"
    )


def main() -> None:
    """Measures all and writes the page."""
    student = resnet50()
    lines = [
        "# ResNet-50, one image of 224 x 224, on systolic-128",
        "",
        "Random weights in ResNet-50's shapes; the host computes nothing. Bounds: multiply-accumulates at the array's peak, the "
        "weights' bytes and all bytes moved at the DRAM's peak. Redraw: `python reports/vision.py`.",
        "",
        "| weights | activations | GMAC | array, ms | weights' bytes, ms | MB moved | all bytes, ms | **simulated, ms** | operators |",
        "|---|---|---|---|---|---|---|---|---|",
        *(row(student, *formats) for formats in FORMATS),
        "",
        "With fp16 activations a convolution makes its windows tile by tile in the scratchpad (`conv`), so that the DRAM sees "
        "the image once. A kernel of one pixel and stride 1 is a product of the image as it lies (`linear`). What stands between the "
        "bytes and the time: the first stages' images do not stay in the scratchpad, results and shortcuts are written and read beside the "
        "streams, and the vector unit makes a tile of windows before, and applies bias and activation after, the same "
        "tile's product. int8 activations have a scale per row of windows, so these rows are made as a whole (`windows`) and "
        "then quantised: nine times the image's bytes, which costs more than the faster types gain.",
        "",
    ]
    OUT.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
