"""What the controller of commands does with streams whose answer follows by hand; clocks of the device named."""

from typing import Any

import numpy as np
import pytest

from firsttoken_compiler.target.dram_presets import dram_device
from firsttoken_simulator.dram_streams import Measured, channel, interleaved, one_by_one, paced, row_linear, saturate

DDR4 = "ddr4-3200aa-8gb-x8"
LPDDR5 = "lpddr5-6400-8gb-x16"
BURST, CL, RCD, RP = 4, 22, 22, 22
"""Of DDR4-3200AA."""


def _quiet(name: str, **changes: Any):  # type: ignore[no-untyped-def]
    """A channel without refresh."""
    return channel(*dram_device(name, trefi_ns=0.0, **changes))


def _places(*bank_row: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    pairs = np.array(bank_row, np.int64)
    return np.ascontiguousarray(pairs[:, 0]), np.ascontiguousarray(pairs[:, 1])


def _counts(found: Measured) -> tuple[int, int, int]:
    return found.hits, found.misses, found.conflicts


def test_a_closed_row_takes_trcd_tcl_and_the_burst_from_the_clock_after_the_request() -> None:
    found = one_by_one(_quiet(DDR4), _places((0, 0)))
    assert found.latency_ns == pytest.approx((1 + RCD + CL + BURST) * 0.625)


def test_row_hits_go_first() -> None:
    c = _quiet(DDR4)
    assert _counts(paced(c, _places((0, 0), (0, 1), (0, 0), (0, 1)), 2)) == (2, 1, 1)


def test_an_older_request_is_not_overtaken_for_ever() -> None:
    """The row that opens for it stays until it is served; younger hits of the row before do not close it again."""
    c = _quiet(DDR4)
    found = paced(c, _places((0, 0), (0, 1), *[(0, 0)] * 60), 100)
    assert _counts(found) == (59, 1, 2)


def test_the_closed_page_policy_saves_the_precharge_of_reads_of_other_rows() -> None:
    places = np.zeros(100, np.int64), np.arange(100)
    opened, closed = (paced(_quiet(DDR4, page=page), places, 200) for page in ("open", "closed"))
    assert _counts(opened) == (0, 1, 99)
    assert _counts(closed) == (0, 100, 0)
    assert closed.latency_ns == pytest.approx((1 + RCD + CL + BURST) * 0.625)
    assert opened.latency_ns - closed.latency_ns == pytest.approx(0.99 * RP * 0.625)


@pytest.mark.parametrize("queue", ["shared", "per-bank"])
def test_the_closed_page_policy_keeps_a_row_that_is_wanted(queue: str) -> None:
    c = _quiet(DDR4, page="closed", queue=queue)
    found = saturate(c, row_linear(c, 20_000))
    assert found.hits > 0.98 * found.reads


def test_reads_of_a_bank_group_follow_after_tccd_l_and_of_all_groups_after_a_burst() -> None:
    one = _quiet(DDR4)
    same = saturate(one, (np.zeros(2000, np.int64), np.zeros(2000, np.int64)))
    assert same.clocks == pytest.approx(8 * same.reads, rel=0.02)
    every = _quiet(DDR4)
    others = saturate(every, interleaved(every, 2000))
    assert others.clocks == pytest.approx(BURST * others.reads, rel=0.03)


def test_activates_of_random_reads_are_bounded_by_tfaw() -> None:
    c = _quiet(DDR4, tras_ns=5.0, trc_ns=5.0, trp_ns=0.7, trcd_ns=0.7)
    bank = np.arange(8000) % 16
    found = saturate(c, (bank, np.arange(8000)))
    assert found.clocks >= 34 / 4 * (found.reads - 40)
    assert found.clocks == pytest.approx(34 / 4 * found.reads, rel=0.05)


def test_a_stopped_data_clock_costs_one_command() -> None:
    places = np.zeros(50, np.int64), np.zeros(50, np.int64)
    stopped = one_by_one(_quiet(LPDDR5), places)
    running = one_by_one(_quiet(LPDDR5, twck_post_ns=0.0), places)
    assert stopped.latency_ns - running.latency_ns == pytest.approx(1.25, rel=0.05)


def test_refresh_of_all_banks_costs_trfc_and_closing_and_opening_a_row_each_interval() -> None:
    c = channel(*dram_device(DDR4))
    found = saturate(c, interleaved(c, 50_000))
    expected = 1 - (350 + (RP + RCD + 12) * 0.625) / 7800
    assert found.gigabytes_per_s / 25.6 == pytest.approx(expected, rel=0.01)


def test_refresh_of_single_banks_costs_less_where_other_banks_can_go_on() -> None:
    shares = []
    for refresh in ("all-bank", "per-bank"):
        c = channel(*dram_device(LPDDR5, refresh=refresh, queue="per-bank"))
        shares.append(saturate(c, interleaved(c, 50_000)).gigabytes_per_s / 12.8)
    assert shares[0] < 0.94
    assert shares[1] > shares[0]


def test_a_row_is_given_up_after_its_hits_are_used_up() -> None:
    """With a tRTP shorter than tCCD_L, so that hits alone do not keep the row from being closed."""
    places = _places((0, 0), (0, 1), *[(0, 0)] * 40)
    conflicts = []
    for limit in (0, 4):
        c = _quiet(DDR4, queue="per-bank", row_hit_limit=limit, trtp_ns=1.0)
        conflicts.append(paced(c, places, 2).conflicts)
    assert conflicts == [1, 2]


def test_ranks_hide_one_anothers_refresh_when_they_are_refreshed_in_turn() -> None:
    shares = []
    for stagger in (False, True):
        c = channel(*dram_device(DDR4, ranks=2, queue="per-bank", stagger_refresh=stagger))
        shares.append(saturate(c, interleaved(c, 50_000)).gigabytes_per_s)
    assert shares[0] != shares[1]


def test_the_same_stream_gives_the_same_figures() -> None:
    first, second = (saturate(c, row_linear(c, 5000)) for c in (channel(*dram_device(DDR4)) for _ in range(2)))
    assert first == second
