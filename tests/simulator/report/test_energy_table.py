import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from firsttoken_simulator.energy import COMPONENTS, PARTS, energy
from firsttoken_simulator.report.build import build_run
from firsttoken_simulator.report.document import EnergyBands, Range, RunDocument
from firsttoken_simulator.report.energy_table import NO_BAND, NO_HOST, WITHIN_STATIC, banded
from firsttoken_simulator.report.html import page
from firsttoken_simulator.report.screen import show

BOUNDS = ("low", "typical", "high")


def document(case, decode=None, **changes) -> RunDocument:
    program, timeline, target = case
    target = replace(target, energy=replace(target.energy, **changes))
    step = None if decode is None else (decode[0], decode[1], energy(decode[0], decode[1], target))
    return build_run(program, timeline, target, energy(program, timeline, target), decode=step)


def bands_of(run: RunDocument) -> EnergyBands:
    assert run.energy_bands is not None
    return run.energy_bands


@pytest.mark.parametrize("stated", [{}, {"host_poll_w": 0.0}, {"dram_background_w": 0.2, "dram_refresh_pj": 1e6}])
def test_rows_sum_and_hold_what_is_typical(make_case, stated: dict[str, float]) -> None:
    program, timeline, target = make_case(120, 4, hosts=True)
    run = document((program, replace(timeline, counters={"dram_refreshes": 5}), target), **stated)
    table = bands_of(run)
    for bound in BOUNDS:
        components = {row.name: getattr(row, f"{bound}_mj") for row in table.rows if not row.part_of}
        assert tuple(components) == COMPONENTS
        assert sum(components.values()) == pytest.approx(getattr(table.npu_mj, bound))
        for component in ("sram", "dram"):
            parts = [row for row in table.rows if row.part_of == component]
            assert [row.name for row in parts] == [part for part, owner in PARTS.items() if owner == component]
            assert sum(getattr(row, f"{bound}_mj") for row in parts) == pytest.approx(components[component])
        system = getattr(table.npu_mj, bound) + getattr(table.host_mj, bound)
        assert system == pytest.approx(getattr(table.system_mj, bound))
        assert getattr(table.npu_power_w, bound) == pytest.approx(getattr(table.npu_mj, bound) / run.ttft_ms)
    assert table.npu_mj.typical == run.energy_mj
    assert table.npu_power_w.typical == pytest.approx(run.average_power_w)
    assert {row.name: row.typical_mj for row in table.rows if not row.part_of} == run.energy_by_component_mj
    assert all(row.low_mj <= row.typical_mj <= row.high_mj for row in table.rows)


def test_what_is_zero_or_has_no_band_says_why(make_case) -> None:
    case = make_case(60, 1)
    table = bands_of(document(case, host_poll_w=0.0, static_w=500.0))
    notes = {row.name: row.note for row in table.rows}
    assert notes["dram_refresh"] == notes["dram_background"] == WITHIN_STATIC
    assert notes["static"] == NO_BAND
    assert notes["mac"] == notes["dram"] == ""
    assert table.host_note == NO_HOST
    stated = bands_of(document(case, host_poll_w=2.0, dram_background_w=0.1))
    assert stated.host_note == ""
    assert {row.name: row.note for row in stated.rows}["dram_background"] == NO_BAND


def test_screen_and_page_show_the_band(make_case) -> None:
    run = document(make_case(60, 1), make_case(30, 2))
    table = bands_of(run)
    out = io.StringIO()
    show(Console(file=out, width=200), [run])
    shown = banded(run.energy_mj, table.npu_mj, "mJ")
    assert re.search(rf"energy per prompt\s*│ {re.escape(shown)} ", out.getvalue())
    polling = banded(table.host_mj.typical, table.host_mj, "mJ")
    assert re.search(rf"host polling, beside.*│ {re.escape(polling)} ", out.getvalue())
    html = page(run)
    assert html.count('<th class="n">low</th><th class="n">typical</th><th class="n">high</th>') == 2
    for row in table.rows:
        assert f"{row.name}</td>" in html
        assert f"{row.high_mj:.4g}</td>" in html
    assert "no probability belongs to them" in html
    low, high = make_case(1)[2].bounds["energy.static_w"]
    assert f"<td>{low} to {high}</td>" in html


def test_a_host_that_is_not_modelled_is_said_so(make_case) -> None:
    out = io.StringIO()
    show(Console(file=out, width=200), [document(make_case(60, 1), host_poll_w=0.0)])
    assert re.search(r"host polling, beside.*│ not modelled ", out.getvalue())


def test_a_document_of_before_has_no_bands_and_is_shown(make_case) -> None:
    run = document(make_case(60, 1))
    text = run.model_dump_json(exclude={"energy_bands"})
    old = RunDocument.from_json(text)
    assert old.energy_bands is None
    show(Console(file=io.StringIO(), width=200), [old])
    assert "energy per prompt, mJ" not in page(old)
    assert RunDocument.from_json(run.to_json()) == run


def test_a_band_without_width_is_one_number() -> None:
    assert banded(1.234, Range(low=1.234, typical=1.234, high=1.234), "mJ") == banded(1.234, None, "mJ") == "1.23 mJ"
    assert banded(1.234, Range(low=0.5, typical=1.234, high=2), "W", 1) == "1.2 W (0.5 to 2.0)"
