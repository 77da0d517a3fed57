"""firsttoken.api: runs, their cache and files with a stand-in for the compiler; what the real one is told."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest
from stand_in import Compiler

from firsttoken import RunOptions, Target, api
from firsttoken.cache import DATABASE
from firsttoken.student import StudentConfig
from firsttoken_compiler.errors import FirsttokenError, OptionError
from firsttoken_models.registry import PROVIDER
from firsttoken_simulator.report.document import RunDocument
from firsttoken_simulator.report.errors import ReportError

TARGET = Target.load("systolic-128")


def test_run(compiler: Compiler, llama: StudentConfig) -> None:
    stages: list[str] = []
    document = api.run(llama, TARGET, prompt=3, progress=lambda stage, done, total: stages.append(stage))
    assert (document.student, document.target, document.prompt_tokens) == ("tiny-llama", "systolic-128", 3)
    assert (document.weights, document.activations, document.norm_cache) == ("int4", "int8", "int8")
    assert document.tpot_ms is None
    assert document.ttft_ms == pytest.approx(document.host_ms + document.npu_ms)
    assert list(dict.fromkeys(stages)) == ["emit", "simulate", "report"]
    assert compiler.calls == [("tiny-llama", 3, 0, RunOptions().precision())]


def test_decode_measures_the_last_step(compiler: Compiler, llama: StudentConfig) -> None:
    document = api.run(llama, TARGET, prompt=3, decode=5)
    assert [call[1:3] for call in compiler.calls] == [(3, 0), (1, 7)]
    assert document.decode is not None
    assert document.decode.past == 7
    assert document.tpot_ms == document.decode.tpot_ms > 0
    assert api.run(llama, TARGET, prompt=60, decode=4).decode is not None  # 64 positions in all
    with pytest.raises(OptionError, match="1 tokens after 64 cached ones exceeds the 64 positions"):
        api.run(llama, TARGET, prompt=60, decode=5)
    with pytest.raises(OptionError, match="--decode -1: "):
        api.run(llama, TARGET, prompt=3, decode=-1)


def test_the_second_run_is_kept(compiler: Compiler, llama: StudentConfig) -> None:
    first = api.run(llama, TARGET, prompt=3)
    assert api.run(llama, TARGET, prompt=3) == first
    assert len(compiler.calls) == 1
    api.run(llama, TARGET, prompt=3, cache=False)
    assert len(compiler.calls) == 2


def test_whatever_changes_the_document_is_another_run(compiler: Compiler, llama: StudentConfig) -> None:
    faster = dataclasses.replace(TARGET, clock_hz=2e9)
    described = dataclasses.replace(TARGET, description="other words")
    questions: list[dict[str, Any]] = [
        {"prompt": 3}, {"prompt": 4}, {"prompt": 3, "decode": 1}, {"prompt": 3, "options": RunOptions(seed=1)},
        {"prompt": 3, "options": RunOptions(weights="int8")}, {"prompt": 3, "options": RunOptions(layer_bits=(8,))},
        {"prompt": 3, "target": faster}, {"prompt": 3, "target": described},
        {"prompt": 3, "student": dataclasses.replace(llama, name="another")},
        {"prompt": 3, "student": dataclasses.replace(llama, intermediate=128)},
    ]  # fmt: skip
    documents = [api.run(**{"student": llama, "target": TARGET, **question}) for question in questions]
    assert len(compiler.calls) == len(questions) + 1  # one of them has a decode graph too
    assert documents[7].target_description == "other words"
    assert documents[8].student == "another"


def test_files(compiler: Compiler, llama: StudentConfig, tmp_path: Path) -> None:
    api.run(llama, TARGET, prompt=3)
    document = api.run(llama, TARGET, prompt=3, out=tmp_path / "a" / "first")
    assert len(compiler.calls) == 2  # the run before had kept no files
    assert api.run(llama, TARGET, prompt=3, out=tmp_path / "second") == document
    assert len(compiler.calls) == 2
    for name in api.REPORTS:
        data = (tmp_path / "a" / "first" / name).read_bytes()
        assert data
        assert (tmp_path / "second" / name).read_bytes() == data
    assert sorted(path.name for path in (tmp_path / "second").iterdir()) == sorted(api.REPORTS)
    assert RunDocument.from_json((tmp_path / "second" / "run.json").read_text()) == document


def test_a_folder_that_cannot_be_is_refused_before_the_work(
    compiler: Compiler, llama: StudentConfig, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    for bad in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(ReportError, match=r"cannot make the folder .*file.*; choose another -o"):
            api.run(llama, TARGET, prompt=3, out=bad)
    assert compiler.calls == []


@pytest.mark.parametrize("harm", ["garbage", "file as folder", "folder as file"])
def test_a_bad_cache_never_breaks_a_run(compiler: Compiler, llama: StudentConfig, cache: Path, harm: str) -> None:
    if harm == "file as folder":
        cache.touch()
    elif harm == "folder as file":
        (cache / DATABASE).mkdir(parents=True)
    else:
        api.run(llama, TARGET, prompt=3)
        (cache / DATABASE).write_bytes(b"garbage" * 999)
    assert api.run(llama, TARGET, prompt=3).ttft_ms > 0


def test_a_file_has_its_own_length(compiler: Compiler, llama: StudentConfig, tmp_path: Path) -> None:
    onnx.save(PROVIDER.graph(llama, tokens=7, past=0), tmp_path / "s.onnx")
    assert api.run(str(tmp_path / "s.onnx"), TARGET).prompt_tokens == 7
    assert api.run(tmp_path / "s.onnx", TARGET).student == "s"
    assert len(compiler.calls) == 1
    with pytest.raises(OptionError, match="--prompt 64 contradicts"):
        api.run(tmp_path / "s.onnx", TARGET, prompt=64)
    with pytest.raises(OptionError, match=r"--decode needs .* tokens and cached rows is static or absent: export"):
        api.run(tmp_path / "s.onnx", TARGET, decode=3)


def test_compile_passes_everything_on(uneven: StudentConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    def compile_onnx(student: Any, target: Any, precision: Any, **rest: Any) -> None:
        seen.update(rest, student=student, target=target, precision=precision)

    pipeline = ModuleType("firsttoken_compiler.pipeline")
    pipeline.compile_onnx = compile_onnx  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "firsttoken_compiler.pipeline", pipeline)
    options = RunOptions(weights="int8", seed=4)
    control = {"stop_after": "lower", "dump_after": "all", "dump_dir": tmp_path}
    assert api.compile(uneven, "systolic-128", prompt=2, past=5, options=options, **control) is None
    assert {name: seen[name] for name in control} == control
    assert seen["target"] == TARGET
    assert seen["precision"].layer_bits == (0, 4, 0)
    assert seen["precision"].weights == "int8"
    assert seen["student"].metadata["firsttoken.past"] == "5"
    assert seen["meta"] == {
        "weights": "int8", "activations": "int8", "group": "128", "norm_cache": "int8", "seed": 4,
        "student": "tiny-uneven", "target": "systolic-128", "target_hash": TARGET.content_hash, "prompt_tokens": 2,
        "past": 5, "phase": "decode", "kv_cache": "fp16", "acts_range": "dynamic",
        "norm_cache_place": "auto", "residual_spill": "fp32",
    }  # fmt: skip


def test_mistakes_are_one_kind_of_error(llama: StudentConfig) -> None:
    for student, target, prompt in (("smolm2", TARGET, 1), (llama, "sistolic", 1), (llama, TARGET, 0)):
        with pytest.raises(FirsttokenError):
            api.run(student, target, prompt=prompt)
        with pytest.raises(FirsttokenError):
            api.compile(student, target, prompt=prompt)
