"""What a target's values may be: ranges, words, and combinations that no machine can have.

The ranges refuse slips of unit (a clock in MHz, a scratchpad in KiB), not unusual machines.
"""

from collections.abc import Iterator
from typing import Any, Final

LIMITS: Final[dict[str, tuple[float, float]]] = {
    "npu.clock_hz": (1e6, 1e10),
    "npu.cores": (1, 64),
    "matrix.rows": (1, 4096),
    "matrix.columns": (1, 4096),
    "matrix.tile_m": (0, 4096),
    "matrix.arrays": (1, 256),
    "matrix.macs_per_cycle": (1, 1 << 24),
    "matrix.fill_cycles": (0, 100_000),
    "matrix.weight_cycles": (0, 100_000),
    "matrix.issue_cycles": (0, 100_000),
    "matrix.tile_columns": (0, 1 << 16),
    "matrix.row_bytes_per_cycle": (0, 1 << 16),
    "matrix.tile_bytes": (0, 1 << 16),
    "vector.lanes": (1, 65536),
    "vector.contexts": (1, 256),
    "vector.startup_cycles": (0, 100_000),
    "vector.byte_lanes": (0, 65536),
    "vector.table_entries": (0, 256),
    "vector.stages": (0, 64),
    "vector.narrow_cycles": (0, 1e4),
    "vector.drain_cycles": (0, 1e4),
    "vector.fold_cycles": (0, 1e4),
    "vector.cycles": (1e-3, 1e4),
    "attention.rows": (1, 4096),
    "attention.contexts": (1, 4096),
    "attention.value_columns": (0, 4096),
    "attention.row_cycles": (0, 1e6),
    "scratchpad.bytes": (1024, 1 << 34),
    "scratchpad.banks": (1, 4096),
    "scratchpad.bank_bytes": (1, 4096),
    "scratchpad.alignment_bytes": (1, 4096),
    "scratchpad.accumulator_bytes": (64, 1 << 32),
    "scratchpad.accumulator_slots": (0, 1),
    "dma.setup_cycles": (0, 1_000_000),
    "dma.outstanding": (1, 65536),
    "dma.bus_bytes_per_cycle": (1, 65536),
    "dma.bus_latency_cycles": (0, 1_000_000),
    "dram.channels": (1, 256),
    "dram.channel_bits": (8, 2048),
    "dram.data_rate_mtps": (50, 100_000),
    "dram.burst_length": (1, 256),
    "dram.bank_groups": (1, 64),
    "dram.banks_per_group": (1, 64),
    "dram.page_bytes": (64, 65536),
    "dram.interleave_bytes": (8, 1 << 20),
    "dram.queue_depth": (1, 1024),
    "dram.tcl_ns": (0.1, 1000),
    "dram.tcwl_ns": (0.1, 1000),
    "dram.trcd_ns": (0.1, 1000),
    "dram.trp_ns": (0.1, 1000),
    "dram.tras_ns": (0.1, 1000),
    "dram.twr_ns": (0.1, 1000),
    "dram.trtp_ns": (0.1, 1000),
    "dram.tccd_s_ns": (0.01, 1000),
    "dram.tccd_l_ns": (0.01, 1000),
    "dram.twtr_ns": (0.1, 1000),
    "dram.trtw_ns": (0.1, 1000),
    "dram.trrd_ns": (0.1, 1000),
    "dram.tfaw_ns": (0.1, 1000),
    "dram.trefi_ns": (10, 1_000_000),
    "dram.trfc_ns": (1, 100_000),
    "dram.controller_ns": (0, 10_000),
    "dram.alignment_bytes": (1, 1 << 16),
    "dram_commands.clock_ns": (0.05, 100),
    "dram_commands.ranks": (1, 8),
    "dram_commands.command_buses": (1, 2),
    "dram_commands.activate_clocks": (1, 8),
    "dram_commands.column_clocks": (1, 8),
    "dram_commands.trc_ns": (0.1, 1000),
    "dram_commands.trcd_wr_ns": (0.1, 1000),
    "dram_commands.trp_ab_ns": (0.1, 1000),
    "dram_commands.tppd_ns": (0, 1000),
    "dram_commands.trrd_l_ns": (0.1, 1000),
    "dram_commands.tccd_l_wr_ns": (0.01, 1000),
    "dram_commands.twtr_s_ns": (0.1, 1000),
    "dram_commands.trank_ns": (0, 1000),
    "dram_commands.trfc_pb_ns": (1, 100_000),
    "dram_commands.tpbr2act_ns": (0, 1000),
    "dram_commands.tpbr2pbr_ns": (0, 10_000),
    "dram_commands.taad_ns": (0, 1000),
    "dram_commands.twck_post_ns": (0, 1000),
    "dram_commands.bank_queue_depth": (1, 64),
    "dram_commands.row_hit_limit": (0, 1 << 20),
    "dram_commands.write_low": (0, 1),
    "dram_commands.write_high": (0, 1),
    "host.dispatch_us": (0, 10_000_000),
    "host.fallback_us": (0, 10_000_000),
    "host.flops": (1e6, 1e16),
    "host.bytes_per_s": (1e6, 1e14),
    "runtimes.launch_us": (0, 10_000_000),
    "runtimes.node_us": (0, 1_000_000),
    "runtimes.group_us": (0, 1_000_000),
    "runtimes.attention_us": (0, 1_000_000),
    "runtimes.turned_bytes_per_s": (0, 1e14),
    "runtimes.chunk_tokens": (0, 1 << 20),
    "runtimes.host_weight_bits": (1, 64),
    "energy.mac_pj": (1e-4, 1000),
    "energy.vector_op_pj": (1e-4, 10_000),
    "energy.spad_read_pj_per_byte": (1e-4, 1000),
    "energy.spad_write_pj_per_byte": (1e-4, 1000),
    "energy.acc_pj_per_byte": (1e-4, 1000),
    "energy.dram_pj_per_bit": (1e-3, 1000),
    "energy.dram_activate_pj": (0, 1_000_000),
    "energy.bus_pj_per_byte": (0, 1000),
    "energy.static_w": (0, 1000),
    "energy.dram_refresh_pj": (0, 1e9),
    "energy.dram_background_w": (0, 1000),
    "energy.host_poll_w": (0, 1000),
}
"""Smallest and largest value by path; entries of a table share the limit of the table."""

