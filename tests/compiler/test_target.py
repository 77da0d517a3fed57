import re
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firsttoken_compiler.errors import TargetError
from firsttoken_compiler.isa.types import Space
from firsttoken_compiler.isa.vector_kernel import COST_CLASSES
from firsttoken_compiler.target.load import MAX_FILE_BYTES, load_target, parse_target, preset_names
from firsttoken_compiler.target.rates import matmul_cost
from firsttoken_compiler.target.target import GRADES, Target


@pytest.fixture(scope="module")
def text() -> str:
    from importlib import resources

    return (resources.files("firsttoken_compiler.target") / "presets" / "systolic-128.toml").read_text("utf-8")


def changed(text: str, pattern: str, replacement: str) -> bytes:
    result, count = re.subn(pattern, replacement, text, count=1, flags=re.MULTILINE)
    assert count == 1
    return result.encode()


@pytest.mark.parametrize("name", preset_names())
def test_every_value_of_a_preset_has_a_grade_and_a_source(name: str) -> None:
    target = Target.load(name)
    assert target.name == name
    assert set(target.vector.cycles) == set(COST_CLASSES)
    assert set(target.matrix.macs_per_cycle) <= set(target.energy.mac_pj)
    assert len(target.provenance) > 70
    for path, provenance in target.provenance.items():
        assert provenance.grade in GRADES, path
        assert provenance.source, path
        value: object = target
        section, *rest = path.split(".")
        value = target if section == "npu" else getattr(target, section)
        for part in rest:
            value = value[part] if isinstance(value, dict) else getattr(value, part)
    assert target.not_modelled


BELOW_THE_PEAK = (
    "ethos-u85-2048", "snapdragon-8-gen3", "snapdragon-x-elite", "snapdragon-x2-elite", "tpu-v4", "xdna2-strix",
)  # fmt: skip
"""Parts whose own figures keep them from it: 64 reads in flight at 500 ns; copies of one operator at a third of the
HBM's peak; columns of the array that pass 100 GB/s; of the Hexagons, what they were measured at while they decode."""


@pytest.mark.parametrize("name", [name for name in preset_names() if name not in BELOW_THE_PEAK])
def test_a_preset_can_stream_at_its_dram_peak(name: str) -> None:
    target = Target.load(name)
    latency_s = (target.dram.trcd_ns + target.dram.tcl_ns + target.dram.controller_ns) * 1e-9
    needed = target.dram.peak_bytes_per_s * latency_s / target.dram.burst_bytes
    assert target.dma.outstanding >= needed
    assert target.dma.bus_bytes_per_cycle * target.clock_hz >= target.dram.peak_bytes_per_s


def test_known_numbers_of_the_presets() -> None:
    textbook, snapdragon = Target.load("systolic-128"), Target.load("snapdragon-x-elite")
    assert textbook.dram.peak_bytes_per_s == pytest.approx(68e9)
    assert textbook.period_fs == 1_000_000
    assert snapdragon.dram.peak_bytes_per_s == pytest.approx(135.168e9)
    assert 2 * 16384 * snapdragon.clock_hz == pytest.approx(45e12, rel=0.01)
    # Whole networks reach less than a product of operands in TCM: 4096 fp16 MAC per cycle on the 8 Gen 3.
    assert 1024 < snapdragon.matrix.macs_per_cycle["fp16xfp16"] < 4096
    assert matmul_cost(snapdragon, 32, 32, 32, "int8xint4").passes == 1


def test_hash_follows_values_and_not_sources(text: str) -> None:
    base = parse_target(text.encode(), "t")
    assert base == load_target("systolic-128")
    resourced = parse_target(changed(text, r'source = "textbook choice"', 'source = "elsewhere"'), "t")
    assert resourced.content_hash == base.content_hash
    assert resourced.provenance != base.provenance
    assert replace(base, clock_hz=2e9).content_hash != base.content_hash
    integer = parse_target(changed(text, r"clock_hz = \{ value = 1e9", "clock_hz = { value = 1000000000"), "t")
    assert integer.content_hash == base.content_hash


