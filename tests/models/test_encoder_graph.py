"""firsttoken_models.encoder_graph against the checker and a plain numpy model."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from students import ENCODERS as TINY

from firsttoken.encoder import EncoderConfig
from firsttoken.generation import ort_session
from firsttoken_models.encoder_graph import build_encoder_graph
from firsttoken_models.encoders import ENCODERS
from firsttoken_models.weights import FileWeights, layout, write_random_weights

Array = NDArray[np.float64]
IDS = [3, 99, 17, 4, 4, 120, 0, 58, 31, 7]
KEPT = 7
TYPES = [0, 0, 0, 0, 1, 1, 1, 0, 0, 0]
POSITION = 3


class NumpyEncoder:
    """The sentence at once in float64, from the formulas of BERT, one head at a time; padding is left away."""

    def __init__(self, config: EncoderConfig, weights: FileWeights) -> None:
        self.config = config
        self.tensor = {name: np.asarray(weights.tensor(name), np.float64) for name in weights.slots}

    def norm(self, x: Array, name: str) -> Array:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + self.config.norm_eps)
        return scaled * self.tensor[f"{name}.weight"] + self.tensor[f"{name}.bias"]

    def dense(self, x: Array, name: str) -> Array:
        return x @ self.tensor[f"{name}.weight"] + self.tensor[f"{name}.bias"]

    def gelu(self, x: Array) -> Array:
        return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))

    def attention(self, x: Array, name: str) -> Array:
        q, k, v = (self.dense(x, f"{name}.self.{part}") for part in ("query", "key", "value"))
        dim, heads = self.config.hidden // self.config.heads, []
        for head in range(self.config.heads):
            columns = slice(head * dim, (head + 1) * dim)
            scores = np.exp(q[:, columns] @ k[:, columns].T / math.sqrt(dim))
            heads.append(scores / scores.sum(-1, keepdims=True) @ v[:, columns])
        return self.dense(np.hstack(heads), f"{name}.output.dense")

    def hidden(self) -> Array:
        x = self.tensor["embeddings.word_embeddings.weight"][IDS[:KEPT]]
        x = x + self.tensor["embeddings.position_embeddings.weight"][:KEPT]
        if self.config.types:
            x = x + self.tensor["embeddings.token_type_embeddings.weight"][TYPES[:KEPT]]
        x = self.norm(x, "embeddings.LayerNorm")
        for index in range(self.config.layers):
            layer = f"encoder.layer.{index}"
            x = self.norm(x + self.attention(x, f"{layer}.attention"), f"{layer}.attention.output.LayerNorm")
            wide = self.gelu(self.dense(x, f"{layer}.intermediate.dense"))
            x = self.norm(x + self.dense(wide, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
        return x

    def run(self) -> Array:
        x = self.hidden()
        if self.config.head == "mean":
            mean = x.mean(0)
            return mean / math.sqrt((mean * mean).sum())
        if self.config.head == "classifier":
            return self.dense(np.maximum(self.dense(x[0], "pre_classifier"), 0), "classifier")
        if self.config.head == "masked_lm":
            turned = self.gelu(self.dense(x[POSITION], "cls.predictions.transform.dense"))
            turned = self.norm(turned, "cls.predictions.transform.LayerNorm")
            return turned @ self.tensor["embeddings.word_embeddings.weight"].T + self.tensor["cls.predictions.bias"]
        return x


def feeds_of(config: EncoderConfig) -> dict[str, NDArray[Any]]:
    feeds = {"input_ids": [IDS], "attention_mask": [[1] * KEPT + [0] * (len(IDS) - KEPT)]}
    feeds |= {"token_type_ids": [TYPES]} if config.types else {}
    feeds |= {"mask_position": [POSITION]} if config.head == "masked_lm" else {}
    return {name: np.array(values, np.int64) for name, values in feeds.items()}


@pytest.mark.parametrize("head", TINY)
def test_it_agrees_with_numpy(head: str, tmp_path: Path) -> None:
    config = TINY[head]
    weights = write_random_weights(config, tmp_path)
    model = build_encoder_graph(config, tokens=len(IDS), weights=weights)
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    onnx.checker.check_model(str(path), full_check=True)
    (found,) = ort_session(model, weights, threads=1).run(None, feeds_of(config))
    expected = NumpyEncoder(config, weights).run()
    found = found[0, :KEPT] if head == "none" else found[0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * max(1.0, float(np.abs(expected).max())))


@pytest.mark.parametrize("name", ENCODERS)
def test_built_in_encoders_build_fast(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = ENCODERS[name]
    start = time.process_time()
    data = build_encoder_graph(config, tokens=128).SerializeToString()
    assert time.process_time() - start < 1.0
    assert len(data) < 300_000
    model = onnx.shape_inference.infer_shapes(onnx.load_from_string(data), check_type=True, strict_mode=True)
    external = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    assert sum(int(np.prod(t.dims)) for t in external) == config.parameters - config.unread
    assert sum(slot.length for slot in layout(config).values()) == 4 * (config.parameters - config.unread)
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)


def test_same_input_same_bytes() -> None:
    first, second = (build_encoder_graph(ENCODERS["bert-base"], tokens=9).SerializeToString() for _ in range(2))
    assert first == second


@pytest.mark.parametrize("tokens", [0, 65])
def test_lengths_out_of_range_are_named(tokens: int) -> None:
    with pytest.raises(ValueError, match=rf"tokens={tokens} is out of range, must be 1 to 64"):
        build_encoder_graph(TINY["none"], tokens=tokens)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": "pooled"}, "head is 'pooled', must be one of"),
        ({"heads": 5}, "hidden is 48, not a multiple of heads 5"),
        ({"types": -1}, "types is -1"),
        ({"labels": 2}, "labels is 2 with head 'none'"),
        ({"norm_eps": 1.0}, "norm_eps is 1.0"),
        ({"vocab": 0}, "vocab is 0, must be an integer of at least 1"),
    ],
)
def test_bad_dimensions_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY["none"], **change)


def test_canonical_text_follows_the_content() -> None:
    config = TINY["mean"]
    text = config.canonical_json()
    assert dataclasses.replace(config, name="other", source="elsewhere", unread=7).canonical_json() == text
    for what in ("family", "hidden", "intermediate", "layers", "heads", "vocab", "max_positions", "types", "norm_eps"):
        value = getattr(config, what)
        changed = f"{value}!" if what == "family" else value * 2 if what != "norm_eps" else 1e-6
        assert dataclasses.replace(config, **{what: changed}).canonical_json() != text, what
