"""Roles and layers of weights, found in the graph's structure: built students, GGUF files, exports, other models."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cases import TINY, TORCH, imported_file, random, written

from firsttoken.subject import subject_of
from firsttoken_compiler.frontend.contrib import prepare
from firsttoken_compiler.frontend.masks import add_masks
from firsttoken_compiler.frontend.onnx_file import OnnxStudent, from_model
from firsttoken_compiler.frontend.specialise import specialise
from firsttoken_compiler.passes.canonicalise import Canonicalise
from firsttoken_compiler.passes.roles import Place, Roles, roles_of
from firsttoken_compiler.passes.split import split
from firsttoken_models.gguf_write import write_gguf
from firsttoken_models.onnx_graph import build_graph
from firsttoken_models.weights import write_random_weights

ROUTES = Path(__file__).resolve().parents[2] / "fixtures" / "routes"
MINE = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
"""What the names of the built students' weights say, for comparison only."""


def found(student: OnnxStudent) -> tuple[Roles, dict[str, Place]]:
    """The roles, and places by initialiser."""
    imported, canonical = split(prepare(add_masks(specialise(student))), True)
    roles = roles_of(canonical)
    return roles, {imported.weights[name]: place for name, place in roles.places.items()}


def expected(name: str) -> Place | None:
    """What the name of a built student's weight says."""
    parts = name.split(".")
    role = MINE.get(".".join(parts[3:5]))
    return None if role is None else Place(role, int(parts[2]))


@pytest.mark.parametrize(("tokens", "past"), [(1, 0), (5, 0), (1, 7), (3, 4)])
@pytest.mark.parametrize("tied", [False, True])
def test_built_students(tokens: int, past: int, tied: bool) -> None:
    config = replace(TINY, layers=3, tie_embeddings=tied)
    model = build_graph(config, tokens=tokens, past=past)
    roles, places = found(from_model(model, Path("/nonexistent"), "tiny"))
    assert roles.layers == 3
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    assert places.pop(head) == Place("output")
    if not tied:
        assert places.pop("model.embed_tokens.weight") == Place("token_embd")
    assert places == {name: expected(name) for name in places}
    assert len(places) == 3 * 7


def test_gguf_files(tmp_path: Path) -> None:
    config = replace(TINY, hidden=64, heads=4, head_dim=16, intermediate=96)
    weights = write_random_weights(config, tmp_path)
    write_gguf(tmp_path / "s.gguf", config, weights.tensor, lambda _name, _width: "q8_0")
    roles, places = found(subject_of(tmp_path / "s.gguf").open(4, 0))
    assert roles.layers == TINY.layers
    assert {name: place for name, place in places.items() if place.layer is not None} == {
        name: place for name in places if (place := expected(name)) is not None
    }
    assert len(places) == 2 * 7 + 2


def test_names_do_not_matter() -> None:
    model = build_graph(TINY, tokens=4, past=0)
    renamed = {t.name: f"t{i}" for i, t in enumerate(model.graph.initializer) if expected(t.name)}
    before = found(from_model(model, Path("/nonexistent"), "tiny"))[1]
    for tensor in model.graph.initializer:
        tensor.name = renamed.get(tensor.name, tensor.name)
    for node in model.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
    after = found(from_model(model, Path("/nonexistent"), "tiny"))[1]
    assert after == {renamed.get(name, name): place for name, place in before.items()}
    assert len(renamed) == 2 * (7 + 3)  # biases too


DECODERS = [
    p.name for p in sorted(ROUTES.iterdir()) if p.name.startswith(("dynamo", "script", "optimum", "genai", "nbits"))
]
FUSED = ("genai-",)
"""Routes whose queries, keys and values are one product."""


def route(name: str) -> tuple[Roles, dict[str, Place]]:
    meta = json.loads((ROUTES / name / "meta.json").read_text(encoding="utf-8"))
    subject = subject_of(ROUTES / name / "model.onnx", meta["bind"])
    return found(subject.open(*subject.lengths(meta["prompt"], meta["past"])))


@pytest.mark.parametrize("name", DECODERS)
def test_exports_of_decoders(name: str) -> None:
    roles, places = route(name)
    fused = ["attn_v"] if name.startswith(FUSED) else ["attn_q", "attn_k", "attn_v"]
    roles_found = sorted((p.role, p.layer) for p in places.values() if p.layer is not None)
    assert roles.layers == 1
    assert roles_found == sorted((role, 0) for role in [*fused, "attn_output", "ffn_gate", "ffn_up", "ffn_down"])
    assert sorted(p.role for p in places.values() if p.layer is None) == ["output", "token_embd"]


@pytest.mark.parametrize("name", ["bert-fused-attention", "resnet-dynamo18-fp32", "vit-dynamo23-fp16", "if-static"])
def test_models_that_are_no_decoders_have_no_roles(name: str) -> None:
    assert route(name)[0] == Roles()


@pytest.mark.parametrize("path", TORCH, ids=lambda path: path.stem)
def test_exports_of_torch(path: Path) -> None:
    roles = roles_of(Canonicalise().run(imported_file(path)))
    kinds = [place.role for place in roles.places.values() if place.layer == 1]
    assert roles.layers == 2
    assert sorted(kinds) == sorted(MINE.values())


def test_a_feed_forward_without_a_gate_and_beside_the_attention() -> None:
    """GPT-J's order: both read the same norm; GELU instead of SwiGLU."""
    body = """
        e = Gather(table, ids) n = LayerNormalization(e, g)
        q = MatMul(n, wq) k = MatMul(n, wk) v = MatMul(n, wv)
        a, pk, pv = Attention<q_num_heads=2, kv_num_heads=2, is_causal=1>(q, k, v)
        o = MatMul(a, wo) u = MatMul(n, wu) t = Gelu(u) d = MatMul(t, wd)
        s = Add(o, d) r = Add(s, e) m = LayerNormalization(r, g) y = MatMul(m, head)
    """
    shapes: dict[str, Any] = {name: random(16, 16, seed=i) for i, name in enumerate(("wq", "wk", "wv", "wo"))}
    shapes |= {"wu": random(16, 40), "wd": random(40, 16), "table": random(24, 16), "head": random(16, 24)}
    shapes["g"] = np.ones(16, np.float32)
    text = body.replace("a, pk, pv = ", "a = ")
    model = written("(int64[1,4] ids) => (float[1,4,24] y)", text, opset=23, **shapes)
    roles, places = found(from_model(onnx.shape_inference.infer_shapes(model), Path("."), "parallel"))
    assert roles.layers == 1
    assert places == {
        "wq": Place("attn_q", 0), "wk": Place("attn_k", 0), "wv": Place("attn_v", 0), "wo": Place("attn_output", 0),
        "wu": Place("ffn_up", 0), "wd": Place("ffn_down", 0), "head": Place("output"), "table": Place("token_embd"),
    }  # fmt: skip
    assert roles.of("anything else") == Place("other", None)
