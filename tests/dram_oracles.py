"""The rows of the DRAM oracles, and this project's figure for each: the same device, controller and stream.

`tests/fixtures/dram_ramulator2.csv` (Ramulator 2.1) and `dram_dramsim3.csv` (DRAMsim3) hold what the two simulators
reached. Ramulator's controller is the presets' own: one queue, first-ready first-come-first-served, open rows, refresh
of all banks. DRAMsim3's shipped files have 8 requests for each bank behind a queue of 32, a row given up after 4 hits,
ranks refreshed in turn, and bursts of other ranks one clock apart.
"""

import csv
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from firsttoken_compiler.target.dram_presets import dram_device
from firsttoken_simulator.dram_streams import (
    Channel,
    Measured,
    banks,
    channel,
    interleaved,
    one_by_one,
    paced,
    page_bursts,
    random_runs,
    row_linear,
    saturate,
)

FIXTURES = Path(__file__).parent / "fixtures"
REQUESTS = 50_000
"""Reads of a Ramulator stream; it ends when the last is taken."""
CLOCKS = 100_000
"""Length of a DRAMsim3 run."""
EVERY = 200
"""Clocks between the reads of DRAMsim3's unloaded runs."""

RAMULATOR = {
    "DDR4_2400R": "ddr4-2400r-8gb-x8", "DDR4_3200AA": "ddr4-3200aa-8gb-x8", "DDR5_4800AN": "ddr5-4800an-16gb-x8",
    "LPDDR5_6400": "lpddr5-6400-8gb-x16", "LPDDR6_10667_BL24": "lpddr6-10667-16gb-x12",
    "HBM2_2000Mbps": "hbm2-2000-2gb-x64", "HBM3_6400Mbps": "hbm3-6400-8gb-x32",
}  # fmt: skip
"""Device by Ramulator's timing preset."""

DRAMSIM_CONTROLLER: dict[str, Any] = {
    "queue": "per-bank", "bank_queue_depth": 8, "row_hit_limit": 4, "stagger_refresh": True, "queue_depth": 32,
}  # fmt: skip


@dataclass(frozen=True)
class Shipped:
    """One of DRAMsim3's files: the device, and where the file departs from it."""

    device: str
    clock_ns: float
    """The file's tCK: it states timings in clocks and rounds the clock."""
    changes: dict[str, Any]
    banks_first: bool = False
    """Address map `rorabgbachco`: banks of a group before groups; the others are `rochrababgco`, groups first."""
    note: str = ""


DRAMSIM = {
    "DDR4_8Gb_x8_3200": Shipped("ddr4-3200aa-8gb-x8", 0.63, {"ranks": 2, "trank_clocks": 1}),
    "DDR4_8Gb_x8_2400": Shipped(
        "ddr4-2400u-8gb-x8", 0.83, {"ranks": 2, "trank_clocks": 1, "refi_clocks": 9360},
        note="timings as in the file of the x16 device (17-17-17, tREFI 9360), ranks as in that of the faster bin",
    ),
    "LPDDR4_8Gb_x16_2400": Shipped(
        "lpddr4-2400-8gb-x16", 0.83,
        {"ranks": 2, "trank_clocks": 1, "channel_bits": 64, "page_bytes": 8192, "refresh": "per-bank"},
        note="the file could not be read: JESD209-4 timings, two ranks, banks refreshed one by one",
    ),
    "LPDDR3_8Gb_x32_1866": Shipped(
        "lpddr3-1866-8gb-x32", 1.07, {"refi_clocks": 7800},
        note="the file misspells tREFI (`REFI = 3645`), so the simulator takes its default of 7800 clocks",
    ),
    "HBM2_8Gb_x128@1ch": Shipped(
        "hbm2-2000-8gb-x128", 1.0, {"trfc_ns": 260.0}, banks_first=True,
        note="the file's tRFC is that of a 4 Gb device",
    ),
}  # fmt: skip
"""Device by DRAMsim3's configuration."""


@dataclass(frozen=True)
class Row:
    """One row of an oracle beside this project's figure."""

    oracle: str
    config: str
    pattern: str
    quantity: str
    """`GB/s` or `ns`."""
    theirs: float
    ours: float
    note: str = ""

    @property
    def error(self) -> float:
        """Relative."""
        return self.ours / self.theirs - 1


