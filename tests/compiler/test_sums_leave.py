"""What it takes sums to leave the accumulators (a drain, a rounding, products that wait), and lanes to fold."""

from dataclasses import replace
from typing import Any

import pytest
from kernel_bench import small_target

from firsttoken_compiler.codegen.tir_reader import read
from firsttoken_compiler.codegen.unroll import Place, unroll
from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.matmul import Matmul
from firsttoken_compiler.isa.types import Dtype, Space
from firsttoken_compiler.isa.vector_kernel import VectorKernel
from firsttoken_compiler.schedule import linear
from firsttoken_compiler.schedule.linear import Tile
from firsttoken_compiler.schedule.product_bytes import linear_bytes
from firsttoken_compiler.schedule.spec import Arg, KernelSpec
from firsttoken_compiler.target.rates import vector_cycles
from firsttoken_compiler.target.target import Target

COPY, ADD, PEAK = VectorKernel("s0"), VectorKernel.parse("add(s0, s1)"), VectorKernel("s0", "max")
DIMS = (2, 8, 512)


def slow(**changes: Any) -> Target:
    target = small_target()
    return replace(target, vector=replace(target.vector, contexts=1, **changes))


def vectors(target: Target) -> int:
    return DIMS[0] * DIMS[1] * -(-DIMS[2] // target.vector.lanes)


@pytest.mark.parametrize("dtype", [Dtype.F16, Dtype.F32])
def test_sums_that_leave_the_accumulators_cost_a_drain_whatever_they_become(dtype: Dtype) -> None:
    target, plain = slow(drain_cycles=3.0), slow()
    kinds = (dtype, Dtype.F32)
    more = vector_cycles(target, COPY, DIMS, kinds, sums=True) - vector_cycles(plain, COPY, DIMS, kinds, sums=True)
    assert more == 3 * vectors(target)
    assert vector_cycles(target, COPY, DIMS, kinds) == vector_cycles(plain, COPY, DIMS, kinds)


@pytest.mark.parametrize(
    ("kernel", "kinds", "narrows"),
    [
        (COPY, (Dtype.F16, Dtype.F32), True),
        (COPY, (Dtype.F16, Dtype.F16), False),
        (ADD, (Dtype.F16, Dtype.F16, Dtype.F16), True),
        (ADD, (Dtype.F32, Dtype.F16, Dtype.F16), False),
        (PEAK, (Dtype.F16, Dtype.F32), False),
    ],
)
def test_results_in_fewer_bits_are_rounded(kernel: VectorKernel, kinds: tuple[Dtype, ...], narrows: bool) -> None:
    target, plain = slow(narrow_cycles=2.0), slow()
    more = vector_cycles(target, kernel, DIMS, kinds) - vector_cycles(plain, kernel, DIMS, kinds)
    assert more == (2 * vectors(target) if narrows else 0)


@pytest.mark.parametrize("contexts", [1, 4])
def test_a_reduction_folds_the_lanes_of_every_row(contexts: int) -> None:
    target, plain = (
        replace(made, vector=replace(made.vector, contexts=contexts)) for made in (slow(fold_cycles=14.0), slow())
    )
    kinds = (Dtype.F32, Dtype.F32)
    more = vector_cycles(target, PEAK, DIMS, kinds) - vector_cycles(plain, PEAK, DIMS, kinds)
    assert more == 14 * DIMS[0] * DIMS[1] // contexts
    assert vector_cycles(target, ADD, DIMS, kinds) == vector_cycles(plain, ADD, DIMS, kinds)


def test_products_wait_where_there_is_one_tile_of_sums() -> None:
    two = small_target()
    one = replace(two, scratchpad=replace(two.scratchpad, accumulator_slots=1))
    spec = KernelSpec(
        "linear", (("acts", "fp16"), ("group", 0), ("n", 64)),
        (Arg((32, 16), Dtype.F16), Arg((64, 16), Dtype.F16)), (Arg((32, 64), Dtype.F16),),
    )  # fmt: skip
    spaces, tile = (Space.DRAM,) * 3, Tile(16, 1, 16)
    for target, slots in ((one, 1), (two, 2)):
        scheduled = linear.schedule(spec, spaces, tile, target)
        body, _ = read(scheduled.lowered())
        places = [Place(space, layout) for space, layout in zip(spaces, scheduled.layouts, strict=True)]
        code = unroll(body, places, scheduled.ragged, target.scratchpad.alignment_bytes).code
        products = code[code[:, word.OPCODE] == Matmul.OPCODE]
        assert len(products) == 2 * 8
        assert len(set(products[:, word.operand_column(0) + 1].tolist())) == slots
        assert linear_bytes(spec, spaces, tile, target)[1] == slots * 16 * 8 * 4
    assert one.content_hash != two.content_hash


def test_operations_in_a_pipeline_take_as_long_as_the_slowest_stage() -> None:
    """Three stages: up to three operations of a cycle pass at once, a fourth waits; one of 4 cycles decides alone."""
    cycles = {**slow().vector.cycles, "add": 1.0, "mul": 1.0, "exp": 4.0}
    target = slow(stages=3, cycles=cycles)
    expected = {"s0": 1, "add(s0, mul(s1, s2))": 1, "add(add(mul(s0, s1), s2), mul(s3, s4))": 4 / 3, "exp(s0)": 4}
    for text, each in expected.items():
        found = vector_cycles(target, VectorKernel.parse(text), DIMS) - target.vector.startup_cycles
        assert found == round(each * vectors(target)), text


def test_values_of_nothing_leave_the_hash_as_it_was() -> None:
    target = small_target()
    same = replace(target, vector=replace(target.vector, narrow_cycles=0.0, drain_cycles=0.0))
    assert same.content_hash == target.content_hash
    assert slow(drain_cycles=1.0).content_hash != slow().content_hash
