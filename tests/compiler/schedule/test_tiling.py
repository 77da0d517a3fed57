"""Tiles: what is chosen fits, nothing that was ranked is cheaper, and what cannot fit is said."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_bench import Bench, small_target, with_scratchpad

from firsttoken_compiler.codegen.build import build
from firsttoken_compiler.errors import AllocationError
from firsttoken_compiler.isa.types import Dtype, Space
from firsttoken_compiler.schedule import tiling
from firsttoken_compiler.schedule.attention import AttentionTile
from firsttoken_compiler.schedule.linear import Shape, Tile, operand_names
from firsttoken_compiler.schedule.product_bytes import linear_bytes
from firsttoken_compiler.schedule.product_cost import linear_cost
from firsttoken_compiler.schedule.spec import Arg, KernelSpec
from firsttoken_compiler.schedule.tiling import (
    Room,
    attention_cost,
    choose_attention,
    choose_linear,
    choose_rows,
    in_flight,
)
from firsttoken_compiler.target.target import Target

D, S = Space.DRAM, Space.SPAD


def linear(m: int, n: int, k: int, bits: int = 8, group: int = 0, residual: Dtype | None = None) -> KernelSpec:
    group = group or k
    args = [Arg((m, k), Dtype.I8), Arg((k, n), {4: Dtype.I4, 8: Dtype.I8}[bits]), Arg((m, 1), Dtype.F32)]
    args.append(Arg((-(-k // group), n), Dtype.F16))
    args += [Arg((m, n), residual)] if residual is not None else []
    params = (
        ("acts", "int8"), ("bias", 0), ("bits", bits), ("group", group), ("k", k), ("n", n), ("out", "float16"),
        ("residual", int(residual is not None)),
    )  # fmt: skip
    return KernelSpec("linear", params, tuple(args), (Arg((m, n), residual or Dtype.F16),))


def attention(tokens: int, past: int, heads: int, width: int) -> KernelSpec:
    keys = tokens + past
    q, cache = Arg((tokens, heads * width), Dtype.F16), Arg((heads, keys, width), Dtype.F16)
    params = (("causal", 1), ("heads", heads), ("kv_heads", heads), ("mask", 0), ("past", past), ("scale", 0.5))
    return KernelSpec("attention", params, (q, cache, cache), (q,))


def rowwise(kind: str, rows: int, width: int, out: Dtype) -> KernelSpec:
    matrix = Arg((rows, width), Dtype.F16)
    outs = (Arg((rows, width), out), Arg((rows, 1), Dtype.F32)) if out is not Dtype.F16 else (matrix,)
    args = {"rms_norm": (matrix, Arg((width,), Dtype.F16)), "swiglu": (matrix, matrix), "quantise": (matrix,)}[kind]
    return KernelSpec(kind, (("eps", 1e-5),) if kind == "rms_norm" else (), args, outs)


@st.composite
def kernels(draw: st.DrawFn) -> tuple[KernelSpec, tuple[Space, ...], Target]:
    """A kernel of any kind, operands anywhere, on a small array."""
    target = small_target(draw(st.integers(4, 24)), draw(st.integers(4, 24)))
    extent = st.integers(1, 90)
    kind = draw(st.sampled_from(["linear", "linear", "attention", "rms_norm", "swiglu", "quantise"]))
    if kind == "linear":
        residual = draw(st.sampled_from([None, Dtype.F16, Dtype.F32]))
        group = draw(st.sampled_from([0, 16, 32]))
        spec = linear(draw(extent), draw(extent), draw(extent), draw(st.sampled_from([4, 8])), group, residual)
        movable = ("a", "a_scale", "residual", "out")
        spaces = tuple(draw(st.sampled_from([D, S])) if name in movable else D for name in operand_names(spec))
        return spec, spaces, target
    if kind == "attention":
        tokens, past, heads, width = (draw(st.integers(1, most)) for most in (40, 40, 3, 20))
        spec = attention(tokens, past, heads, width)
    else:
        out = draw(st.sampled_from([Dtype.I8, Dtype.I16] if kind == "quantise" else [Dtype.F16, Dtype.I8, Dtype.I16]))
        spec = rowwise(kind, draw(extent), draw(extent), out)
    return spec, tuple(draw(st.sampled_from([D, S])) for _ in (*spec.args, *spec.outs)), target


@settings(max_examples=40, deadline=None, print_blob=True)
@given(kernels(), st.integers(40, 700))
def test_what_is_chosen_fits(kernel: tuple[KernelSpec, tuple[Space, ...], Target], granules: int) -> None:
    """The template takes at most the room, or the error says that nothing does."""
    (spec, spaces, target), limit = kernel, 64 * granules
    target = with_scratchpad(target, accumulator_bytes=16384)
    try:
        template = build(spec, spaces, target, Room(limit // 2, limit))
    except AllocationError as raised:
        error = str(raised)
    else:
        assert template.scratch_bytes <= limit
        assert template.acc_bytes <= target.scratchpad.accumulator_bytes
        return
    assert re.search(rf"\b{limit}\b.* free: .*raise.*\bscratchpad.bytes", error), error


@settings(max_examples=12, deadline=None)
@given(
    st.integers(1, 600), st.integers(1, 300), st.integers(1, 300), st.sampled_from([4, 8]), st.sampled_from([0, 32]),
    st.integers(4000, 200_000),
)  # fmt: skip
def test_no_ranked_candidate_is_cheaper(m: int, n: int, k: int, bits: int, group: int, limit: int) -> None:
    spec, target = linear(m, n, k, bits, group), small_target(16, 16)
    spaces = (D,) * 5
    try:
        tile = choose_linear(spec, spaces, target, Room(limit, limit))
    except AllocationError:
        for other in tiling.linear_tiles(spec, target, (1,)):
            assert linear_bytes(spec, spaces, other, target)[0] > limit
        return
    assert linear_bytes(spec, spaces, tile, target)[0] <= limit
    rows = tiling.ROWS if tile.m == m or tile.m >= 16 else tiling.FEW_ROWS

    def cost(tile: Tile) -> int:
        room = limit // linear_bytes(spec, spaces, tile, target)[0]
        return round(linear_cost(spec, spaces, tile, target, launches=room))

    for plain in tiling.linear_tiles(spec, target, rows):
        for other in tiling.variants(Shape.of(spec), plain, True, target):
            nbytes, acc = linear_bytes(spec, spaces, other, target)
            if nbytes <= limit and acc <= target.scratchpad.accumulator_bytes:
                assert cost(other) * (1 + tiling.SLACK) >= cost(tile), other


def test_preferred_room_is_left_only_for_a_tile_that_needs_it() -> None:
    spec, target = linear(64, 256, 256), small_target(16, 16)
    spaces = (D,) * 5
    tile = choose_linear(spec, spaces, target, Room(20_000, 1 << 20))
    assert linear_bytes(spec, spaces, tile, target)[0] <= 20_000
    tile = choose_linear(spec, spaces, target, Room(100, 1 << 20))
    assert linear_bytes(spec, spaces, tile, target)[0] > 100


def test_products_that_fit_nowhere_say_what_is_missing() -> None:
    spec, target = linear(64, 256, 256), replace(small_target(16, 16), name="little")
    with pytest.raises(
        AllocationError,
        match=r"target little: the smallest tile of a product of \(64, 256\) by 256 columns needs \d+ bytes of "
        r"scratchpad and \d+ of accumulators; 200 and 1048576 are free: raise scratchpad.bytes or scratchpad.acc",
    ):
        choose_linear(spec, (D,) * 5, with_scratchpad(target, accumulator_bytes=1 << 20), Room(100, 200))
    poor = with_scratchpad(target, accumulator_bytes=64)
    with pytest.raises(AllocationError, match=r"of accumulators; 100000 and 64 are free"):
        choose_linear(spec, (D,) * 5, poor, Room(100_000, 100_000))


def test_rows_that_crowd_the_scratchpad_are_staged_one_at_a_time() -> None:
    spec, spaces = rowwise("rms_norm", 4, 4000, Dtype.F16), (D, D, D)
    small, large = (with_scratchpad(small_target(), bytes=nbytes) for nbytes in (1 << 16, 1 << 18))
    needs = [tiling.row_bytes(spec, spaces, 1, target) for target in (small, large)]
    assert [tiling.row_slots(spec, spaces, target) for target in (small, large)] == [1, 3]
    assert needs[1] - needs[0] == 2 * 2 * 4000 * 2
    template = build(spec, spaces, small, Room(needs[0], needs[0]))
    assert template.scratch_bytes <= needs[0]
    x, gamma = (np.random.default_rng(1).standard_normal(arg.shape).astype(np.float16) for arg in spec.args)
    (got,) = Bench(spec, spaces, small, (*spec.args, *spec.outs)).run(template, [x, gamma])
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + 1e-5) * gamma.astype(np.float64)
    np.testing.assert_allclose(got.astype(np.float64), expected, rtol=2e-3, atol=1e-3)


def test_keys_in_dram_are_read_for_as_many_rows_as_fit() -> None:
    """A long prompt's tiles of rows all read the keys; those that lie on chip are read for nothing."""
    target, room = Target.load("tpu-v3"), Room(1 << 23, 1 << 24)
    spec = attention(512, 0, 2, 64)
    spec = replace(spec, params=tuple((name, value * (name != "causal")) for name, value in spec.params))
    assert choose_attention(spec, (D, D, D, D), target, room).rows == 512
    assert choose_attention(spec, (D, S, S, D), target, room).rows <= 128


