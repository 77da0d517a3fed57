"""Graphs that NPU and host compute together: numbers beside onnxruntime, order, time, energy, and lost waits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from firsttoken.execution import load
from firsttoken_compiler.codegen.verify import verify
from firsttoken_compiler.errors import ProgramError
from firsttoken_compiler.frontend.onnx_file import OnnxStudent, open_student
from firsttoken_compiler.frontend.partition import EMBEDDED_BYTES
from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.host import HostRun
from firsttoken_compiler.isa.program import Program
from firsttoken_compiler.isa.types import ENGINES_PER_CORE, Engine
from firsttoken_compiler.options import resolve
from firsttoken_compiler.pipeline import compile_onnx
from firsttoken_compiler.target.load import load_target
from firsttoken_simulator.energy import energy
from firsttoken_simulator.machine import simulate_program
from firsttoken_simulator.report.build import build_run

TARGET = load_target("systolic-128")
PRECISIONS = {"fp16": resolve("fp16", None, "channel", None), "int8": resolve("int8", "int8", "channel", None)}
WITHIN = {"fp16": 5e-3, "int8": 5e-2}
"""Of the largest value of an output."""


def matrix(*shape: int, seed: int = 1) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    return np.asarray(values * np.float32(shape[0] ** -0.5), np.float32)


WEIGHTS: dict[str, Callable[[], np.ndarray]] = {
    "w": lambda: matrix(16, 16), "v": lambda: matrix(16, 16, seed=2), "one": lambda: np.array(1),
    "lengths": lambda: np.array([3]), "lengths2": lambda: np.array([2, 4]), "half": lambda: np.array(0.5, np.float32),
    "big": lambda: matrix(4, 3 * 1024, seed=3).reshape(1, 4, 3072), "k": lambda: np.array([2]),
    "columns": lambda: np.array([0, 5, 3, 9]),
}  # fmt: skip
REVERSE = "ReverseSequence<batch_axis=0, time_axis=1>"
CASES = {
    "one node between products": (
        "(float[1,4,16] x) => (float[1,4,16] y)", f"p = MatMul(x, w) q = {REVERSE}(p, lengths) y = MatMul(q, v)", 1,
    ),
    "segments alternate with products": (
        "(float[1,4,16] x) => (float[1,4,16] y)",
        "a = CumSum(x, one) b = MatMul(a, w) c = CumSum(b, one) d = MatMul(c, v) y = CumSum(d, one)", 3,
    ),
    "a segment of branches and a product beside it": (
        "(float[1,4,16] x) => (float[1,4,16] y, float[1,4,16] z)",
        f"a = {REVERSE}(x, lengths) b = CumSum(x, one) z = MatMul(x, w) c = {REVERSE}(b, lengths) d = Add(a, c) "
        "y = MatMul(d, v)", 1,
    ),
    "a batch": (
        "(float[2,4,16] x) => (float[2,4,16] y)", f"p = MatMul(x, w) q = {REVERSE}(p, lengths2) y = MatMul(q, v)", 1,
    ),
    "a transpose across rows": (
        "(float[2,4,16] x) => (float[4,2,16] y)",
        "p = MatMul(x, w) t = Transpose<perm=[1,0,2]>(p) q = CumSum(t, one) y = MatMul(q, v)", 1,
    ),
    "heads, read by their strides": (
        "(float[1,4,16] x) => (float[1,2,4,8] y)",
        "p = MatMul(x, w) h = Reshape(p, heads) t = Transpose<perm=[0,2,1,3]>(h) y = CumSum(t, one)", 1,
    ),
    "the host first and last": (
        "(float[1,4,16] x) => (float[1,4,2] y, int64[1,4,2] i)",
        "a = CumSum(x, one) p = MatMul(a, w) y, i = TopK(p, k)", 2,
    ),
    "float64": (
        "(float[1,4,16] x, double[1,4,16] z) => (float[1,4,16] y, double[1,4,16] s)",
        "s = CumSum(z, one) d = Cast<to=1>(s) a = MatMul(x, w) y = Sub(a, d)", 1,
    ),
    "bytes and bools": (
        "(uint8[1,4,16] u, bool[1,4,16] m, float[1,4,16] x) => (float[1,4,16] y, bool[1,4,16] n, uint8[1,4,16] r)",
        f"r = {REVERSE}(u, lengths) f = Cast<to=1>(r) g = Where(m, f, x) n = Not(m) h = CumSum(g, one) "
        "y = MatMul(h, w)", 2,
    ),
    "indices computed by the host": (
        "(float[1,4,16] x) => (float[1,4,16] y)",
        "a = ArgMax<axis=2, keepdims=0>(x) t = MatMul(x, w) r = GatherElements<axis=2>(t, places) y = Add(r, t)", 1,
    ),
    "an output that is an input": (
        "(float[1,4,16] x, int64[1,4] ids) => (float[1,4,16] y, int64[1,4] ids_again)",
        "y = MatMul(x, w) ids_again = Identity(ids)", 1,
    ),
    "a large initialiser": (
        "(float[1,4,16] x) => (float[1,4,16] y, float[1,4,3072] z)",
        "p = MatMul(x, w) z = ScatterElements<axis=2>(big, places, p) c = CumSum(p, one) y = MatMul(c, v)", 1,
    ),
}  # fmt: skip
EXTRA = {"heads": np.array([1, 4, 2, 8]), "places": np.arange(64).reshape(1, 4, 16) % 16}


def built(name: str) -> onnx.ModelProto:
    signature, body, _ = CASES[name]
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 18]> mixed {signature} {{ {body} }}')
    arrays = {**EXTRA, **{key: make() for key, make in WEIGHTS.items()}}
    read = {value for node in model.graph.node for value in node.input} - {value.name for value in model.graph.input}
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(arrays[key], key) for key in sorted(read & set(arrays))
    )
    onnx.checker.check_model(model)
    return model


def fed(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    random, feeds = np.random.default_rng(7), {}
    for value in model.graph.input:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        feeds[value.name] = (random.integers(0, 2 if dtype.kind == "b" else 90, shape) if dtype.kind in "iub" else
                             random.standard_normal(shape)).astype(dtype)  # fmt: skip
    return feeds


def compiled(student: OnnxStudent, precision: str) -> Program:
    program = compile_onnx(student, TARGET, PRECISIONS[precision])
    assert program is not None
    return program


def executed(student: OnnxStudent, program: Program, feeds: dict[str, np.ndarray], ordered: bool) -> dict[str, Any]:
    loaded = load(program, simulate_program(program, TARGET), student, TARGET)
    results = loaded.run(feeds)
    if ordered:
        loaded.machine.run()
        for name, values in results.items():
            tensor = loaded.machine.read_tensor(name)
            assert tensor.reshape(values.shape).astype(values.dtype).tobytes() == values.tobytes(), name
    return results


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", CASES)
def test_numbers_are_onnxruntimes(name: str, precision: str, tmp_path: Path) -> None:
    """In the order of completion and in program order, through the compiler's own file format."""
    model, feeds = built(name), fed(built(name))
    (tmp_path / "student.onnx").write_bytes(model.SerializeToString())
    student = open_student(tmp_path / "student.onnx")
    program = Program.decode(compiled(student, precision).encode())
    assert len(program.hosts) == CASES[name][2]
    results = executed(student, program, feeds, ordered=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    assert set(results) == set(names)
    for output, expected in zip(names, session.run(names, feeds), strict=True):
        assert (results[output].dtype, results[output].shape) == (expected.dtype, expected.shape)
        if expected.dtype.kind in "iub" and output != "i":
            np.testing.assert_array_equal(results[output], expected, err_msg=output)
        elif output != "i":  # near numbers may change places
            bound = WITHIN[precision] * max(1.0, float(np.abs(expected).max()))
            np.testing.assert_allclose(results[output], expected, rtol=0, atol=bound, err_msg=output)


def test_operands_of_the_host_keep_the_type_of_their_memory(tmp_path: Path) -> None:
    onnx.save(built("bytes and bools"), tmp_path / "student.onnx")
    calls = compiled(open_student(tmp_path / "student.onnx"), "fp16").hosts
    types = {value.name: value.dtype.text for call in calls for value in (*call.inputs, *call.outputs)}
    floats = {types.pop(name) for name in ("f", "g")}
    assert floats <= {"f16", "f32"}
    assert types == {"u": "u8", "r": "u8", "h": "f16"}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_large_initialiser_may_be_absent_until_it_is_read(precision: str, tmp_path: Path) -> None:
    """It is no part of the program: with and without its data the program is the same but for small constants."""
    model = built("a large initialiser")
    (big,) = [tensor for tensor in model.graph.initializer if tensor.name == "big"]
    assert len(big.raw_data) > EMBEDDED_BYTES
    feeds, whole = fed(model), model.SerializeToString()
    onnx.save(model, tmp_path / "student.onnx", save_as_external_data=True, location="big.bin", size_threshold=9999)
    assert (tmp_path / "big.bin").stat().st_size == 4 * 3072 * 4
    student = open_student(tmp_path / "student.onnx")
    program = compiled(student, precision)
    assert [value.name for value in program.hosts[0].inputs][-1] == "big"
    assert len(program.hosts[0].model) < EMBEDDED_BYTES
    expected = onnxruntime.InferenceSession(whole, providers=["CPUExecutionProvider"]).run(["z"], feeds)[0]
    found = executed(student, program, feeds, ordered=False)["z"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=WITHIN[precision] * float(np.abs(expected).max()))
    (tmp_path / "big.bin").unlink()
    bare = compiled(open_student(tmp_path / "student.onnx"), precision)
    assert bare.encode() == program.encode()
    assert simulate_program(bare, TARGET).total_fs == simulate_program(program, TARGET).total_fs


@pytest.fixture(scope="module")
def alternating(tmp_path_factory: pytest.TempPathFactory) -> Program:
    path = tmp_path_factory.mktemp("host") / "student.onnx"
    onnx.save(built("segments alternate with products"), path)
    return compiled(open_student(path), "int8")


def test_time_of_the_host_is_in_the_run_and_adds_up(alternating: Program) -> None:
    line = simulate_program(alternating, TARGET)
    run = build_run(alternating, line, TARGET, energy(alternating, line, TARGET))
    host = TARGET.host
    work = [max(c.flops / host.flops, c.nbytes / host.bytes_per_s) for c in alternating.hosts]
    calls = [seconds + host.fallback_us * 1e-6 for seconds in work]
    moved = [v.dtype.nbytes(64) / host.bytes_per_s for c in alternating.hosts for v in (*c.inputs, *c.outputs)]
    assert sum(call.ms for call in run.host_calls) == pytest.approx((sum(calls) + sum(moved)) * 1e3, rel=1e-6)
    assert run.npu_ms > 3 * host.fallback_us / 1e3
    assert run.host_fallbacks == ["CumSum#0", "CumSum#2", "CumSum#4"]
    edges = len(alternating) * line.period_fs / 1e12  # instructions start on clock edges
    assert run.time_by_bound_ms["host_fallback"] <= sum(call.ms for call in run.host_calls) + edges
    assert sum(run.time_by_bound_ms.values()) == pytest.approx(run.ttft_ms)
    assert sum(row.cycles for row in run.ops) + run.host_cycles == run.ttft_cycles
    assert sum(row.energy_nj for row in run.ops) + run.dispatch_energy_nj == pytest.approx(run.energy_mj * 1e6)
    assert sum(run.dram_bytes_by_kind.values()) == run.dram_read_bytes + run.dram_write_bytes
    on_host = alternating.code[:, word.OPCODE] == HostRun.OPCODE
    assert (np.diff(line.start_fs[on_host]) > line.busy_fs[on_host][:-1]).all()  # products lie between


def test_every_wait_around_the_host_is_needed(alternating: Program) -> None:
    """As for the NPU's own queues in test_mutation.py: without it the verifier names both instructions."""
    verify(alternating, TARGET)
    code, waited = alternating.code, 0
    host = 1 + int(Engine.HOST)
    for column in range(word.WAITS, word.WAITS + 2 * word.MAX_WAITS, 2):
        mine = code[:, word.QUEUE] % ENGINES_PER_CORE == Engine.HOST
        for number in np.flatnonzero((code[:, column] > 0) & (mine | (code[:, column] == host))).tolist():
            lost = code.copy()
            lost[number, column : column + 2] = 0
            with pytest.raises(ProgramError, match=rf"instruction {number}: is not ordered after instruction \d+"):
                verify(alternating.with_code(lost), TARGET)
            waited += 1
    assert waited >= 4  # each product waits for a call, each call but the first for a product


def test_every_call_of_the_host_is_an_operator_of_its_nodes(alternating: Program) -> None:
    operators = [op for op in alternating.ops if op.kind == "host"]
    assert [op.onnx_nodes for op in operators] == [call.nodes for call in alternating.hosts]
    for number, op in enumerate(operators):
        rows = alternating.code[op.first : op.last]
        assert (rows[:, word.FLAGS] >> 16 == number).all()
        assert (rows[:, word.QUEUE] == Engine.HOST).all()
