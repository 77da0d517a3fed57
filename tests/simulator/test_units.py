"""Matrix, vector and scratchpad against closed forms."""

import math
from dataclasses import replace

import numpy as np
import pytest
from harness import load, make_program, make_target, matmul, vector
from hypothesis import given, settings
from hypothesis import strategies as st

from firsttoken_compiler.isa.dma import spad
from firsttoken_compiler.isa.types import PACKED, Dtype
from firsttoken_compiler.isa.vector_kernel import VectorKernel
from firsttoken_compiler.target.rates import vector_cycles
from firsttoken_compiler.target.target import Target
from firsttoken_simulator.machine import simulate_program
from firsttoken_simulator.units.scratchpad import conflict_factor

SHAPES = (st.integers(1, 300), st.integers(1, 300), st.integers(1, 300))


def systolic(dataflow: str, double_buffered: bool, size: int = 16) -> Target:
    """A small array with ports that never limit it."""
    return make_target(
        matrix_rows=size, matrix_columns=size, matrix_dataflow=dataflow, matrix_double_buffered=double_buffered,
        matrix_issue_cycles=0, matrix_macs_per_cycle={"int8xint8": size * size}, scratchpad_bank_bytes=1 << 14,
    )  # fmt: skip


def cycles(target: Target, m: int, n: int, k: int) -> int:
    return simulate_program(make_program(matmul(m, n, k)), target).total_cycles


@given(*SHAPES)
@settings(max_examples=40, deadline=None)
def test_weight_stationary_is_scalesim(m: int, n: int, k: int) -> None:
    expected = sum(2 * 16 + 16 + m - 2 for _ in range(math.ceil(k / 16) * math.ceil(n / 16)))
    assert cycles(systolic("ws", False), m, n, k) == expected


@given(*SHAPES)
@settings(max_examples=40, deadline=None)
def test_output_stationary_is_scalesim(m: int, n: int, k: int) -> None:
    expected = sum(16 + 16 + k - 2 for _ in range(math.ceil(m / 16) * math.ceil(n / 16)))
    assert cycles(systolic("os", False), m, n, k) == expected


@given(*SHAPES)
@settings(max_examples=40, deadline=None)
def test_double_buffered_hides_the_weight_loads(m: int, n: int, k: int) -> None:
    passes = math.ceil(k / 16) * math.ceil(n / 16)
    assert cycles(systolic("ws", True), m, n, k) == 16 + (passes - 1) * max(m, 16) + m + 16 + 16 - 2


def test_issue_cost_is_added_per_instruction() -> None:
    program = make_program(*[matmul(128, 128, 128) for _ in range(5)])
    with_issue = simulate_program(program, make_target(matrix_issue_cycles=10)).total_cycles
    assert with_issue == simulate_program(program, make_target(matrix_issue_cycles=0)).total_cycles + 50


def test_vector_cycles_are_the_shared_rate() -> None:
    target = make_target()
    expected = vector_cycles(target, VectorKernel.parse("add(s0, s1)"), (2, 8, 512))
    assert simulate_program(make_program(vector(2, 8, 512)), target).total_cycles == expected


@pytest.mark.parametrize("dtype", PACKED)
def test_packed_sources_are_billed_by_their_bits(dtype: Dtype) -> None:
    """A conversion per lane-vector, bytes by row, energy of one operation more per element."""
    target, (rows, width) = make_target(), (6, 131)
    plain = vector(1, rows, width)
    packed = replace(plain, operands=(*plain.operands[:2], spad(dtype, 1 << 20, 0, dtype.nbytes(width), 1)))
    line, before = (simulate_program(make_program(i), target) for i in (packed, plain))
    kernel = VectorKernel.parse("add(s0, s1)")
    assert line.total_cycles == vector_cycles(target, kernel, (1, rows, width), (Dtype.F16, Dtype.F16, dtype))
    assert line.total_cycles > vector_cycles(target, kernel, (1, rows, width))
    assert line.spad_read_bytes[0] == rows * (2 * width + dtype.nbytes(width))
    assert line.vector_ops[0] == before.vector_ops[0] + rows * width == 2 * rows * width
    once = replace(plain, operands=(*plain.operands[:2], spad(dtype, 1 << 20, 0, 8, 0)))
    assert simulate_program(make_program(once), target).spad_read_bytes[0] == rows * (2 * width + 1)


