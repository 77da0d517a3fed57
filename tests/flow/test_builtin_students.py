"""Built-in students from their graphs to the NPU: nothing is left to the host, numbers agree with onnxruntime's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from students import ENCODERS as TINY

from firsttoken import RunOptions, api
from firsttoken.execution import load
from firsttoken.generation import ort_session
from firsttoken.student import StudentConfig, find_any, find_student
from firsttoken_compiler.errors import OptionError
from firsttoken_compiler.frontend.importer import import_onnx
from firsttoken_compiler.frontend.onnx_file import from_model
from firsttoken_compiler.options import resolve
from firsttoken_compiler.passes.canonicalise import Canonicalise
from firsttoken_compiler.pipeline import compile_onnx
from firsttoken_compiler.target.load import load_target
from firsttoken_models.encoder_graph import build_encoder_graph
from firsttoken_models.encoders import ENCODERS
from firsttoken_models.onnx_graph import build_graph
from firsttoken_models.students import DECODERS
from firsttoken_models.weights import write_random_weights
from firsttoken_simulator.machine import simulate_program

TARGET = "snapdragon-x-elite"


COMPILED = ("qwen3-0.6b", "phi-3.5-mini", "tinyllama-1.1b")
"""Norms of heads; heads of 96; eight queries to a key."""


def short(config: StudentConfig) -> StudentConfig:
    """One of its layers, which are all equal, at its real width."""
    return replace(config, layers=1, vocab=1024)


@pytest.mark.parametrize("past", [0, 8])
def test_the_npu_has_an_operator_for_every_node_of_every_decoder(past: int) -> None:
    for config in map(short, DECODERS.values()):
        imported = import_onnx(from_model(build_graph(config, tokens=4, past=past), Path("/nonexistent"), config.name))
        canonical = Canonicalise().run(imported)
        assert not canonical.left, config.name
        assert not canonical.hosts, config.name
        assert set().union(*canonical.nodes.values()) == {node.name for node in imported.student.graph.node}


@pytest.mark.parametrize("name", COMPILED)
def test_a_layer_of_a_decoder_is_all_the_npus(name: str) -> None:
    config = short(DECODERS[name])
    program = api.compile(config, TARGET, prompt=64)
    assert program is not None
    assert not program.hosts
    q, kv, h = config.heads * config.head_dim, config.kv_heads * config.head_dim, config.hidden
    products = h * (2 * q + 2 * kv + 3 * config.intermediate)
    assert sum(op.macs for op in program.ops if op.kind != "attention") == 64 * products + h * config.vocab
    assert sum(op.kind == "rms_norm" for op in program.ops) == (5 if config.qk_norm else 3)


@pytest.mark.parametrize("name", ENCODERS)
def test_a_layer_of_every_encoder_is_all_the_npus(name: str) -> None:
    program = api.compile(replace(ENCODERS[name], layers=1, vocab=1024), TARGET, prompt=32)
    assert program is not None
    assert not program.hosts
    assert program.meta["phase"] == "encode"
    assert [op.kind for op in program.ops].count("attention") == 1


@pytest.mark.parametrize(
    ("head", "weights", "target"),
    [*((head, "fp16", TARGET) for head in TINY), ("mean", "int8", TARGET), ("masked_lm", "int8", "systolic-128")],
)
def test_an_encoder_agrees_with_onnxruntime(head: str, weights: str, target: str, tmp_path: Path) -> None:
    config, machine = TINY[head], load_target(target)
    store = write_random_weights(config, tmp_path)
    model = build_encoder_graph(config, tokens=13, weights=store)
    random = np.random.default_rng(5)
    feeds: dict[str, Any] = {"input_ids": random.integers(0, config.vocab, (1, 13)), "attention_mask": np.ones((1, 13))}
    feeds["attention_mask"][0, 10:] = 0
    feeds |= {"token_type_ids": random.integers(0, 2, (1, 13))} if config.types else {}
    feeds |= {"mask_position": np.array([4])} if head == "masked_lm" else {}
    feeds = {name: values.astype(np.int64) for name, values in feeds.items()}
    (expected,) = ort_session(model, store, threads=1).run(None, feeds)
    student = from_model(model, tmp_path, config.name)
    program = compile_onnx(student, machine, resolve(weights, None, "channel", None))
    assert program is not None
    assert not program.hosts
    (found,) = load(program, simulate_program(program, machine), student, machine).run(feeds).values()
    kept = slice(0, 10) if head == "none" else slice(None)
    error = np.abs(found - expected)[:, kept].max() / np.abs(expected).max()
    assert error < {"fp16": 4e-3, "int8": 4e-2}[weights]


def test_a_run_of_an_encoder(tmp_path: Path) -> None:
    """The whole MiniLM at the length of its measurements: a time, and no word of a first token."""
    document = api.run("minilm-l6", TARGET, prompt=128, options=RunOptions(weights="fp16"), out=tmp_path, cache=False)
    assert document.phase == "encode"
    assert document.host_fallbacks == []
    assert (document.tpot_ms, document.kv_bytes) == (None, 0)
    h = 384
    assert document.macs == 6 * (128 * h * (4 * h + 2 * 1536) + 2 * 128 * 128 * h)
    assert [layer.name for layer in document.layers if layer.name.startswith("layers.")] == [
        f"layers.{i}" for i in range(6)
    ]
    assert document.ladder[-1].name == "result"
    assert "first token" not in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))["phase"] == "encode"


def test_what_an_encoder_cannot_do() -> None:
    with pytest.raises(OptionError, match="bert-base is an encoder, it reads no cache and makes no tokens"):
        api.run("bert-base", TARGET, decode=1)
    with pytest.raises(OptionError, match="leave --past and --decode away"):
        api.compile("bert-base", TARGET, past=8)
    with pytest.raises(OptionError, match="--prompt 513 exceeds the 512 positions of bert-base"):
        api.compile("bert-base", TARGET, prompt=513)
    with pytest.raises(OptionError, match="distilbert is an encoder, to answer takes a tokenizer"):
        api.generate("distilbert", "Hello")
    with pytest.raises(OptionError, match="minilm-l6 is an encoder, to measure it takes"):
        api.quality("sentence-transformers/all-MiniLM-L6-v2")
    with pytest.raises(OptionError, match="bert-base is an encoder, which has no cache"):
        find_student("bert-base-uncased")
    assert not isinstance(find_any("bert-base-uncased")[1], StudentConfig)
