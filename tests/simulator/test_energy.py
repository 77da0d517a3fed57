from dataclasses import replace

import numpy as np
import pytest

from firsttoken_compiler.errors import OptionError
from firsttoken_compiler.isa.dma import Load, dram, spad
from firsttoken_compiler.isa.matmul import Matmul
from firsttoken_compiler.isa.program import OpInfo, Program
from firsttoken_compiler.isa.types import Dtype, Engine, Operand, Space
from firsttoken_compiler.target.target import Target
from firsttoken_simulator.energy import BOUNDS, COMPONENTS, PARTS, Band, energy, matmul_pairs, standing_w
from firsttoken_simulator.timeline import Timeline

LOAD_FS, MATMUL_FS = 300_000_000, 200_000_000


@pytest.fixture(scope="module")
def target() -> Target:
    return Target.load("systolic-128")


@pytest.fixture
def program() -> Program:
    load = Load(
        queue=int(Engine.DMA_IN), op=0, signal=True, dims=(4, 1, 64),
        operands=(spad(Dtype.I8, 0, 64), dram(Dtype.I8, 0, 64)),
    )  # fmt: skip
    acc = Operand(Space.ACC, Dtype.I32, 0, 64)
    matmul = Matmul(
        queue=int(Engine.MATRIX), op=1, waits=((int(Engine.DMA_IN), 1),), dims=(16, 16, 32),
        operands=(acc, spad(Dtype.I8, 0, 32), spad(Dtype.I4, 4096, 0, 8, 16)),
    )  # fmt: skip
    ops = (OpInfo("fetch", "copy", (), "", 0, 1), OpInfo("multiply", "linear", (), "", 1, 2))
    return Program(np.stack([load.encode(), matmul.encode()]), (), (), ops)


@pytest.fixture
def timeline() -> Timeline:
    def pair(a: int, b: int) -> np.ndarray:
        return np.array([a, b], np.int64)

    end = pair(LOAD_FS, LOAD_FS + MATMUL_FS)
    return Timeline(
        head_fs=pair(0, 0), start_fs=pair(0, LOAD_FS), issue_end_fs=end, end_fs=end, stall_spad_fs=pair(0, 0),
        stall_dram_fs=pair(0, 0), busy_fs=end, macs=pair(0, 8192), vector_ops=pair(0, 0), dram_read_bytes=pair(256, 0),
        dram_write_bytes=pair(0, 0), spad_read_bytes=pair(0, 768), spad_write_bytes=pair(256, 0),
        acc_bytes=pair(0, 2048), dram_activates=pair(2, 0), completion_order=pair(0, 1), period_fs=1_000_000,
        total_fs=LOAD_FS + MATMUL_FS,
    )  # fmt: skip


def test_energy_is_actions_times_table_plus_static_power_times_time(program, timeline, target) -> None:
    table, result = target.energy, energy(program, timeline, target)
    by_hand = {
        "mac": (0, 8192 * table.mac_pj["int8xint4"]),
        "vector": (0, 0),
        "sram": (256 * table.spad_write_pj_per_byte, 768 * table.spad_read_pj_per_byte + 2048 * table.acc_pj_per_byte),
        "dram": (256 * 8 * table.dram_pj_per_bit + 2 * table.dram_activate_pj, 0),
        "bus": (256 * table.bus_pj_per_byte, 0),
        "static": (table.static_w * LOAD_FS * 1e-3, table.static_w * MATMUL_FS * 1e-3),
    }
    assert tuple(by_hand) == COMPONENTS
    for name, picojoules in by_hand.items():
        np.testing.assert_allclose(result.nj(name) * 1e3, picojoules, rtol=1e-9, atol=1e-3)


def test_totals_equal_sums_exactly(program, timeline, target) -> None:
    slow_host = replace(target, host=replace(target.host, dispatch_us=123.4))
    result = energy(program, timeline, slow_host)
    assert result.dispatch_fj == round(123.4e9 * target.energy.static_w)
    assert result.total_fj == int(result.fj.sum()) + result.dispatch_fj
    assert result.total_fj == sum(int(column) for column in result.fj.sum(axis=0)) + result.dispatch_fj
    assert sum(result.by_component_mj.values()) == pytest.approx(result.total_mj, rel=1e-12)
    assert result.op_nj.sum() + result.dispatch_fj / 1e6 == pytest.approx(result.total_mj * 1e6, rel=1e-12)


def test_static_energy_covers_the_whole_time(program, timeline, target) -> None:
    result = energy(program, timeline, target)
    assert result.fj[:, COMPONENTS.index("static")].sum() == round(timeline.total_fs * target.energy.static_w)


