"""The timing rules of each standard, one by one, in three verbs: probe, issue, assert_earliest_ready_at."""

import pytest
from dram_command_bench import CommandBench

from firsttoken_compiler.target.dram_presets import dram_device, dram_names
from firsttoken_simulator.units.dram_commands import ACT, PRE, PREA, RD, RDA, REF, REFB, WR, WRA, rules

DDR4 = "ddr4-3200aa-8gb-x8"
LPDDR4 = "lpddr4-4266-8gb-x16"
LPDDR5 = "lpddr5-6400-8gb-x16"
LPDDR5X = "lpddr5x-8533-16gb-x16"
HBM2 = "hbm2-2000-2gb-x64"
DDR5 = "ddr5-4800an-16gb-x8"

SAME, BANK, GROUP, RANK = {}, {"bank": 1}, {"group": 1}, {"rank": 1}
"""Where the second command goes, seen from the first: its bank, another of its group, another group, another rank."""

PAIRS = [
    # JESD79-4, DDR4-3200AA x8, 8 Gb, in clocks of 0.625 ns
    (DDR4, ACT, RD, SAME, 22, "tRCD"), (DDR4, ACT, WR, SAME, 22, "tRCD"), (DDR4, ACT, PRE, SAME, 52, "tRAS"),
    (DDR4, ACT, ACT, SAME, 74, "tRC"), (DDR4, ACT, ACT, BANK, 8, "tRRD_L"), (DDR4, ACT, ACT, GROUP, 4, "tRRD_S"),
    (DDR4, RD, RD, BANK, 8, "tCCD_L"), (DDR4, RD, RD, GROUP, 4, "tCCD_S"), (DDR4, RD, RD, RANK, 6, "burst + 2"),
    (DDR4, WR, WR, BANK, 8, "tCCD_L"), (DDR4, WR, WR, GROUP, 4, "tCCD_S"),
    (DDR4, RD, WR, GROUP, 12, "tCL + burst + 2 - tCWL"), (DDR4, RD, WR, RANK, 12, "tCL + burst + 2 - tCWL"),
    (DDR4, WR, RD, BANK, 32, "tCWL + burst + tWTR_L"), (DDR4, WR, RD, GROUP, 24, "tCWL + burst + tWTR_S"),
    (DDR4, RD, PRE, SAME, 12, "tRTP"), (DDR4, WR, PRE, SAME, 44, "tCWL + burst + tWR"),
    (DDR4, PRE, ACT, SAME, 22, "tRP"), (DDR4, PREA, ACT, BANK, 22, "tRP"), (DDR4, PREA, REF, SAME, 22, "tRP"),
    (DDR4, RDA, ACT, SAME, 34, "tRTP + tRP"), (DDR4, WRA, ACT, SAME, 66, "tCWL + burst + tWR + tRP"),
    (DDR4, REF, ACT, GROUP, 560, "tRFC"), (DDR4, REF, REF, SAME, 560, "tRFC"),
    # JESD209-4, LPDDR4-4266 8 Gb, in clocks of 0.469 ns
    (LPDDR4, ACT, RD, SAME, 39, "tRCD"), (LPDDR4, PRE, ACT, SAME, 39, "tRPpb"), (LPDDR4, PREA, ACT, SAME, 45, "tRPab"),
    (LPDDR4, ACT, PRE, SAME, 90, "tRAS"), (LPDDR4, ACT, ACT, BANK, 22, "tRRD"), (LPDDR4, RD, RD, BANK, 8, "tCCD"),
    (LPDDR4, PRE, PRE, BANK, 4, "tPPD"), (LPDDR4, WR, RD, BANK, 48, "tCWL + burst + tWTR"),
    # JESD209-5, LPDDR5-6400 8 Gb, in clocks of 1.25 ns
    (LPDDR5, ACT, RD, SAME, 15, "tRCD"), (LPDDR5, PRE, ACT, SAME, 15, "tRPpb"), (LPDDR5, PREA, ACT, BANK, 17, "tRPab"),
    (LPDDR5, ACT, PRE, SAME, 34, "tRAS"), (LPDDR5, ACT, ACT, SAME, 49, "tRC"), (LPDDR5, ACT, ACT, GROUP, 4, "tRRD"),
    (LPDDR5, RD, RD, BANK, 4, "tCCD_L"), (LPDDR5, RD, RD, GROUP, 2, "tCCD_S"), (LPDDR5, RD, PRE, SAME, 8, "tRTP"),
    (LPDDR5, WR, RD, BANK, 21, "tCWL + burst + tWTR_L"), (LPDDR5, WR, RD, GROUP, 16, "tCWL + burst + tWTR_S"),
    (LPDDR5, PRE, PRE, GROUP, 2, "tPPD"), (LPDDR5, REF, ACT, SAME, 168, "tRFCab"),
    (LPDDR5, REFB, ACT, SAME, 96, "tRFCpb"), (LPDDR5, REFB, ACT, BANK, 6, "tpbR2act"),
    (LPDDR5, REFB, REFB, GROUP, 72, "tpbR2pbR"), (LPDDR5, RD, WR, GROUP, 12, "tCL + burst + 2 - tCWL"),
    # JESD209-5C, LPDDR5X-8533 16 Gb, in clocks of 0.9375 ns
    (LPDDR5X, ACT, RD, SAME, 20, "tRCD"), (LPDDR5X, RD, RD, GROUP, 2, "tCCD_S"), (LPDDR5X, RD, RD, BANK, 4, "tCCD_L"),
    (LPDDR5X, REF, ACT, SAME, 299, "tRFCab"),
    # JESD235, HBM2 2 Gbit/s, in clocks of 1 ns; an activate takes two clocks and is dated by its first
    (HBM2, ACT, RD, SAME, 14 + 1, "tRCDRD"), (HBM2, ACT, WR, SAME, 12 + 1, "tRCDWR"),
    (HBM2, ACT, PRE, SAME, 34 + 1, "tRAS"),
    (HBM2, PRE, ACT, SAME, 14 - 1, "tRP"), (HBM2, RD, RD, BANK, 4, "tCCD_L"), (HBM2, RD, RD, GROUP, 2, "tCCD_S"),
    (HBM2, ACT, ACT, GROUP, 4, "tRRD"), (HBM2, ACT, ACT, RANK, 2, "the row bus"),
    (HBM2, ACT, PRE, RANK, 2, "the row bus"),
    # JESD79-5, DDR5-4800AN x8, 16 Gb, in clocks of 0.416 ns; activates, reads and writes take two clocks
    (DDR5, ACT, RD, SAME, 34, "tRCD"), (DDR5, ACT, PRE, SAME, 77 + 1, "tRAS"), (DDR5, PRE, ACT, SAME, 34 - 1, "tRP"),
    (DDR5, RD, RD, GROUP, 8, "tCCD_S"), (DDR5, RD, RD, BANK, 12, "tCCD_L"), (DDR5, WR, WR, BANK, 48, "tCCD_L_WR"),
    (DDR5, PRE, PRE, BANK, 2, "tPPD"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "first", "second", "where", "clocks", "rule"), PAIRS)
