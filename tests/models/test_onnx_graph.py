"""firsttoken_models.onnx_graph against the checker, a plain numpy model, and the exports of torch."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from firsttoken.generation import MASKED, StaticCache, ort_session, token_feeds
from firsttoken.rope import LongRope
from firsttoken.student import StudentConfig
from firsttoken_models.onnx_graph import build_graph
from firsttoken_models.students import DEEPSEEK_R1_DISTILL_QWEN_1_5B
from firsttoken_models.weights import EMBEDDING, FINAL_NORM, LM_HEAD, FileWeights, write_random_weights, write_weights

TORCH = Path(__file__).resolve().parents[1] / "fixtures" / "torch"
IDS = [3, 99, 17, 4, 4, 120, 0, 58, 31, 7]
Array = NDArray[np.float64]


class NumpyModel:
    """The whole context at once in float64, written from the formulas of Llama, Qwen2 and Qwen3, one head at a time."""

    def __init__(self, config: StudentConfig, weights: FileWeights) -> None:
        self.config = config
        self.tensor = {name: np.asarray(weights.tensor(name), np.float64) for name in weights.slots}

    def head_norm(self, x: Array, name: str) -> Array:
        return self.norm(x, name) if self.config.qk_norm else x

    def norm(self, x: Array, name: str) -> Array:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.config.rms_eps) * self.tensor[name]

    def rope(self, x: Array) -> Array:
        half = x.shape[-1] // 2
        frequencies = self.config.rope_theta ** (-np.arange(half) / half)
        angles = np.arange(len(x))[:, None] * frequencies
        low, high = x[:, :half], x[:, half:]
        return np.hstack([low * np.cos(angles) - high * np.sin(angles), high * np.cos(angles) + low * np.sin(angles)])

    def linear(self, x: Array, name: str) -> Array:
        return x @ self.tensor[f"{name}.weight"] + self.tensor.get(f"{name}.bias", 0.0)

    def attention(self, x: Array, index: int) -> tuple[Array, Array, Array]:
        prefix, layer, dim = f"model.layers.{index}.self_attn", self.config.layer(index), self.config.head_dim
        q, k, v = (self.linear(x, f"{prefix}.{name}_proj") for name in "qkv")
        key_heads = [k[:, h * dim : (h + 1) * dim] for h in range(layer.kv_heads)]
        keys = [self.rope(self.head_norm(head, f"{prefix}.k_norm.weight")) for head in key_heads]
        values = [v[:, h * dim : (h + 1) * dim] for h in range(layer.kv_heads)]
        heads = []
        for head in range(layer.heads):
            group = head // (layer.heads // layer.kv_heads)
            query = self.head_norm(q[:, head * dim : (head + 1) * dim], f"{prefix}.q_norm.weight")
            scores = self.rope(query) @ keys[group].T / np.sqrt(dim)
            scores[np.triu_indices(len(x), 1)] = -np.inf
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(scores / scores.sum(-1, keepdims=True) @ values[group])
        return self.linear(np.hstack(heads), f"{prefix}.o_proj"), np.stack(keys), np.stack(values)

    def run(self, ids: list[int]) -> tuple[Array, list[tuple[Array, Array]]]:
        """Return logits [len(ids), vocab] and (keys, values) [kv_heads, len(ids), head_dim] of every layer."""
        x, cache = self.tensor[EMBEDDING][ids], []
        for index in range(self.config.layers):
            prefix = f"model.layers.{index}"
            attended, keys, values = self.attention(self.norm(x, f"{prefix}.input_layernorm.weight"), index)
            cache.append((keys, values))
            x = x + attended
            normed = self.norm(x, f"{prefix}.post_attention_layernorm.weight")
            gate, up = (self.linear(normed, f"{prefix}.mlp.{name}_proj") for name in ("gate", "up"))
            x = x + self.linear(gate / (1 + np.exp(-gate)) * up, f"{prefix}.mlp.down_proj")
        head = self.tensor[EMBEDDING].T if self.config.tie_embeddings else self.tensor[LM_HEAD]
        return self.norm(x, FINAL_NORM) @ head, cache


def run(config: StudentConfig, weights: FileWeights, past: int, feeds: dict[str, Any]) -> dict[str, NDArray[Any]]:
    model = build_graph(config, tokens=feeds["input_ids"].shape[1], past=past, weights=weights)
    onnx.checker.check_model(write_beside(model, weights), full_check=True)
    session = ort_session(model, weights, threads=1)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def write_beside(model: onnx.ModelProto, weights: FileWeights) -> str:
    path = weights.path.with_name("model.onnx")
    path.write_bytes(model.SerializeToString())
    return str(path)


def assert_close(actual: NDArray[Any], expected: Array) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5 * max(1.0, float(np.abs(expected).max())))


def test_prefill_agrees_with_numpy(tiny: StudentConfig, tmp_path: Path) -> None:
    weights = write_random_weights(tiny, tmp_path)
    outputs = run(tiny, weights, 0, token_feeds(IDS))
    logits, cache = NumpyModel(tiny, weights).run(IDS)
    assert outputs["logits"].shape == (1, 1, tiny.vocab)
    assert_close(outputs["logits"][0, 0], logits[-1])
    for index, (keys, values) in enumerate(cache):
        assert_close(outputs[f"present.{index}.key"][0], keys)
        assert_close(outputs[f"present.{index}.value"][0], values)


class LongRopeModel(NumpyModel):
    """Rotation by LongRoPE's angles, one at a time."""

    def rope(self, x: Array) -> Array:
        scaling = self.config.rope_scaling
        assert isinstance(scaling, LongRope)
        divisors = scaling.short if len(x) <= scaling.original_positions else scaling.long
        stretch = math.log(self.config.max_positions / scaling.original_positions)
        factor = math.sqrt(1 + stretch / math.log(scaling.original_positions))
        found, half = np.empty_like(x), x.shape[1] // 2
        for (position, i), low in np.ndenumerate(x[:, :half]):
            angle = position / divisors[i] * self.config.rope_theta ** (-i / half)
            cos, sin, high = factor * math.cos(angle), factor * math.sin(angle), x[position, i + half]
            found[position, i], found[position, i + half] = low * cos - high * sin, high * cos + low * sin
        return found


