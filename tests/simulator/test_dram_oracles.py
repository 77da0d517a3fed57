"""Bandwidth and latency of saturating and unloaded streams against Ramulator 2.1 and DRAMsim3, row by row."""

import pytest
from dram_oracles import DRAMSIM, RAMULATOR, Row, dramsim_row, dramsim_run, ramulator_row, ramulator_run, read

from firsttoken_compiler.target.dram_presets import dram_device

BANDWIDTH = 0.03
LATENCY = 0.05


def _check(row: Row) -> None:
    print(f"{row.config} {row.pattern}: {row.theirs:.3f} {row.quantity}, here {row.ours:.3f}, {row.error:+.2%}")
    assert abs(row.error) <= (LATENCY if row.quantity == "ns" else BANDWIDTH)


@pytest.mark.parametrize("row", read("dram_ramulator2.csv"), ids=lambda row: f"{row['timing']}-{row['pattern']}")
def test_ramulator(row: dict[str, str]) -> None:
    _check(ramulator_row(row))


@pytest.mark.parametrize(
    "row", read("dram_dramsim3.csv"), ids=lambda row: f"{row['config']}-{row['pattern']}-{row['load']}"
)
def test_dramsim(row: dict[str, str]) -> None:
    _check(dramsim_row(row))


@pytest.mark.parametrize("timing", sorted(RAMULATOR))
def test_an_unloaded_read_takes_trp_trcd_and_tcl_less_what_refresh_closed_and_one_read_waits_for_each_refresh(
    timing: str,
) -> None:
    found = ramulator_run(timing, "unloaded_random_probe")
    dram, commands = dram_device(RAMULATOR[timing])
    conflict = dram.trp_ns + dram.trcd_ns + dram.tcl_ns + dram.burst_length * 1e3 / dram.data_rate_mtps
    closed = found.misses / found.reads
    waiting = (found.latency_ns + commands.clock_ns) / (dram.trefi_ns - dram.trfc_ns)
    expected = conflict - closed * dram.trp_ns + waiting * dram.trfc_ns + commands.clock_ns
    print(f"{timing}: expected {expected:.2f} ns, measured {found.latency_ns:.2f} ns")
    assert found.latency_ns == pytest.approx(expected, rel=0.04)


@pytest.mark.parametrize("config", sorted(DRAMSIM))
def test_an_unloaded_random_read_is_slower_than_a_sequential_one(config: str) -> None:
    sequential, random = (dramsim_run(config, pattern, "unloaded") for pattern in ("sequential", "random64B"))
    assert random.latency_ns > sequential.latency_ns
