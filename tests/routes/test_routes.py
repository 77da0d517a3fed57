"""Exporters' models, small enough to be committed, through all of firsttoken; `check.py` does so for all routes."""

import json
from pathlib import Path

import numpy as np
import pytest
from checking import agreement, check
from routes import ENVIRONMENTS, FIXTURES, ROUTES

from firsttoken_compiler.errors import FirsttokenError

FOLDER = Path(__file__).resolve().parents[1] / "fixtures" / "routes"
LIMIT_BYTES = 200_000
ON_NPU = {"MatMul", "Gemm", "MatMulInteger", "MatMulNBits", "Attention", "Softmax", "GroupQueryAttention", "Conv",
          "RotaryEmbedding", "LayerNormalization", "ReduceMean", "SkipLayerNormalization", "Sigmoid"}  # fmt: skip
"""Operators that carry the work of a model: of float graphs none of them may run on the host."""


@pytest.mark.parametrize("name", FIXTURES)
def test_numbers_and_where_the_work_is_done(name: str) -> None:
    result = check(FOLDER / name, "systolic-128")
    assert result.error == ""
    assert result.passed, f"difference {result.max_rel:.1e}, cosine {result.cosine:.6f}, limits {result.limit}"
    assert result.ttft_ms > 0
    allowed = {"MatMul"} if name.startswith(("optimum", "static")) else set()  # angles of positions; attention in QDQ
    assert not set(result.host) & (ON_NPU - allowed)


def test_the_second_target() -> None:
    assert check(FOLDER / "genai-llama-int4-prefill", "snapdragon-x-elite").passed


def test_every_fixture_is_a_small_route_of_the_table() -> None:
    assert {path.name for path in FOLDER.iterdir() if path.is_dir()} == set(FIXTURES) <= set(ROUTES)
    assert all((FOLDER / name / "model.onnx").stat().st_size < LIMIT_BYTES for name in FIXTURES)
    metas = [json.loads((FOLDER / name / "meta.json").read_text(encoding="utf-8")) for name in FIXTURES]
    assert [meta["route"] for meta in metas] == list(FIXTURES)


def test_the_table_names_environments_and_functions_that_exist() -> None:
    here = Path(__file__).parent
    for route in ROUTES.values():
        module, _, function = route.function.partition(":")
        assert f"def {function}(" in (here / f"{module}.py").read_text(encoding="utf-8")
        assert route.environment in ENVIRONMENTS


def test_agreement_sees_what_differs() -> None:
    right = np.linspace(-1, 1, 9)
    assert agreement({"y": right}, {"y": right}) == (0.0, pytest.approx(1.0))
    worst, cosine = agreement({"y": right + 0.2 * (right > 0.9)}, {"y": right})
    assert worst == pytest.approx(0.1)
    assert cosine < 0.9999
    assert agreement({"y": np.full(9, np.nan)}, {"y": right})[0] == np.inf
    with pytest.raises(FirsttokenError, match="'y' is missing; there are z"):
        agreement({"z": right}, {"y": right})