def test_a_causal_tile_is_ranked_by_the_keys_that_it_sees() -> None:
    target = with_scratchpad(small_target(), bytes=1 << 25, accumulator_bytes=1 << 23)
    spec = attention(1024, 0, 1, 64)
    free = replace(spec, params=tuple((name, value * (name != "causal")) for name, value in spec.params))
    tile = AttentionTile(256, 256)
    share = attention_cost(spec, (D, D, D, D), tile, target) / attention_cost(free, (D, D, D, D), tile, target)
    assert share == pytest.approx((1 + 2 + 3 + 4) / 4 / 4)


def test_few_requests_in_flight_make_a_tile_of_more_rows_worth_it() -> None:
    """Each tile of rows reads all keys again: where requests in flight limit a stream, that is what decides."""
    plain = Target.load("snapdragon-x-elite")
    spec = attention(128, 384, 1, 64)
    few, many = (replace(plain, dma=replace(plain.dma, outstanding=count)) for count in (2, 4096))
    tiles = [AttentionTile(rows, 64) for rows in (16, 128)]
    costs = [[attention_cost(spec, (D, D, D, D), tile, target) for tile in tiles] for target in (few, many)]
    assert in_flight(few) == pytest.approx(in_flight(many) * 2 / 4096)
    assert costs[0][0] / costs[0][1] > 1.5 * costs[1][0] / costs[1][1]


