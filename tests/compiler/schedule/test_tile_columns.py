"""A tile unit that makes so many columns side by side, and its activations again for the next ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
from kernel_bench import small_target

from firsttoken_compiler.isa.types import Dtype, Space
from firsttoken_compiler.schedule.linear import Shape, panel_of
from firsttoken_compiler.schedule.spec import Arg, KernelSpec
from firsttoken_compiler.schedule.tiling import Room, choose_linear, own_panels
from firsttoken_compiler.target.rates import matmul_cost
from firsttoken_compiler.target.target import Target

XDNA = Target.load("xdna2-strix")


def product(m: int, n: int, k: int) -> KernelSpec:
    """Of fp16 matrices in DRAM."""
    params = (("n", n), ("k", k), ("group", 0), ("acts", "fp16"), ("weights", "fp16"))
    operands = (Arg((m, k), Dtype.F16), Arg((k, n), Dtype.F16))
    return KernelSpec("linear", params, operands, (Arg((m, n), Dtype.F16),))


@pytest.mark.parametrize(
    ("n", "columns"),
    [(2048, 512), (1536, 512), (896, 128), (8960, 256), (128, 128), (768, 256), (960, 320), (320, 320), (100, 0)],
)
def test_width_is_the_widest_part_that_divides(n: int, columns: int) -> None:
    """The widths of mlir-air's kernel registry, but for 768, which it makes by 384."""
    assert own_panels(Shape.of(product(2048, n, 512)), XDNA) * panel_of(XDNA) == columns


def test_only_products_of_several_rows_of_a_target_that_says_so() -> None:
    assert own_panels(Shape.of(product(1, 2048, 512)), XDNA) == 0
    assert own_panels(Shape.of(product(64, 2048, 512)), small_target()) == 0
    room = Room(XDNA.scratchpad.bytes // 2, XDNA.scratchpad.bytes)
    tile = choose_linear(product(512, 896, 256), (Space.DRAM,) * 3, XDNA, room)
    assert tile.panels * panel_of(XDNA) == 128


def test_activations_come_again_for_every_width() -> None:
    """512 rows of 64 terms of two bytes, 16 bytes a cycle: 4096 cycles for every 512 columns, and no less."""
    unit = replace(XDNA.matrix, row_bytes_per_cycle=16.0)
    target, free = (replace(XDNA, matrix=m) for m in (unit, replace(unit, row_bytes_per_cycle=0.0)))

    def cycles(target: Target, n: int, attends: bool = False) -> int:
        return matmul_cost(target, 512, n, 64, "fp16xfp16", attends).cycles - target.matrix.fill_cycles

    assert cycles(target, 64) == cycles(target, 128) == 4096
    assert cycles(free, 64) < cycles(free, 128) < 4096
    assert cycles(target, 512) == cycles(free, 512) > 4096
    assert cycles(target, 576) == max(cycles(free, 576), 8192)
    assert cycles(target, 64, attends=True) == cycles(free, 64, attends=True)
    assert matmul_cost(target, 512, 64, 64, "int8xint8").cycles - target.matrix.fill_cycles == 2048
