"""Operators of com.microsoft on the functional machine: onnxruntime's numbers, and what stays on the host."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from firsttoken.execution import load
from firsttoken_compiler.frontend.onnx_file import from_model
from firsttoken_compiler.isa.program import Program
from firsttoken_compiler.options import resolve
from firsttoken_compiler.pipeline import compile_onnx
from firsttoken_compiler.target.load import load_target
from firsttoken_simulator.machine import simulate_program

Array = NDArray[Any]
WIDTH, HEADS, KV_HEADS = 16, 4, 2
RANDOM = np.random.default_rng


def run(nodes: list[Any], feeds: dict[str, Array], weights: dict[str, Array], outputs: list[str]) -> Program:
    """Compiles the graph, executes it, and holds it against onnxruntime; returns the program."""
    inputs = [_info(name, array) for name, array in feeds.items()]
    initialisers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "contrib", inputs, [onnx.ValueInfoProto(name=n) for n in outputs], initialisers),
        opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)], ir_version=9,
    )  # fmt: skip
    expected = onnxruntime.InferenceSession(model.SerializeToString()).run(outputs, feeds)
    del model.graph.output[:]
    model.graph.output.extend(_info(name, array) for name, array in zip(outputs, expected, strict=True))
    student, target = from_model(model, Path(), "contrib"), load_target("systolic-128")
    program = compile_onnx(student, target, resolve("fp16", None, "128", None))
    assert program is not None
    found = load(program, simulate_program(program, target), student, target).run(feeds)
    for name, right in zip(outputs, expected, strict=True):
        span = float(np.abs(right).max())
        np.testing.assert_allclose(found[name], right, atol=4e-3 * span, rtol=0, err_msg=name)
    return program


def _info(name: str, array: Array) -> Any:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)


def host_operators(program: Program) -> list[str]:
    """Types of the nodes that the host computes."""
    models = [onnx.load_from_string(call.model) for call in program.hosts]
    return sorted(node.op_type for model in models for node in model.graph.node)


def grouped(
    tokens: int, rows: int, *, window: int = -1, packed: bool = False, rotary: bool = True, valid: int | None = None
) -> Program:
    """GroupQueryAttention between its inputs and outputs; `valid` tokens and cached rows count."""
    random = RANDOM(tokens + rows)
    widths = [HEADS * WIDTH, KV_HEADS * WIDTH, KV_HEADS * WIDTH]
    parts = [random.standard_normal((1, tokens, width)).astype(np.float32) for width in widths]
    feeds: dict[str, Array] = dict(zip("qkv", parts, strict=True))
    if packed:
        feeds = {"q": np.concatenate(parts, 2)}
    if rows:
        for name in ("past_k", "past_v"):
            feeds[name] = random.standard_normal((1, KV_HEADS, rows, WIDTH)).astype(np.float32)
    feeds["seqlens"] = np.array([(rows + tokens if valid is None else valid) - 1], np.int32)
    angles = np.outer(np.arange(64), 0.5 ** np.arange(WIDTH // 2))
    weights: dict[str, Array] = {
        "total": np.array(rows + tokens, np.int32), "cos": np.cos(angles).astype(np.float32),
        "sin": np.sin(angles).astype(np.float32),
    }  # fmt: skip
    past = ["past_k", "past_v"] if rows else ["", ""]
    tables = ["cos", "sin"] if rotary else []
    node = helper.make_node(
        "GroupQueryAttention", ["q", *(["", ""] if packed else ["k", "v"]), *past, "seqlens", "total", *tables],
        ["out", "present_k", "present_v"], name="gqa", domain="com.microsoft", num_heads=HEADS, kv_num_heads=KV_HEADS,
        local_window_size=window, do_rotary=int(rotary), scale=0.2,
    )  # fmt: skip
    return run([node], feeds, weights, ["out", "present_k", "present_v"])


@pytest.mark.parametrize(
    "case",
    [
        lambda: grouped(6, 0),
        lambda: grouped(6, 0, packed=True, rotary=False),
        lambda: grouped(9, 0, window=3),
        lambda: grouped(1, 7),
        lambda: grouped(1, 9, packed=True, window=4),
        lambda: grouped(3, 5),
        lambda: grouped(4, 8, window=2),
    ],
)
def test_grouped_query_attention(case: Callable[[], Program]) -> None:
    program = case()
    assert "GroupQueryAttention" not in host_operators(program)
    assert "attention" in {op.kind for op in program.ops}


def test_a_grouped_query_attention_that_the_npu_lacks_runs_on_the_host() -> None:
    random = RANDOM(0)
    feeds: dict[str, Array] = {
        name: random.standard_normal((1, 5, heads * WIDTH)).astype(np.float32)
        for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS))
    }
    feeds["seqlens"] = np.array([4], np.int32)
    node = helper.make_node(
        "GroupQueryAttention", ["q", "k", "v", "", "", "seqlens", "total"], ["out", "pk", "pv"], name="gqa",
        domain="com.microsoft", num_heads=HEADS, kv_num_heads=KV_HEADS, softcap=5.0,
    )  # fmt: skip
    program = run([node], feeds, {"total": np.array(5, np.int32)}, ["out", "pk", "pv"])
    assert host_operators(program) == ["GroupQueryAttention"]


@pytest.mark.parametrize("mask", ["lengths", "raw", "none"])
def test_multi_head_attention_with_its_bias(mask: str) -> None:
    random = RANDOM(1)
    feeds: dict[str, Array] = {name: random.standard_normal((1, 7, 64)).astype(np.float32) for name in "qkv"}
    if mask != "none":
        feeds["mask"] = np.array([5] if mask == "lengths" else [[1, 1, 1, 0, 1, 1, 0]], np.int32)
    inputs = ["q", "k", "v", "bias", *(["mask"] if mask != "none" else [])]
    node = helper.make_node(
        "MultiHeadAttention", inputs, ["out"], name="mha", domain="com.microsoft", num_heads=HEADS
    )
    program = run([node], feeds, {"bias": random.standard_normal(192).astype(np.float32)}, ["out"])
    assert "MultiHeadAttention" not in host_operators(program)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_with_one_weight(causal: bool) -> None:
    random = RANDOM(2)
    feeds: dict[str, Array] = {"x": random.standard_normal((1, 7, 64)).astype(np.float32)}
    weights = {
        "w": (random.standard_normal((64, 192)) / 8).astype(np.float32),
        "b": random.standard_normal(192).astype(np.float32),
    }
    if not causal:
        feeds["mask"] = np.array([[1, 1, 1, 1, 1, 0, 0]], np.int32)
    node = helper.make_node(
        "Attention", ["x", "w", "b", *(["mask"] if not causal else [])], ["out"], name="attention",
        domain="com.microsoft", num_heads=HEADS, unidirectional=int(causal),
    )  # fmt: skip
    program = run([node], feeds, weights, ["out"])
    assert "Attention" not in host_operators(program)


def test_embeddings_of_a_fused_encoder() -> None:
    random = RANDOM(3)
    feeds: dict[str, Array] = {
        "ids": np.array([[3, 1, 4, 1, 5]], np.int64), "kinds": np.array([[0, 0, 1, 1, 1]], np.int64),
        "mask": np.array([[1, 1, 0, 1, 0]], np.int32),
    }  # fmt: skip
    shapes = {"word": (10, 32), "place": (8, 32), "kind": (2, 32), "gamma": (32,), "beta": (32,)}
    weights = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    nodes = [
        helper.make_node("Cast", ["ids"], ["ids32"], name="ids32", to=TensorProto.INT32),
        helper.make_node("Cast", ["kinds"], ["kinds32"], name="kinds32", to=TensorProto.INT32),
        helper.make_node(
            "EmbedLayerNormalization", ["ids32", "kinds32", *list(shapes), "mask"], ["out", "count"], name="embed",
            domain="com.microsoft", epsilon=1e-5,
        ),
    ]  # fmt: skip
    program = run(nodes, feeds, weights, ["out", "count"])
    assert "EmbedLayerNormalization" not in host_operators(program)


def test_norms_and_sums_of_genai() -> None:
    random = RANDOM(4)
    feeds: dict[str, Array] = {name: random.standard_normal((1, 5, 32)).astype(np.float32) for name in "xy"}
    weights = {"g": random.standard_normal(32).astype(np.float32), "h": random.standard_normal(32).astype(np.float32)}
    nodes = [
        helper.make_node("SimplifiedLayerNormalization", ["x", "g"], ["n"], name="n", axis=-1, epsilon=1e-5),
        helper.make_node(
            "SkipSimplifiedLayerNormalization", ["n", "y", "h"], ["out", "", "", "sum"], name="s",
            domain="com.microsoft", epsilon=1e-5,
        ),
    ]  # fmt: skip
    program = run(nodes, feeds, weights, ["out", "sum"])
    assert not program.hosts


def test_rotary_embedding_by_positions() -> None:
    random = RANDOM(5)
    feeds: dict[str, Array] = {
        "x": random.standard_normal((1, 5, 64)).astype(np.float32), "at": np.array([[7, 8, 9, 10, 3]], np.int64)
    }  # fmt: skip
    angles = np.outer(np.arange(64), 0.5 ** np.arange(WIDTH // 2))
    weights = {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}
    node = helper.make_node(
        "RotaryEmbedding", ["x", "at", "cos", "sin"], ["out"], name="rope", domain="com.microsoft", num_heads=HEADS
    )
    program = run([node], feeds, weights, ["out"])
    assert not program.hosts
