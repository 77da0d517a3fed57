"""Many tiles at once: the bytes, the costs and the choice are those of one tile after the other, to the last bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kernel_bench import small_target, with_scratchpad

from firsttoken_compiler.errors import AllocationError
from firsttoken_compiler.isa.types import Dtype, Space
from firsttoken_compiler.isa.word import MAX_EXTENT
from firsttoken_compiler.schedule import tiling
from firsttoken_compiler.schedule.linear import Shape, Tile, operand_names, panel_of
from firsttoken_compiler.schedule.product_bytes import linear_bytes, tiles_bytes
from firsttoken_compiler.schedule.product_cost import linear_cost
from firsttoken_compiler.schedule.product_costs import linear_costs
from firsttoken_compiler.schedule.spec import Arg, KernelSpec
from firsttoken_compiler.schedule.tiles import Tiles
from firsttoken_compiler.schedule.tiling import Room
from firsttoken_compiler.target.rates import pair_name
from firsttoken_compiler.target.target import Target

D, S = Space.DRAM, Space.SPAD
PRESETS = (
    "ethos-u85-2048", "rk3588", "snapdragon-x-elite", "snapdragon-8-gen3", "systolic-128", "tpu-v3", "tpu-v4",
    "xdna2-strix",
)  # fmt: skip
MOVABLE = ("a", "a_scale", "a_sum", "residual", "factor", "out")


@st.composite
def specs(draw: st.DrawFn) -> tuple[KernelSpec, tuple[Space, ...]]:
    """A product of any format, its activations and results anywhere."""
    m, n, k = draw(st.integers(1, 300)), draw(st.integers(1, 700)), draw(st.integers(1, 700))
    acts, weights = draw(st.sampled_from([("fp16", Dtype.F16), ("int8", Dtype.I8), ("int8", Dtype.I4)]))
    group = draw(st.sampled_from([k, k, 32, 128])) if acts == "int8" else 0
    flags = {name: draw(st.booleans()) for name in ("bias", "residual", "factor", "silu")}
    flags |= {name: bool(group) and draw(st.booleans()) for name in ("zeros", "asymmetric", "minimum")}
    flags["zeros"] = flags["zeros"] and not flags["asymmetric"]
    flags["minimum"] = flags["minimum"] and not (flags["zeros"] or flags["asymmetric"])
    out = draw(st.sampled_from([Dtype.F16, Dtype.F32]))
    scales = -(-k // group) if group else 0
    shapes = {
        "a": Arg((m, k), {"fp16": Dtype.F16, "int8": Dtype.I8}[acts]), "w": Arg((k, n), weights),
        "a_scale": Arg((m, 1), Dtype.F32), "a_zero": Arg((1, 1), Dtype.F32), "a_sum": Arg((m, scales), Dtype.I32),
        **{name: Arg((scales, n), Dtype.F16) for name in ("w_scale", "w_zero", "w_min", "w_sum")},
        "bias": Arg((n,), Dtype.F16), "residual": Arg((m, n), draw(st.sampled_from([Dtype.F16, Dtype.F32]))),
        "factor": Arg((m, n), Dtype.F16), "out": Arg((m, n), out),
    }  # fmt: skip
    params = {"acts": acts, "bits": weights.bits, "group": group, "k": k, "n": n, "out": "float16"}
    params |= {name: int(given) for name, given in flags.items()}
    spec = KernelSpec("linear", tuple(sorted(params.items())), (shapes["a"],), (shapes["out"],))
    names = operand_names(spec)
    spec = replace(spec, args=tuple(shapes[name] for name in names[:-1]))
    return spec, tuple(draw(st.sampled_from([D, S])) if name in MOVABLE else D for name in names)


@st.composite
def targets(draw: st.DrawFn) -> Target:
    """A preset, or a small array, which need not let its DMA run ahead."""
    if draw(st.booleans()):
        return Target.load(draw(st.sampled_from(PRESETS)))
    target = small_target(draw(st.integers(4, 24)), draw(st.integers(4, 24)))
    target = with_scratchpad(target, accumulator_slots=draw(st.sampled_from([0, 1])))
    return replace(target, dma=replace(target.dma, decoupled=draw(st.booleans())))


def multiplies(target: Target, spec: KernelSpec) -> bool:
    """Whether the matrix unit has a rate for the product."""
    return pair_name(spec.args[0].dtype, spec.args[1].dtype) in target.matrix.macs_per_cycle


def one_by_one(spec: KernelSpec, spaces: tuple[Space, ...], target: Target, rows: tuple[int, ...]) -> list[Tile]:
    """Every tile that is tried, in order."""
    shape = Shape.of(spec)
    return [
        tile
        for plain in tiling.linear_tiles(spec, target, rows)
        for tile in tiling.variants(shape, plain, spaces[0] is D, target)
    ]


def all_at_once(spec: KernelSpec, spaces: tuple[Space, ...], target: Target, rows: tuple[int, ...]) -> Tiles:
    """The same as arrays."""
    return Tiles.of(Shape.of(spec), panel_of(target), tiling.tile_extents(spec, target, rows), spaces[0] is D)


@settings(max_examples=50, deadline=None, print_blob=True)
@given(specs(), targets(), st.randoms(use_true_random=False))
def test_bytes_and_costs_are_those_of_each_tile(
    product: tuple[KernelSpec, tuple[Space, ...]], target: Target, random: object
) -> None:
    spec, spaces = product
    assume(multiplies(target, spec))
    single, many = one_by_one(spec, spaces, target, tiling.ROWS), all_at_once(spec, spaces, target, tiling.ROWS)
    assert [many.tile(index) for index in range(len(many.m))] == single
    shape, panel = Shape.of(spec), panel_of(target)
    assert many.extents(shape, panel).tolist() == [tiling.extent(shape, tile, target) for tile in single]
    scratch, acc = tiles_bytes(spec, spaces, many, target)
    kept = np.array(sorted(random.sample(range(len(single)), min(len(single), 100))))  # type: ignore[attr-defined]
    needed = [linear_bytes(spec, spaces, single[index], target) for index in kept]
    assert list(zip(scratch[kept].tolist(), acc[kept].tolist(), strict=True)) == needed
    launches = np.array([random.choice((1, 2, 3, 7)) for _ in kept])  # type: ignore[attr-defined]
    costs = linear_costs(spec, spaces, many.only(kept), target, launches)
    assert costs.tolist() == [
        linear_cost(spec, spaces, single[index], target, launches=room)
        for index, room in zip(kept.tolist(), launches.tolist(), strict=True)
    ]


def plainly_chosen(spec: KernelSpec, spaces: tuple[Space, ...], target: Target, room: Room) -> Tile | None:
    """The choice of `choose_linear`, by the account of one tile."""
    few, many = tiling.FEW_ROWS, tiling.ROWS
    for limit, rows in ((room.preferred, many), (room.limit, many), (room.limit, few)):
        costs: dict[Tile, int] = {}
        for tile in one_by_one(spec, spaces, target, rows):
            scratch, acc = linear_bytes(spec, spaces, tile, target)
            fits = scratch <= limit and acc <= target.scratchpad.accumulator_bytes
            if fits and tiling.extent(Shape.of(spec), tile, target) <= MAX_EXTENT:
                launches = max(1, room.limit // max(1, scratch))
                costs[tile] = round(linear_cost(spec, spaces, tile, target, launches=launches))
        if costs:
            most = min(costs.values()) * (1 + tiling.SLACK)
            longest = max(tile.k for tile, cost in costs.items() if cost <= most)
            near = [tile for tile, cost in costs.items() if tile.k == longest and cost <= most]
            return min(near, key=lambda tile: (costs[tile], -tile.m, -tile.panels, tile.buffers))
    return None


@settings(max_examples=20, deadline=None, print_blob=True)
@given(specs(), targets(), st.integers(12, 24), st.integers(1, 3))
def test_the_choice_is_that_of_one_tile_after_the_other(
    product: tuple[KernelSpec, tuple[Space, ...]], target: Target, bits: int, parts: int
) -> None:
    (spec, spaces), room = product, Room((1 << bits) // parts, 1 << bits)
    assume(multiplies(target, spec))
    expected = plainly_chosen(spec, spaces, target, room)
    if expected is None:
        with pytest.raises(AllocationError):
            tiling.choose_linear(spec, spaces, target, room)
        return
    assert tiling.choose_linear(spec, spaces, target, room) == expected