def test_boundaries_are_the_targets_own_or_64_bytes(text: str) -> None:
    textbook, snapdragon = parse_target(text.encode(), "t"), Target.load("snapdragon-x-elite")
    assert "dram.alignment_bytes" not in textbook.provenance
    assert [textbook.alignment(space) for space in (Space.DRAM, Space.SPAD)] == [64, 64]
    assert textbook.alignment(Space.DRAM, matrix_weights=True) == 64
    assert [snapdragon.alignment(space) for space in (Space.DRAM, Space.SPAD)] == [128, 128]
    assert snapdragon.alignment(Space.SPAD, matrix_weights=True) == 2048
    entry = '{ value = 256, grade = "assumed", source = "test" }'
    wider = parse_target(changed(text, r"^controller_ns", f"alignment_bytes = {entry}\ncontroller_ns"), "t")
    assert wider.alignment(Space.DRAM) == 256
    assert wider.content_hash != textbook.content_hash


@pytest.mark.parametrize(
    ("before", "line", "message"),
    [
        ("controller_ns", "alignment_bytes = { value = 96,", "dram.alignment_bytes is 96, must be a power of two"),
        ("controller_ns", "alignment_bytes = { value = 0,", "dram.alignment_bytes is 0, must be at least 1"),
        ("issue_cycles", "tile_bytes = { value = 131072,", "matrix.tile_bytes is 131072, must be at most 65536"),
        ("issue_cycles", "tile_bytes = { value = 1000,", "matrix.tile_bytes is 1000, must be a power of two"),
        ("issue_cycles", "tile_byte = { value = 1024,", "unknown key matrix.tile_byte; nearest known key: tile_bytes"),
    ],
)
def test_boundaries_that_cannot_be_are_named(text: str, before: str, line: str, message: str) -> None:
    broken = changed(text, f"^{before}", f'{line} grade = "assumed", source = "test" }}\n{before}')
    with pytest.raises(TargetError, match=re.escape(message)):
        parse_target(broken, "t")


def test_a_scratchpad_is_whole_matrix_tiles(text: str) -> None:
    tile = 'tile_bytes = { value = 2048, grade = "assumed", source = "test" }\nissue_cycles'
    smaller = changed(changed(text, "^issue_cycles", tile).decode(), r"value = 4194304", "value = 5120")
    with pytest.raises(TargetError, match=r"scratchpad.bytes is 5120, must be a multiple of matrix.tile_bytes 2048"):
        parse_target(smaller, "t")


def test_a_file_is_loaded_by_path(tmp_path, text: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text.replace('name = "systolic-128"', 'name = "mine"'))
    assert load_target(path).name == load_target(str(path)).name == "mine"


