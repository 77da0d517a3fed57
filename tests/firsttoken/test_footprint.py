"""firsttoken.footprint: bytes that follow from the student's numbers, and what published sizes are held against."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from firsttoken import RunOptions, Target
from firsttoken.cli import app
from firsttoken.footprint import Footprint, footprints, verdicts
from firsttoken.student import StudentConfig
from firsttoken.subject import subject_of
from firsttoken_compiler.errors import OptionError, StudentError

TARGET = Target.load("snapdragon-x-elite")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIRSTTOKEN_CACHE", str(tmp_path))


def test_bytes_follow_from_the_students_numbers(qwen2: StudentConfig) -> None:
    half, integers = footprints(subject_of(qwen2), TARGET, ["fp16", "int4"], 32, 5, RunOptions(weights="fp16"))
    assert half.kv_bytes == integers.kv_bytes == 32 * qwen2.kv_bytes_per_token()
    tied = qwen2.vocab * qwen2.hidden * 2 if qwen2.tie_embeddings else 0
    angles = half.weight_bytes - 2 * qwen2.parameters - tied
    assert 0 <= angles <= 2 * 4 * qwen2.max_positions * qwen2.head_dim + 64 * qwen2.layers * 16
    assert half.table_bytes == integers.table_bytes == qwen2.vocab * qwen2.hidden * 2
    assert integers.weight_bytes < half.weight_bytes
    for entry in (half, integers):
        assert entry.activation_bytes >= 4 * qwen2.vocab
        assert 0 < entry.scratchpad_bytes <= TARGET.scratchpad.bytes
        assert entry.program_bytes > 0
        assert entry.total_bytes == entry.weight_bytes + entry.kv_bytes + entry.activation_bytes + entry.program_bytes
    again = footprints(subject_of(qwen2), TARGET, ["int4", "fp16"], 32, 5, RunOptions(weights="fp16"))
    assert again == [integers, half]


def test_int8_keys_and_values_take_half_and_a_scale(qwen2: StudentConfig) -> None:
    (found,) = footprints(subject_of(qwen2), TARGET, ["fp16"], 32, 5, RunOptions(weights="fp16", kv_cache="int8"))
    heads = 2 * qwen2.layers * qwen2.kv_heads
    assert found.kv_bytes == 32 * (qwen2.kv_bytes_per_token(1) + 2 * heads)


@pytest.mark.parametrize(
    ("context", "prompt", "message"),
    [(32, 32, "--prompt 32: give 1 to 31 tokens, fewer than --context 32"), (4096, 8, "4095")],
)
def test_lengths_that_do_not_fit_are_named(qwen2: StudentConfig, context: int, prompt: int, message: str) -> None:
    with pytest.raises((OptionError, StudentError), match=message):
        footprints(subject_of(qwen2), TARGET, ["fp16"], context, prompt, RunOptions(weights="fp16"))


def entry(weights: str, nbytes: int, table: int = 0, rest: int = 0) -> Footprint:
    return Footprint(weights, nbytes, table, rest, 0, 0, 0)


def test_published_sizes_are_held_against_the_plans() -> None:
    found = [
        entry("q4_k_m", 1_117_000_000), entry("q5_k_m", 1_310_000_000), entry("q3_k_s", 855_300_000, 100_300_000),
        entry("fp16", 3_554_000_000, 466_700_000, 100_000_000), entry("int4", 1_700_000_000, 0, 50_000_000),
    ]  # fmt: skip
    said = [(line.weights, line.verdict) for line in verdicts("deepseek-r1-distill-qwen-1.5b", found)]
    assert said == [
        ("q4_k_m", "possible"),
        ("q5_k_m", "not possible: too large"),
        ("q3_k_s", "only with the table of token embeddings outside of memory"),
        ("fp16", "only with the table of token embeddings outside of memory"),
        ("int4", "possible"),
        ("q4_k_m", "possible"),
        ("q5_k_m", "possible"),
    ]
    assert verdicts("smollm2-135m", found) == []


def test_the_verb_prints_a_table_or_one_document() -> None:
    words = ["footprint", "smollm2-135m", "--context", "65", "--prompt", "64", "--weights", "fp16", "--json"]
    made = CliRunner().invoke(app, words)
    assert made.exit_code == 0, made.output
    document = json.loads(made.stdout)
    assert document["formats"][0]["kv_bytes"] == 65 * 23040
    shown = CliRunner().invoke(app, words[:-1])
    assert "65 tokens of context" in shown.stdout
    assert f"{document['formats'][0]['weight_bytes'] / 1e6:,.2f}" in shown.stdout


def test_an_onnx_file_is_refused(tmp_path: Path) -> None:
    import onnx

    graph = "g (float[1,4] x) => (float[1,4] y) { y = Relu (x) }"
    onnx.save(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 18]> {graph}'), tmp_path / "relu.onnx")
    with pytest.raises(OptionError, match="is an ONNX file: give a GGUF file, or a built-in"):
        footprints(subject_of(str(tmp_path / "relu.onnx")), TARGET, ["fp16"], 32, 5, RunOptions(weights="fp16"))
