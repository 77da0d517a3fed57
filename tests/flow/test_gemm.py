"""One MatMul from ONNX to exact numbers and cycles: the four products that other simulators were run on."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from firsttoken_compiler.codegen.weights import materialise, quantise
from firsttoken_compiler.frontend.onnx_file import from_model
from firsttoken_compiler.options import resolve
from firsttoken_compiler.pipeline import compile_onnx
from firsttoken_compiler.target.load import load_target
from firsttoken_simulator.functional import FunctionalMachine
from firsttoken_simulator.machine import simulate_program


def report() -> Any:
    """The script that writes reports/gemm, as a module."""
    path = Path(__file__).resolve().parents[2] / "reports" / "gemm.py"
    spec = importlib.util.spec_from_file_location("report_gemm", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


GEMM = report()


@pytest.mark.parametrize("index", range(4))
def test_cycles_lie_between_the_bound_and_onnxim(index: int) -> None:
    found = GEMM.measure(GEMM.SHAPES[index])
    m, k, n = found.shape
    assert found.compute_bound == m * k * n // (128 * 128)
    assert found.dram_bound == k * n // 68
    print(f"{found.shape}: {found.cycles} cycles, bound {found.dram_bound}, ONNXim {GEMM.ONNXIM[index]}")
    alone = 1.1 if m == 1 else 1.0  # tiles are chosen for a product among others, whose transfers cover its first tile
    assert max(found.compute_bound, found.dram_bound) <= found.cycles <= alone * GEMM.ONNXIM[index]


@pytest.mark.parametrize("target", ["systolic-128", "snapdragon-x-elite"])
@pytest.mark.parametrize(("m", "k", "n"), [(1, 96, 70), (13, 131, 257), (64, 64, 33)])
@pytest.mark.parametrize("weights", ["fp16", "int8", "int4"])
def test_a_single_product_computes_what_it_says(target: str, m: int, k: int, n: int, weights: str) -> None:
    machine, random = load_target(target), np.random.default_rng(m + k + n)
    x, w = random.standard_normal((m, k)).astype(np.float32), random.standard_normal((k, n)).astype(np.float32)
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"], name="gemm")], "gemm", [info("x", 1, [m, k])],
        [info("y", 1, [m, n])], [onnx.numpy_helper.from_array(w, "w")],
    )  # fmt: skip
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    student = from_model(model, Path("."), "gemm")
    program = compile_onnx(student, machine, resolve(weights, None, "channel", None))
    assert program is not None
    timeline = simulate_program(program, machine)
    assert int(timeline.macs.sum()) == m * k * n
    functional = FunctionalMachine(program, machine)
    materialise(program, student.array, functional.write_bytes)
    tensor = program.tensor("x")
    functional.write_tensor("x", x.astype(tensor.dtype.numpy).reshape(tensor.shape))
    functional.run(timeline.completion_order)
    y = functional.read_tensor("y").reshape(m, n)
    half = x.astype(np.float16).astype(np.float32)
    if weights == "fp16":
        expected = half @ w.astype(np.float16).astype(np.float32)
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-4)
        return
    q, scales = quantise(w, int(weights[3:]), k)
    scale = np.maximum(np.abs(half).max(axis=1, keepdims=True), np.float32(1e-12)) * np.float32(1 / 127)
    a = np.rint(half * (np.float32(1) / scale)).astype(np.int64)
    sums = (a @ q.astype(np.int64)).astype(np.float32)  # exact: the machine's int32 sums, widened once
    np.testing.assert_allclose(y, sums * scale * scales.astype(np.float32), rtol=1e-6)
