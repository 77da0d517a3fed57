import re
from dataclasses import fields, replace
from importlib import resources

import pytest

from firsttoken_compiler.errors import TargetError
from firsttoken_compiler.target.load import parse_target, preset_names
from firsttoken_compiler.target.target import OPTIONAL_ENERGY, Energy, Target

ENTRY = 'grade = "assumed", source = "test"'


@pytest.fixture(scope="module")
def text() -> str:
    """A preset without bands."""
    folder = resources.files("firsttoken_compiler.target") / "presets"
    return re.sub(r" (?:low|high) = [\d.]+,", "", (folder / "systolic-128.toml").read_text("utf-8"))


def with_static(text: str, entry: str) -> Target:
    changed, count = re.subn(r"^static_w = .*$", f"static_w = {{ {entry}, {ENTRY} }}", text, flags=re.MULTILINE)
    assert count == 1
    return parse_target(changed.encode(), "t")


def values(energy: Energy) -> list[float]:
    found = []
    for field in fields(Energy):
        value = getattr(energy, field.name)
        found += list(value.values()) if isinstance(value, dict) else [value]
    return found


@pytest.mark.parametrize("name", preset_names())
def test_bands_of_presets_hold_their_values_and_have_a_source(name: str) -> None:
    target = Target.load(name)
    assert set(target.bounds) <= {path for path in target.provenance if path.startswith("energy.")}
    for path, (low, high) in target.bounds.items():
        assert low <= target.value(path) <= high, path
        assert low < high, f"{path}: a band of no width says nothing"
        source = target.provenance[path].source
        assert "band" in source or f"{low:g} to {high:g}" in source, path
    low, typical, high = (values(target.energy_at(bound)) for bound in ("low", "typical", "high"))
    assert all(a <= b <= c for a, b, c in zip(low, typical, high, strict=True))
    assert target.energy_at("typical") is target.energy


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_lacks_a_band_only_where_no_figure_exists(name: str) -> None:
    target = Target.load(name)
    lacking = {path for path in target.provenance if path.startswith("energy.")} - set(target.bounds)
    assert lacking <= {"energy.static_w"}


def test_a_bound_alone_leaves_the_other_side_at_the_value(text: str) -> None:
    target = with_static(text, "value = 0.3, high = 1")
    assert target.bounds == {"energy.static_w": (0.3, 1.0)}
    assert target.energy_at("low") == target.energy
    assert target.energy_at("high") == replace(target.energy, static_w=1.0)


def test_a_value_that_leaves_its_band_has_none(text: str) -> None:
    target = with_static(text, "value = 0.3, low = 0.1, high = 1.0")
    swept = replace(target, energy=replace(target.energy, static_w=2.0))
    assert swept.energy_at("low") == swept.energy_at("high") == swept.energy
    fewer = replace(target, energy=replace(target.energy, mac_pj={"fp16xfp16": 0.5}))
    assert fewer.energy_at("high").mac_pj == {"fp16xfp16": 0.5}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("value = 0.3, low = 0.4", "energy.static_w has low 0.4 above its value 0.3, must be at most that"),
        ("value = 0.3, high = 0.2", "energy.static_w has high 0.2 below its value 0.3, must be at least that"),
        ("value = 0.3, low = -1.0", "energy.static_w.low is -1.0, must be at least 0"),
        ("value = 0.3, high = 1e9", "energy.static_w.high is 1000000000.0, must be at most 1000"),
        ("value = 0.3, high = 'much'", "energy.static_w.high is 'much'"),
        ("value = 0.3, lwo = 0.1", "unknown key energy.static_w.lwo; nearest known key: low"),
    ],
)
def test_a_band_that_cannot_be_is_named(text: str, entry: str, message: str) -> None:
    with pytest.raises(TargetError, match=re.escape(message)):
        with_static(text, entry)


def test_only_energies_have_bands(text: str) -> None:
    changed = re.sub(r"^dispatch_us = \{ value = (\S+),", r"dispatch_us = { value = \1, low = 0.0,", text, flags=re.M)
    with pytest.raises(TargetError, match=r"unknown key host\.dispatch_us\.low"):
        parse_target(changed.encode(), "t")


def test_hash_follows_bands_and_optional_energies_only_where_they_are(text: str) -> None:
    base = parse_target(text.encode(), "t")
    assert base.bounds == {}
    assert with_static(text, "value = 0.3").content_hash == base.content_hash
    assert with_static(text, "value = 0.3, high = 1.0").content_hash != base.content_hash
    for name in OPTIONAL_ENERGY:
        assert getattr(base.energy, name) == 0
        longer = text.replace("[energy]\n", f"[energy]\n{name} = {{ value = 0.5, {ENTRY} }}\n")
        stated = parse_target(longer.encode(), "t")
        assert getattr(stated.energy, name) == 0.5
        assert stated.content_hash != base.content_hash
