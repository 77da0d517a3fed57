"""Rows gathered out of blocks of every type are, bit by bit, the rows that the library makes of the blocks."""

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from onnx import helper, numpy_helper
from students import QWEN3

from firsttoken import api
from firsttoken.options import RunOptions
from firsttoken_compiler.errors import StudentError
from firsttoken_compiler.formats.types import BLOCK_TYPES, BlockType

QWEN3_32 = dataclasses.replace(QWEN3, head_dim=32, tie_embeddings=True)
"""Rows of a head that blocks of 32 weights divide."""
ROWS, IDS = 11, [[3, 10, 0, 3]]


def table(kind: BlockType, k: int) -> np.ndarray:
    """Random blocks; every half-precision number in them is between 0.5 and 2."""
    chance = np.random.default_rng(kind.ggml)
    blocks = chance.integers(0, 256, (ROWS * k // kind.block, kind.nbytes), np.uint8)
    places = {"q6_k": [208], "q3_k": [108]}.get(kind.name, [0, 2] if kind.has_minimum else [0])
    for at in places:
        blocks[:, at : at + 2] = chance.uniform(0.5, 2, len(blocks)).astype(np.float16).view(np.uint8).reshape(-1, 2)
    return blocks.reshape(ROWS, -1)


def model(kind: BlockType, k: int, after: str = "Neg") -> onnx.ModelProto:
    nodes = [
        helper.make_node("DequantizeBlocks", ["b"], ["t"], name="blocks", domain="firsttoken", type=kind.name, k=k),
        helper.make_node("Gather", ["t", "ids"], ["rows"], name="rows"),
        helper.make_node(after, ["rows"], ["y"], name="after"),
    ]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("ids", 7, [1, 4])],
        [helper.make_tensor_value_info("y", 1, [1, 4, k])], [numpy_helper.from_array(table(kind, k), "b")],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("firsttoken", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_rows_are_bit_exact(name: str, tmp_path: Path) -> None:
    kind = BLOCK_TYPES[name]
    k = 2 * kind.block
    onnx.save(model(kind, k), tmp_path / "g.onnx")
    found = api.execute(tmp_path / "g.onnx", "systolic-128", {"ids": np.array(IDS)}, options=RunOptions(weights="fp16"))
    expected = dequantize(table(kind, k), GGMLQuantizationType(kind.ggml))[IDS[0]]
    np.testing.assert_array_equal(found["y"][0], -expected)


def change(node: onnx.NodeProto, name: str, value: object) -> None:
    attribute = next(a for a in node.attribute if a.name == name)
    attribute.CopyFrom(helper.make_attribute(name, value))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("type", "q2_k", "has type 'q2_k', known are q4_0"), ("k", 0, "has k 0"), ("k", 48, "has k 48"),
     ("k", 96, r"of shape \[11, 36\], rows of 96 weights in q4_0 are \[n, 54\]")],
)  # fmt: skip
def test_malformed_nodes_are_refused(name: str, value: object, message: str, tmp_path: Path) -> None:
    damaged = model(BLOCK_TYPES["q4_0"], 64)
    change(damaged.graph.node[0], name, value)
    onnx.save(damaged, tmp_path / "g.onnx")
    with pytest.raises(StudentError, match=message):
        api.compile(tmp_path / "g.onnx", "systolic-128")


def test_computed_blocks_are_refused(tmp_path: Path) -> None:
    damaged = model(BLOCK_TYPES["q4_0"], 64)
    damaged.graph.node[0].input[0] = "ids"
    onnx.save(damaged, tmp_path / "g.onnx")
    with pytest.raises(StudentError, match="blocks are an initialiser of uint8"):
        api.compile(tmp_path / "g.onnx", "systolic-128")


def test_other_uses_are_refused_by_name(tmp_path: Path) -> None:
    damaged = model(BLOCK_TYPES["q4_0"], 64)
    damaged.graph.node.append(helper.make_node("Neg", ["t"], ["u"], name="negated"))
    damaged.graph.output.append(helper.make_tensor_value_info("u", 1, [ROWS, 64]))
    onnx.save(damaged, tmp_path / "g.onnx")
    with pytest.raises(StudentError, match="blocks of node 'blocks' go to Neg 'negated', and the NPU reads blocks in"):
        api.compile(tmp_path / "g.onnx", "systolic-128")


def test_norms_of_heads_read_products_with_blocks() -> None:
    program = api.compile(QWEN3_32, "systolic-128", prompt=4, options=RunOptions(weights="q4_0", acts="fp16"))
    assert sum(op.kind == "rms_norm" for op in program.ops) == 2 * QWEN3_32.layers * 2 + 1
