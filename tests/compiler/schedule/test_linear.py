"""Products: the unrolled template against numpy, int32 accumulators bit for bit, results to fp32 rounding."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_bench import Bench, small_target

from firsttoken_compiler.codegen.template import Template
from firsttoken_compiler.codegen.tir_reader import read
from firsttoken_compiler.codegen.unroll import Place, unroll
from firsttoken_compiler.codegen.weights import quantise
from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.instruction import Instruction, strided
from firsttoken_compiler.isa.matmul import Matmul
from firsttoken_compiler.isa.types import Dtype, Operand, Space
from firsttoken_compiler.isa.vector import Vector
from firsttoken_compiler.schedule import linear
from firsttoken_compiler.schedule.linear import Shape, Tile
from firsttoken_compiler.schedule.spec import Arg, KernelSpec
from firsttoken_compiler.target.target import Target
from firsttoken_simulator.functional import FunctionalMachine

D, S = Space.DRAM, Space.SPAD
ACTS = {"int8": Dtype.I8, "int16": Dtype.I16, "fp16": Dtype.F16}
WEIGHTS = {4: Dtype.I4, 8: Dtype.I8, 16: Dtype.F16}


@dataclass(frozen=True)
class Case:
    """A product and how it is cut and placed."""

    m: int
    n: int
    k: int
    acts: str
    bits: int
    group: int
    tile: Tile
    unit: tuple[int, int] = (8, 8)
    """Rows and columns of the array."""
    bias: bool = False
    residual: bool = False
    silu: bool = False
    factor: bool = False
    act: str = ""
    """A function of the result, as a microprogram."""
    out: Dtype = Dtype.F32
    on_chip: frozenset[str] = frozenset()
    seed: int = 0

    @property
    def target(self) -> Target:
        return small_target(*self.unit)

    @property
    def spec(self) -> KernelSpec:
        args = [Arg((self.m, self.k), ACTS[self.acts]), Arg((self.k, self.n), WEIGHTS[self.bits])]
        if self.acts != "fp16":
            args.append(Arg((self.m, 1), Dtype.F32))
        if self.group:
            args.append(Arg((-(-self.k // self.group), self.n), Dtype.F16))
        args += [Arg((self.n,), Dtype.F16)] * self.bias + [Arg((self.m, self.n), Dtype.F16)] * self.residual
        args += [Arg((self.m, self.n), Dtype.F16)] * self.factor
        params = (
            ("acts", self.acts), ("bias", int(self.bias)), ("bits", self.bits), ("factor", int(self.factor)),
            ("group", self.group), ("k", self.k), ("n", self.n), ("out", self.out.text),
            ("residual", int(self.residual)), ("silu", int(self.silu)),
            *((("act", self.act),) if self.act else ()),
        )  # fmt: skip
        return KernelSpec("linear", params, tuple(args), (Arg((self.m, self.n), self.out),))

    @property
    def names(self) -> list[str]:
        return linear.operand_names(self.spec)

    @property
    def spaces(self) -> tuple[Space, ...]:
        return tuple(S if name in self.on_chip else D for name in self.names)

    def template(self) -> Template:
        scheduled = linear.schedule(self.spec, self.spaces, self.tile, self.target)
        body, _ = read(scheduled.lowered())
        places = [Place(space, layout) for space, layout in zip(self.spaces, scheduled.layouts, strict=True)]
        return unroll(body, places, scheduled.ragged, self.target.scratchpad.alignment_bytes, scheduled.tile)

    def run(self, arrays: dict[str, np.ndarray], execute=None) -> np.ndarray:
        names = self.names
        panels = tuple(names.index(name) for name in ("w", "w_scale", "bias") if name in names)
        bench = Bench(self.spec, self.spaces, self.target, (*self.spec.args, *self.spec.outs), panels)
        return bench.run(self.template(), [arrays[name] for name in names[:-1]], execute)[0]

    def arrays(self) -> dict[str, np.ndarray]:
        """Random operands; weights and their scales as the compiler quantises them."""
        r = np.random.default_rng(self.seed)
        made: dict[str, np.ndarray] = {}
        if self.acts == "fp16":
            made["a"] = r.standard_normal((self.m, self.k)).astype(np.float16)
        else:
            limits = np.iinfo(ACTS[self.acts].numpy)
            made["a"] = r.integers(limits.min, limits.max, (self.m, self.k), endpoint=True)
        if self.bits == 16:
            made["w"] = r.standard_normal((self.k, self.n)).astype(np.float16)
        else:
            weights = r.standard_normal((self.k, self.n)).astype(np.float32)
            made["w"], made["w_scale"] = quantise(weights, self.bits, self.group)
        made["a_scale"] = r.uniform(1e-3, 2e-3, (self.m, 1)).astype(np.float32)
        made["bias"] = r.standard_normal(self.n).astype(np.float16)
        for name in ("residual", "factor"):
            made[name] = r.standard_normal((self.m, self.n)).astype(np.float16)
        return made


@st.composite
def cases(draw: st.DrawFn, *, integer: bool = False, plain: bool = False) -> Case:
    """Any product: extents that divide by nothing, tiles smaller and larger than them, operands anywhere."""
    m, n, k = draw(st.integers(1, 13)), draw(st.integers(1, 37)), draw(st.integers(1, 41))
    kinds = [("int8", 8), ("int8", 4), ("int16", 4)] + ([] if integer else [("fp16", 16), ("int16", 8)])
    acts, bits = draw(st.sampled_from(kinds))
    group = 0 if bits == 16 else draw(st.sampled_from([k, min(k, 4), min(k, 7), min(k, 16)]))
    unit = group if 0 < group < k else 1
    tile = Tile(
        draw(st.one_of(st.just(m), st.integers(1, m))), draw(st.integers(1, 4)),
        draw(st.one_of(st.just(-(-k // unit)), st.integers(1, -(-k // unit)))) * unit,
        rows_outer=draw(st.booleans()), buffers=draw(st.integers(1, 3)),
    )  # fmt: skip
    names = ["a", "out", "a_scale", "residual", "w_scale", "bias", "factor"]
    return Case(
        m, n, k, acts, bits, group, tile, (draw(st.sampled_from([4, 8, 5])), draw(st.sampled_from([8, 4, 6, 7]))),
        bias=not plain and draw(st.booleans()), residual=not plain and draw(st.booleans()),
        silu=not plain and draw(st.booleans()), factor=not plain and draw(st.booleans()),
        out=Dtype.F32 if plain else draw(st.sampled_from([Dtype.F16, Dtype.F32])),
        on_chip=draw(st.frozensets(st.sampled_from(names))), seed=draw(st.integers(0, 99)),
    )  # fmt: skip


def tap(machine: FunctionalMachine, instruction: Instruction) -> None:
    """Executes, but keeps the integers: sums go from accumulator to result as int32, times their group's scale."""
    if not isinstance(instruction, Vector):
        instruction.execute(machine)
        return
    sources = [operand for operand in instruction.operands[1:] if operand is not None]
    dst = instruction.operand(0)
    assert dst.dtype is Dtype.F32

    def view(operand: Operand, dtype: Dtype) -> np.ndarray:
        strides = (operand.s0, operand.s1, operand.s2)
        return strided(machine.bytes(operand.space, 0), dtype, operand.address, instruction.dims, strides)

    out = view(dst, Dtype.I32)
    sums = [operand for operand in sources if operand.space is Space.ACC]
    if not sums:  # the scaled groups, complete
        out[...] = view(sources[0], Dtype.I32)
        return
    value = view(sums[0], Dtype.I32).astype(np.int64)
    for scale in (operand for operand in sources if operand.dtype is Dtype.F16):
        value = value * view(scale, Dtype.F16).astype(np.int64)
    if any((operand.space, operand.address) == (dst.space, dst.address) for operand in sources):
        value = value + view(dst, Dtype.I32)
    out[...] = value.astype(np.int32)


