"""ONNX files with open dimensions: lengths, the token after a cache, a program per length, what decides a graph."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from firsttoken import api
from firsttoken.buckets import bucket_path, bucket_row, prompt_lengths, weight_bytes
from firsttoken.cli import app
from firsttoken.subject import File, subject_of
from firsttoken_compiler.errors import OptionError
from firsttoken_compiler.isa.program import Program

ROUTES = Path(__file__).parents[1] / "fixtures" / "routes"
PREFILL = ROUTES / "dynamo18-llama-kv-fp32-dynamic-sdpa-tf4" / "model.onnx"
STEP = ROUTES / "optimum-llama-with-past-decode" / "model.onnx"
STATIC = ROUTES / "script11-llama-additive-fp32-static-eager" / "model.onnx"
IF = ROUTES / "if-static" / "model.onnx"
TARGET = "systolic-128"


def test_open_dimensions_take_what_is_asked_for() -> None:
    file = File(PREFILL)
    assert file.lengths(None, None) == (64, 0)
    assert file.lengths(5, 0) == (5, 0)
    assert File(PREFILL, (("sequence_length", 9),)).lengths(None, None) == (9, 0)
    assert File(STEP).lengths(3, 11) == (3, 11)
    graph = File(STEP).open(3, 11).graph
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*graph.input, *graph.output)}
    assert shapes["input_ids"] == [1, 3]
    assert shapes["past_key_values.0.key"][2] == 11
    assert shapes["present.0.key"][2] == 14
    assert shapes["attention_mask"] == [1, 14]
    assert "past_key_values.0.key" not in {value.name for value in File(STEP).open(3, 0).graph.input}


@pytest.mark.parametrize(
    ("path", "prompt", "past", "bind", "message"),
    [
        (PREFILL, 5, 3, {}, r"--past 3: the graph of .*model.onnx reads no cache: leave --past away"),
        (PREFILL, 5, 0, {"sequence_length": 6}, r"--prompt 5 contradicts .*, whose graph is for 6: leave --prompt"),
        (IF, None, None, {}, r"1 dimensions of the inputs have no value:\n  'rows' of 'x'\n  remedy: .*--bind rows=64"),
        (IF, None, None, {"lines": 3}, r"--bind 'lines': model has no such dimension, its open dimensions are 'rows'"),
        (STATIC, None, None, {"batch": 1}, r"--bind 'batch': .* all its shapes are static"),
    ],
)
def test_lengths_that_cannot_be(
    path: Path, prompt: int | None, past: int | None, bind: dict[str, int], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        subject_of(path, bind).lengths(prompt, past)


def test_only_files_have_open_dimensions() -> None:
    with pytest.raises(OptionError, match=r"--bind batch: smollm2-135m is no ONNX file"):
        subject_of("smollm2-135m", {"batch": 1})


def test_bindings_are_part_of_the_content() -> None:
    contents = {File(IF, bind).content() for bind in ((), (("rows", 16),), (("rows", 17),))}
    assert len(contents) == 3


def test_one_file_serves_the_prompt_and_the_next_token() -> None:
    run = api.run(STEP, TARGET, prompt=6, decode=3, cache=False)
    assert (run.prompt_tokens, run.past) == (6, 0)
    assert run.decode is not None
    step = api.run(STEP, TARGET, prompt=1, past=8, cache=False)
    assert run.tpot_ms == step.ttft_ms
    assert step.past == 8


@pytest.mark.parametrize(
    ("path", "missing"), [(STATIC, "tokens and cached rows"), (PREFILL, "cached rows"), (IF, "tokens and cached rows")]
)
def test_other_files_have_no_next_token(path: Path, missing: str) -> None:
    with pytest.raises(OptionError, match=rf"--decode needs .* the number of {missing} is static or absent: export it"):
        api.run(path, TARGET, decode=1, cache=False, bind={"rows": 16} if path == IF else None)


def test_the_cache_of_results_tells_lengths_and_bindings_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIRSTTOKEN_CACHE", str(tmp_path))
    rows = [api.run(IF, TARGET, bind={"rows": rows}).prompt_tokens for rows in (16, 24, 16)]
    assert rows == [16, 24, 16]
    past = [api.run(STEP, TARGET, prompt=1, past=past).past for past in (4, 6, 4)]
    assert past == [4, 6, 4]


def test_programs_for_several_lengths_share_their_weights() -> None:
    programs = [api.compile(PREFILL, TARGET, prompt=prompt) for prompt in (4, 8, 40)]
    assert [program.meta["prompt_tokens"] for program in programs] == [4, 8, 40]
    whole = [sum(tensor.nbytes for tensor in program.of_kind("weight")) for program in programs]
    sizes = weight_bytes(programs)
    assert sizes["shared_weight_bytes"] <= min(whole)
    assert sizes["weight_bytes"] < 1.05 * max(whole), "not a copy per length"
    assert sizes["shared_weight_bytes"] > 0.95 * min(whole)
    assert weight_bytes(programs[:1]) == {"weight_bytes": whole[0], "shared_weight_bytes": whole[0]}


def test_a_line_per_length() -> None:
    runs = [api.run(PREFILL, TARGET, prompt=prompt, cache=False) for prompt in (4, 8)]
    lines = [bucket_row(run) for run in runs]
    assert [line[0] for line in lines] == ["4", "8"]
    assert [line[1] for line in lines] == [f"{run.ttft_ms:.3f}" for run in runs]
    assert lines[0][5] == "-"


def test_texts_of_several_lengths() -> None:
    assert prompt_lengths([]) == [None]
    assert prompt_lengths(["64"]) == [64]
    assert prompt_lengths(["128, 64", "512", "64"]) == [64, 128, 512]
    for text in ("0", "-1", "x", "1,", "", "1.5", "99999999", "\N{SUPERSCRIPT TWO}"):
        with pytest.raises(OptionError, match=r"'--prompt' .*: give the number of tokens, 1 to 1048576, or several"):
            prompt_lengths([text])
    with pytest.raises(OptionError, match="'--prompt' gives 65 lengths, at most 64"):
        prompt_lengths([",".join(map(str, range(1, 66)))])
    assert bucket_path(Path("a/student.npu"), 64) == Path("a/student-64.npu")


def scaled(folder: Path, elements: int) -> Path:
    """y = x * sin(w), w outside the file."""
    folder.mkdir()
    nodes = [helper.make_node("Sin", ["w"], ["s"]), helper.make_node("Mul", ["x", "s"], ["y"])]
    inputs, outputs = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, elements])] for name in ("x", "y")
    )  # fmt: skip
    weight = numpy_helper.from_array(np.ones(elements, np.float32), "w")
    model = helper.make_model(
        helper.make_graph(nodes, "g", inputs, outputs, [weight]), opset_imports=[helper.make_opsetid("", 18)],
        ir_version=10,
    )  # fmt: skip
    onnx.save(model, folder / "m.onnx", save_as_external_data=True, size_threshold=0, location="m.data")
    return folder / "m.onnx"


def test_small_constants_outside_the_file_decide_the_graph(tmp_path: Path) -> None:
    """They are computed with, so that results of such a graph are not kept under the content of the file alone."""
    small, large = File(scaled(tmp_path / "a", 64)), File(scaled(tmp_path / "b", 8192))
    assert [node.op_type for node in small.open(4, 0).graph.node] == ["Mul"]
    assert [node.op_type for node in large.open(4, 0).graph.node] == ["Sin", "Mul"]
    assert (small.self_contained, large.self_contained) == (False, True)
    (tmp_path / "a" / "m.data").unlink()
    assert [node.op_type for node in File(small.path).open(4, 0).graph.node] == ["Sin", "Mul"]


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIRSTTOKEN_CACHE", str(tmp_path / "cache"))
    asked = [str(PREFILL), "--target", TARGET, "--prompt", "4,8", "--bind", "batch=1"]
    runner = CliRunner()
    several = runner.invoke(app, ["run", *asked, "-o", str(tmp_path / "out"), "--json"], catch_exceptions=False)
    documents = json.loads(several.stdout)
    assert [document["prompt_tokens"] for document in documents] == [4, 8]
    kept = [json.loads((tmp_path / "out" / f"prompt-{n}" / "run.json").read_text()) for n in (4, 8)]
    assert kept == documents
    table = runner.invoke(app, ["run", *asked], catch_exceptions=False).stdout
    assert all(f"{document['ttft_cycles']:,}" in table for document in documents)
    one = runner.invoke(app, ["run", str(IF), "--target", TARGET, "--bind", "rows=9", "--json"], catch_exceptions=False)
    assert json.loads(one.stdout)["prompt_tokens"] == 9
    made = runner.invoke(app, ["compile", *asked, "-o", str(tmp_path / "s.npu"), "--json"], catch_exceptions=False)
    facts = json.loads(made.stdout)
    assert [Program.load(Path(name)).meta["prompt_tokens"] for name in facts["program"]] == [4, 8]
    assert facts["shared_weight_bytes"] <= facts["weight_bytes"]
    step = ["compile", str(STEP), "--prompt", "2", "--past", "7", "-o", str(tmp_path / "t.npu")]
    assert runner.invoke(app, step, catch_exceptions=False).exit_code == 0
    assert Program.load(tmp_path / "t.npu").meta["past"] == 7