def test_attention_and_rows_that_fit_nowhere_say_what_is_missing() -> None:
    target = replace(small_target(), name="little")
    with pytest.raises(
        AllocationError,
        match=r"target little: one row of attention over 5000 keys needs \d+ bytes of scratchpad and \d+ of "
        r"accumulators; 1000 and \d+ are free: shorten the prompt, or raise",
    ):
        choose_attention(attention(1, 4999, 1, 8), (D, D, D, D), target, Room(500, 1000))
    with pytest.raises(AllocationError, match=r"one row of swiglu needs \d+ bytes of scratchpad, 3000 are free: raise"):
        choose_rows(rowwise("swiglu", 4, 4000, Dtype.I8), (D, D, D, D), target, Room(1000, 3000))


def test_attention_takes_all_rows_and_keys_when_there_is_room() -> None:
    spec = attention(40, 24, 2, 8)
    assert choose_attention(spec, (D,) * 4, small_target(), Room(1 << 20, 1 << 20)) == AttentionTile(40, 64)
    less = choose_attention(spec, (D,) * 4, small_target(), Room(12_000, 12_000))
    assert less.rows < 40


def test_what_swiglu_keeps_on_chip_counts() -> None:
    spec, target = rowwise("swiglu", 80, 67, Dtype.I8), small_target()
    template = build(spec, (S,) * 4, target, Room(7744, 7744))
    assert template.scratch_bytes <= 7744
