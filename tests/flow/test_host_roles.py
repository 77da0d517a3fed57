"""The token table and the head on the CPU because that was asked for: numbers, bytes, time; and heads of other bits."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from students import LLAMA, QWEN2

from firsttoken import RunOptions
from firsttoken.api import compile as compile_student
from firsttoken.execution import load
from firsttoken.generation import ort_session, token_feeds
from firsttoken.options import WeightRule
from firsttoken.student import StudentConfig
from firsttoken_compiler.errors import OptionError, StudentError
from firsttoken_compiler.frontend.onnx_file import from_model
from firsttoken_compiler.isa.host_call import COPIED
from firsttoken_compiler.isa.program import Program
from firsttoken_compiler.pipeline import compile_onnx
from firsttoken_compiler.target.load import load_target
from firsttoken_models.onnx_graph import build_graph
from firsttoken_models.students import STUDENTS
from firsttoken_models.weights import write_random_weights
from firsttoken_simulator.energy import energy
from firsttoken_simulator.machine import simulate_program

TARGET = load_target("systolic-128")
IDS = [3, 1, 4, 1, 5]
BOTH = ("token_embd", "output")
ROLES = [("token_embd",), ("output",), BOTH]
HALF = RunOptions(weights="fp16")
SMALL = replace(STUDENTS["smollm2-135m"], layers=1)


def logits_of(config: StudentConfig, folder: Path, options: RunOptions) -> tuple[Program, Any, Any]:
    """The program, what the machine computes, and what onnxruntime computes of the float32 graph."""
    weights = write_random_weights(config, folder)
    model = build_graph(config, tokens=len(IDS), past=0, weights=weights)
    feeds = token_feeds(IDS)
    expected = ort_session(model, weights, threads=1).run(["logits"], feeds)[0]
    student = from_model(model, folder, config.name)
    program = compile_onnx(student, TARGET, options.precision())
    assert program is not None
    found = load(program, simulate_program(program, TARGET), student, TARGET).run(feeds)["logits"]
    return program, found, expected


@pytest.mark.parametrize("tiny", [LLAMA, QWEN2], ids=["one table", "two tables"])
@pytest.mark.parametrize("roles", ROLES, ids="+".join)
def test_the_host_computes_its_part_in_float32(tiny: StudentConfig, tmp_path: Path, roles: tuple[str, ...]) -> None:
    program, found, expected = logits_of(tiny, tmp_path, replace(HALF, host_roles=roles))
    reasons = [call.reason for call in program.hosts]
    assert len(reasons) == len(roles)
    assert all(f"--host-roles {role}" in reason for role, reason in zip(roles, reasons, strict=True))
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, atol=5e-3 * scale)


@pytest.mark.parametrize("roles", ROLES, ids="+".join)
def test_weights_are_read_where_they_lie_on_the_host(roles: tuple[str, ...]) -> None:
    def made(bits: float) -> Program:
        program: Program = compile_student(
            SMALL, TARGET, prompt=16, options=replace(HALF, host_roles=roles, host_weight_bits=bits)
        )
        return program

    program = made(4.5)
    rows, every = 16 * SMALL.hidden * 4.5 / 8, SMALL.vocab * SMALL.hidden * 4.5 / 8
    reads = [value.reads for call in program.hosts for value in call.inputs if value.reads != COPIED]
    assert reads == [rows if role == "token_embd" else every for role in roles]
    for role, call in zip(roles, program.hosts, strict=True):
        beside = call.nbytes - (rows if role == "token_embd" else every)
        assert 0 < beside < 4 * (SMALL.vocab + SMALL.hidden) + 16 * (4 * SMALL.hidden + 8) + 1
        assert call.flops < 2 * SMALL.vocab * SMALL.hidden + 1
    slow = simulate_program(made(31.5), TARGET).total_fs - simulate_program(program, TARGET).total_fs
    assert slow / 1e15 == pytest.approx(6 * sum(reads) / TARGET.host.bytes_per_s, rel=0.02, abs=2e-7)
    timeline = simulate_program(program, TARGET)
    assert energy(program, timeline, TARGET).total_mj > 0
    assert Program.decode(program.encode()).hosts == program.hosts


def test_without_the_option_nothing_goes_to_the_host() -> None:
    program = compile_student(SMALL, TARGET, prompt=16, options=HALF)
    assert program.hosts == ()
    placed = compile_student(SMALL, TARGET, prompt=16, options=replace(HALF, host_roles=("output",)))
    macs = [sum(op.macs for op in made.ops) for made in (program, placed)]
    assert macs[0] - macs[1] == SMALL.vocab * SMALL.hidden


def test_roles_that_a_graph_does_not_have_are_refused() -> None:
    with pytest.raises(StudentError, match="--host-roles output: the graph returns no product as wide"):
        compile_student("minilm-l6", TARGET, prompt=4, options=replace(HALF, host_roles=("output",)))
    with pytest.raises(OptionError, match="--host-roles has 'attn_q': the host computes token_embd, output"):
        RunOptions(host_roles=("attn_q",))
    with pytest.raises(OptionError, match="--host-weight-bits 64"):
        RunOptions(host_roles=("output",), host_weight_bits=64)


@pytest.mark.parametrize("tiny", [LLAMA, QWEN2], ids=["one table", "two tables"])
@pytest.mark.parametrize("acts", ["int16", "fp16"])
def test_an_int8_head_beside_an_int4_body(tiny: StudentConfig, tmp_path: Path, acts: str) -> None:
    made = {}
    for head in ("int4", "int8", "fp16"):
        rules = (WeightRule("output", head),)
        options = RunOptions(weights="int4", acts=acts, group="32", rules=rules)
        program, made[head], _ = logits_of(tiny, tmp_path, options)
        assert head in str(program.meta["weight_formats"])
    whole = float(np.linalg.norm(made["fp16"]))
    errors = {head: float(np.linalg.norm(logits - made["fp16"])) / whole for head, logits in made.items()}
    assert errors["int8"] < 0.02
    assert errors["int8"] < errors["int4"] / 4, "the rest of the graph is the same in all"
