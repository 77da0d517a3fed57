"""firsttoken.subject and firsttoken.options: what a run is about, and every way to ask for what cannot be had."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from firsttoken.options import RunOptions
from firsttoken.student import StudentConfig, UnknownStudent
from firsttoken.subject import Built, File, subject_of
from firsttoken_compiler.errors import OptionError, StudentError
from firsttoken_compiler.options import WeightRule
from firsttoken_models.registry import PROVIDER


def graph_file(path: Path, config: StudentConfig, tokens: int, past: int = 0) -> Path:
    onnx.save(PROVIDER.graph(config, tokens=tokens, past=past), path)
    return path


def test_kinds(llama: StudentConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = graph_file(tmp_path / "s.onnx", llama, 7)
    Path("plain").write_bytes(file.read_bytes())
    Path("smollm2-135m").mkdir()  # a folder of that name does not hide the student
    assert subject_of(llama) == Built(PROVIDER, llama)
    assert subject_of("SmolLM2").name == "smollm2-135m"
    assert subject_of("smollm2-135m").name == "smollm2-135m"
    assert subject_of("s.onnx") == File(Path("s.onnx"))
    assert subject_of(Path("s.onnx")) == File(Path("s.onnx"))
    assert subject_of("plain").lengths(None, None) == (7, 0)


@pytest.mark.parametrize(
    ("student", "error", "message"),
    [
        ("folder", StudentError, "folder is a folder, not a student; give the ONNX file in it"),
        ("smolm2", UnknownStudent, "unknown student 'smolm2'; nearest names: smollm2-135m"),
        ("absent.onnx", StudentError, "no such student: absent.onnx is neither a file nor a built-in name"),
        ("cut.onnx", StudentError, "cut.onnx"),
    ],
)
def test_no_student(
    student: str, error: type[Exception], message: str, llama: StudentConfig, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("cut.onnx").write_bytes(graph_file(tmp_path / "s.onnx", llama, 7).read_bytes()[:999])
    with pytest.raises(error, match=message):
        subject_of(student).lengths(None, None)


def test_unknown_student_crosses_processes() -> None:
    error = UnknownStudent("smolm2", ["smollm2-135m"])
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (UnknownStudent, str(error))


def test_lengths_of_a_configuration(llama: StudentConfig) -> None:
    student = subject_of(llama)
    assert student.lengths(None, None) == (64, 0)
    assert student.lengths(1, 63) == (1, 63)
    for prompt, past, message in (
        (0, None, "--prompt 0: a prompt has at least 1 token"),
        (-3, None, "--prompt -3: "),
        (1, -1, "--past -1: "),
        (65, None, "--prompt 65 exceeds the 64 positions of tiny-llama; ask for at most 64 tokens"),
        (1, 64, "1 tokens after 64 cached ones exceeds the 64 positions"),
    ):
        with pytest.raises(OptionError, match=message):
            student.lengths(prompt, past)


def test_lengths_of_a_file(llama: StudentConfig, tmp_path: Path) -> None:
    prompt = File(graph_file(tmp_path / "prompt.onnx", llama, 7))
    step = File(graph_file(tmp_path / "step.onnx", llama, 1, past=9))
    assert prompt.lengths(None, None) == prompt.lengths(7, 0) == (7, 0)
    assert step.lengths(None, None) == step.lengths(1, 9) == (1, 9)
    with pytest.raises(OptionError, match=r"--prompt 8 contradicts .*prompt.onnx, whose graph is for 7: leave "):
        prompt.lengths(8, None)
    with pytest.raises(OptionError, match=r"--past 8 contradicts .*step.onnx, whose graph is for 9"):
        step.lengths(None, 8)
    with pytest.raises(OptionError, match="at least 1 token"):
        prompt.lengths(0, None)


def test_tokens_of_a_graph_without_ids(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [5, 16])
    weight = helper.make_tensor("w", TensorProto.FLOAT, [16, 8], [0.0] * 128)
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [5, 8])
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [value], [out], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), tmp_path / "m.onnx")
    assert subject_of(tmp_path / "m.onnx").lengths(None, None) == (5, 0)


def test_content_is_the_file_and_not_its_place(llama: StudentConfig, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    one, two = (File(graph_file(tmp_path / name, llama, 7)) for name in ("a.onnx", "b/c.onnx"))
    assert one.content() == two.content()
    assert one.self_contained
    assert File(graph_file(tmp_path / "d.onnx", llama, 8)).content() != one.content()


def test_integers_outside_the_file_are_not_its_content(llama: StudentConfig, tmp_path: Path) -> None:
    model = PROVIDER.graph(llama, tokens=7, past=0)
    bounds = next(t for t in model.graph.initializer if t.name == "model.slice.starts")
    bounds.ClearField("raw_data")
    bounds.data_location = TensorProto.EXTERNAL
    bounds.external_data.add(key="location", value="bounds.bin")
    onnx.save(model, tmp_path / "s.onnx")
    assert not File(tmp_path / "s.onnx").self_contained


def test_bits_per_layer(uneven: StudentConfig) -> None:
    assert subject_of(uneven).layer_bits == (0, 4, 0)
    asked = RunOptions(weights="int8", layer_bits=(16,))
    assert asked.precision((0, 4, 0)).layer_bits == (16, 4, 0)
    assert asked.precision((0, 4, 0)).format_of("ffn_up", 1) == "int4"
    assert RunOptions(weights="int8").precision((0, 0, 0)).layer_bits == ()
    with pytest.raises(OptionError, match="layer_bits has 4 entries, the student has 3 layers"):
        RunOptions(layer_bits=(4, 4, 4, 4)).precision((0, 4, 0))


def test_options() -> None:
    meta = RunOptions(weights="fp16").meta()
    expected = {"weights": "fp16", "activations": "fp16", "group": "128", "norm_cache": "fp16", "seed": 0}
    assert meta == meta | expected
    assert RunOptions(rules=(WeightRule("output", "int8"),)).meta()["mix"] == ["output=int8"]
    assert RunOptions().meta()["activations"] == "int8"
    with pytest.raises(OptionError, match="--weights fp16 needs --acts fp16, not int8"):
        RunOptions(weights="fp16", acts="int8")
    with pytest.raises(OptionError, match=r"bits per layer \(5,\)"):
        RunOptions(layer_bits=(5,))
    assert dataclasses.replace(RunOptions(), seed=3) == pickle.loads(pickle.dumps(RunOptions(seed=3)))


def test_a_provider_that_refuses_is_a_message(llama: StudentConfig) -> None:
    with pytest.raises(StudentError, match=r"tokens=65 after past=0 is out of range"):
        Built(PROVIDER, llama).open(65, 0)
