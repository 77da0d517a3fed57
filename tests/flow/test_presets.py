"""The targets that exist as products: published peaks, and what each runs in the formats that it has."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
from students import ENCODERS

from firsttoken import RunOptions, api
from firsttoken.execution import load
from firsttoken.generation import ort_session
from firsttoken.student import StudentConfig
from firsttoken_compiler.errors import OptionError, StudentError
from firsttoken_compiler.frontend.onnx_file import from_model
from firsttoken_compiler.options import resolve
from firsttoken_compiler.pipeline import compile_onnx
from firsttoken_compiler.target.load import load_target, preset_names
from firsttoken_models.encoder_graph import build_encoder_graph
from firsttoken_models.weights import write_random_weights
from firsttoken_simulator.machine import simulate_program


class Published(NamedTuple):
    """What is published of a part, and how much of it the target stands for."""

    pair: str
    tera: float
    """10^12 operations per second in that pair, two a multiply-accumulate."""
    gigabytes: float
    """10^9 bytes of DRAM per second."""
    share: float
    """The part of the published figures that one device of the target has."""
    formats: tuple[str, str]
    """Weights and activations that the target multiplies, the narrowest that suit it."""


PUBLISHED = {
    "snapdragon-x-elite": Published("int8xint8", 45, 135, 1, ("int4", "int16")),
    "snapdragon-8-gen3": Published("fp16xfp16", 12.032, 68, 1, ("int4", "int16")),
    "snapdragon-8-elite": Published("fp16xfp16", 12.032, 84.8, 1, ("int4", "int16")),
    "snapdragon-x2-elite": Published("int8xint8", 80, 228, 1, ("int4", "int16")),
    "rk3588": Published("int8xint8", 6, 33.8, 1, ("int8", "int8")),
    "rk3576": Published("int8xint8", 6, 17.1, 1, ("int4", "fp16")),
    "xdna2-strix": Published("int8xint8", 51, 120, 1, ("int4", "fp16")),
    "tpu-v3": Published("fp16xfp16", 123, 900, 0.5, ("fp16", "fp16")),
    "tpu-v4": Published("fp16xfp16", 275, 1200, 1, ("fp16", "fp16")),
    "ethos-u85-2048": Published("int8xint8", 4, 24, 1, ("int8", "int16")),
    "nvdla-full": Published("int8xint8", 4.096, 20, 1, ("int8", "int8")),
}
"""Every preset but the textbook machine. The 8 Elite's rate is the 8 Gen 3's: none is published."""

LAYER = StudentConfig(
    name="layer", family="qwen2", hidden=128, intermediate=256, layers=1, heads=4, kv_heads=2, head_dim=32, vocab=256,
    rope_theta=1e4, max_positions=256, rms_eps=1e-5, tie_embeddings=False, qkv_bias=True, source="made up for tests",
)  # fmt: skip


def test_every_preset_has_published_figures() -> None:
    assert set(PUBLISHED) == set(preset_names()) - {"systolic-128"}


def test_the_page_of_targets_has_every_preset() -> None:
    page = (Path(__file__).parents[2] / "docs" / "targets.md").read_text(encoding="utf-8")
    rows = {line.split("`")[1] for line in page.split("## What runs")[0].splitlines() if line.startswith("| `")}
    assert rows == set(preset_names())


@pytest.mark.parametrize("name", PUBLISHED)
def test_peaks_are_the_published_ones(name: str) -> None:
    target, published = load_target(name), PUBLISHED[name]
    peak = 2 * target.cores * target.matrix.macs_per_cycle[published.pair] * target.clock_hz
    nominal = published.tera * published.share
    effective = any(f"matrix.macs_per_cycle.{published.pair}" in entry.paths for entry in target.calibration)
    assert peak * 1e-12 < 1.03 * nominal if effective else peak * 1e-12 == pytest.approx(nominal, rel=0.03)
    assert target.dram.peak_bytes_per_s * 1e-9 == pytest.approx(published.gigabytes * published.share, rel=0.01)
    assert target.dram_commands is None


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_fitted_is_declared_and_has_a_record(name: str) -> None:
    target = load_target(name)
    grades = {path: provenance.grade for path, provenance in target.provenance.items()}
    fitted = {path for path, grade in grades.items() if grade == "fitted"}
    assert fitted <= {path for entry in target.calibration for path in entry.paths}
    assert bool(fitted) == (target.fit is not None)
    assert grades["host.bytes_per_s"] == grades["energy.static_w"] == "assumed"


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_product(name: str) -> None:
    target, (weights, acts) = load_target(name), PUBLISHED[name].formats
    tensor, info = onnx.TensorProto, onnx.helper.make_tensor_value_info
    weight = tensor(name="w", data_type=tensor.FLOAT, dims=[256, 512], data_location=tensor.EXTERNAL)
    weight.external_data.add(key="location", value="absent.bin")
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = onnx.helper.make_graph([node], "g", [info("x", 1, [64, 256])], [info("y", 1, [64, 512])], [weight])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)])
    program: Any = compile_onnx(from_model(model, Path(), "one"), target, resolve(weights, acts, "channel", None))
    line = simulate_program(program, target)
    assert not program.hosts
    assert line.total_cycles > 64 * 256 * 512 / max(target.matrix.macs_per_cycle.values())


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_layer_of_a_decoder(name: str) -> None:
    weights, acts = PUBLISHED[name].formats
    document = api.run(LAYER, name, prompt=32, options=RunOptions(weights=weights, acts=acts), cache=False)
    left = {node.rsplit("/", 1)[-1] for row in document.host_calls for node in row.nodes}
    assert left == ({"Attention"} if name == "ethos-u85-2048" else set())
    assert document.ttft_ms > load_target(name).host.dispatch_us * 1e-3


@pytest.mark.parametrize(
    ("name", "weights", "acts"),
    [("tpu-v3", "int8", "int8"), ("tpu-v4", "int4", "int8"), ("nvdla-full", "int4", "fp16"), ("rk3588", "int4", "int8"),
     ("ethos-u85-2048", "fp16", "fp16")],
)  # fmt: skip
def test_a_pair_that_a_target_lacks_is_refused_by_name(name: str, weights: str, acts: str) -> None:
    with pytest.raises(OptionError, match=rf"target {name} cannot multiply {acts} by {weights}; it has "):
        api.compile(LAYER, name, prompt=8, options=RunOptions(weights=weights, acts=acts))


@pytest.mark.parametrize("name", ["tpu-v3", "rk3588"])
def test_blocks_become_fp16_where_nothing_narrower_is_multiplied(name: str) -> None:
    options = [RunOptions(weights=weights) for weights in ("q4_0", "fp16")]
    blocks, half = (api.run(LAYER, name, prompt=8, options=each, cache=False) for each in options)
    assert not blocks.host_calls
    assert blocks.weight_bytes < half.weight_bytes


def test_attention_is_the_hosts_where_no_fp16_is_multiplied(tmp_path: Path) -> None:
    """Named with its reason, an error without a host, and right."""
    config, machine = ENCODERS["mean"], load_target("ethos-u85-2048")
    store = write_random_weights(config, tmp_path)
    model, random = build_encoder_graph(config, tokens=13, weights=store), np.random.default_rng(5)
    feeds = {"input_ids": random.integers(0, config.vocab, (1, 13)), "attention_mask": np.ones((1, 13), np.int64)}
    feeds |= {"token_type_ids": random.integers(0, 2, (1, 13))} if config.types else {}
    (expected,) = ort_session(model, store, threads=1).run(None, feeds)
    student = from_model(model, tmp_path, config.name)
    program = compile_onnx(student, machine, resolve("int8", "int16", "channel", None))
    assert program is not None
    assert len(program.hosts) == config.layers
    (found,) = load(program, simulate_program(program, machine), student, machine).run(feeds).values()
    assert np.abs(found - expected).max() / np.abs(expected).max() < 4e-2
    with pytest.raises(StudentError, match="not fp16xfp16, as attention does"):
        api.compile(LAYER, "ethos-u85-2048", prompt=8, options=RunOptions(weights="int8", acts="int8", fallback=False))
