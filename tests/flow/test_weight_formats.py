"""Formats of weights through the whole compiler: single products beside numpy, students in mixtures."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from firsttoken.api import compile, execute, simulate
from firsttoken.execution import load
from firsttoken.generation import token_feeds
from firsttoken.options import RunOptions
from firsttoken.student import StudentConfig
from firsttoken_compiler.codegen.weights import quantise, quantise_asymmetric
from firsttoken_compiler.formats.dequantise import dequantise as floats_of
from firsttoken_compiler.formats.policy import policy_of
from firsttoken_compiler.formats.quantise import quantise as blocks_of
from firsttoken_compiler.formats.types import BLOCK_TYPES
from firsttoken_compiler.frontend.onnx_file import from_model
from firsttoken_compiler.options import Precision
from firsttoken_compiler.pipeline import compile_onnx
from firsttoken_compiler.target.load import load_target
from firsttoken_compiler.target.target import Target
from firsttoken_models.gguf_write import mixed, write_gguf
from firsttoken_models.onnx_graph import build_graph
from firsttoken_models.weights import write_random_weights

TARGET = load_target("systolic-128")
LARGEST = {"int8": np.float32(127), "int16": np.float32(32767)}


def product(weight: np.ndarray, rows: int) -> onnx.ModelProto:
    """x times a weight."""
    k, n = weight.shape
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")], "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, rows, k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, rows, n])], [numpy_helper.from_array(weight, "w")],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def computed(weight: np.ndarray, x: np.ndarray, precision: Precision, target: Target = TARGET) -> np.ndarray:
    """What the machine makes of x."""
    student = from_model(product(weight, len(x)), Path("."), "one")
    program = compile_onnx(student, target, precision)
    assert program is not None
    y: np.ndarray = load(program, simulate(program, target), student, target).run({"x": x[None]})["y"][0]
    return y


def expected(weight: np.ndarray, x: np.ndarray, precision: Precision) -> np.ndarray:
    """The same product of what quantisation leaves, in float64."""
    return by_activations(left(weight, precision), x, precision.acts)


def left(weight: np.ndarray, precision: Precision) -> np.ndarray:
    """What quantisation leaves of a weight."""
    if precision.weights in BLOCK_TYPES:
        kind = BLOCK_TYPES[precision.weights]
        return floats_of(blocks_of(np.ascontiguousarray(weight.T), kind), kind).T.astype(np.float64)
    k, bits = len(weight), int(precision.weights.removeprefix("int"))
    group = k if precision.group == "channel" else min(k, int(precision.group))
    made = (quantise_asymmetric if precision.asymmetric else quantise)(weight, bits, group)
    q, scale, *zero = (part.astype(np.float64) for part in made)
    scale, *zero = (np.repeat(part, group, axis=0)[:k] for part in (scale, *zero))
    floats: np.ndarray = (q - zero[0] if zero else q) * scale
    return floats


def by_activations(floats: np.ndarray, x: np.ndarray, acts: str) -> np.ndarray:
    """x, as it is quantised, times floats."""
    half = x.astype(np.float16).astype(np.float32)
    if acts == "fp16":
        return np.asarray(half.astype(np.float64) @ floats)
    step = np.abs(half).max(axis=1, keepdims=True) * (np.float32(1) / LARGEST[acts])
    return np.asarray(np.rint(half * (np.float32(1) / step)).astype(np.float64) @ floats * step)


GRID = [
    ("int4", "int8", "32", 256), ("int4", "int8", "64", 96), ("int8", "int8", "128", 256),
    ("int4", "int8", "channel", 2048), ("int8", "int8", "channel", 2048), ("int4", "int16", "64", 256),
    ("int8", "int16", "32", 160), ("int8", "int16", "channel", 1536), ("int4", "int16", "channel", 9600),
    ("int4", "fp16", "channel", 256), ("int8", "fp16", "32", 96),
]  # fmt: skip


@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(("weights", "acts", "group", "k"), GRID, ids=lambda value: str(value))
def test_products_are_exact_but_for_fp32(weights: str, acts: str, group: str, k: int, asymmetric: bool) -> None:
    random = np.random.default_rng(k)
    weight = (random.standard_normal((k, 40)) + 0.7).astype(np.float32) / np.float32(k**0.5)
    x = random.standard_normal((3, k)).astype(np.float32)
    precision = Precision(weights, acts, group, "off", asymmetric=asymmetric)
    wanted = expected(weight, x, precision)
    np.testing.assert_allclose(computed(weight, x, precision), wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(("weights", "k"), [("int8", 2048), ("int4", 9600)])
def test_sums_of_int16_do_not_overflow(weights: str, k: int, asymmetric: bool) -> None:
    """All products are the largest there can be, so that one sum over k would leave int32."""
    weight, x = np.full((k, 16), 1.0, np.float32), np.ones((2, k), np.float32)
    precision = Precision(weights, "int16", "channel", "off", asymmetric=asymmetric)
    np.testing.assert_allclose(computed(weight, x, precision), expected(weight, x, precision), rtol=1e-6)


@pytest.mark.parametrize("target", ["systolic-128", "snapdragon-x-elite"])
@pytest.mark.parametrize("acts", ["fp16", "int8"])
@pytest.mark.parametrize("weights", BLOCK_TYPES)
def test_floats_are_quantised_to_blocks_and_multiplied(weights: str, acts: str, target: str) -> None:
    """By codes exactly, or by floats that are rounded to fp16 first, whichever the compiler found cheaper."""
    random = np.random.default_rng(7)
    k = 2 * BLOCK_TYPES[weights].block
    weight, x = random.standard_normal((k, 24)).astype(np.float32), random.standard_normal((3, k)).astype(np.float32)
    precision = Precision(weights, acts, "128", "off")
    found = computed(weight, x, precision, load_target(target))
    blocks = left(weight, precision)
    exact = [by_activations(floats, x, acts) for floats in (blocks, blocks.astype(np.float16).astype(np.float64))]
    assert min(float(np.abs(found - wanted).max() / np.abs(wanted).max()) for wanted in exact) < 1e-6


@pytest.mark.parametrize(("weights", "tied"), [("q4_k_m", False), ("q3_k_l", True), ("q5_0", False)])
def test_a_mixture_of_floats_is_the_file_that_it_would_be_written_to(weights: str, tied: bool, tmp_path: Path) -> None:
    """Roles from the structure and blocks made late give, bit by bit, what blocks give that were written by name."""
    config = StudentConfig(
        name="mixed", family="llama", hidden=256, intermediate=288, layers=8, heads=4, kv_heads=2, head_dim=64,
        vocab=96, rope_theta=1e4, max_positions=64, rms_eps=1e-6, tie_embeddings=tied, qkv_bias=False,
        source="made up for tests",
    )  # fmt: skip
    floats, feeds = write_random_weights(config, tmp_path), token_feeds([3, 90, 17, 4])
    onnx.save(build_graph(config, tokens=4, past=0, weights=floats), floats.path.parent / "floats.onnx")
    write_gguf(tmp_path / "blocks.gguf", config, floats.tensor, mixed(policy_of(weights), config))
    stored = execute(tmp_path / "blocks.gguf", TARGET, feeds, prompt=4)["logits"]
    path, options = floats.path.parent / "floats.onnx", RunOptions(weights=weights)
    np.testing.assert_array_equal(execute(path, TARGET, feeds, options=options)["logits"], stored)
    ours = compile(path, TARGET, options=options).meta["weight_formats"]
    file = compile(tmp_path / "blocks.gguf", TARGET, prompt=4).meta
    assert {row["stored"] for row in ours} == {False}
    assert [dict(row, stored=row["format"] != "vectors") for row in ours] == file["weight_formats"]
    assert (file["weights"], file["activations"]) == (", ".join(row["format"] for row in ours[:-1]), "fp16")


def test_reports_name_the_formats_in_use() -> None:
    weight = np.random.default_rng(1).standard_normal((64, 32)).astype(np.float32)
    student = from_model(product(weight, 2), Path("."), "one")
    program = compile_onnx(student, TARGET, Precision("int4", "int8", "32", "off", asymmetric=True))
    assert program is not None
    rows = [{"format": "int4 group 32 with zero points", "stored": False, "matrices": 1}]
    found = program.meta["weight_formats"]
    assert [{key: value for key, value in row.items() if key != "bytes"} for row in found] == rows
    assert [row["bytes"] for row in found] == [sum(t.nbytes for t in program.tensors if t.kind == "weight")]
