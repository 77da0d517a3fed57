"""DRAM timing rules one by one, then bandwidth against Ramulator 2.1."""

import csv
from pathlib import Path

import numpy as np
import pytest
from harness import DramBench, gather, load, make_program, make_target

from firsttoken_compiler.isa.types import Space
from firsttoken_simulator.machine import simulate_program
from firsttoken_simulator.units import dram

ORACLE = Path(__file__).parents[1] / "fixtures" / "dram_ramulator2.csv"
"""What Ramulator 2.1 reached: one channel, refresh on, row hits first, open rows, reads as fast as they are taken."""


def test_closed_bank_opens_in_trcd() -> None:
    DramBench().assert_earliest_ready_at(18.75, bank=0, row=0)


def test_row_hit_of_a_bank_group_follows_after_tccd_l() -> None:
    bench = DramBench()
    first = bench.issue(0, bank=0, row=0)
    bench.assert_earliest_ready_at(first + 5.0, bank=0, row=0, column=1)


def test_other_bank_group_follows_after_tccd_s() -> None:
    bench = DramBench()
    bench.issue(0, bank=0, row=0)
    bench.issue(0, bank=1, row=0)
    late = bench.issue(100, bank=0, row=0, column=1)
    bench.assert_earliest_ready_at(late + 2.5, bank=1, row=0, column=1, at_ns=100)


def test_second_activate_waits_trrd() -> None:
    bench = DramBench()
    bench.issue(0, bank=0, row=0)
    bench.assert_earliest_ready_at(5.0 + 18.75, bank=1, row=0)


def test_fifth_activate_waits_tfaw() -> None:
    bench = DramBench(tfaw_ns=40.0)
    for bank in range(4):
        bench.issue(0, bank=bank, row=0)
    bench.assert_earliest_ready_at(40.0 + 18.75, bank=4, row=0)


def test_conflict_waits_tras_then_trp_then_trcd() -> None:
    bench = DramBench()
    bench.issue(0, bank=0, row=0)
    bench.assert_earliest_ready_at(42.5 + 18.75 + 18.75, bank=0, row=1)


def test_conflict_waits_trtp_after_a_late_read() -> None:
    bench = DramBench()
    bench.issue(0, bank=0, row=0)
    read = bench.issue(100, bank=0, row=0, column=1)
    bench.assert_earliest_ready_at(read + 10.0 + 18.75 + 18.75, bank=0, row=1, at_ns=100)


def test_read_waits_twtr_after_a_batch_of_writes() -> None:
    bench = DramBench(queue_depth=4)
    for column in range(2):  # a batch is half the queue
        bench.issue(0, bank=0, row=0, column=column, write=True)
    last_write = 18.75 + 5.0
    bench.assert_earliest_ready_at(last_write + 11.25 + 2.5 + 12.5, bank=0, row=0, column=2)


def test_conflict_waits_twr_after_a_write() -> None:
    bench = DramBench(queue_depth=2)
    bench.issue(0, bank=0, row=0, write=True)
    bench.assert_earliest_ready_at(18.75 + 11.25 + 2.5 + 35.0 + 18.75 + 18.75, bank=0, row=1)


def test_writes_wait_trtw_after_a_read() -> None:
    bench = DramBench(queue_depth=2, trtw_ns=100.0)
    read = bench.issue(0, bank=0, row=0)
    bench.issue(0, bank=0, row=0, column=1, write=True)
    bench.assert_earliest_ready_at(read + 100.0 + 11.25 + 2.5 + 12.5, bank=0, row=0, column=2)


def test_request_need_not_wait_behind_a_row_that_is_opening() -> None:
    bench = DramBench()
    bench.issue(0, bank=1, row=0)
    bench.issue(0, bank=0, row=0)
    bench.issue(200, bank=0, row=7)  # opens for tRP + tRCD
    bench.assert_earliest_ready_at(200.0, bank=1, row=0, column=1, at_ns=200)


def test_full_queue_holds_a_request_back() -> None:
    bench = DramBench(queue_depth=2)
    columns = [bench.issue(0, bank=0, row=0, column=c) for c in range(3)]
    assert columns == [18.75, 23.75, 28.75]
    accept, _ = dram.request(bench.p, *bench.state, bench.activates, bench.burst(0, 0, 3), False, 0, 0)
    assert accept == 23_750_000  # two younger commands are still waiting until then


