"""Which cores compute what, and where values then lie."""

from __future__ import annotations

from dataclasses import replace

import pytest
from launches import tiny_launches

from firsttoken_compiler.isa.types import Space
from firsttoken_compiler.passes.lower import Launches
from firsttoken_compiler.passes.place import Place
from firsttoken_compiler.passes.spread import ON_ONE_CORE, SpreadCores, meeting_share, share_of
from firsttoken_compiler.schedule.choice import CoreSplit, Schedules, launch_key
from firsttoken_compiler.schedule.parts import ways
from firsttoken_compiler.schedule.rowwise import kernel_operands
from firsttoken_compiler.target.dram_presets import dram_device
from firsttoken_compiler.target.target import Target

TARGET = Target.load("systolic-128")
TWO = replace(TARGET, cores=2)


@pytest.fixture(scope="module")
def lowered() -> Launches:
    return tiny_launches(TARGET)


def by_rows(launches: Launches) -> Schedules:
    """Rows wherever there are several, core 0 for the rest."""
    splits = {
        launch_key(launch.spec): CoreSplit("rows", 2) if "rows" in ways(launch.spec, TWO, 2) else CoreSplit()
        for launch in launches.launches
    }
    return Schedules(splits=tuple(splits.items()))


def test_a_target_of_one_core_has_nothing_to_spread(lowered: Launches) -> None:
    assert SpreadCores(TARGET).run(lowered) is ON_ONE_CORE


def test_little_work_stays_on_one_core_and_that_is_said(lowered: Launches) -> None:
    spread = SpreadCores(TWO).run(lowered)
    assert spread.parts == ()
    assert spread.cores == 1
    assert spread.lines[0].endswith("; one core compiled")
    assert sum(int(line.split(" x ")[0]) for line in spread.lines[1:]) == len(lowered.launches)
    assert any("linear core 0 (others would not speed it up)" in line for line in spread.lines)
    assert any("row core 0 (it cannot be cut)" in line for line in spread.lines)


def test_values_that_cores_exchange_lie_in_dram_and_rows_of_one_core_stay_with_it(lowered: Launches) -> None:
    spread = SpreadCores(TWO, by_rows(lowered)).run(lowered)
    assert spread.cores == 2
    assert spread.lines[0].endswith(" cycles, cut as the schedule says")
    assert any("row core 0 (as the schedule says)" in line for line in spread.lines)
    placement = Place(TWO, exchanged=spread.exchanged, rows=spread.rows, cores=2).run(lowered)
    for launch, parts in zip(lowered.launches, spread.parts, strict=True):
        values = kernel_operands(launch.spec, (*launch.args, *launch.outs))
        for index, value in enumerate(values):
            if value.kind != "storage" or placement.space(value) is Space.DRAM:
                continue
            assert value.name not in spread.exchanged
            if len(parts) > 1:
                args = [(*part.spec.args, *part.spec.outs)[index] for part in parts]
                assert max(arg.shape[0] for arg in args) == spread.rows[value.name] < value.arg.shape[0]
    kept = set(spread.rows) & set(placement.resident)
    assert kept
    alone = Place(TARGET).run(lowered)
    assert all(placement.sizes[name] < alone.sizes[name] for name in kept if name in alone.sizes)
    assert set(spread.exchanged) <= set(placement.dram)
    assert all(placement.spilled[name].endswith("several cores read or write it") for name in spread.exchanged)


def test_cores_share_dram_and_bus() -> None:
    dram, commands = dram_device("lpddr5x-8533-16gb-x16")
    served = replace(TARGET, dram=dram, dram_commands=commands)
    assert meeting_share(served) == 1.0
    assert share_of(served, 2).dram.data_rate_mtps == served.dram.data_rate_mtps // 2
    assert share_of(served, 2).dma.bus_bytes_per_cycle == served.dma.bus_bytes_per_cycle // 2
    assert share_of(served, 1) is served
    in_order = meeting_share(TARGET)  # 4 banks that each give a burst of 1.88 ns in 61.25 ns
    assert in_order == pytest.approx(4 * 16e3 / 8500 / 61.25, rel=0.01)
