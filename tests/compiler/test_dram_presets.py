"""DRAM devices by name, and targets that name one."""

from importlib import resources

import pytest

from firsttoken_compiler.errors import TargetError
from firsttoken_compiler.target.dram_presets import dram_device, dram_names, dram_sections
from firsttoken_compiler.target.load import load_target, parse_target


def _file(dram: str) -> bytes:
    text = (resources.files("firsttoken_compiler.target") / "presets" / "systolic-128.toml").read_text(encoding="utf-8")
    return (text[: text.index("[dram]")] + dram + "\n" + text[text.index("[host]") :]).encode()


def test_every_standard_has_its_speeds_densities_and_widths() -> None:
    names = dram_names()
    assert {name.split("-")[0] for name in names} == {
        "ddr4", "ddr5", "hbm2", "hbm3", "lpddr3", "lpddr4", "lpddr4x", "lpddr5", "lpddr5x", "lpddr6",
    }  # fmt: skip
    for name in ("ddr4-2133p-16gb-x4", "lpddr4x-4266-16gb-x16", "lpddr5-5500-32gb-x16", "lpddr5x-9600-16gb-x16"):
        assert name in names


def test_every_device_makes_a_target() -> None:
    for name in dram_names():
        target = parse_target(_file(f'[dram]\npreset = "{name}"'), name)
        assert (target.dram, target.dram_commands) == dram_device(name)


@pytest.mark.parametrize(
    ("name", "peak"),
    [("ddr4-3200aa-8gb-x8", 25.6), ("lpddr5-6400-8gb-x16", 12.8), ("hbm2-2000-2gb-x64", 32.0),
     ("ddr5-4800an-16gb-x8", 19.2),
     ("lpddr6-10667-16gb-x12", 14.22), ("hbm3-6400-8gb-x32", 51.2), ("hbm2-2000-8gb-x128", 32.0)],
)  # fmt: skip
def test_peak(name: str, peak: float) -> None:
    dram, _ = dram_device(name)
    assert dram.peak_bytes_per_s / 1e9 == pytest.approx(peak, rel=1e-3)


def test_a_target_may_replace_any_value_of_the_device_it_names() -> None:
    stated = '{ value = 8, grade = "measured", source = "die shot" }'
    depth = '{ value = 16, grade = "assumed", source = "small" }'
    text = f'[dram]\npreset = "lpddr5x-8533-16gb-x16"\nchannels = {stated}\n[dram_commands]\nbank_queue_depth = {depth}'
    target = parse_target(_file(text), "mine")
    assert target.dram.channels == 8
    assert target.dram_commands is not None
    assert target.dram_commands.bank_queue_depth == 16
    assert target.provenance["dram.channels"].source == "die shot"
    assert "JESD209-5" in target.provenance["dram.trcd_ns"].source
    assert target.value("dram_commands.trc_ns") == target.dram_commands.trc_ns


def test_timings_that_are_assumed_say_so() -> None:
    assumed, stated = (dram_sections(f"{name}-16gb-x16")["dram"] for name in ("lpddr5x-8533", "lpddr5-6400"))
    assert (assumed["tcl_ns"]["grade"], stated["tcl_ns"]["grade"]) == ("assumed", "datasheet")
    assert "not checked" in assumed["tcl_ns"]["source"]
    assert assumed["page_bytes"]["grade"] == "datasheet"


def test_targets_that_name_no_device_are_what_they_were() -> None:
    target = load_target("systolic-128")
    assert target.dram_commands is None
    named = parse_target(_file('[dram]\npreset = "lpddr5-6400-8gb-x16"'), "named")
    assert named.content_hash != target.content_hash


@pytest.mark.parametrize(
    ("dram", "message"),
    [
        ('[dram]\npreset = "lpddr5-6400-8gb-x8"', "unknown DRAM 'lpddr5-6400-8gb-x8'; nearest: lpddr5-6400-8gb-x16"),
        ("[dram]\npreset = 7", "dram.preset is 7, must be the name of a DRAM such as lpddr5-6400-16gb-x16"),
        ('[dram]\npreset = "hbm2-2000-8gb-x64"\nchannels = { value = 3, grade = "assumed", source = "x" }',
         "dram.channels is 3, must be a multiple of dram_commands.ranks 2"),
        ('[dram]\npreset = "ddr5-4800an-16gb-x8"\n[dram_commands]\n'
         'ranks = { value = 4, grade = "assumed", source = "x" }',
         "dram_commands.ranks gives 128 banks a channel, must be at most 64"),
        ('[dram]\npreset = "ddr4-3200aa-8gb-x8"\nmap = { value = "column-row", grade = "assumed", source = "x" }',
         "dram.map is 'column-row', must be one of bank-interleaved, group-interleaved, row-linear, or the fields"),
        ('[dram]\npreset = "ddr4-3200aa-8gb-x8"\n[dram_commands]\n'
         'page = { value = "shut", grade = "assumed", source = "x" }',
         "dram_commands.page is 'shut', must be one of open, closed"),
        ('[dram]\npreset = "ddr4-3200aa-8gb-x8"\n[dram_commands]\n'
         'rank = { value = 2, grade = "assumed", source = "x" }',
         "unknown key dram_commands.rank; nearest known key: ranks"),
    ],
)  # fmt: skip
def test_a_mistake_is_named(dram: str, message: str) -> None:
    with pytest.raises(TargetError) as error:
        parse_target(_file(dram), "mine")
    assert message in str(error.value)


def test_values_are_graded_and_sourced() -> None:
    for section in dram_sections("lpddr4-3200-8gb-x16").values():
        assert all(entry["grade"] in ("datasheet", "assumed") and entry["source"] for entry in section.values())
