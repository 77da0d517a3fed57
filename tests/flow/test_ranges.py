"""`firsttoken ranges` and `--acts-range`, from the command line to run.json."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

MAIN = "import sys; from firsttoken.cli import main; sys.argv[0] = 'firsttoken'; main()"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A file with two products, and inputs for it."""
    text = '<ir_version: 10, opset_import: ["" : 18]> two (float[64, 512] x) => (float[64, 128] y) {' + (
        "h = MatMul(x, w1)  r = Relu(h)  y = MatMul(r, w2) }"
    )
    model, r = onnx.parser.parse_model(text), np.random.default_rng(0)
    for name, shape in (("w1", (512, 1024)), ("w2", (1024, 128))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(r.standard_normal(shape).astype(np.float32), name))
    onnx.save(model, tmp_path / "two.onnx")
    np.savez(tmp_path / "inputs.npz", x=r.standard_normal((3, 64, 512)).astype(np.float32))
    return tmp_path


def firsttoken(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", MAIN, *arguments], capture_output=True, text=True, check=False,
        cwd=folder, timeout=300,
        env={"PATH": "/usr/bin:/bin", "FIRSTTOKEN_CACHE": str(folder / "cache"), "HOME": str(folder)},
    )  # fmt: skip


def test_ranges_that_are_measured_cost_fewer_cycles(folder: Path) -> None:
    made = firsttoken(folder, "ranges", "two.onnx", "--inputs", "inputs.npz", "-o", "ranges.json", "--json")
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout) == {"file": "ranges.json", "method": "minmax", "samples": 3, "tensors": 2}
    runs = {}
    for acts_range in ("dynamic", "ranges.json"):
        arguments = ("run", "two.onnx", "--target", "systolic-128", "--acts-range", acts_range, "--json")
        ran = firsttoken(folder, *arguments)
        assert ran.returncode == 0, ran.stderr
        runs[acts_range] = json.loads(ran.stdout)
    dynamic, static = runs.values()
    assert (dynamic["acts_range"], static["acts_range"]) == ("dynamic", "static")
    assert static["ttft_cycles"] < dynamic["ttft_cycles"]
    assert len(static["ops"]) < len(dynamic["ops"])


def test_mistakes_are_one_message_and_exit_code_2(folder: Path) -> None:
    (folder / "ranges.json").write_text('{"format": "firsttoken-ranges"}')
    for arguments, message in (
        (("run", "two.onnx", "--acts-range", "ranges.json"), "--acts-range ranges.json: version: Field required"),
        (("run", "two.onnx", "--acts-range", "static"), "--acts-range static: no such file; write one with"),
        (("ranges", "two.onnx"), "two is an ONNX file"),
        (("ranges", "deepseek-r1-distill-qwen-1.5b"), "has no weights and no tokenizer here"),
        (("ranges", "two.onnx", "--inputs", "two.onnx"), "two.onnx is not an .npz file of arrays"),
    ):
        ran = firsttoken(folder, *arguments)
        assert ran.returncode == 2, ran.stdout
        assert message in ran.stderr
        assert "Traceback" not in ran.stderr
