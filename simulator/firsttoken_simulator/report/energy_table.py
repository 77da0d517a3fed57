"""The low, typical and high energy of a run by component and part, as the run document holds and reports show it."""

from dataclasses import asdict
from typing import Final

from firsttoken_compiler.target.target import Target
from firsttoken_simulator.energy import COMPONENTS, PARTS, Band, EnergyResult
from firsttoken_simulator.report.document import DecodeSection, EnergyBands, EnergyRow, Range, RunDocument

WITHIN_STATIC: Final = "within static: the target does not state it apart"
NO_BAND: Final = "no band: one figure, or none, is public"
NO_HOST: Final = "not modelled: the target has no energy.host_poll_w"
_APART: Final = {"dram_refresh": "dram_refresh_pj", "dram_background": "dram_background_w"}


def energy_bands(energy: EnergyResult, target: Target, total_fs: int) -> EnergyBands:
    """The table of one execution that takes `total_fs`, dispatch included."""
    per_s = 1e12 / total_fs if total_fs else 0.0
    return EnergyBands(
        npu_mj=_range(energy.total),
        host_mj=_range(energy.host),
        system_mj=_range(energy.system),
        npu_power_w=_range(energy.total.scaled(per_s)),
        system_power_w=_range(energy.system.scaled(per_s)),
        host_note="" if target.energy.host_poll_w else NO_HOST,
        rows=[row for name in COMPONENTS for row in _component(name, energy, target)],
    )


def _component(name: str, energy: EnergyResult, target: Target) -> list[EnergyRow]:
    """The row of a component, and one for each of its parts where it has several."""
    parts = [part for part, owner in PARTS.items() if owner == name]
    band = energy.component(name)
    whole = EnergyRow(name=name, part_of="", note=_note(band), **_columns(band))
    if len(parts) == 1:
        return [whole]
    found = [whole]
    for part in parts:
        band, field = energy.part(part), _APART.get(part)
        note = WITHIN_STATIC if field is not None and not getattr(target.energy, field) else _note(band)
        found.append(EnergyRow(name=part, part_of=name, note=note, **_columns(band)))
    return found


def _note(band: Band) -> str:
    return NO_BAND if band.low == band.high > 0 else ""


def _columns(band: Band) -> dict[str, float]:
    return {f"{bound}_mj": value for bound, value in asdict(band).items()}


def _range(band: Band) -> Range:
    return Range(**asdict(band))


def low_high(part: RunDocument | DecodeSection) -> tuple[float, float]:
    """Least and most energy in millijoules; the energy itself where the document has no bands."""
    bands = part.energy_bands
    return (part.energy_mj, part.energy_mj) if bands is None else (bands.npu_mj.low, bands.npu_mj.high)


def banded(typical: float, band: Range | None, unit: str, digits: int = 2) -> str:
    """A quantity for people: `95.24 mJ (58.10 to 210.00)`, without the brackets where the band has no width."""
    text = f"{typical:.{digits}f} {unit}"
    if band is None or band.low == band.high:
        return text
    return f"{text} ({band.low:.{digits}f} to {band.high:.{digits}f})"
