from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.dma import Load, Store, dram, spad
from firsttoken_compiler.isa.matmul import Matmul
from firsttoken_compiler.isa.program import OpInfo, Program
from firsttoken_compiler.isa.types import ENGINES_PER_CORE, Dtype, Engine, Operand, Space
from firsttoken_compiler.target.load import preset_names
from firsttoken_compiler.target.rates import matmul_cost
from firsttoken_compiler.target.target import Target
from firsttoken_simulator.machine import simulate_program
from firsttoken_simulator.report.critical import critical_path
from firsttoken_simulator.report.ladder import Ladder, ladder_of
from firsttoken_simulator.report.mapping import PARTS, matrix_parts_fs, split
from firsttoken_simulator.report.steps import HOLDERS, OF_OPERATORS
from firsttoken_simulator.timeline import Timeline

EXTENTS = st.tuples(st.integers(1, 300), st.integers(1, 700), st.integers(1, 700))
MULTIPLIERS = [
    name for name in preset_names() if {"int8xint4", "fp16xfp16"} <= set(Target.load(name).matrix.macs_per_cycle)
]
"""Targets that multiply what random programs do."""
QUIET = Target.load("systolic-128")
"""No bank conflicts in what these tests run."""


def found(program: Program, timeline: Timeline, target: Target) -> Ladder:
    return ladder_of(program, timeline, target, critical_path(program, timeline))


def step(ladder: Ladder, name: str) -> int:
    return int(ladder.steps[:, OF_OPERATORS.index(name)].sum())


@pytest.mark.parametrize("name", preset_names())
@given(extents=EXTENTS)
def test_parts_of_a_product_sum_to_its_cycles(name: str, extents: tuple[int, int, int]) -> None:
    target = Target.load(name)
    for pair, rate in target.matrix.macs_per_cycle.items():
        busy, fill, load, issue = split(target, *extents, pair)
        assert busy + fill + load == matmul_cost(target, *extents, pair).cycles
        assert issue == target.matrix.issue_cycles
        assert min(busy, fill, load) >= 0
        m, n, k = extents
        assert busy * rate >= m * n * k


@pytest.mark.parametrize(
    ("dataflow", "double_buffered", "extents", "expected"),
    [  # an array of 128 x 128: cycles that multiply, fill and drain, load
        ("ws", True, (64, 256, 128), (2 * 64, 254, 128 + 64)),
        ("ws", True, (200, 256, 128), (2 * 200, 254, 128)),
        ("ws", False, (64, 256, 128), (2 * 64, 2 * 254, 2 * 128)),
        ("is", False, (64, 256, 128), (256, 254, 128)),
        ("os", False, (64, 256, 128), (2 * 128, 2 * 254, 0)),
    ],
)
def test_an_array_by_hand(dataflow: str, double_buffered: bool, extents: tuple, expected: tuple) -> None:
    matrix = replace(QUIET.matrix, dataflow=dataflow, double_buffered=double_buffered)
    assert split(replace(QUIET, matrix=matrix), *extents, "fp16xfp16")[:3] == expected


def test_a_tile_unit_by_hand() -> None:
    target = Target.load("snapdragon-x-elite")
    unit = target.matrix
    cost, rate = matmul_cost(target, 33, 100, 70, "fp16xint4"), unit.macs_per_cycle["fp16xint4"]
    each = -(-33 // unit.tile_m) * max(1, -(-unit.tile_m * unit.rows * unit.columns // rate))
    conversion = int(np.ceil(unit.weight_cycles.get("fp16xint4", 0.0)))
    assert split(target, 33, 100, 70, "fp16xint4") == (
        cost.passes * each, unit.fill_cycles, cost.passes * conversion, unit.issue_cycles
    )  # fmt: skip


def test_only_products_have_parts(make_case) -> None:
    program, _, target = make_case(40)
    with pytest.raises(ValueError, match="only matrix instructions"):
        matrix_parts_fs(program.code, target)


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 150), seed=st.integers(0, 10_000), hosts=st.booleans(), target=st.sampled_from(MULTIPLIERS)
)
def test_steps_tile_the_time_of_any_timeline(make_case, count: int, seed: int, hosts: bool, target: str) -> None:
    program, timeline, machine = make_case(count, seed, hosts=hosts, target=target)
    check(program, timeline, found(program, timeline, machine))


