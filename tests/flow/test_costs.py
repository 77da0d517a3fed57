"""Nothing costs nothing: every ONNX node is in an operator, every operator runs, what is not modelled is the host's."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from chain import Chain

from firsttoken.student import StudentConfig
from firsttoken_compiler.errors import StudentError
from firsttoken_compiler.frontend.onnx_file import OnnxStudent, from_model, open_student
from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.program import Program
from firsttoken_compiler.isa.types import ENGINES_PER_CORE, Engine
from firsttoken_compiler.options import resolve
from firsttoken_compiler.pipeline import compile_onnx
from firsttoken_compiler.target.load import load_target
from firsttoken_compiler.target.target import Target
from firsttoken_simulator.energy import energy
from firsttoken_simulator.machine import simulate_program
from firsttoken_simulator.report.build import build_run

TORCH = sorted((Path(__file__).resolve().parents[1] / "fixtures" / "torch").glob("*.onnx"))
CONFIG = StudentConfig(
    name="small", family="qwen2", hidden=51, intermediate=90, layers=2, heads=4, kv_heads=2, head_dim=10, vocab=77,
    rope_theta=1e4, max_positions=64, rms_eps=1e-5, tie_embeddings=False, qkv_bias=True, source="made up for tests",
)  # fmt: skip


def assert_nothing_is_free(student: OnnxStudent, program: Program, target: Target) -> None:
    covered = {node for op in program.ops for node in op.onnx_nodes}
    assert {node.name for node in student.graph.node} <= covered, "an ONNX node that no operator names"
    assert program.ops[0].first == 0
    assert program.ops[-1].last == len(program)
    assert all(a.last == b.first for a, b in pairwise(program.ops)), "instructions of no operator, or of two"
    line = simulate_program(program, target)
    run = build_run(program, line, target, energy(program, line, target))
    for op, row in zip(program.ops, run.ops, strict=True):
        assert op.last > op.first, f"{op.name} has no instructions"
        assert int(line.busy_fs[op.first : op.last].sum()) > 0, f"{op.name} keeps no unit busy"
        moved = row.dram_read_bytes + row.dram_write_bytes + row.sram_read_bytes + row.sram_write_bytes
        assert moved > 0, f"{op.name} moves no bytes"
        assert row.compute_cycles + row.dma_cycles > 0 or op.kind == "host", f"{op.name} takes no time"
        assert row.energy_nj > 0, f"{op.name} takes no energy"
        assert row.cycles > 0 or row.bound == "hidden", f"{op.name} takes no time and is not hidden"
        assert (row.macs > 0) == (op.kind in ("linear", "attention")), f"{op.name}: {row.macs} products"
        assert int(line.macs[op.first : op.last].sum()) == row.macs == op.macs, f"{op.name} multiplies something else"


@pytest.mark.parametrize("target", ["systolic-128", "snapdragon-x-elite"])
@pytest.mark.parametrize("past", [0, 7])
@pytest.mark.parametrize("weights", ["fp16", "int8", "int4"])
def test_every_operator_of_a_student_costs(target: str, past: int, weights: str, tmp_path: Path) -> None:
    machine = load_target(target)
    chain = Chain(CONFIG, 5, past, resolve(weights, None, "32", None), machine, tmp_path)
    assert_nothing_is_free(chain.student, chain.program, machine)


@pytest.mark.parametrize("path", TORCH, ids=lambda path: path.stem)
def test_every_operator_of_an_export_costs(path: Path) -> None:
    machine, student = load_target("snapdragon-x-elite"), open_student(path)
    program = compile_onnx(student, machine, resolve("int8", None, "channel", None))
    assert program is not None
    assert_nothing_is_free(student, program, machine)


NOT_MODELLED = {
    "CumSum": "y = CumSum(x, one)",
    "ReverseSequence": "y = ReverseSequence<batch_axis=0, time_axis=1>(x, lengths)",
    "com.microsoft::Trilu": "y = com.microsoft.Trilu(x)",
}


def not_modelled(operator: str) -> OnnxStudent:
    """One node that the NPU has nothing for, named `the_node`, between two products."""
    body = NOT_MODELLED[operator].replace("(x", "(p", 1).replace("y =", "q =")
    text = f"""<ir_version: 10, opset_import: ["" : 18, "com.microsoft" : 1]>
        odd (float[1,4,8] x) => (float[1,4,8] y) <float[1,4,8] p, float[1,4,8] q>
        {{ p = MatMul(x, w) {body} y = MatMul(q, w) }}"""
    model = onnx.parser.parse_model(text)
    model.graph.node[1].name = "the_node"
    arrays = {"w": np.eye(8, dtype=np.float32), "one": np.array(1), "lengths": np.array([3])}
    used = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(a, name) for name, a in arrays.items() if name in used)
    return from_model(model, Path("."), "odd")


@pytest.mark.parametrize("operator", NOT_MODELLED)
def test_what_is_not_modelled_is_named_and_costs_the_host(operator: str) -> None:
    """Other simulators give some of these 0 cycles and exit code 0."""
    machine, precision = load_target("systolic-128"), resolve("int8", None, "channel", None)
    student = not_modelled(operator)
    with pytest.raises(StudentError, match=rf"{operator} \(no NPU operator for .*\): the_node"):
        compile_onnx(student, machine, precision, fallback=False)
    program = compile_onnx(student, machine, precision)
    assert program is not None
    assert [call.nodes for call in program.hosts] == [("the_node",)]
    assert_nothing_is_free(student, program, machine)
    line = simulate_program(program, machine)
    on_host = program.code[:, word.QUEUE] % ENGINES_PER_CORE == Engine.HOST
    assert line.busy_fs[on_host].sum() >= machine.host.fallback_us * 1e9
    assert line.total_fs >= machine.host.fallback_us * 1e9


def test_what_nothing_here_knows_is_refused_by_name() -> None:
    text = """<ir_version: 10, opset_import: ["" : 18, "my.own" : 1]>
        odd (float[1,4,8] x) => (float[1,4,8] y) { y = my.own.MakeBelieve(x) }"""
    model = onnx.parser.parse_model(text)
    model.graph.node[0].name = "the_node"
    with pytest.raises(StudentError, match=r"(?s)my\.own::MakeBelieve.*the_node"):
        compile_onnx(from_model(model, Path("."), "odd"), load_target("systolic-128"), resolve("int8", None, "channel",
                     None), fallback=False)  # fmt: skip
