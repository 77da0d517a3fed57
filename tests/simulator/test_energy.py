from dataclasses import replace

import numpy as np
import pytest

from firsttoken_compiler.errors import OptionError
from firsttoken_compiler.isa.dma import Load, dram, spad
from firsttoken_compiler.isa.matmul import Matmul
from firsttoken_compiler.isa.program import OpInfo, Program
from firsttoken_compiler.isa.types import Dtype, Engine, Operand, Space
from firsttoken_compiler.target.target import Target
from firsttoken_simulator.energy import COMPONENTS, energy, matmul_pairs
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