def test_pair_of_operand_types(program, target, timeline) -> None:
    which, names = matmul_pairs(program)
    assert names == ("int8xint4",)
    assert which.tolist() == [-1, 0]
    poor = replace(target, energy=replace(target.energy, mac_pj={"fp16xfp16": 0.5}))
    with pytest.raises(OptionError, match=r"no energy.mac_pj for int8xint4; it has fp16xfp16"):
        energy(program, timeline, poor)


def test_bands_are_the_table_at_its_bounds(program, timeline, target) -> None:
    result = energy(program, timeline, target)
    for bound in BOUNDS:
        alone = energy(program, timeline, replace(target, energy=target.energy_at(bound), bounds={}))
        assert getattr(result.total, bound) == alone.total_mj
        for name in COMPONENTS:
            assert getattr(result.component(name), bound) == alone.by_component_mj[name]
    assert result.total.low < result.total.typical == result.total_mj < result.total.high


def test_without_bands_nothing_has_a_width(program, timeline, target) -> None:
    result = energy(program, timeline, replace(target, bounds={}))
    assert result.total == Band(result.total_mj, result.total_mj, result.total_mj)


def test_parts_sum_to_components_and_components_to_the_total(program, timeline, target) -> None:
    slow_host = replace(target, host=replace(target.host, dispatch_us=123.4))
    result = energy(program, timeline, slow_host)
    typical = BOUNDS.index("typical")
    by_part = result.parts_fj[typical] + result.dispatch_parts_fj[typical]
    assert int(by_part.sum()) == result.total_fj
    for name in COMPONENTS:
        own = [result.part(part) for part, owner in PARTS.items() if owner == name]
        for bound in BOUNDS:
            assert sum(getattr(band, bound) for band in own) == pytest.approx(getattr(result.component(name), bound))
    assert result.total.typical - result.device.typical == pytest.approx(result.dispatch_fj / 1e12)


def test_dram_energy_is_by_command_and_by_bit(program, timeline, target) -> None:
    table = target.energy
    plain = energy(program, timeline, target)
    assert plain.part("dram_read").typical == pytest.approx(256 * 8 * table.dram_pj_per_bit * 1e-9)
    assert plain.part("dram_write").typical == 0
    assert plain.part("dram_activate").typical == pytest.approx(2 * table.dram_activate_pj * 1e-9)
    assert plain.part("dram_refresh").typical == plain.part("dram_background").typical == 0
    refreshed = replace(timeline, counters={"dram_refreshes": 7})
    stated = replace(target, energy=replace(table, dram_refresh_pj=3000.0, dram_background_w=0.05))
    full = energy(program, refreshed, stated)
    seconds = timeline.total_fs * 1e-15 + target.host.dispatch_us * 1e-6
    assert full.part("dram_refresh").typical == pytest.approx(7 * 3000 * 1e-9)
    assert full.part("dram_background").typical == pytest.approx(0.05 * seconds * 1e3)
    assert full.component("static") == plain.component("static")
    assert full.total_fj == int(full.fj.sum()) + full.dispatch_fj


def test_a_polling_host_is_beside_the_total(program, timeline, target) -> None:
    still = energy(program, timeline, target)
    assert still.host == Band(0, 0, 0)
    assert still.system == still.total
    bounds = {**target.bounds, "energy.host_poll_w": (1.0, 4.0)}
    slow_host = replace(target.host, dispatch_us=100.0)
    watched = replace(target, energy=replace(target.energy, host_poll_w=2.0), bounds=bounds, host=slow_host)
    result = energy(program, timeline, watched)
    assert result.host.typical == pytest.approx(2e3 * (timeline.total_fs * 1e-15 + 100e-6))
    assert result.host.scaled(0.5) == Band(result.host.low / 2, result.host.low, result.host.typical)
    assert result.device == still.device
    for bound in BOUNDS:
        assert getattr(result.system, bound) == pytest.approx(getattr(result.total + result.host, bound))


def test_standing_power_is_what_time_alone_costs(program, timeline, target) -> None:
    watched = replace(target, energy=replace(target.energy, host_poll_w=2.0, dram_background_w=0.1))
    npu, host = standing_w(watched)
    slow = replace(watched, host=replace(watched.host, dispatch_us=1000.0))
    quick = replace(watched, host=replace(watched.host, dispatch_us=0.0))
    more, less = energy(program, timeline, slow), energy(program, timeline, quick)
    for bound in BOUNDS:
        assert getattr(more.total, bound) - getattr(less.total, bound) == pytest.approx(getattr(npu, bound))
        assert getattr(more.host, bound) - getattr(less.host, bound) == pytest.approx(getattr(host, bound))
