"""GGUF files through the facade: their weights as they are stored, on both machines."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from firsttoken import CostModel, Target, api
from firsttoken.generation import ort_session, token_feeds
from firsttoken.options import RunOptions
from firsttoken.student import StudentConfig
from firsttoken.subject import Built, File, subject_of
from firsttoken_compiler.errors import OptionError, StudentError
from firsttoken_models.gguf_write import write_gguf
from firsttoken_models.registry import PROVIDER
from firsttoken_models.weights import write_random_weights

IDS = [3, 99, 17, 4, 120, 0]
TARGET = "systolic-128"


def written(path: Path, config: StudentConfig, kind: str = "f32") -> Path:
    weights = write_random_weights(config, path.parent / f"floats-{path.stem}")
    write_gguf(path, config, weights.tensor, lambda _name, _width: kind)
    return path


@pytest.mark.parametrize("kind", ["f32", "f16"])
def test_floats_compute_what_onnxruntime_does(tiny: StudentConfig, kind: str, tmp_path: Path) -> None:
    path = written(tmp_path / "s.gguf", tiny, kind)
    results = api.execute(path, TARGET, token_feeds(IDS), prompt=len(IDS))
    file = PROVIDER.file(path)
    floats = file.float_weights()
    session = ort_session(PROVIDER.graph(file.config, tokens=len(IDS), past=0, weights=floats), floats, threads=1)
    expected = session.run(["logits"], token_feeds(IDS))[0]
    np.testing.assert_allclose(results["logits"], expected, atol=0.02 * np.abs(expected).max())


def test_by_its_path_and_in_every_spelling(llama: StudentConfig, tmp_path: Path) -> None:
    path = written(tmp_path / "s.gguf", llama)
    plain = path.rename(tmp_path / "plain")
    for student in (plain, str(plain)):
        found = subject_of(student)
        assert isinstance(found, Built)
        assert (found.name, found.path) == ("plain", plain)
    assert isinstance(subject_of(tmp_path / "absent.gguf"), File)
    with pytest.raises(StudentError, match=r"absent\.gguf is neither a file nor a built-in name"):
        api.run(str(tmp_path / "absent.gguf"), TARGET)
    with pytest.raises(OptionError, match="--bind rows: plain is no ONNX file"):
        subject_of(plain, {"rows": 3})


def test_timing_with_a_token_of_the_answer(qwen2: StudentConfig, tmp_path: Path) -> None:
    path = written(tmp_path / "s.gguf", qwen2)
    document = api.run(str(path), TARGET, prompt=7, decode=2, options=RunOptions(weights="int8"))
    assert (document.student, document.prompt_tokens, document.host_fallbacks) == ("s", 7, [])
    assert document.tpot_ms is not None
    named = api.run(qwen2, TARGET, prompt=7, decode=2, options=RunOptions(weights="int8"))
    assert json.loads(document.to_json())["ttft_ms"] == json.loads(named.to_json())["ttft_ms"]


def test_estimates_come_from_the_file_too(llama: StudentConfig, tmp_path: Path) -> None:
    path = written(tmp_path / "s.gguf", llama)
    cost = CostModel(Target.load(TARGET), prompt=5, options=RunOptions(weights="int8"))
    assert cost.exact(path).ttft_ms == cost.exact(llama).ttft_ms
    assert subject_of(path).portable() == path
    assert subject_of(llama).portable() == llama


def test_a_student_without_a_tokenizer_does_not_answer(llama: StudentConfig, tmp_path: Path) -> None:
    path = written(tmp_path / "s.gguf", llama)
    with pytest.raises(StudentError, match=r"the tokenizer is \(None, None\), only .* time the student with"):
        api.generate(path, "Hi")


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q8_0"])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_blocks_compute_what_their_floats_do(
    name: str, kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    path = written(tmp_path / "s.gguf", request.getfixturevalue(name), kind)
    options = RunOptions(weights="int4")  # which is for floats, of which there are none
    program = api.compile(path, TARGET, prompt=len(IDS), options=options)
    assert program.meta["stored_weights"] == [
        f"15 products as the graph stores their weights: {kind} with fp16 activations"
    ]
    results = api.execute(path, TARGET, token_feeds(IDS), prompt=len(IDS))
    file = PROVIDER.file(path)
    floats = file.float_weights()
    session = ort_session(PROVIDER.graph(file.config, tokens=len(IDS), past=0, weights=floats), floats, threads=1)
    expected = session.run(["logits"], token_feeds(IDS))[0]
    np.testing.assert_allclose(results["logits"], expected, atol=0.01 * np.abs(expected).max())
