"""The compiler as a whole: pass names, stopping, dumps, progress, errors; and what it leaves is a verified program."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from cases import TINY

from firsttoken_compiler.codegen.verify import verify
from firsttoken_compiler.errors import OptionError
from firsttoken_compiler.frontend.onnx_file import OnnxStudent, from_model
from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.program import Program, parse_listing
from firsttoken_compiler.isa.types import ENGINES_PER_CORE, Engine
from firsttoken_compiler.options import resolve
from firsttoken_compiler.pipeline import PIPELINE, compile_onnx
from firsttoken_compiler.target.target import Target
from firsttoken_models.onnx_graph import build_graph

TARGET = Target.load("systolic-128")
INT4 = resolve("int4", None, "32", None)


@pytest.fixture(scope="module")
def student() -> OnnxStudent:
    """Without its weights: nothing in the compiler reads them."""
    return from_model(build_graph(TINY, tokens=5, past=3), Path(), "tiny")


def compiled(student: OnnxStudent, target: Target = TARGET, **options: object) -> Program:
    program = compile_onnx(student, target, INT4, **options)  # type: ignore[arg-type]
    assert program is not None
    return program


def test_a_program_is_verified_and_says_what_it_is(student: OnnxStudent) -> None:
    program = compiled(student, meta={"student": "tiny"})
    verify(program, TARGET)
    assert program.meta["student"] == "tiny"
    assert program.hosts == ()
    assert not (program.code[:, word.QUEUE] % ENGINES_PER_CORE == Engine.HOST).any()
    assert program.meta["kv"] == {
        f"past_key_values.{i}.{s}": f"present.{i}.{s}" for i in range(2) for s in ("key", "value")
    }
    assert {t.name for t in program.of_kind("output")} == {"logits"}
    assert {t.name for t in program.of_kind("input")} == {"input_ids", "position_ids", "attention_mask"}


def test_operators_partition_the_instructions(student: OnnxStudent) -> None:
    program = compiled(student)
    assert [op.first for op in program.ops[1:]] == [op.last for op in program.ops[:-1]]
    assert (program.ops[0].first, program.ops[-1].last) == (0, len(program))
    for number, op in enumerate(program.ops):
        assert (program.code[op.first : op.last, word.OP] == number).all()
    names = [op.name for op in program.ops]
    assert len(set(names)) == len(names)
    assert all(op.onnx_nodes for op in program.ops if op.kind in ("linear", "attention", "rms_norm", "swiglu"))


@pytest.mark.parametrize("stop", PIPELINE)
def test_stops_after_any_pass_with_its_dump_and_no_other(student: OnnxStudent, stop: str, tmp_path: Path) -> None:
    seen: list[float] = []
    made = compile_onnx(
        student, TARGET, INT4, stop_after=stop, dump_after=stop, dump_dir=tmp_path,
        progress=lambda _name, done, _total: seen.append(done),
    )  # fmt: skip
    assert made is None
    assert [path.name for path in tmp_path.iterdir()] == [f"{PIPELINE.index(stop):02d}-{stop}.txt"]
    assert seen == sorted(seen)
    assert seen[-1] == PIPELINE.index(stop) + 1


def test_dumps_of_all_passes_are_text_that_names_what_was_made(student: OnnxStudent, tmp_path: Path) -> None:
    program = compiled(student, dump_after="all", dump_dir=tmp_path)
    files = sorted(tmp_path.iterdir())
    assert [path.name for path in files] == [f"{i:02d}-{name}.txt" for i, name in enumerate(PIPELINE)]
    texts = {path.stem[3:]: path.read_text() for path in files}
    assert "RMSNormalization" in texts["specialise"]
    assert "npu.raw_rope" in texts["import"]
    assert "npu.attention" in texts["canonicalise"]
    assert "npu.raw_rope" not in texts["canonicalise"]
    assert 'dtype="int4"' in texts["quantise"]
    assert "resident" in texts["place"]
    assert "# linear" in texts["schedule"]
    code, kernels = parse_listing(texts["emit"])
    assert (code == program.code).all()
    assert kernels == program.kernels
    assert texts["verify"] == texts["emit"]


@pytest.mark.parametrize("option", ["stop_after", "dump_after"])
def test_unknown_passes_are_named_with_the_known_ones(student: OnnxStudent, option: str) -> None:
    known = "specialise, import, canonicalise, .*, verify"
    with pytest.raises(OptionError, match=f"'linking' is no pass; passes are {known}"):
        compile_onnx(student, TARGET, INT4, **{option: "linking"})  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="'all' is no pass"):
        compile_onnx(student, TARGET, INT4, stop_after="all")


def test_a_dump_that_cannot_be_written_is_an_error(student: OnnxStudent, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OptionError, match=r"cannot write to .*file"):
        compile_onnx(student, TARGET, INT4, dump_after="import", dump_dir=tmp_path / "file")


def with_pad(nbytes: int) -> Target:
    return replace(TARGET, name="little", scratchpad=replace(TARGET.scratchpad, bytes=nbytes))


@pytest.mark.parametrize("nbytes", [12 << 10, 24 << 10, 100 << 10])
def test_working_memory_stays_above_the_residents(student: OnnxStudent, nbytes: int) -> None:
    target = with_pad(nbytes)
    target = replace(target, matrix=replace(target.matrix, rows=16, columns=16))
    rates = {pair: 256 for pair in target.matrix.macs_per_cycle}
    target = replace(target, matrix=replace(target.matrix, macs_per_cycle=rates))
    program = compiled(student, target)
    verify(program, target)
    assert program.spad_bytes <= nbytes
