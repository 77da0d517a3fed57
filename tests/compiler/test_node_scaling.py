import re

import pytest

from firsttoken_compiler.errors import TargetError
from firsttoken_compiler.target.load import preset_names
from firsttoken_compiler.target.node_scaling import POLYNOMIALS, VOLTS, scale, switching_energy
from firsttoken_compiler.target.target import Target

AT_7_NM = {
    "mac_pj.int8xint8": 0.084, "mac_pj.int8xint4": 0.046, "mac_pj.int16xint8": 0.168, "mac_pj.int16xint4": 0.092,
    "mac_pj.fp16xfp16": 0.5, "mac_pj.fp16xint8": 0.5, "mac_pj.fp16xint4": 0.5, "acc_pj_per_byte": 8.5 / 8,
}  # fmt: skip
"""Figures for 7 nm that the presets' sources name; those of a TPU's products are bfloat16."""


@pytest.mark.parametrize(("volts", "factor"), [(0.9, 0.102), (0.75, 0.0665), (0.70, 0.0566), (0.60, 0.0401)])
def test_from_45_nm_at_900_mv_to_7_nm(volts: float, factor: float) -> None:
    assert scale(7, volts, from_nm=45, from_volts=0.9) == pytest.approx(factor, rel=0.005)


@pytest.mark.parametrize(
    ("volts", "factor"),
    [(0.5, 0.42), (0.55, 0.50), (0.6, 0.60), (0.65, 0.72), (0.7, 0.85), (0.75, 1.0), (0.8, 1.16), (0.9, 1.54)],
)
def test_voltages_at_7_nm(volts: float, factor: float) -> None:
    assert scale(7, volts) == pytest.approx(factor, abs=0.005)


@pytest.mark.parametrize(("node", "factor"), [(5, 0.845), (4, 0.756), (3, 0.655)])
def test_below_7_nm_energy_goes_with_the_root_of_the_node(node: float, factor: float) -> None:
    assert scale(node) == pytest.approx(factor, abs=0.0005)
    assert scale(node, 0.6) == pytest.approx(factor * scale(7, 0.6), abs=0.0005)


def test_a_smaller_node_and_a_lower_voltage_take_less() -> None:
    at = [switching_energy(node, 0.75) for node in (45, 16, 10, 7, 5, 3)]
    assert at == sorted(at, reverse=True)
    for node in (*POLYNOMIALS, 4):
        energies = [switching_energy(node, volts) for volts in (0.4, 0.6, 0.8, 1.0, 1.2)]
        assert energies == sorted(energies)
        assert energies[0] > 0


@pytest.mark.parametrize(
    ("node", "volts", "message"),
    [
        (28, 0.9, "no scaling to 28 nm: nodes are 45, 16, 10, 7, and any below 7"),
        (0, 0.9, "no scaling to 0 nm"),
        (float("nan"), 0.9, "no scaling to nan nm"),
        (7, 0.3, "no scaling at 0.3 V: voltages are 0.4 to 1.2"),
        (7, float("nan"), "no scaling at nan V"),
    ],
)
def test_what_has_no_scaling_is_refused(node: float, volts: float, message: str) -> None:
    assert VOLTS == (0.4, 1.2)
    with pytest.raises(TargetError, match=re.escape(message)):
        scale(node, volts)


FACTORS = {"16 nm": scale(16, 0.8), "8 nm": scale(10, 0.8), "7 nm": 1.0, "4 nm": scale(4), "3 nm": scale(3)}
"""As the sources of the presets name them; 8 nm is a process of the 10 nm generation, at 0.8 V."""


@pytest.mark.parametrize("name", preset_names())
def test_a_value_that_cites_the_scaling_is_what_it_gives(name: str) -> None:
    target = Target.load(name)
    cited = 0
    for path, provenance in target.provenance.items():
        if not path.startswith("energy."):
            continue
        found = re.search(r"\* (\d+\.\d+) (?:\(|for )(\d+ nm)", provenance.source)
        if found is None:
            continue
        cited += 1
        assert float(found[1]) == pytest.approx(FACTORS[found[2]], abs=0.0061), path
        base = AT_7_NM.get(path.removeprefix("energy."))
        if "bf16" in provenance.source:
            base = 0.21 + 0.11
        if base is not None:
            assert target.value(path) == pytest.approx(base * FACTORS[found[2]], rel=0.025), path
    assert cited or name in ("systolic-128", "tpu-v4"), "a preset of 7 nm alone scales nothing"
