"""Integers with a static scale: kernels that make them, bit for bit against numpy."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from kernel_bench import Bench
from rowwise_case import F16, F32, I8, I16, TARGET, Case, D, S, random_half, spec_of

from firsttoken_compiler.codegen.build import build
from firsttoken_compiler.isa.types import Dtype
from firsttoken_compiler.schedule import linear
from firsttoken_compiler.schedule.spec import Arg
from firsttoken_compiler.schedule.tiling import Room

ONE = Arg((1, 1), F32)
INVERSE = np.array([[37.25]], np.float32)
LIMITS = {I8: (-128, 127), I16: (-32768, 32767)}


def integers(x: np.ndarray, inverse: np.ndarray, out: Dtype) -> np.ndarray:
    return np.clip(np.rint(x.astype(np.float32) * inverse), *LIMITS[out]).astype(out.numpy)


def norm_rows(x: np.ndarray, gamma: np.ndarray) -> np.ndarray:
    wide = x.astype(np.float32)
    square = np.add.reduce(wide * wide, axis=1, keepdims=True)
    factor = np.float32(1) / np.sqrt(square * np.float32(1 / x.shape[1]) + np.float32(1e-5))
    return wide * factor * gamma.astype(np.float32)


def swiglu_rows(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    wide = gate.astype(np.float32)
    return wide * (np.float32(1) / (np.float32(1) + np.exp(-wide))) * up.astype(np.float32)


CASES = {
    "rms_norm": (((9, 40), (40,)), norm_rows),
    "swiglu": (((9, 40), (9, 40)), swiglu_rows),
    "quantise": (((9, 40),), lambda x: x.astype(np.float32)),
}


@pytest.mark.parametrize("out", [I8, I16], ids=["int8", "int16"])
@pytest.mark.parametrize("kind", CASES)
def test_rows_are_numpys_in_every_place_and_block(kind: str, out: Dtype) -> None:
    shapes, reference = CASES[kind]
    r = np.random.default_rng(5)
    arrays = [random_half(r, *shape) for shape in shapes]
    args = (*(Arg(shape, F16) for shape in shapes), ONE)
    params = {"eps": 1e-5} if kind == "rms_norm" else {}
    spec = spec_of(kind, args, Arg(shapes[0], out), static=1, **params)
    case = Case(spec, reference, (*arrays, INVERSE))
    expected = integers(reference(*arrays), INVERSE, out)
    assert np.abs(expected).max() > 60
    for on_chip, rows in product(product((D, S), repeat=2), (9, 4)):
        spaces = (on_chip[0], *(D,) * len(shapes), on_chip[1])
        bench = Bench(spec, spaces, TARGET, case.operands)
        np.testing.assert_array_equal(bench.run(case.template(spaces, rows), list(case.arrays))[0], expected)


@pytest.mark.parametrize("one_scale", [False, True], ids=["per-token", "static"])
@pytest.mark.parametrize("out", [I8, I16], ids=["int8", "int16"])
def test_a_product_leaves_integers(out: Dtype, one_scale: bool) -> None:
    m, n, k = 11, 24, 40
    r = np.random.default_rng(6)
    a, w = r.integers(-127, 128, (m, k)).astype(np.int8), r.integers(-127, 128, (k, n)).astype(np.int8)
    scale = r.uniform(0.001, 0.01, (1 if one_scale else m, 1)).astype(np.float32)
    w_scale, factor = r.uniform(0.001, 0.01, (1, n)).astype(np.float16), random_half(r, m, n)
    args = (
        Arg((m, k), I8), Arg((k, n), I8), Arg(scale.shape, F32), Arg((1, n), F16), Arg((m, n), F16), ONE,
    )  # fmt: skip
    spec = spec_of(
        "linear", args, Arg((m, n), out), acts="int8", bias=0, bits=8, factor=1, group=k, k=k, n=n, narrow=1,
        out=out.text, residual=0, silu=1,
    )  # fmt: skip
    names = linear.operand_names(spec)
    assert names == ["a", "w", "a_scale", "w_scale", "factor", "inverse", "out"]
    template = build(spec, (D,) * 7, TARGET, Room(1 << 16, 1 << 17))
    bench = Bench(spec, (D,) * 7, TARGET, (*args, *spec.outs), (1, 3))
    got = bench.run(template, [a, w, scale, w_scale, factor, INVERSE])[0]
    value = (a.astype(np.int32) @ w.astype(np.int32)).astype(np.float32) * scale * w_scale.astype(np.float32)
    value = value * (np.float32(1) / (np.float32(1) + np.exp(-value))) * factor.astype(np.float32)
    np.testing.assert_array_equal(got, integers(value, INVERSE, out))