@pytest.mark.parametrize(("mode", "share"), [("all-bank", 210 / 3906), ("none", 0.0)])
def test_refresh_costs_its_share(mode: str, share: float) -> None:
    refresh = {"dram_trefi_ns": 0.0} if mode == "none" else {}
    target = make_target(dram_queue_depth=64, dma_outstanding=256, **refresh)
    line = simulate_program(make_program(load(1 << 22)), target)
    ideal = (1 << 22) / target.dram.peak_bytes_per_s * 1e15
    print(f"expected {1 - share:.4f} measured {ideal / line.total_fs:.4f}")
    assert ideal / line.total_fs == pytest.approx(1 - share, abs=0.025)
    assert line.counters["dram_refreshes"] == (line.total_fs // 3_906_000_000 if share else 0)


def test_per_bank_refresh_costs_less_than_all_bank() -> None:
    program = make_program(load(1 << 21))
    per_bank = simulate_program(program, make_target(dram_refresh="per-bank", dram_trfc_ns=120.0, dma_outstanding=256))
    all_bank = simulate_program(program, make_target(dma_outstanding=256))
    assert per_bank.total_fs < all_bank.total_fs
    assert per_bank.counters["dram_refreshes"] > 10 * all_bank.counters["dram_refreshes"]


def test_idle_time_is_skipped_and_rows_are_closed_by_refresh() -> None:
    bench = DramBench(trefi_ns=3906.0)
    bench.issue(0, bank=0, row=0)
    assert bench.probe(1e9, bank=0, row=0) >= 1e9 + 18.75


@pytest.mark.parametrize("mapping", ["group-interleaved", "bank-interleaved", "row-linear"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_address_map_is_one_to_one(mapping: str, channels: int) -> None:
    target = make_target(dram_map=mapping, dram_channels=channels, dram_page_bytes=256, dram_interleave_bytes=64)
    p = dram.resolve(target)
    banks, page = 16, 256 // 32
    total = channels * banks * page * 4
    places = [tuple(map(int, dram.locate.py_func(p, burst))) for burst in range(total)]
    assert set(places) == {(c, b, r) for c in range(channels) for b in range(banks) for r in range(4)}
    assert all(places.count(place) == page for place in set(places[:20]))


@pytest.mark.parametrize(
    ("mapping", "round_of"), [("group-interleaved", 4), ("bank-interleaved", 16), ("row-linear", 1)]
)
def test_consecutive_bursts_go_round_a_set_of_banks_until_its_pages_are_full(mapping: str, round_of: int) -> None:
    p = dram.resolve(make_target(dram_map=mapping))
    page = 2048 // 32
    banks = [int(dram.locate.py_func(p, burst)[1]) for burst in range(2 * round_of * page)]
    assert banks[: round_of * page] == list(range(round_of)) * page
    following = [bank + round_of for bank in range(round_of)] if round_of < 16 else list(range(16))
    assert banks[round_of * page :] == following * page


def test_a_stream_on_four_open_rows_is_as_fast_as_on_sixteen() -> None:
    four, sixteen = (_saturate(f"{name}-interleaved", np.arange(49968)) for name in ("group", "bank"))
    assert four == pytest.approx(sixteen, rel=0.02)


def _oracle(pattern: str) -> float:
    with ORACLE.open() as file:
        for row in csv.DictReader(file):
            if row["timing"] == "LPDDR5_6400" and row["pattern"] == pattern:
                return float(row["eff_pct"])
    raise AssertionError(pattern)


def _saturate(target_map: str, bursts: np.ndarray) -> float:
    p = dram.resolve(make_target(dram_map=target_map, dram_controller_ns=0.0))
    state, activates, at, last = dram.new_state(p), np.zeros(1, np.int64), 0, 0
    for burst in bursts.tolist():
        at, done = dram.request(p, *state, activates, burst, False, 0, at)
        last = max(last, done)
    return 100 * len(bursts) * 2.5e6 / last


@pytest.mark.parametrize(
    ("pattern", "mapping", "tolerance"),
    [("seq_interleaved", "bank-interleaved", 1), ("seq_rowlinear", "row-linear", 5), ("random64B", "row-linear", 6)],
)
def test_bandwidth_agrees_with_ramulator(pattern: str, mapping: str, tolerance: float) -> None:
    """Percent of peak, LPDDR5-6400 x16, saturating reads; tolerance in percent of the oracle's value."""
    expected = _oracle(pattern)
    bursts = np.arange(49968)
    if pattern == "random64B":
        bursts = (2 * np.random.default_rng(1).integers(0, 1 << 23, 24984)[:, None] + np.arange(2)).ravel()
    measured = _saturate(mapping, bursts)
    print(f"{pattern}: expected {expected:.1f} measured {measured:.1f} deviation {measured / expected - 1:+.1%}")
    assert measured == pytest.approx(expected, rel=tolerance / 100)


def test_gather_reads_rows_spread_over_the_table() -> None:
    target = make_target()
    spread = simulate_program(make_program(gather(512, 64, 1 << 16, indices=Space.SPAD)), target)
    dense = simulate_program(make_program(load(512 * 64)), target)
    assert spread.counters["dram_row_hits"] < dense.counters["dram_row_hits"]
    assert spread.total_fs > dense.total_fs
    indexed = simulate_program(make_program(gather(512, 64, 1 << 16)), target)
    assert indexed.counters["dram_bursts"] == spread.counters["dram_bursts"] + 512 * 8 // 32
    assert indexed.total_fs > spread.total_fs
