"""reports/power.py: what stands beside a published power, and in which words."""

import csv
import importlib.util
import io
import sys
from pathlib import Path
from typing import Any

import pytest

from firsttoken import RunOptions, Target
from firsttoken.latency import EncoderWork, LlmWork, predict
from firsttoken_simulator.energy import COMPONENTS, Band

ZERO = Band(0.0, 0.0, 0.0)


@pytest.fixture(scope="module")
def power() -> Any:
    path = Path(__file__).resolve().parents[2] / "reports" / "power.py"
    spec = importlib.util.spec_from_file_location("report_power", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def row(power: Any) -> Any:
    """A small encoder, beside a figure made up for the purpose."""
    work = EncoderWork("minilm-l6", RunOptions(weights="fp16"), 16)
    figure = power.Figure("a <job>", 1.0, "=", "system", "snapdragon-x-elite", work, "inference", "nobody", "in all")
    return power.found(figure, power.Meter())


def made(power: Any, covers: str, bound: str, watts: float) -> Any:
    work = EncoderWork("minilm-l6", RunOptions(), 16)
    figure = power.Figure("j", watts, bound, covers, "systolic-128", work, "inference", "s", "d")
    parts = {name: ZERO for name in COMPONENTS} | {"mac": Band(1.0, 2.0, 3.0), "dram": Band(0.5, 1.0, 2.0)}
    return power.Found(figure, 1e-3, parts, Band(0.0, 1.0, 4.0))


def test_components_are_what_the_prediction_says(row: Any, power: Any) -> None:
    target = Target.load("snapdragon-x-elite")
    said = predict(row.figure.work, target, power.Meter())
    whole = row.npu + row.dram
    assert said.power_w == pytest.approx(whole.typical, rel=1e-6)
    assert said.power_band_w == pytest.approx((whole.low, whole.high), rel=1e-6)
    assert row.host == Band(*(target.energy_at(bound).host_poll_w for bound in ("low", "typical", "high")))
    assert row.beside.typical == pytest.approx(whole.typical + row.host.typical)
    assert row.seconds == said.parts["inference"].seconds


@pytest.mark.parametrize(
    ("covers", "bound", "watts", "band", "verdict"),
    [
        ("NPU", "=", 2.5, Band(1.0, 2.0, 3.0), "inside the band, typical 0.80 times"),
        ("NPU", "=", 4.0, Band(1.0, 2.0, 3.0), "below the figure, typical 0.50 times"),
        ("NPU and DRAM", "=", 1.0, Band(1.5, 3.0, 5.0), "above the figure, typical 3.00 times"),
        ("NPU and DRAM", "<", 5.0, Band(1.5, 3.0, 5.0), "agrees, the whole band is below"),
        ("system", "<", 5.0, Band(1.5, 4.0, 9.0), "agrees, a part of the band is above"),
        ("system", "<", 2.0, Band(1.5, 4.0, 9.0), "2.00 times the limit"),
        ("NPU", "~", 0.5, Band(1.0, 2.0, 3.0), "4.00 times: the same order of magnitude"),
        ("NPU", "~", 0.1, Band(1.0, 2.0, 3.0), "20.00 times: another order of magnitude"),
    ],
)
def test_a_verdict_follows_the_band(
    power: Any, covers: str, bound: str, watts: float, band: Band, verdict: str
) -> None:
    found = made(power, covers, bound, watts)
    assert found.beside == band
    assert found.verdict == verdict


def test_the_files_say_the_same(row: Any, power: Any, tmp_path: Path) -> None:
    rows = [row, made(power, "NPU", "~", 0.5)]
    power.write(rows, tmp_path)
    read = list(csv.DictReader(io.StringIO((tmp_path / "power.csv").read_text("utf-8"))))
    assert tuple(read[0]) == power.COLUMNS
    for line, one in zip(read, rows, strict=True):
        assert float(line["typical_w"]) == pytest.approx(one.beside.typical, rel=1e-3)
        assert float(line["low_w"]) <= float(line["typical_w"]) <= float(line["high_w"])
        assert line["verdict"] == one.verdict
    text, page = ((tmp_path / name).read_text("utf-8") for name in ("README.md", "power.html"))
    for one in rows:
        assert power.watts(one.beside) in text
        assert power.watts(one.beside) in page
        assert one.verdict in text
    assert "a &lt;job&gt;" in page
    assert "<job>" not in page
    assert "http" not in page


def test_every_figure_names_a_target_its_phase_and_a_source(power: Any) -> None:
    for figure in (*power.FIGURES, power.NVDLA):
        target = Target.load(figure.target)
        target.runtime(figure.work and figure.work.runtime)
        assert figure.covers in power.MEASURED
        assert figure.bound in ("=", "<", "~")
        phases = ("prefill", "decode") if isinstance(figure.work, LlmWork) else ("inference",)
        assert figure.phase in phases
        assert figure.source
        assert figure.differs