@pytest.mark.parametrize(
    ("pattern", "replacement", "message"),
    [
        (r"^tcl_ns", "tcll_ns", "unknown key dram.tcll_ns; nearest known key: tcl_ns"),
        (r"^tcl_ns", "tcll_ns", "missing key dram.tcl_ns"),
        (r"^\[host\]", "[hots]", "unknown key hots; nearest known key: host"),
        (r"^\[host\]", "[hots]", "missing key host"),
        (r"^clock_hz = \{ value = 1e9", "clock_hz = { value = -1e9", "npu.clock_hz is -1.*must be at least 1e.06"),
        (
            r"^clock_hz = \{ value = 1e9",
            "clock_hz = { value = 1e15",
            "npu.clock_hz is 1000000000000000.0, must be at most 1e.10",
        ),
        (r"^clock_hz = \{ value = 1e9", "clock_hz = { value = nan", "npu.clock_hz is nan"),
        (r"^clock_hz = \{ value = 1e9", "clock_hz = { value = '1e9'", "npu.clock_hz is '1e9'.*number"),
        (r"^clock_hz = .*$", "clock_hz = 1e9", "npu.clock_hz is 1000000000.0, must be a table"),
        (r"^channels = \{ value = 4", "channels = { value = 0", "dram.channels is 0, must be at least 1"),
        (r"^channels = \{ value = 4", "channels = { value = 4.5", "dram.channels is 4.5.*integer"),
        (r"^channels = \{ value = 4", "channels = { value = true", "dram.channels is True.*integer"),
        (r'^channels = (.*)grade = "derived"', r'channels = \1grade = "guess"', "dram.channels.grade is 'guess', must"),
        (r'^channels = (.*)source = ".*"', r'channels = \1source = ""', "dram.channels.source"),
        (r'^channels = (.*), source = ".*"', r"channels = \1", "missing key dram.channels.source"),
        (r'^kind = \{ value = "systolic"', 'kind = { value = "cube"', "matrix.kind is 'cube', must be one of systolic"),
        (r"^bank_bytes = \{ value = 32", "bank_bytes = { value = 33", "scratchpad.bank_bytes is 33.*power of two"),
        (r"^int8xint8 = \{ value = 16384", "int8xint8 = { value = 32768", "macs_per_cycle.int8xint8 is 32768.*16384"),
        (r"^int8xint4", "int8_int4", "unknown key matrix.macs_per_cycle.int8_int4"),
        (r"^exp = ", "expo = ", "unknown key vector.cycles.expo; nearest known key: exp"),
        (r"^exp = ", "expo = ", "missing key vector.cycles.exp"),
        (r"^tile_m = \{ value = 0", "tile_m = { value = 8", "matrix.tile_m is 8, must be 0"),
        (r"^trfc_ns = \{ value = 280.0", "trfc_ns = { value = 9999.0", "trfc_ns is 9999, must be below dram.trefi_ns"),
        (r"^tccd_s_ns = \{ value = 1.8824", "tccd_s_ns = { value = 0.5", "tccd_s_ns is 0.5, must be at least the 1.88"),
        (r"^int8xint8 = \{ value = 0.084.*$", "", "missing key energy.mac_pj.int8xint8"),
        (r'^name = ".*"', 'name = "../x"', "npu.name is '../x'"),
        (r'^description = "', 'description = "\\\\u001b[31m', "control characters"),
    ],
)
def test_a_mistake_is_named_by_its_path_and_limit(text: str, pattern: str, replacement: str, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        parse_target(changed(text, pattern, replacement), "mine.toml")


@pytest.mark.parametrize("data", [b"\xff\xfe", b"[npu", b"a = " + b"[" * 5000, b"x = 1\nx = 2"])
def test_broken_toml_is_one_message(data: bytes) -> None:
    with pytest.raises(TargetError, match=r"target mine.toml is not valid TOML"):
        parse_target(data, "mine.toml")


def test_large_missing_and_unknown(tmp_path) -> None:
    path = tmp_path / "large.toml"
    path.write_bytes(b"#" * (MAX_FILE_BYTES + 1))
    with pytest.raises(TargetError, match=r"1048577 bytes, the limit is 1048576"):
        load_target(path)
    with pytest.raises(TargetError, match="no such target file"):
        load_target(tmp_path / "absent.toml")
    with pytest.raises(TargetError, match=r"nearest: systolic-128; known targets: ethos-u85-2048, .*, systolic-128, "):
        load_target("sistolic128")
    with pytest.raises(TargetError, match="known targets"):
        load_target("")


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300))
def test_no_bytes_raise_anything_but_a_target_error(data: bytes) -> None:
    with pytest.raises(TargetError):
        parse_target(data, "fuzz")


def test_pydantic_is_imported_only_when_a_file_is_read() -> None:
    code = "import sys, firsttoken_compiler.target.load; sys.exit('pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