MAX_BANKS: Final = 64
"""Banks of one channel that a controller of commands keeps apart."""

CHOICES: Final[dict[str, tuple[str, ...]]] = {
    "matrix.kind": ("systolic", "tile"),
    "matrix.dataflow": ("ws", "os", "is", "tile"),
    "dram.refresh": ("all-bank", "per-bank"),
    "dram_commands.queue": ("shared", "per-bank"),
    "dram_commands.page": ("open", "closed"),
}

DRAM_FIELDS: Final = ("row", "rank", "bank", "group", "column")
"""Parts of an address within a channel."""
DRAM_MAPS: Final = {
    "bank-interleaved": "row-column-rank-bank-group",
    "group-interleaved": "row-rank-bank-column-group",
    "row-linear": "row-rank-bank-group-column",
}
"""Address maps by name: fields from the most significant to the least. A controller of commands takes any order."""

POWERS_OF_TWO: Final = (
    "scratchpad.alignment_bytes", "scratchpad.banks", "scratchpad.bank_bytes", "dram.channel_bits", "dram.burst_length",
    "dram.bank_groups", "dram.banks_per_group", "dram.page_bytes", "dram.interleave_bytes", "dram.alignment_bytes",
    "matrix.tile_bytes",
)  # fmt: skip
"""Values that cut an address into bit fields. The number of channels need not be one."""


def contradictions(plain: dict[str, Any]) -> Iterator[str]:
    """What is wrong between values that are each in range; `plain` holds values by section and field."""
    yield from _matrix(plain["matrix"], plain["energy"]["mac_pj"])
    yield from _memory(plain["scratchpad"], plain["dram"], "dram_commands" in plain)
    if "dram_commands" in plain:
        yield from _commands(plain["dram"], plain["dram_commands"])
    tile, pad = plain["matrix"]["tile_bytes"], plain["scratchpad"]["bytes"]
    if tile and pad % tile:
        yield f"scratchpad.bytes is {pad}, must be a multiple of matrix.tile_bytes {tile}"


