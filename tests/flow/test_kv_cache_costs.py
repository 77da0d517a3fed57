"""What int8 keys and values cost beside fp16 ones, in the reports of the same decode step."""

from __future__ import annotations

import dataclasses

import pytest
from students import QWEN2

from firsttoken import RunOptions, run
from firsttoken_simulator.report.screen import ROWS

WIDE = dataclasses.replace(QWEN2, name="tiny-wide", head_dim=64, max_positions=4096)


@pytest.mark.parametrize("target", ["snapdragon-x-elite", "systolic-128"])
def test_a_long_cache_costs_less_in_int8(target: str) -> None:
    fp16, int8 = (
        run(WIDE, target, prompt=1, past=1023, options=RunOptions(kv_cache=kind), cache=False)
        for kind in ("fp16", "int8")
    )
    assert (fp16.kv_cache, int8.kv_cache) == ("fp16", "int8")
    assert fp16.kv_bytes == 2 * 2 * 2 * 1024 * 64 * 2
    assert int8.kv_bytes == 2 * 2 * 2 * 1024 * 66
    assert int8.dram_bytes_by_kind["kv"] / fp16.dram_bytes_by_kind["kv"] == pytest.approx(66 / 128, rel=0.01)
    assert int8.ttft_cycles < fp16.ttft_cycles
    assert int8.energy_mj < fp16.energy_mj
    shown = dict(ROWS)["keys and values"](int8)
    assert shown == "int8, 540.67 kB (528 B per token)"