@settings(max_examples=40, deadline=None, print_blob=True)
@given(cases(integer=True, plain=True))
def test_accumulators_equal_numpy_exactly(case: Case) -> None:
    arrays = case.arrays()
    r = np.random.default_rng(case.seed)
    arrays["a_scale"] = np.ones((case.m, 1), np.float32)
    arrays["w_scale"] = r.integers(-3, 4, (-(-case.k // case.group), case.n)).astype(np.float16)
    a, w = arrays["a"].astype(np.int64), arrays["w"].astype(np.int64)
    scales = np.repeat(arrays["w_scale"].astype(np.int64), case.group, axis=0)[: case.k]
    expected = (a @ (w * scales)).astype(np.int32)
    got = case.run(arrays, tap).view(np.int32)
    np.testing.assert_array_equal(got, expected)


@settings(max_examples=50, deadline=None, print_blob=True)
@given(cases())
def test_results_equal_numpy_to_rounding(case: Case) -> None:
    arrays = case.arrays()
    a, w = arrays["a"].astype(np.float64), arrays["w"].astype(np.float64)
    if case.group:
        w = w * np.repeat(arrays["w_scale"].astype(np.float64), case.group, axis=0)[: case.k]
    scale = arrays["a_scale"].astype(np.float64) if case.acts != "fp16" else 1.0
    expected = (a @ w) * scale
    size = (np.abs(a) @ np.abs(w)) * scale + 1.0
    for name in ("bias", "residual"):
        if getattr(case, name):
            expected = expected + arrays[name].astype(np.float64)
            size = size + np.abs(arrays[name].astype(np.float64))
    if case.silu:  # its slope stays below 1.1
        expected, size = expected / (1 + np.exp(-expected)), 1.1 * size + np.abs(expected)
    if case.factor:
        factor = arrays["factor"].astype(np.float64)
        expected, size = expected * factor, size * np.abs(factor)
    got = case.run(arrays).astype(np.float64)
    eps = 2.0**-11 * np.abs(expected) + 2.0**-24 if case.out is Dtype.F16 else 0.0
    # Every sum, product and conversion rounds once to fp32: groups + 6 of them on the way.
    bound = (case.k + 12) * 2.0**-24 * size + eps
    assert (np.abs(got - expected) <= bound).all()


GELU = "mul(mul(s0, 0.5), add(1.0, erf(mul(s0, 0.7071067811865475))))"
FUNCTIONS = {
    GELU: lambda x: x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "max(s0, 0.0)": lambda x: np.maximum(x, 0),
    "select(lt(s0, 0.0), mul(s0, 0.1), min(s0, 6.0))": lambda x: np.where(x < 0, 0.1 * x, np.minimum(x, 6)),
}


@pytest.mark.parametrize("act", FUNCTIONS)
@pytest.mark.parametrize(("acts", "bits", "group"), [("int8", 8, 22), ("int8", 4, 8), ("fp16", 16, 0)])
def test_a_function_of_the_result(act: str, acts: str, bits: int, group: int) -> None:
    """Behind scales, bias and residual, before the factor."""
    case = Case(5, 19, 22, acts, bits, group, Tile(2, 2, group or 11), (4, 8), True, True, factor=True, act=act)
    arrays = case.arrays()
    w = arrays["w"].astype(np.float64)
    if group:
        w = w * np.repeat(arrays["w_scale"].astype(np.float64), group, axis=0)[:22]
    sums = (arrays["a"].astype(np.float64) @ w) * (arrays["a_scale"] if group else 1.0)
    expected = FUNCTIONS[act](sums + arrays["bias"] + arrays["residual"]) * arrays["factor"]
    np.testing.assert_allclose(case.run(arrays), expected, rtol=1e-4, atol=1e-4)


MOVABLE = ("a", "out", "a_scale", "residual", "bias")
PLACES = [frozenset(name for bit, name in enumerate(MOVABLE) if i >> bit & 1) for i in range(32)]


@pytest.mark.parametrize("on_chip", PLACES, ids=lambda places: "+".join(sorted(places)) or "none")
def test_every_combination_of_operand_spaces(on_chip: frozenset[str]) -> None:
    """int8 x int4 in groups, tiled along m, n and k, last panel narrow, last group short."""
    case = Case(5, 19, 22, "int8", 4, 8, Tile(2, 2, 8), (4, 8), True, True, on_chip=on_chip)
    arrays = case.arrays()
    w = arrays["w"] * np.repeat(arrays["w_scale"].astype(np.float64), 8, axis=0)[:22]
    expected = (arrays["a"] @ w) * arrays["a_scale"] + arrays["bias"].astype(np.float64) + arrays["residual"]
    np.testing.assert_allclose(case.run(arrays), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (7, 13, 31), (1, 127, 3), (13, 1, 29), (17, 23, 61)])
def test_primes_in_one_piece_and_in_the_smallest(m: int, n: int, k: int) -> None:
    for tile in (Tile(m, -(-n // 8), k), Tile(1, 1, 1)):
        case = Case(m, n, k, "int8", 8, k, tile, out=Dtype.F32)
        arrays = case.arrays()
        arrays["a_scale"][...] = 1
        arrays["w_scale"][...] = 1
        expected = arrays["a"] @ arrays["w"].astype(np.int64)
        assert np.abs(expected).max() < 1 << 24  # fp32 holds it
        np.testing.assert_array_equal(case.run(arrays), expected)


def test_every_multiplication_happens_once() -> None:
    case = Case(5, 19, 22, "int8", 4, 8, Tile(2, 2, 8), (4, 8))
    matmuls = [row for row in case.template().code if row[word.OPCODE] == Matmul.OPCODE]
    assert sum(int(np.prod(row[word.DIMS : word.DIMS + 3])) for row in matmuls) == 5 * 19 * 22


def test_shape_scales_in_groups_only_where_there_are_several() -> None:
    assert Shape.of(Case(2, 3, 8, "int8", 8, 8, Tile(2, 1, 8)).spec).group == 0
    assert Shape.of(Case(2, 3, 8, "int8", 8, 4, Tile(2, 1, 8)).spec).group == 4
