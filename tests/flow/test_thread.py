"""The thinnest thread: one product from an ONNX file to the numbers that numpy gets, in every spelling and format."""

import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from firsttoken_compiler.codegen.verify import verify
from firsttoken_compiler.codegen.weights import dequantise, materialise, quantise
from firsttoken_compiler.errors import StudentError
from firsttoken_compiler.frontend.onnx_file import OnnxStudent, from_model, open_student
from firsttoken_compiler.isa.program import Program
from firsttoken_compiler.options import Precision, resolve
from firsttoken_compiler.pipeline import compile_onnx
from firsttoken_compiler.target.load import load_target
from firsttoken_simulator.functional import FunctionalMachine
from firsttoken_simulator.machine import simulate_program

TARGETS = ("systolic-128", "snapdragon-x-elite")
FORMATS = {
    "fp16": resolve("fp16", None, "channel", None),
    "int8": resolve("int8", "int8", "channel", None),
    "int8, acts int16": resolve("int8", "int16", "channel", None),
    "int4 per channel": resolve("int4", "int8", "channel", None),
    "int4 in groups of 32": resolve("int4", "int8", "32", None),
    "int4 in groups of 64, acts int16": resolve("int4", "int16", "64", None),
}
EXACT = ("fp16", "int8", "int4 per channel", "int4 in groups of 32")
"""Formats in which whole numbers and scales of 1 survive the way in."""
SPELLINGS = ("MatMul", "MatMul, Add", "Add first", "Gemm", "Gemm, bias", "Gemm transB, bias")
BITS = {"int4": 4, "int8": 8, "fp16": 16}
LARGEST = {16: 16, 8: 127, 4: 7}
"""By bits of the numbers: with one of them in every row, or column and group, all scales are exactly 1."""


