"""The verbs on a small ONNX file, from the command line to the files, through the real compiler and machines."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from students import LLAMA

from firsttoken_models.registry import PROVIDER
from firsttoken_models.weights import WEIGHTS_FILE

Run = Callable[..., subprocess.CompletedProcess[str]]
MAIN = "import sys; from firsttoken.cli import main; sys.argv[0] = 'firsttoken'; main()"
LOADED = (
    "import atexit, sys; atexit.register(lambda: print('loaded', "
    "[m for m in ('tvm', 'numba', 'onnx', 'torch') if m in sys.modules], file=sys.stderr)); "
)
REPORTS = ["ops.csv", "program.npu", "program.txt", "report.html", "run.json", "trace.pftrace"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of 7 tokens without its weights, and an empty cache."""
    folder = tmp_path_factory.mktemp("verbs")
    onnx.save(PROVIDER.graph(LLAMA, tokens=7, past=0), folder / "tiny.onnx")
    assert not (folder / WEIGHTS_FILE).exists()
    return folder


@pytest.fixture(scope="module")
def firsttoken(folder: Path) -> Run:
    def call(*arguments: str, prelude: str = "") -> subprocess.CompletedProcess[str]:
        absent = ["--weights-absent"] if arguments[0] in ("run", "compile") else []
        command = [sys.executable, "-W", "error", "-c", prelude + MAIN, *arguments, *absent]
        return subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=folder, timeout=300,
            env={"PATH": "/usr/bin:/bin", "FIRSTTOKEN_CACHE": str(folder / "cache"), "HOME": str(folder)},
        )  # fmt: skip

    return call


@pytest.fixture(scope="module")
def first_run(firsttoken: Run) -> str:
    result = firsttoken("run", "tiny.onnx", "--target", "systolic-128", "-o", "out", "--json")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


def test_a_file_without_its_weights_is_timed_only_when_that_is_asked_for(folder: Path, firsttoken: Run) -> None:
    command = [sys.executable, "-W", "error", "-c", MAIN, "run", "tiny.onnx", "--target", "systolic-128", "-o", "no"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, timeout=300)
    assert (result.returncode, result.stdout) == (2, "")
    assert f"is kept in {WEIGHTS_FILE}, which is not beside the model" in result.stderr
    assert not (folder / "no").exists()


def test_run(folder: Path, first_run: str) -> None:
    document = json.loads(first_run)
    assert (document["student"], document["prompt_tokens"], document["target"]) == ("tiny", 7, "systolic-128")
    assert sum(op["cycles"] for op in document["ops"]) + document["host_cycles"] == document["ttft_cycles"]
    assert sum(op["macs"] for op in document["ops"]) == document["macs"]
    assert sum(layer["macs"] for layer in document["layers"]) == document["macs"]
    for phase in ("read", "write"):
        assert sum(op[f"dram_{phase}_bytes"] for op in document["ops"]) == document[f"dram_{phase}_bytes"]
    total = document["dram_read_bytes"] + document["dram_write_bytes"]
    assert sum(document["dram_bytes_by_kind"].values()) == total
    assert sum(document["energy_by_component_mj"].values()) == pytest.approx(document["energy_mj"], rel=1e-12)
    nanojoules = sum(op["energy_nj"] for op in document["ops"]) + document["dispatch_energy_nj"]
    assert nanojoules == pytest.approx(document["energy_mj"] * 1e6, rel=1e-9)
    assert sum(document["time_by_bound_ms"].values()) == pytest.approx(document["ttft_ms"], rel=1e-12)
    assert sorted(path.name for path in (folder / "out").iterdir()) == REPORTS
    assert (folder / "out" / "run.json").read_text() == first_run


def test_the_second_run_is_at_once_and_equal(firsttoken: Run, folder: Path, first_run: str) -> None:
    start = time.monotonic()
    again = firsttoken(
        "run", "tiny.onnx", "--target", "systolic-128", "-o", "again", "--json", prelude=LOADED
    )  # fmt: skip
    seconds = time.monotonic() - start
    assert again.stdout == first_run
    assert again.stderr == "loaded []\n"
    for name in REPORTS:
        assert (folder / "again" / name).read_bytes() == (folder / "out" / name).read_bytes()
    assert seconds < 3, "a second is what is promised; other tests may share the processor"


def test_the_same_without_a_cache(firsttoken: Run, first_run: str) -> None:
    result = firsttoken("run", "tiny.onnx", "--target", "systolic-128", "--no-cache", "--prompt", "7", "--json")
    assert result.stdout == first_run


def test_screen(firsttoken: Run, first_run: str) -> None:
    screen = firsttoken("run", "tiny.onnx", "--target", "systolic-128").stdout
    for text in ("time to first token", "energy per prompt", "Costliest operators", "Not modelled", "host fallbacks"):
        assert text in screen


def test_compile_and_simulate_give_what_run_gives(firsttoken: Run, folder: Path, first_run: str) -> None:
    facts = json.loads(firsttoken("compile", "tiny.onnx", "--target", "systolic-128", "-o", "t.npu", "--json").stdout)
    assert facts["program"] == "t.npu"
    assert facts["macs"] == json.loads(first_run)["macs"]
    simulated = firsttoken(
        "simulate", "t.npu", "--json", "--trace", "s.pftrace", "--ops", "s.csv", "--html", "s.html"
    )  # fmt: skip
    assert simulated.stdout == first_run
    for name, same in (("s.pftrace", "trace.pftrace"), ("s.csv", "ops.csv"), ("s.html", "report.html")):
        assert (folder / name).read_bytes() == (folder / "out" / same).read_bytes()


def test_stop_and_dump(firsttoken: Run, folder: Path) -> None:
    stopped = firsttoken(
        "compile", "tiny.onnx", "--stop-after", "quantise", "--dump-after", "all", "--dump-dir", "dumps", "--json",
        "-o", "never.npu",
    )  # fmt: skip
    assert stopped.returncode == 0, stopped.stderr
    facts = json.loads(stopped.stdout)
    assert (facts["program"], facts["stopped_after"], facts["dump"]) == (None, "quantise", "dumps")
    assert len(list((folder / "dumps").iterdir())) == 4
    assert not (folder / "never.npu").exists()
    wrong = firsttoken("compile", "tiny.onnx", "--stop-after", "quantize")
    assert wrong.returncode == 2
    assert "quantise" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_a_prompt_that_the_file_is_not_for(firsttoken: Run) -> None:
    mistaken = firsttoken("run", "tiny.onnx", "--prompt", "8")
    assert mistaken.returncode == 2
    assert "--prompt 8 contradicts tiny.onnx, whose graph is for 7" in mistaken.stderr


def test_diff_of_formats(firsttoken: Run, folder: Path, first_run: str) -> None:
    options = ("--target", "systolic-128", "--weights", "fp16", "-o", "half")
    assert firsttoken("run", "tiny.onnx", *options).returncode == 0
    result = firsttoken("diff", "out", "half", "--fail-if", "weight_bytes>+1%", "--json")
    assert result.returncode == 1
    assert "weights: int4 -> fp16" in json.loads(result.stdout)["inputs"]
