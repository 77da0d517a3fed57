"""The account of products: its cheapest tiles are near the fastest that the simulator finds."""

import random

import pytest

from firsttoken.tuning.measure import measure_kernel
from firsttoken_compiler.isa.types import Dtype, Space
from firsttoken_compiler.schedule import choosing
from firsttoken_compiler.schedule.linear import Tile
from firsttoken_compiler.schedule.product_cost import Making, linear_cost
from firsttoken_compiler.schedule.spec import Arg, KernelSpec
from firsttoken_compiler.schedule.tiling import Room
from firsttoken_compiler.target.target import Target

D, S = Space.DRAM, Space.SPAD
ON_CHIP = (S, D, S, D, S)
NEAR = 1.08
"""Cycles of the default over those of the fastest of a sample; the worst of the products below is 1.05."""


def product(m: int, n: int, k: int, bits: int = 4) -> KernelSpec:
    args = (
        Arg((m, k), Dtype.I8), Arg((k, n), {4: Dtype.I4, 8: Dtype.I8}[bits]), Arg((m, 1), Dtype.F32),
        Arg((1, n), Dtype.F16),
    )  # fmt: skip
    params = (
        ("acts", "int8"), ("bias", 0), ("bits", bits), ("group", k), ("k", k), ("n", n), ("out", "float16"),
        ("residual", 0), ("silu", 0),
    )  # fmt: skip
    return KernelSpec("linear", tuple(sorted(params)), args, (Arg((m, n), Dtype.F16),))


@pytest.mark.parametrize("name", ["systolic-128", "snapdragon-x-elite"])
@pytest.mark.parametrize("seed", range(2))
def test_the_default_is_near_the_fastest_of_a_sample(name: str, seed: int) -> None:
    rng = random.Random(seed)
    m, n, k = rng.choice((1, 16, 48, 64, 100)), 32 * rng.randint(6, 60), 32 * rng.randint(6, 60)
    spec, target = product(m, n, k, rng.choice((4, 8))), Target.load(name)
    room = Room(target.scratchpad.bytes // 3, 2 * target.scratchpad.bytes // 3)
    default = measure_kernel(spec, ON_CHIP, target, room).cycles
    legal = list(choosing.legal_choices(spec, ON_CHIP, target, room))
    cheap = sorted(legal, key=lambda choice: choosing.ranked(spec, ON_CHIP, target, choice) or 0.0)[:6]
    sample = (*cheap, *rng.sample(legal, min(len(legal), 12)))
    times = [measure_kernel(spec, ON_CHIP, target, room, choice).cycles for choice in sample]
    assert default <= NEAR * min(times)


def test_a_slot_more_hides_the_answer_of_the_dram() -> None:
    spec, target = product(64, 1536, 1536), Target.load("systolic-128")
    one, two, three = (linear_cost(spec, ON_CHIP, Tile(64, 1, 256, buffers=buffers), target) for buffers in (1, 2, 3))
    assert one > two >= three


def test_a_tile_across_all_columns_overlaps_less() -> None:
    spec, target = product(64, 576, 576), Target.load("snapdragon-x-elite")
    whole, parts = (linear_cost(spec, ON_CHIP, Tile(32, panels, 128), target) for panels in (18, 6))
    room, choices = Room(1 << 22, 1 << 23), [choosing.choice_of(Tile(32, n, 128), target) for n in (18, 6)]
    took = [measure_kernel(spec, ON_CHIP, target, room, choice).cycles for choice in choices]
    assert (whole > parts) == (took[0] > took[1])


def test_weights_that_the_vector_unit_makes_take_its_time() -> None:
    spec, target, tile = product(16, 512, 512), Target.load("systolic-128"), Tile(16, 2, 128)
    plain = linear_cost(spec, ON_CHIP, tile, target, Making(1 << 14, 1))
    assert linear_cost(spec, ON_CHIP, tile, target, Making(1 << 14, 1, 50_000)) > plain + 7 * 50_000


def test_results_in_dram_prefer_long_runs() -> None:
    spec, target = product(64, 8192, 64), Target.load("systolic-128")
    spaces = (*ON_CHIP[:-1], D)
    narrow, wide = (linear_cost(spec, spaces, Tile(64, panels, 64), target) for panels in (1, 4))
    assert wide < narrow
