"""Every bad file is refused by the whole pipeline with its own message, soon, and leaves nothing behind."""

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import gguf_cases
from bad_cases import CASES, Case

from firsttoken import api
from firsttoken_compiler.errors import StudentError
from firsttoken_compiler.frontend import check_graph, check_operators, check_tensors, onnx_file, wire
from firsttoken_models import gguf_file

CHECK = Path(__file__).with_name("check.py")
ROOT = CHECK.parents[2]
THROUGH_THE_COMMAND = ("20,000 nested subgraphs", "external data in a link to a device", "Loop whose count is an input")


def listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


ALL = [*CASES, *gguf_cases.CASES]


@pytest.mark.parametrize("case", ALL, ids=[case.name.replace(" ", "-") for case in ALL])
def test_refused(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIRSTTOKEN_CACHE", str(tmp_path / "cache"))
    path = case.write(tmp_path)
    before = listing(tmp_path)
    started, grown = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(StudentError) as caught:
        api.run(path, "systolic-128", out=tmp_path / "out" / "here")
    seconds = time.process_time() - started
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - grown
    message = str(caught.value)
    assert case.message in message
    assert len(message) < 3000
    assert listing(tmp_path) == before
    assert seconds < 5, "the limit on the command line is 2 s; this one leaves room for a busy machine and imports"
    assert grown < 700 << 10


@pytest.mark.parametrize("name", THROUGH_THE_COMMAND)
def test_refused_on_the_command_line(name: str) -> None:
    command = [sys.executable, str(CHECK), name]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ}, timeout=120)
    assert "exit code" not in result.stdout, result.stdout
    assert "left" not in result.stdout
    assert "Traceback" not in result.stdout + result.stderr
    assert f"{name}: " in result.stdout


def test_the_text_of_a_case_is_its_own() -> None:
    assert len(CASES) > 150

def test_the_page_states_the_limits() -> None:
    page = (ROOT / "docs" / "untrusted.md").read_text(encoding="utf-8")
    for limit in (
        f"{wire.MAX_FIELDS:,} fields", f"| {check_graph.MAX_NODES:,} |", f"| {check_graph.MAX_NAME:,} |",
        f"| {check_graph.MAX_NESTING}; {check_graph.MAX_CALL_DEPTH} |", f"| {check_operators.MAX_TRIPS:,}, and",
        f"| {check_tensors.MAX_RANK}; {check_tensors.MAX_TENSOR_BYTES >> 30} GiB |",
        f"| {onnx_file.MAX_INNER_BYTES >> 20} MiB |", f"| {onnx_file.MAX_PROTO_BYTES >> 30} GiB,",
    ):  # fmt: skip
        assert limit in page


def test_the_page_states_the_limits_of_gguf_files() -> None:
    page = " ".join((ROOT / "docs" / "untrusted.md").read_text(encoding="utf-8").split())
    for limit in (
        f"{gguf_file.MAX_FIELDS:,} fields", f"{gguf_file.MAX_TENSORS:,} tensors",
        f"{gguf_file.MAX_NAME} bytes of a tensor's name", f"{gguf_file.MAX_KEY} of a field's",
        f"{gguf_file.MAX_TEXT >> 20} MiB of a string", f"{gguf_file.MAX_TEXTS >> 20} MiB of all strings",
        f"{gguf_file.MAX_ITEMS:,} elements", f"{gguf_file.MAX_TENSOR_BYTES >> 30} GiB of a tensor",
    ):  # fmt: skip
        assert limit in page
