"""Nothing costs nothing: every ONNX node is in an operator, every operator runs, what is not modelled is refused."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from chain import Chain

from firsttoken.student import StudentConfig
from firsttoken_compiler.errors import StudentError
from firsttoken_compiler.frontend.onnx_file import OnnxStudent, from_model, open_student
from firsttoken_compiler.isa.program import Program
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
        assert row.compute_cycles + row.dma_cycles > 0, f"{op.name} takes no time"
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


@pytest.mark.parametrize(
    ("operator", "domain"),
    [
        ("MatMulNBits", "com.microsoft"), ("GroupQueryAttention", "com.microsoft"), ("QLinearMatMul", ""),
        ("MatMulInteger", ""), ("Conv", ""), ("MakeBelieve", "my.own"),
    ],
)  # fmt: skip
def test_what_is_not_modelled_is_refused_by_name(operator: str, domain: str) -> None:
    """Other simulators give some of these 0 cycles and exit code 0."""
    info = onnx.helper.make_tensor_value_info
    weight = onnx.numpy_helper.from_array(np.ones((8, 8), np.float32), "w")
    node = onnx.helper.make_node(operator, ["x", "w"], ["y"], name="the_node", domain=domain)
    graph = onnx.helper.make_graph([node], "g", [info("x", 1, [1, 4, 8])], [info("y", 1, [1, 4, 8])], [weight])
    opsets = [onnx.helper.make_opsetid(name, 18 if not name else 1) for name in {"", domain}]
    student = from_model(onnx.helper.make_model(graph, opset_imports=opsets), Path("."), "odd")
    with pytest.raises(StudentError, match="the_node"):
        compile_onnx(student, load_target("systolic-128"), resolve("int8", None, "channel", None))