@pytest.mark.parametrize("original", [8, 32])
def test_scaled_positions_agree_with_numpy(llama: StudentConfig, tmp_path: Path, original: int) -> None:
    scaling = LongRope(tuple(1.0 + i / 4 for i in range(8)), tuple(2.0 + i for i in range(8)), original)
    config = dataclasses.replace(llama, family="phi3", rope_scaling=scaling)
    weights = write_random_weights(config, tmp_path)
    logits, _ = LongRopeModel(config, weights).run(IDS)
    assert_close(run(config, weights, 0, token_feeds(IDS))["logits"][0, 0], logits[-1])


def test_all_logits_are_those_of_every_token(tiny: StudentConfig, tmp_path: Path) -> None:
    weights = write_random_weights(tiny, tmp_path)
    model = build_graph(tiny, tokens=len(IDS), past=0, weights=weights, all_logits=True)
    onnx.checker.check_model(write_beside(model, weights), full_check=True)
    logits = ort_session(model, weights, threads=1).run(["logits"], token_feeds(IDS))[0]
    assert logits.shape == (1, len(IDS), tiny.vocab)
    assert_close(logits[0], NumpyModel(tiny, weights).run(IDS)[0])


def test_single_token_prefill_has_no_slice(tiny: StudentConfig, tmp_path: Path) -> None:
    weights = write_random_weights(tiny, tmp_path)
    outputs = run(tiny, weights, 0, token_feeds([5]))
    assert_close(outputs["logits"][0, 0], NumpyModel(tiny, weights).run([5])[0][-1])
    assert "Slice" not in {node.op_type for node in build_graph(tiny, tokens=1, past=0).graph.node}


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("unused", [0, 5])
def test_decode_agrees_with_numpy(tiny: StudentConfig, tmp_path: Path, tokens: int, unused: int) -> None:
    weights = write_random_weights(tiny, tmp_path)
    reference = NumpyModel(tiny, weights)
    cache = StaticCache(tiny, len(IDS) - tokens + unused)
    _, rows = reference.run(IDS[:-tokens])
    past = {
        f"present.{i}.{part}": row[None]
        for i, pair in enumerate(rows)
        for part, row in zip(("key", "value"), pair, strict=True)
    }
    cache.append(past, len(IDS) - tokens)
    outputs = run(tiny, weights, cache.capacity, cache.feeds(IDS[-tokens:]))
    logits, rows = reference.run(IDS)
    assert_close(outputs["logits"][0, 0], logits[-1])
    for index, (keys, values) in enumerate(rows):
        assert_close(outputs[f"present.{index}.key"][0, :, -tokens:], keys[:, -tokens:])
        assert_close(outputs[f"present.{index}.value"][0, :, -tokens:], values[:, -tokens:])


def test_masked_rows_have_no_influence_at_all(tiny: StudentConfig, tmp_path: Path) -> None:
    weights = write_random_weights(tiny, tmp_path)
    cache = StaticCache(tiny, 6)
    clean = run(tiny, weights, 6, cache.feeds([9]))["logits"]
    for buffer in (*cache.keys, *cache.values):
        buffer[...] = 50.0
    np.testing.assert_array_equal(run(tiny, weights, 6, cache.feeds([9]))["logits"], clean)
    assert np.float16(MASKED) == MASKED