def _matrix(unit: dict[str, Any], energy: dict[str, float]) -> Iterator[str]:
    tile = unit["kind"] == "tile"
    if tile and unit["dataflow"] != "tile":
        yield f"matrix.dataflow is {unit['dataflow']!r}, must be 'tile' for a unit of kind tile"
    if not tile and unit["dataflow"] == "tile":
        yield "matrix.dataflow is 'tile', must be ws, os or is for a unit of kind systolic"
    if tile != (unit["tile_m"] > 0):
        yield f"matrix.tile_m is {unit['tile_m']}, must be {'at least 1' if tile else '0'} for kind {unit['kind']}"
    if not unit["macs_per_cycle"]:
        yield "matrix.macs_per_cycle is empty, must name at least one pair such as int8xint8"
    if tile and unit["arrays"] != 1:
        yield f"matrix.arrays is {unit['arrays']}, must be 1 for kind tile: its extents are those of one issue"
    for pair in unit["weight_cycles"]:
        if not tile or pair not in unit["macs_per_cycle"]:
            yield f"matrix.weight_cycles.{pair} has no rate, must be a pair of matrix.macs_per_cycle, of tiles"
    most = unit["rows"] * unit["columns"] * (unit["tile_m"] if tile else unit["arrays"])
    for pair, rate in unit["macs_per_cycle"].items():
        if rate > most:
            yield f"matrix.macs_per_cycle.{pair} is {rate}, must be at most {most}, what one issue of the unit holds"
        if pair not in energy:
            yield f"missing key energy.mac_pj.{pair}: matrix.macs_per_cycle has this pair"


def _map(name: str, ordered: bool) -> Iterator[str]:
    if name in DRAM_MAPS:
        return
    names = ", ".join(DRAM_MAPS)
    if not ordered:
        yield f"dram.map is {name!r}, must be one of {names}; other orders of the fields need [dram_commands]"
    elif sorted(name.split("-")) != sorted(DRAM_FIELDS) or not name.startswith("row-"):
        fields = "-".join(DRAM_FIELDS)
        yield f"dram.map is {name!r}, must be one of {names}, or the fields in an order that begins with row: {fields}"


def _memory(scratchpad: dict[str, Any], dram: dict[str, Any], ordered: bool) -> Iterator[str]:
    if scratchpad["bytes"] % scratchpad["alignment_bytes"]:
        yield (
            f"scratchpad.bytes is {scratchpad['bytes']}, must be a multiple of scratchpad.alignment_bytes "
            f"{scratchpad['alignment_bytes']}"
        )
    yield from _map(dram["map"], ordered)
    burst = dram["channel_bits"] * dram["burst_length"] // 8
    if dram["interleave_bytes"] < burst:
        yield f"dram.interleave_bytes is {dram['interleave_bytes']}, must be at least one burst of {burst} bytes"
    page, interleave = dram["page_bytes"], dram["interleave_bytes"]
    if page < interleave:
        yield f"dram.page_bytes is {page}, must be at least dram.interleave_bytes {interleave}"
    if dram["trfc_ns"] >= dram["trefi_ns"]:
        yield f"dram.trfc_ns is {dram['trfc_ns']:g}, must be below dram.trefi_ns {dram['trefi_ns']:g}"
    if dram["tccd_l_ns"] < dram["tccd_s_ns"]:
        yield f"dram.tccd_l_ns is {dram['tccd_l_ns']:g}, must be at least dram.tccd_s_ns {dram['tccd_s_ns']:g}"
    transfer = dram["burst_length"] * 1e3 / dram["data_rate_mtps"]
    if dram["tccd_s_ns"] < transfer * 0.99:
        yield f"dram.tccd_s_ns is {dram['tccd_s_ns']:g}, must be at least the {transfer:.3f} ns that a burst takes"


def _commands(dram: dict[str, Any], commands: dict[str, Any]) -> Iterator[str]:
    ranks, banks = commands["ranks"], commands["ranks"] * dram["bank_groups"] * dram["banks_per_group"]
    if ranks & (ranks - 1):
        yield f"dram_commands.ranks is {ranks}, must be a power of two"
    if banks > MAX_BANKS:
        yield f"dram_commands.ranks gives {banks} banks a channel, must be at most {MAX_BANKS}"
    if not commands["shared_data_bus"] and dram["channels"] % ranks:
        yield (
            f"dram.channels is {dram['channels']}, must be a multiple of dram_commands.ranks {ranks}: "
            "where ranks do not share the data bus, channels counts data buses"
        )
    if commands["write_low"] > commands["write_high"]:
        low, high = commands["write_low"], commands["write_high"]
        yield f"dram_commands.write_low is {low:g}, must be at most dram_commands.write_high {high:g}"
    if commands["trc_ns"] < dram["tras_ns"]:
        yield f"dram_commands.trc_ns is {commands['trc_ns']:g}, must be at least dram.tras_ns {dram['tras_ns']:g}"
    burst = dram["burst_length"] * 1e3 / dram["data_rate_mtps"]
    if burst < 0.49 * commands["clock_ns"]:
        yield f"dram_commands.clock_ns is {commands['clock_ns']:g}, must be at most twice the {burst:.3f} ns of a burst"