def product(spelling: str, lead: list[int], m: int, weight: np.ndarray, bias: np.ndarray) -> onnx.ModelProto:
    """`y = x @ weight`, with `+ bias` where the spelling says so; `lead` are the axes of x before its last two."""
    k, n = weight.shape
    make, info, tensor = onnx.helper.make_node, onnx.helper.make_tensor_value_info, onnx.numpy_helper.from_array
    turned = "transB" in spelling
    initializers = [tensor(weight.T.copy() if turned else weight, "w")]
    if has_bias(spelling):
        initializers.append(tensor(bias, "b"))
    if spelling.startswith("Gemm"):
        names = ["x", "w", *(["b"] if has_bias(spelling) else [])]
        nodes = [make("Gemm", names, ["y"], transB=int(turned))]
    else:
        nodes = [make("MatMul", ["x", "w"], ["t" if has_bias(spelling) else "y"], name="/layers.0/proj/MatMul")]
        if has_bias(spelling):
            nodes.append(make("Add", ["b", "t"] if spelling == "Add first" else ["t", "b"], ["y"]))
    graph = onnx.helper.make_graph(
        nodes, "g", [info("x", 1, [*lead, m, k])], [info("y", 1, [*lead, m, n])], initializers
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    return model


def integers(random: np.random.Generator, shape: tuple[int, int], largest: int, group: int) -> np.ndarray:
    """Whole numbers up to `largest`, reached in every group of rows of every column."""
    values = random.integers(-largest, largest + 1, shape).astype(np.float32)
    for first in range(0, shape[0], group):
        rows = random.integers(first, min(first + group, shape[0]), shape[1])
        values[rows, np.arange(shape[1])] = largest * random.choice([-1, 1], shape[1])
    return values


def group_of(precision: Precision, k: int) -> int:
    return k if precision.group == "channel" else min(k, int(precision.group))


def has_bias(spelling: str) -> bool:
    return "bias" in spelling or "Add" in spelling


def compiled(student: OnnxStudent, target: str, precision: Precision) -> Program:
    program = compile_onnx(student, load_target(target), precision)
    assert program is not None
    return program


def result(student: OnnxStudent, program: Program, target: str, x: np.ndarray) -> np.ndarray:
    """What the functional machine computes, in the order in which the timing machine completes."""
    machine = load_target(target)
    order = simulate_program(program, machine).completion_order
    functional = FunctionalMachine(program, machine)
    materialise(program, student.array, functional.write_bytes)
    tensor = program.tensor("x")
    functional.write_tensor("x", x.astype(tensor.dtype.numpy).reshape(tensor.shape))
    functional.run(order)
    return functional.read_tensor("y").reshape(-1, program.tensor("y").shape[-1])


@given(data=st.data())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_accumulators_are_numpys(data: st.DataObject) -> None:
    """All scales are 1, so the result is the accumulators: equal to numpy's sums in every bit."""
    target, name = data.draw(st.sampled_from(TARGETS)), data.draw(st.sampled_from(EXACT))
    spelling, precision = data.draw(st.sampled_from(SPELLINGS)), FORMATS[name]
    m, k, n = data.draw(st.integers(1, 70)), data.draw(st.integers(2, 300)), data.draw(st.integers(2, 300))
    lead = [] if spelling.startswith("Gemm") else data.draw(st.sampled_from([[], [1], [1, 1]]))
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    weight = integers(random, (k, n), LARGEST[BITS[precision.weights]], group_of(precision, k))
    x = integers(random, (k, m), LARGEST[16 if precision.acts == "fp16" else 8], k).T
    bias = random.integers(-100, 100, n).astype(np.float32)
    student = from_model(product(spelling, lead, m, weight, bias), Path("."), "one")
    program = compiled(student, target, precision)
    verify(program, load_target(target))
    sums = x.astype(np.int64) @ weight.astype(np.int64) + bias.astype(np.int64) * has_bias(spelling)
    assert np.abs(sums).max() < 1 << 24, "fp32 holds every sum"
    np.testing.assert_array_equal(result(student, program, target, x), sums.astype(np.float32))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", sorted(FORMATS))
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_random_numbers_are_quantised_as_documented(target: str, name: str, spelling: str) -> None:
    random, precision = np.random.default_rng(3), FORMATS[name]
    m, k, n = 9, 131, 257
    weight = random.standard_normal((k, n), dtype=np.float32)
    x, bias = random.standard_normal((m, k), dtype=np.float32), random.standard_normal(n, dtype=np.float32)
    lead = [] if spelling.startswith("Gemm") else [1]
    student = from_model(product(spelling, lead, m, weight, bias), Path("."), "one")
    y = result(student, compiled(student, target, precision), target, x)
    half = x.astype(np.float16).astype(np.float32)
    if precision.acts == "fp16":
        expected = half @ weight.astype(np.float16).astype(np.float32)
    else:
        largest = np.float32(127 if precision.acts == "int8" else 32767)
        scale = np.abs(half).max(axis=1, keepdims=True) * (np.float32(1) / largest)
        group = group_of(precision, k)
        q, scales = quantise(weight, BITS[precision.weights], group)
        expected = np.rint(half * (np.float32(1) / scale)) @ dequantise(q, scales, group) * scale
    expected = expected + bias.astype(np.float16) * has_bias(spelling)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", sorted(FORMATS))
def test_absent_weights_time_as_present_ones(target: str, name: str, tmp_path: Path) -> None:
    weight = np.ones((200, 300), np.float32)
    model = product("MatMul", [1], 5, weight, np.ones(300, np.float32))
    onnx.save(model, tmp_path / "whole.onnx")
    onnx.save(model, tmp_path / "split.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    (tmp_path / "w.bin").unlink()
    programs = [compiled(open_student(tmp_path / f), target, FORMATS[name]) for f in ("whole.onnx", "split.onnx")]
    assert np.array_equal(programs[0].code, programs[1].code)
    assert simulate_program(programs[1], load_target(target)).total_cycles > 200 * 300 * 4 / 8 / 135
    student = open_student(tmp_path / "split.onnx")
    with pytest.raises(StudentError, match=r"kept in w\.bin"):
        result(student, programs[1], target, np.ones((5, 200), np.float32))


def test_a_product_keeps_its_name_and_its_macs() -> None:
    student = from_model(
        product("MatMul, Add", [1], 3, np.ones((8, 6), np.float32), np.ones(6, np.float32)), Path(), "one"
    )
    op = compiled(student, TARGETS[0], FORMATS["fp16"]).ops[-1]
    assert (op.name, op.kind, op.onnx_nodes) == ("layers.0.proj", "linear", ("/layers.0/proj/MatMul", "Add#1"))
    assert (op.m, op.k, op.n, op.macs) == (3, 8, 6, 3 * 8 * 6)


def test_float16_outputs_stay_float16() -> None:
    model = product("MatMul", [], 3, np.ones((8, 6), np.float32), np.ones(6, np.float32))
    for value, expected in ((onnx.TensorProto.FLOAT, np.float32), (onnx.TensorProto.FLOAT16, np.float16)):
        for tensor in (model.graph.input[0].type.tensor_type, model.graph.output[0].type.tensor_type):
            tensor.elem_type = value
        weight = onnx.numpy_helper.from_array(np.ones((8, 6), expected), "w")
        model.graph.initializer[0].CopyFrom(weight)
        onnx.checker.check_model(model, full_check=True)
        program = compiled(from_model(model, Path(), "one"), TARGETS[0], FORMATS["int8"])
        assert program.tensor("y").dtype.numpy == expected


@pytest.mark.parametrize("name", sorted(FORMATS))
@pytest.mark.parametrize(("spelling", "lead"), [("MatMul", [2]), ("MatMul, Add", [2, 1, 2])], ids=str)
def test_a_batch_is_a_product_of_all_its_rows(spelling: str, lead: list[int], name: str) -> None:
    """Every row is quantised and multiplied as if it were alone."""
    random, (m, k, n) = np.random.default_rng(5), (4, 40, 24)
    weight = random.standard_normal((k, n), dtype=np.float32)
    x, bias = random.standard_normal((*lead, m, k), dtype=np.float32), random.standard_normal(n, dtype=np.float32)
    whole = from_model(product(spelling, lead, m, weight, bias), Path("."), "one")
    program = compiled(whole, TARGETS[0], FORMATS[name])
    assert program.hosts == ()
    assert [op.m for op in program.ops if op.kind == "linear"] == [math.prod(lead) * m]
    y = result(whole, program, TARGETS[0], x).reshape(-1, m, n)
    single = from_model(product(spelling, [1], m, weight, bias), Path("."), "one")
    one = compiled(single, TARGETS[0], FORMATS[name])
    for part, rows in zip(y, x.reshape(-1, m, k), strict=True):
        np.testing.assert_allclose(part, result(single, one, TARGETS[0], rows), rtol=1e-6, atol=1e-6)