def check(program: Program, timeline: Timeline, ladder: Ladder) -> None:
    assert (ladder.steps >= 0).all()
    assert (ladder.critical >= 0).all()
    assert int(ladder.steps.sum()) == timeline.total_fs
    np.testing.assert_array_equal(ladder.steps.sum(axis=1), ladder.critical.sum(axis=1))
    on_path = np.zeros(len(HOLDERS), np.int64)
    path = critical_path(program, timeline)
    engine = program.code[path.instruction, word.QUEUE] % ENGINES_PER_CORE
    np.add.at(on_path, np.array([0, 0, 1, 2, 3])[engine], path.length_fs)
    assert np.abs(ladder.critical.sum(axis=0) - on_path).max() <= program.cores


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 150), seed=st.integers(0, 10_000))
def test_a_simulated_product_takes_its_parts_and_its_conflicts(make_case, count: int, seed: int) -> None:
    program, _, target = make_case(count, seed)
    timeline = simulate_program(program, target)
    ladder = found(program, timeline, target)
    check(program, timeline, ladder)
    matrix = program.code[:, word.OPCODE] == Matmul.OPCODE
    parts = matrix_parts_fs(program.code[matrix], target)
    np.testing.assert_array_equal(parts.sum(axis=1), timeline.busy_fs[matrix])
    for name in PARTS:
        assert step(ladder, name) == int(parts[:, PARTS.index(name)].sum())
    assert step(ladder, "bank_conflicts") >= int(timeline.stall_spad_fs[matrix].sum())


def chain(loads: int, nbytes: int, products: int = 0, core: int = 0) -> list[np.ndarray]:
    """Loads one after the other on a core, then products that wait for the last of them."""
    rows = []
    for number in range(loads):
        operands = (spad(Dtype.I8, 0, nbytes), dram(Dtype.I8, number * nbytes, nbytes))
        queue = core * ENGINES_PER_CORE + Engine.DMA_IN
        rows.append(Load(queue=queue, op=0, signal=True, waits=(), dims=(1, 1, nbytes), operands=operands).encode())
    for _ in range(products):
        waits = ((core * ENGINES_PER_CORE + Engine.DMA_IN, loads),) if loads else ()
        acc = Operand(Space.ACC, Dtype.F32, 0, 512)
        operands = (acc, spad(Dtype.F16, 0, 256), spad(Dtype.F16, 65536, 0, 2, 256))
        queue = core * ENGINES_PER_CORE + Engine.MATRIX
        rows.append(
            Matmul(queue=queue, op=1, signal=True, waits=waits, dims=(128, 128, 128), operands=operands).encode()
        )
    return rows


def program_of(rows: list[np.ndarray], cores: int = 1) -> Program:
    ops = tuple(
        OpInfo(name=name, kind="linear", onnx_nodes=(), module="", first=0, last=len(rows))
        for name in ("load", "product")
    )
    return Program(np.stack(rows), (), (), ops, spad_bytes=1 << 20, acc_bytes=1 << 16, cores=cores)


def ladder_on(target: Target, program: Program) -> tuple[Ladder, Timeline]:
    timeline = simulate_program(program, target)
    ladder = found(program, timeline, target)
    check(program, timeline, ladder)
    return ladder, timeline