def ramulator_row(row: dict[str, str]) -> Row:
    """Runs the stream of a row of Ramulator's file."""
    found = ramulator_run(row["timing"], row["pattern"])
    if row["pattern"] == "unloaded_random_probe":
        theirs, ours, quantity = float(row["avg_read_lat_ns"]), found.latency_ns, "ns"
    else:
        theirs, ours, quantity = float(row["achieved_GBps"]), found.gigabytes_per_s, "GB/s"
    return Row("Ramulator 2.1", row["timing"], row["pattern"], quantity, theirs, ours)


def ramulator_run(timing: str, pattern: str) -> Measured:
    """The stream of that name on the device of that name."""
    c = channel(*dram_device(RAMULATOR[timing]))
    if pattern == "unloaded_random_probe":
        return one_by_one(c, random_runs(c, 5000, 1))
    if pattern == "seq_interleaved":
        return saturate(c, interleaved(c, REQUESTS))
    if pattern == "seq_rowlinear":
        return saturate(c, row_linear(c, REQUESTS))
    return saturate(c, random_runs(c, REQUESTS, 64 // c.dram.burst_bytes))


def dramsim_row(row: dict[str, str]) -> Row:
    """Runs the stream of a row of DRAMsim3's file."""
    found = dramsim_run(row["config"], row["pattern"], row["load"])
    clock = DRAMSIM[row["config"]].clock_ns
    name = f"{row['pattern']} {row['load']}"
    note = DRAMSIM[row["config"]].note
    if row["load"] == "unloaded":
        return Row(
            "DRAMsim3", row["config"], name, "ns", float(row["avg_read_lat_cycles"]) * clock, found.latency_ns, note
        )
    theirs = int(row["reads_done"]) * int(row["req_bytes"]) / (CLOCKS * clock)
    return Row("DRAMsim3", row["config"], name, "GB/s", theirs, found.gigabytes_per_s, note)


def dramsim_channel(config: str) -> Channel:
    """The device and controller of one of DRAMsim3's files."""
    shipped = DRAMSIM[config]
    changes = {key: value for key, value in shipped.changes.items() if not key.endswith("_clocks")}
    dram, commands = dram_device(shipped.device, **DRAMSIM_CONTROLLER | changes)
    scale = shipped.clock_ns / commands.clock_ns
    if scale != 1:
        dram = replace(dram, data_rate_mtps=round(dram.data_rate_mtps / scale), **_scaled(dram, scale))
        commands = replace(commands, clock_ns=shipped.clock_ns, **_scaled(commands, scale))
    if "trank_clocks" in shipped.changes:
        commands = replace(commands, trank_ns=shipped.changes["trank_clocks"] * shipped.clock_ns)
    if "refi_clocks" in shipped.changes:
        dram = replace(dram, trefi_ns=shipped.changes["refi_clocks"] * shipped.clock_ns)
    return channel(dram, commands)


def _scaled(values: Any, scale: float) -> dict[str, float]:
    names = [name for name in type(values).__dataclass_fields__ if name.startswith("t") and name.endswith("_ns")]
    return {name: getattr(values, name) * scale for name in names}


def dramsim_run(config: str, pattern: str, load: str) -> Measured:
    """One of DRAMsim3's runs."""
    c = dramsim_channel(config)
    in_order = pattern == "sequential"
    places = _sequential(c, DRAMSIM[config].banks_first, 64) if in_order else random_runs(c, CLOCKS, 1)
    if load == "saturating":
        return saturate(c, places, clocks=CLOCKS, per_clock=1)
    return paced(c, places, EVERY, CLOCKS + 1)


def _sequential(c: Channel, banks_first: bool, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Reads `step` bytes apart; a burst may be longer, and is then read again."""
    i = np.arange(CLOCKS) * step // max(step, c.dram.burst_bytes) // page_bursts(c)
    order = np.arange(banks(c)).reshape(c.commands.ranks, c.dram.bank_groups, c.dram.banks_per_group)
    order = (order if banks_first else order.transpose(0, 2, 1)).ravel()
    return order[i % banks(c)], i // banks(c)


def read(name: str) -> list[dict[str, str]]:
    """The rows of an oracle's file."""
    with (FIXTURES / name).open() as file:
        return list(csv.DictReader(file))


def all_rows() -> list[Row]:
    """Every row of both oracles."""
    return [
        *(ramulator_row(row) for row in read("dram_ramulator2.csv")),
        *(dramsim_row(row) for row in read("dram_dramsim3.csv")),
    ]