def test_rule(name: str, first: int, second: int, where: dict[str, int], clocks: int, rule: str) -> None:
    ranks = max(2 if where == RANK else 1, dram_device(name)[1].ranks)
    bench = CommandBench(name, ranks=ranks)
    bench.issue(first, bench.bank(), 1000)
    bench.assert_earliest_ready_at(second, bench.bank(**where), 1000 + clocks)


@pytest.mark.parametrize(("name", "clocks"), [(DDR4, 34), (LPDDR5, 16), (HBM2, 16), (DDR5, 48)])
def test_fifth_activate_waits_tfaw(name: str, clocks: int) -> None:
    bench = CommandBench(name)
    at, first = 1000, 1000
    for bank in (bench.bank(group=group) for group in range(4)):
        while not bench.probe(ACT, bank, at):
            at += 1
        bench.issue(ACT, bank, at)
    expected = max(first + clocks, at + (8 if name == DDR4 else 0))
    fifth = bench.bank(group=0, bank=1)
    while not bench.probe(ACT, fifth, at):
        at += 1
    assert at == expected


def test_activates_of_another_rank_do_not_count_in_tfaw() -> None:
    bench = CommandBench(DDR4, ranks=2)
    for group in range(4):
        bench.issue(ACT, bench.bank(group=group), 1000 + 4 * group)
    bench.assert_earliest_ready_at(ACT, bench.bank(bank=1), 1034)
    assert bench.probe(ACT, bench.bank(rank=1), 1013)


def test_pseudo_channels_share_the_command_bus_and_not_the_data_bus() -> None:
    bench = CommandBench(HBM2)
    bench.issue(RD, bench.bank(), 1000)
    assert bench.probe(RD, bench.bank(rank=1), 1001)
    bench.assert_earliest_ready_at(RD, bench.bank(group=1), 1002)


def test_refresh_waits_for_every_bank_of_its_rank() -> None:
    bench = CommandBench(DDR4, ranks=2)
    bench.issue(PRE, bench.bank(group=3, bank=3), 1000)
    bench.assert_earliest_ready_at(REF, bench.bank(), 1022)
    assert bench.probe(REF, bench.bank(rank=1), 1000)


def test_issue_refuses_what_a_rule_forbids() -> None:
    bench = CommandBench(DDR4)
    bench.issue(ACT, 0, 1000)
    with pytest.raises(AssertionError, match="RD to bank 0 at 1021: not before 1022"):
        bench.issue(RD, 0, 1021)


def test_every_device_has_rules_that_hold_together() -> None:
    for name in dram_names():
        dram, commands = dram_device(name)
        assert all(rule.clocks > -8 for rule in rules(dram, commands)), name
        bench = CommandBench(name)
        bench.issue(ACT, 0, 1000)
        assert not bench.probe(RD, 0, 1000 + commands.activate_clocks), name
        assert dram.trfc_ns < dram.trefi_ns, name
        assert commands.trc_ns >= dram.tras_ns, name
        assert dram.tccd_s_ns >= dram.burst_length * 1e3 / dram.data_rate_mtps * 0.99, name