@pytest.mark.parametrize("past", [0, 12])
def test_interface_and_names(uneven: StudentConfig, past: int) -> None:
    model = build_graph(uneven, tokens=4, past=past)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 23)]
    assert model.ir_version == 10
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    expected = {"input_ids": [1, 4], "position_ids": [1, 4], "logits": [1, 1, 128]}
    expected |= {"attention_mask": [1, 1, 4, 4 + past]} if past else {}
    for index, heads in enumerate((2, 1, 3)):
        for part in ("key", "value"):
            expected |= {f"past_key_values.{index}.{part}": [1, heads, past, 24]} if past else {}
            expected[f"present.{index}.{part}"] = [1, heads, 4 + past, 24]
    assert shapes == expected
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    assert "/model/layers.2/self_attn/q_proj/MatMul" in names
    gate = next(t for t in model.graph.initializer if t.name == "model.layers.1.mlp.gate_proj.weight")
    assert list(gate.dims) == [64, 32]
    attention = next(node for node in model.graph.node if node.op_type == "Attention")
    assert ("is_causal" in {a.name for a in attention.attribute}) == (past == 0)


def test_same_input_same_bytes(tiny: StudentConfig) -> None:
    first, second = (build_graph(tiny, tokens=5, past=3).SerializeToString(deterministic=True) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(("tokens", "past"), [(128, 0), (512, 0), (1, 1024), (1, 2048)])
def test_large_student_builds_fast_and_small(tokens: int, past: int, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    start = time.process_time()
    data = build_graph(DEEPSEEK_R1_DISTILL_QWEN_1_5B, tokens=tokens, past=past).SerializeToString()
    assert time.process_time() - start < 1.0
    assert len(data) < 2_000_000
    assert list(tmp_path.iterdir()) == []
    model = onnx.shape_inference.infer_shapes(onnx.load_from_string(data), check_type=True, strict_mode=True)
    external = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    assert sum(int(np.prod(t.dims)) for t in external) == DEEPSEEK_R1_DISTILL_QWEN_1_5B.parameters
    assert {entry.value for t in external for entry in t.external_data if entry.key == "location"} == {"weights.bin"}


@pytest.mark.parametrize(("tokens", "past"), [(0, 0), (1, -1), (60, 5)])
def test_lengths_out_of_range_are_named(llama: StudentConfig, tokens: int, past: int) -> None:
    with pytest.raises(ValueError, match=rf"tokens={tokens} after past={past} is out of range.*<= 64"):
        build_graph(llama, tokens=tokens, past=past)


def test_weights_of_another_student_are_refused(llama: StudentConfig, qwen2: StudentConfig, tmp_path: Path) -> None:
    biased = dataclasses.replace(llama, qkv_bias=True)
    with pytest.raises(ValueError, match=r"have no tensor model.layers.0.self_attn.q_proj.bias"):
        build_graph(biased, tokens=2, past=0, weights=write_random_weights(llama, tmp_path / "llama"))
    with pytest.raises(ValueError, match=r"q_proj.weight is 24576 bytes in .* needs 16384"):
        build_graph(llama, tokens=2, past=0, weights=write_random_weights(qwen2, tmp_path / "qwen2"))


def weights_of_export(config: StudentConfig, model: onnx.ModelProto, folder: Path) -> FileWeights:
    """Collect the weights of a torch export; its matrices are constants without names, in the order of use."""
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    used = [n.input[1] for n in model.graph.node if n.op_type == "MatMul" and n.input[1].startswith("val_")]
    matrices = iter([constants[name] for name in used if constants.get(name, np.zeros(1)).ndim == 2])

    def tensor_of(name: str) -> NDArray[np.float32]:
        stored = f"model.{'lm_head.weight' if name == EMBEDDING and config.tie_embeddings else name}"
        return constants[stored] if stored in constants else next(matrices)

    return write_weights(config, folder, tensor_of)


@pytest.mark.parametrize("variant", ["eager-opset18", "eager-opset23", "sdpa-opset18", "sdpa-opset23"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_torch_exports_give_the_same_logits(family: str, variant: str, tmp_path: Path) -> None:
    """The graphs mean what transformers means: its exported weights in our graph give its logits."""
    path = TORCH / f"{family}-{variant}.onnx"
    config = StudentConfig(
        name=family, family=family, hidden=64, intermediate=128, layers=2, heads=4, kv_heads=2, head_dim=16, vocab=128,
        rope_theta=1e4, max_positions=64, rms_eps=1e-5 if family == "llama" else 1e-6,
        tie_embeddings=family == "llama", qkv_bias=family == "qwen2", source="tests/fixtures/export_torch.py",
    )  # fmt: skip
    exported = onnx.load(path)
    onnx.checker.check_model(exported, full_check=True)
    ids = [int(i) * 7 % 128 for i in range(16)]
    feeds = token_feeds(ids)
    session = onnxruntime.InferenceSession(exported.SerializeToString(), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"input_ids": feeds["input_ids"]})
    weights = weights_of_export(config, exported, tmp_path)
    outputs = run(config, weights, 0, feeds)
    assert_close(outputs["logits"][0, 0], expected[0, -1].astype(np.float64))
    assert_close(NumpyModel(config, weights).run(ids)[0], expected[0].astype(np.float64))
