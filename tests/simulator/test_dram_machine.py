"""DMA, bus and DRAM together, for both kinds of controller: Little's law, saturation, sharing, order, accounting."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from harness import gather, load, make_program, make_target, matmul, store

from firsttoken_compiler.errors import ProgramError
from firsttoken_compiler.isa.program import Program
from firsttoken_compiler.isa.types import Engine, Space, queue_index
from firsttoken_compiler.target.dram_presets import dram_device
from firsttoken_compiler.target.target import Target
from firsttoken_simulator.machine import simulate_program
from firsttoken_simulator.timeline import Timeline

KINDS = ["look-ahead", "commands"]
LPDDR5 = "lpddr5-6400-8gb-x16"


def _target(kind: str, name: str = LPDDR5, dram: dict[str, Any] | None = None, **overrides: Any) -> Target:
    device, commands = dram_device(name, **(dram or {}))
    target = replace(make_target(**overrides), dram=device)
    return replace(target, dram_commands=commands) if kind == "commands" else target


def _share(target: Target, program: Program) -> tuple[float, Timeline]:
    line = simulate_program(program, target)
    moved = int((line.dram_read_bytes + line.dram_write_bytes).sum())
    return moved / (target.dram.peak_bytes_per_s * line.total_fs / 1e15), line


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("outstanding", [1, 2, 4])
def test_littles_law(kind: str, outstanding: int) -> None:
    """Below saturation n requests in flight move n bursts in each round trip."""
    target = _target(kind, dram={"trefi_ns": 0.0, "controller_ns": 40.0}, dma_outstanding=outstanding)
    line = simulate_program(make_program(load(1 << 16)), target)
    bursts = (1 << 16) // 32
    trip = 21.25 + 2.5 + 40.0 + target.dma.bus_latency_cycles * 1.0
    if kind == "commands":  # looked at from the next clock on, after the start of a data clock that has stopped
        trip += 1.25 + (1.25 if outstanding == 1 else 0.6)
    expected = bursts / outstanding * trip
    print(f"{kind}, {outstanding} in flight: expected {expected:.0f} ns, measured {line.total_fs / 1e6:.0f} ns")
    assert line.total_fs / 1e6 == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("bus", "expected"), [(4, 4 / 12.8), (8, 8 / 12.8), (64, 1.0)])
def test_the_slower_of_bus_and_dram_decides(kind: str, bus: int, expected: float) -> None:
    quiet = {"trefi_ns": 0.0}
    target = _target(kind, dram=quiet, dma_outstanding=256, dma_bus_bytes_per_cycle=bus, dma_setup_cycles=0)
    share, _ = _share(target, make_program(load(1 << 21)))
    assert share == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mapping", ["bank-interleaved", "group-interleaved"])
def test_two_cores_share_what_the_dram_gives(kind: str, mapping: str) -> None:
    target = _target(kind, dram={"map": mapping}, dma_outstanding=64, cores=2)
    size = 1 << 20
    alone, _ = _share(target, make_program(load(size), cores=2))
    both, line = _share(target, make_program(load(size), load(size, 1 << 26, core=1), cores=2))
    ends = line.end_fs / line.total_fs
    print(f"{kind}, {mapping}: alone {alone:.3f}, together {both:.3f}, ends {ends}")
    assert ends.min() > 0.97
    assert both < alone * 1.01
    if kind == "commands":  # in order within a bank, streams that meet in the same banks close one another's rows
        assert both > alone * 0.75


@pytest.mark.parametrize("kind", KINDS)
def test_no_core_starves(kind: str) -> None:
    """Four cores with short requests each: none waits for more than its share of the traffic."""
    target = _target(kind, dma_outstanding=128, cores=4, dma_bus_latency_cycles=0)
    parts = [load(1 << 18, core << 24, core=core) for core in range(4)]
    line = simulate_program(make_program(*parts, cores=4), target)
    assert line.end_fs.min() > 0.9 * line.total_fs


@pytest.mark.parametrize(
    ("name", "mapping", "percent"),
    [(LPDDR5, "bank-interleaved", 92.9), (LPDDR5, "row-linear", 80.7), ("ddr4-3200aa-8gb-x8", "bank-interleaved", 95.2),
     ("ddr4-3200aa-8gb-x8", "row-linear", 61.5), ("hbm2-2000-2gb-x64", "bank-interleaved", 94.5)],
)  # fmt: skip
def test_a_long_load_reaches_what_ramulator_gives_the_stream(name: str, mapping: str, percent: float) -> None:
    """Percent of peak of Ramulator 2.1, `tests/fixtures/dram_ramulator2.csv`; here with DMA and bus before the DRAM."""
    target = _target("commands", name, {"map": mapping}, dma_outstanding=512, dma_bus_bytes_per_cycle=128)
    share, _ = _share(target, make_program(load(1 << 22)))
    print(f"{name} {mapping}: expected {percent:.1f} measured {100 * share:.1f}")
    assert 100 * share == pytest.approx(percent, rel=0.03)


def test_every_burst_is_counted_and_writes_reach_the_dram() -> None:
    target = _target("commands", dma_outstanding=32)
    program = make_program(load(1 << 16), store(1 << 15, 1 << 22), gather(256, 64, 1 << 12))
    line = simulate_program(program, target)
    assert line.counters["dram_bursts"] == (1 << 16) // 32 + (1 << 15) // 32 + 256 * 2 + 256 * 8 // 32
    assert line.counters["dram_row_misses"] + line.counters["dram_row_conflicts"] <= int(line.dram_activates.sum())
    assert int(line.dram_activates[1]) >= (1 << 15) // 2048


def test_writes_beside_reads_cost_more_than_their_bytes() -> None:
    target = _target("commands", dma_outstanding=64)
    reads = simulate_program(make_program(load(1 << 20)), target)
    mixed = simulate_program(make_program(load(1 << 20), store(1 << 17, 1 << 24)), target)
    assert mixed.total_fs > reads.total_fs * (1 + 1 / 8) * 0.99


def test_a_gather_waits_for_its_indices() -> None:
    target = _target("commands")
    direct = simulate_program(make_program(gather(512, 64, 1 << 16, indices=Space.SPAD)), target)
    indexed = simulate_program(make_program(gather(512, 64, 1 << 16)), target)
    assert indexed.total_fs > direct.total_fs + 30_000_000


def test_completion_is_in_order_and_semaphores_hold() -> None:
    target = _target("commands", dma_outstanding=16)
    dma_in = queue_index(0, Engine.DMA_IN)
    parts = [load(4096, at << 16) for at in range(8)]
    product = matmul(32, 128, 128, waits=((dma_in, 8),))
    line = simulate_program(make_program(*parts, product), target)
    assert np.all(np.diff(line.end_fs[:8]) >= 0)
    assert line.start_fs[8] >= line.end_fs[7]
    again = simulate_program(make_program(*parts, product), target)
    assert np.array_equal(line.end_fs, again.end_fs)


def test_a_deadlock_is_found() -> None:
    target = _target("commands")
    waits = ((queue_index(0, Engine.MATRIX), 1),)
    with pytest.raises(ProgramError, match="deadlock"):
        simulate_program(make_program(load(64), load(64, waits=waits)), target)


def test_a_map_of_any_order_puts_every_burst_in_its_place() -> None:
    from firsttoken_simulator.units import dram_channels

    for order in ("row-rank-group-bank-column", "row-column-group-bank-rank", "row-linear"):
        target = _target("commands", dram={"map": order, "ranks": 2, "channels": 3, "page_bytes": 256})
        a = dram_channels.resolve(target)
        places = [tuple(map(int, dram_channels.place.py_func(a, burst))) for burst in range(3 * 32 * 8 * 2)]
        assert set(places) == {(c, b, r) for c in range(3) for b in range(32) for r in range(2)}
        assert all(places.count(place) == 8 for place in set(places[:9]))