def test_a_long_stream_is_data_at_the_peak_and_refresh() -> None:
    ladder, timeline = ladder_on(QUIET, program_of(chain(64, 65536)))
    peak = 64 * 65536 / QUIET.dram.peak_bytes_per_s * 1e15
    assert step(ladder, "dma_peak") == pytest.approx(peak, rel=0.03)
    assert step(ladder, "dma_outstanding") == 0
    closed = QUIET.dram.trfc_ns / QUIET.dram.trefi_ns
    assert step(ladder, "dma_refresh") == pytest.approx(peak * closed / (1 - closed), rel=0.1)
    setups = 64 * QUIET.dma.setup_cycles * QUIET.period_fs
    assert step(ladder, "dma_setup") < 0.15 * setups, "descriptors are set up while data of the ones before flows"
    assert ladder.critical[:, HOLDERS.index("dma")].sum() == timeline.total_fs


def test_few_requests_in_flight_show_as_such() -> None:
    few = replace(QUIET, dma=replace(QUIET.dma, outstanding=4))
    slow, line = ladder_on(few, program_of(chain(16, 65536)))
    fast, _ = ladder_on(QUIET, program_of(chain(16, 65536)))
    assert step(slow, "dma_outstanding") > 0.8 * line.total_fs
    assert step(fast, "dma_outstanding") == 0
    assert step(slow, "dma_peak") == pytest.approx(step(fast, "dma_peak"), rel=0.05)


def test_a_narrow_bus_shows_as_such() -> None:
    narrow = replace(QUIET, dma=replace(QUIET.dma, bus_bytes_per_cycle=8))
    ladder, line = ladder_on(narrow, program_of(chain(16, 65536)))
    assert step(ladder, "dma_bus") > 0.7 * line.total_fs


def test_one_short_load_is_mostly_latency() -> None:
    ladder, line = ladder_on(QUIET, program_of(chain(1, 64)))
    assert step(ladder, "dma_latency") > 0.5 * line.total_fs


def test_products_alone_are_their_parts() -> None:
    ladder, line = ladder_on(QUIET, program_of(chain(0, 64, products=5)))
    assert step(ladder, "ideal") == 5 * 128 * QUIET.period_fs
    assert line.total_fs == sum(step(ladder, name) for name in (*PARTS, "bank_conflicts", "sync"))
    assert int(ladder.steps[0].sum()) == 0


def test_work_that_hides_behind_a_stream_belongs_to_the_product_but_not_to_the_path() -> None:
    rows = chain(1, 64, products=3) + chain(64, 65536)
    ladder, line = ladder_on(QUIET, program_of(rows))
    product = int(ladder.steps[1].sum())
    assert product >= 3 * 128 * QUIET.period_fs
    assert ladder.critical[1, HOLDERS.index("dma")] == product
    assert int(ladder.steps[0].sum()) == line.total_fs - product


def test_a_core_that_waits_for_another_one_waits_for_synchronisation() -> None:
    two = replace(QUIET, cores=2)
    ladder, line = ladder_on(two, program_of(chain(0, 64, products=8), cores=2))
    one, alone = ladder_on(QUIET, program_of(chain(0, 64, products=8)))
    assert line.total_fs == alone.total_fs
    assert step(ladder, "ideal") == step(one, "ideal") // 2
    assert step(ladder, "sync") == pytest.approx(line.total_fs / 2, rel=0.01)


def test_writes_are_counted_as_data() -> None:
    operands = (dram(Dtype.I8, 0, 65536), spad(Dtype.I8, 0, 65536))
    common = {"queue": int(Engine.DMA_OUT), "op": 0, "signal": True, "waits": ()}
    rows = [Store(**common, dims=(1, 1, 65536), operands=operands).encode() for _ in range(16)]
    ladder, _ = ladder_on(QUIET, program_of(rows))
    assert step(ladder, "dma_peak") == pytest.approx(16 * 65536 / QUIET.dram.peak_bytes_per_s * 1e15, rel=0.1)


def test_an_empty_program_has_an_empty_ladder() -> None:
    program = replace(program_of(chain(1, 64)), code=np.zeros((0, word.WIDTH), np.int64))
    ladder = ladder_of(program, simulate_program(program, QUIET), QUIET, critical_path(program, None))
    assert ladder.steps.shape == (2, len(OF_OPERATORS))
    assert not ladder.steps.any()
