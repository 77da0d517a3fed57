"""firsttoken: the names of the facade, and that importing it costs nothing."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import firsttoken

HEAVY = ("tvm", "numba", "torch", "onnx", "onnxruntime", "pydantic", "networkx", "numpy", "rich", "typer")


def test_import_is_light_and_fast() -> None:
    check = (
        "import json, sys, time; start = time.perf_counter(); import firsttoken; end = time.perf_counter()\n"
        f"print(json.dumps([end - start, [m for m in {HEAVY!r} if m in sys.modules]]))"
    )
    runs = [
        json.loads(subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout)
        for _ in range(3)
    ]
    assert runs[0][1] == []
    assert min(seconds for seconds, _ in runs) < 0.150


def test_target_and_cost_model_load_no_compiler() -> None:
    check = (
        "import sys; from firsttoken import CostModel, Target, RunOptions, Estimate, compile, simulate, run, generate\n"
        "CostModel(Target.load('systolic-128'))\n"
        "print([m for m in ('tvm', 'numba', 'torch', 'onnx', 'onnxruntime') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_names() -> None:
    for name in firsttoken.__all__:
        assert getattr(firsttoken, name) is not None
        assert name in dir(firsttoken)
    assert firsttoken.__version__[0].isdigit()
    with pytest.raises(AttributeError, match="has no attribute 'Targets'; it has CostModel, "):
        _ = firsttoken.Targets