def test_narrow_ports_stretch_a_product() -> None:
    wide = simulate_program(make_program(matmul(128, 128, 4096)), make_target())
    assert wide.stall_spad_fs[0] == 0
    target = make_target(scratchpad_banks=4, scratchpad_bank_bytes=16)
    narrow = simulate_program(make_program(matmul(128, 128, 4096)), target)
    least = narrow.spad_read_bytes[0] // 64
    assert narrow.total_cycles >= least
    assert narrow.stall_spad_fs[0] == (narrow.end_fs - narrow.start_fs - narrow.busy_fs)[0]


def test_units_and_dma_share_the_ports() -> None:
    target = make_target(scratchpad_banks=4, scratchpad_bank_bytes=64)
    alone = simulate_program(make_program(matmul(128, 128, 4096)), target)
    shared = simulate_program(make_program(matmul(128, 128, 4096), vector(64, 8, 512), load(1 << 16)), target)
    assert shared.stall_spad_fs[0] > alone.stall_spad_fs[0]
    moved = shared.spad_read_bytes.sum() + shared.spad_write_bytes.sum()
    assert moved <= 256 * shared.total_cycles


def test_conflicting_elements_slow_the_vector_unit() -> None:
    dense = simulate_program(make_program(vector(1, 64, 512)), make_target())
    strided = simulate_program(make_program(vector(1, 64, 512, step=1024)), make_target())
    assert dense.stall_spad_fs[0] == 0
    assert strided.total_cycles >= 64 * 512  # one element a cycle: all lie in one bank
    assert strided.stall_spad_fs[0] > 0


@given(st.sampled_from([4, 8, 16, 32]), st.sampled_from([8, 16, 32]), st.integers(1, 8))
def test_dense_and_aligned_patterns_are_free(banks: int, bank_bytes: int, words: int) -> None:
    span = banks * bank_bytes
    assert conflict_factor(span, span * words, banks, bank_bytes) == 1
    if banks % words == 0:
        assert conflict_factor(words * bank_bytes, words * bank_bytes, banks, bank_bytes) == 1
    odd = bank_bytes * (2 * words + 1)  # an odd number of banks visits all of them
    assert conflict_factor(bank_bytes, odd, banks, bank_bytes) == 1


@given(st.sampled_from([4, 8, 16, 32]), st.sampled_from([8, 16, 32]), st.integers(1, 4), st.integers(1, 9))
def test_a_stride_of_all_banks_queues_at_the_first(banks: int, bank_bytes: int, words: int, turns: int) -> None:
    assert conflict_factor(words * bank_bytes, turns * banks * bank_bytes, banks, bank_bytes) == banks / words


@given(st.integers(1, 200), st.integers(0, 600), st.sampled_from([4, 8]), st.sampled_from([8, 16]))
@settings(max_examples=150)
def test_conflict_factor_equals_counting(run: int, stride: int, banks: int, bank_bytes: int) -> None:
    if stride == run:
        return
    span = banks * bank_bytes
    rows = span // math.gcd(stride, span) if stride else 1
    load_per_bank = np.zeros(banks, int)
    last = -1
    for row in range(rows):
        for word in range(row * stride // bank_bytes, (row * stride + run - 1) // bank_bytes + 1):
            if word == last or (stride and row and word < last):
                continue
            load_per_bank[word % banks] += 1
            last = word
    expected = max(1.0, load_per_bank.max() * span / (rows * run))
    if stride >= run or stride == 0:
        assert conflict_factor(run, stride, banks, bank_bytes) == pytest.approx(expected)


@pytest.mark.parametrize(("pair", "w"), [("int4", Dtype.I4), ("int8", Dtype.I8)])
def test_weight_width_sets_the_scratchpad_traffic(pair: str, w: Dtype) -> None:
    line = simulate_program(make_program(matmul(1, 128, 256, w=w)), make_target())
    assert line.spad_read_bytes[0] == 128 * 256 * w.bits // 8 + 256
    assert line.acc_bytes[0] == 2 * 128 * 4 * 2
