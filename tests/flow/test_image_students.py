"""Built-in networks for images from their name to reports: an inference, ranges that are declared, what is refused."""

from __future__ import annotations

import io
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from rich.console import Console

from firsttoken import RunOptions, api
from firsttoken.act_ranges import ranges_of
from firsttoken.describe import student_document
from firsttoken.execution import load
from firsttoken.latency import EncoderWork, latency
from firsttoken.range_calibration import calibrate_file, declared
from firsttoken.student import find_any, find_student
from firsttoken.subject import ImageNetwork, subject_of
from firsttoken.verbs.ranges import ranges
from firsttoken_compiler.errors import OptionError
from firsttoken_compiler.frontend.onnx_file import from_model
from firsttoken_compiler.options import resolve
from firsttoken_compiler.pipeline import compile_onnx
from firsttoken_compiler.target.load import load_target
from firsttoken_models.image_networks import RESNET_50
from firsttoken_models.resnet_graph import build_resnet
from firsttoken_simulator.machine import simulate_program
from firsttoken_simulator.report.screen import show

SMALL = replace(RESNET_50, name="small", side=32, stem=16, stages=((1, 8), (2, 16)), classes=10)
TARGETS = ("nvdla-full", "systolic-128")
INT8 = RunOptions(weights="int8", acts="int8", group="channel")


def network() -> ImageNetwork:
    """The small one as something to compile."""
    found = subject_of(SMALL)
    assert isinstance(found, ImageNetwork)
    return found


@pytest.mark.parametrize("target", TARGETS)
def test_a_run_is_an_inference_of_one_image(target: str, tmp_path: Path) -> None:
    document = api.run(SMALL, target, options=INT8, out=tmp_path, cache=False)
    assert (document.phase, document.prompt_tokens, document.past, document.tpot_ms) == ("inference", 1, 0, None)
    assert document.host_fallbacks == []
    assert document.kv_bytes == 0
    assert document.ladder[-1].name == "result"
    console = Console(width=160, file=io.StringIO())
    show(console, [document])
    screen, page = console.file.getvalue(), (tmp_path / "report.html").read_text(encoding="utf-8")
    for text in (screen, page):
        assert "first token" not in text
        assert "time of an inference" in text
        assert "energy per inference" in text
        assert "one image" in text
    assert "for an inference of one image;" in page
    kept = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert (kept["phase"], kept["student"], kept["acts_range"]) == ("inference", "small", "dynamic")


@pytest.mark.parametrize("target", TARGETS)
def test_declared_ranges_keep_images_in_integers(target: str, tmp_path: Path) -> None:
    file = tmp_path / "ranges.json"
    file.write_text(declared(network()).to_json())
    options = replace(INT8, ranges=ranges_of(str(file)))
    static, dynamic = (api.run(SMALL, target, options=chosen, cache=False) for chosen in (options, INT8))
    assert (static.acts_range, dynamic.acts_range) == ("static", "dynamic")
    assert static.macs == dynamic.macs
    kinds, before = (Counter(row.kind for row in document.ops) for document in (static, dynamic))
    assert (before["windows"], before["conv"], before["quantise"]) == (5, 0, 13)
    assert (kinds["windows"], kinds["conv"], kinds["quantise"]) == (0, 5, 2)  # of the image, and of the means
    wider = replace(options, ranges=tuple((tensor, 7.0) for tensor, _ in options.ranges))
    assert [row.tile for row in api.run(SMALL, target, options=wider, cache=False).ops] == [r.tile for r in static.ops]
    assert sorted(options.ranges) == sorted(network().declared())
    with pytest.raises(OptionError, match="--acts-range: 1 of the tensors that products read have no range: 'pixels'"):
        api.run(SMALL, target, options=replace(INT8, ranges=network().declared()[1:]), cache=False)


def test_the_verb_declares_ranges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ranges("resnet-50", tmp_path / "ranges.json", "minmax", 4, 128, None, None, as_json=True)
    assert json.loads(capsys.readouterr().out) == {
        "file": str(tmp_path / "ranges.json"), "method": "declared", "samples": 0, "tensors": 54,
    }  # fmt: skip
    assert dict(ranges_of(str(tmp_path / "ranges.json")))["pixels"] == 1.0
    with pytest.raises(OptionError, match="--prompt 8: resnet-50 is an image network"):
        ranges("resnet-50", tmp_path / "ranges.json", "minmax", 4, 128, None, 8)
    with pytest.raises(OptionError, match=r"--inputs in\.npz is for ONNX files, and resnet-50 is an image network"):
        ranges("resnet-50", tmp_path / "ranges.json", "minmax", 4, 128, Path("in.npz"), None)
    with pytest.raises(OptionError, match="is for ONNX files"):
        calibrate_file(network(), "minmax", Path("in.npz"), None)


def test_the_machine_computes_what_onnxruntime_does(tmp_path: Path) -> None:
    model, random = build_resnet(SMALL), np.random.default_rng(3)
    stored = []
    for weight in model.graph.initializer:
        scale = np.prod(weight.dims[1:]) ** -0.5 if len(weight.dims) > 1 else 0.1
        stored.append((random.standard_normal(tuple(weight.dims)) * scale).astype(np.float32))
    (tmp_path / "weights.bin").write_bytes(b"".join(array.tobytes() for array in stored))
    onnx.save(model, tmp_path / "small.onnx")
    feeds = {"pixels": random.random((1, 3, 32, 32), np.float32)}
    (expected,) = onnxruntime.InferenceSession(tmp_path / "small.onnx").run(None, feeds)
    machine, student = load_target("systolic-128"), from_model(model, tmp_path, "small")
    program = compile_onnx(student, machine, resolve("fp16", None, "channel", None))
    assert program is not None
    assert not program.hosts
    (found,) = load(program, simulate_program(program, machine), student, machine).run(feeds).values()
    assert np.abs(found - expected).max() < 4e-3 * np.abs(expected).max()


def test_latency_is_of_an_inference() -> None:
    found = latency(EncoderWork(SMALL, INT8, 1), "nvdla-full", cache=False)
    assert list(found.parts) == ["inference"]
    assert found.ttft_ms is not None
    assert (found.prefill_tok_s, found.tpot_ms, found.time_us) == (None, None, None)


def test_what_it_is_described_as() -> None:
    found = student_document("resnet-50")
    assert (found["layers"], found["side"], found["parameters"]) == (50, 224, 25_557_032)
    assert (found["weights"], found["tokenizer"]) == ("no", "no")
    assert find_any("resnet50")[1] is RESNET_50


def test_what_an_image_network_cannot_do() -> None:
    with pytest.raises(OptionError, match="--prompt 64: resnet-50 is an image network, it reads one image of 224"):
        api.run("resnet-50", "nvdla-full", prompt=64)
    with pytest.raises(OptionError, match="leave --past and --decode away"):
        api.run("resnet-50", "nvdla-full", decode=1)
    with pytest.raises(OptionError, match="leave --past and --decode away"):
        api.compile("resnet-50", "nvdla-full", past=8)
    with pytest.raises(OptionError, match="--prompt 0: a prompt has at least 1 token"):
        api.compile("resnet-50", "nvdla-full", prompt=0)
    with pytest.raises(OptionError, match="resnet-50 is an image network, to answer takes a tokenizer"):
        api.generate("resnet-50", "Hello")
    with pytest.raises(OptionError, match="resnet-50 is an image network, to measure it takes"):
        api.quality("resnet-50")
    with pytest.raises(OptionError, match="resnet-50 is an image network, which has no cache"):
        find_student("resnet-50")
