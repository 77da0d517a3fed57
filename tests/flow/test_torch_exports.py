"""What torch.onnx.export (dynamo) writes, through the whole compiler: onnxruntime's numbers, no node left out."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from firsttoken_compiler.codegen.weights import materialise
from firsttoken_compiler.frontend.onnx_file import open_student
from firsttoken_compiler.options import resolve
from firsttoken_compiler.pipeline import compile_onnx
from firsttoken_compiler.target.load import load_target
from firsttoken_simulator.functional import FunctionalMachine
from firsttoken_simulator.machine import simulate_program

EXPORTS = sorted((Path(__file__).resolve().parents[1] / "fixtures" / "torch").glob("*.onnx"))


@pytest.mark.parametrize("path", EXPORTS, ids=lambda path: path.stem)
def test_logits_and_provenance(path: Path) -> None:
    student, target = open_student(path), load_target("systolic-128")
    program = compile_onnx(student, target, resolve("fp16", None, "128", None))
    assert program is not None
    covered = {node for op in program.ops for node in op.onnx_nodes}
    assert {node.name for node in student.graph.node} <= covered
    assert all(op.first < op.last for op in program.ops)  # nothing is free
    assert [op.first for op in program.ops[1:]] == [op.last for op in program.ops[:-1]]

    timeline = simulate_program(program, target)
    machine = FunctionalMachine(program, target)
    materialise(program, student.array, machine.write_bytes)
    ids = np.random.default_rng(0).integers(0, 128, (1, 16))
    machine.write_tensor("input_ids", ids.reshape(program.tensor("input_ids").shape))
    machine.run(timeline.completion_order)
    ours = machine.read_tensor("logits").ravel()
    reference = onnxruntime.InferenceSession(str(path)).run(None, {"input_ids": ids})[0].ravel()
    cosine = float(ours @ reference / np.linalg.norm(ours) / np.linalg.norm(reference))
    assert cosine >= 0.9999


def test_there_are_exports_of_both_families() -> None:
    assert {path.stem.split("-")[0] for path in EXPORTS} == {"llama", "qwen2"}
