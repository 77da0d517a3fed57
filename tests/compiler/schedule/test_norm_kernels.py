"""Norms in two parts: the numbers of a row and the rows made from them are those of the norm in one piece, to the bit.

Integer rows of the norm in one piece equal the definition in numpy, to the bit.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_bench import Bench
from rowwise_case import F16, F32, I8, I16, QMAX, TARGET, Case, D, S, random_half, results_of, spec_of

from firsttoken_compiler.isa.types import Dtype, Space
from firsttoken_compiler.schedule.norm_definitions import statistics_of
from firsttoken_compiler.schedule.spec import NAMES, Arg, KernelSpec

Arrays = list[np.ndarray]


def run(spec: KernelSpec, arrays: Arrays, spaces: tuple[Space, ...], rows: int) -> Arrays:
    case = Case(spec, np.add, tuple(arrays))
    bench = Bench(spec, spaces, TARGET, case.operands, results=len(spec.outs))
    return list(bench.run(case.template(spaces, rows), arrays))


def kinds(norm: str, rows: int, width: int, wide: bool, beta: bool, out: Dtype) -> tuple[KernelSpec, ...]:
    """(the norm, its numbers per row, the rows from them)"""
    x, vector = Arg((rows, width), F32 if wide else F16), Arg((width,), F16)
    vectors = (vector, vector) if beta else (vector,)
    numbers = tuple(Arg((rows, 1), F32) for _ in statistics_of(norm, NAMES[out]))
    given = {"norm": norm, "out": NAMES[out]}
    return (
        spec_of(norm, (x, *vectors), *results_of(rows, width, out), eps=1e-5),
        spec_of("norm_stats", (x, *vectors), *numbers, **given, eps=1e-5),
        spec_of("normalise", (x, *numbers, *vectors), Arg((rows, width), out), **given),
    )


@settings(max_examples=60, deadline=None, print_blob=True)
@given(st.data())
def test_two_parts_equal_one_piece(data: st.DataObject) -> None:
    rows, width = data.draw(st.integers(1, 12)), data.draw(st.one_of(st.integers(1, 20), st.sampled_from([67, 128])))
    norm = data.draw(st.sampled_from(["rms_norm", "layer_norm"]))
    wide, beta = data.draw(st.booleans()), norm == "layer_norm" and data.draw(st.booleans())
    out = data.draw(st.sampled_from([F16, F32, I8, I16]))
    r = np.random.default_rng(data.draw(st.integers(0, 99)))
    x = (100 * random_half(r, rows, width)).astype(np.float32 if wide else np.float16)
    x[r.integers(rows)] = 0
    vectors = [random_half(r, width) for _ in range(1 + beta)]
    block = data.draw(st.integers(1, rows))
    whole, stats, apply = kinds(norm, rows, width, wide, beta, out)

    def space() -> Space:
        return data.draw(st.sampled_from([D, S]))

    expected = run(whole, [x, *vectors], tuple(space() for _ in (*whole.args, *whole.outs)), block)
    numbers = run(stats, [x, *vectors], tuple(space() for _ in (*stats.args, *stats.outs)), block)
    got = run(apply, [x, *numbers, *vectors], tuple(space() for _ in (*apply.args, *apply.outs)), rows)
    np.testing.assert_array_equal(got[0], expected[0])
    if out in QMAX:
        np.testing.assert_array_equal(numbers[-1], expected[1])


@pytest.mark.parametrize("out", [I8, I16])
@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm"])
def test_integer_rows_equal_the_definition(norm: str, out: Dtype) -> None:
    """fp32, in the order of the definition: only sums of rows may be added in another order, so these are given."""
    r, rows, width = np.random.default_rng(3), 9, 64
    x = r.integers(-8, 9, (rows, width)).astype(np.float32)  # sums and squares of integers are exact in any order
    gamma, beta = random_half(r, width), random_half(r, width)
    one = np.float32(1)
    if norm == "rms_norm":
        total = np.sum(x * x, axis=1, keepdims=True, dtype=np.float32)
        normed = x * (one / np.sqrt(total * np.float32(1 / width) + np.float32(1e-5))) * gamma.astype(np.float32)
    else:
        x -= x.sum(axis=1, keepdims=True) / width  # a mean of 0, so that differences are exact as well
        x = np.rint(x)
        x[:, 0] -= x.sum(axis=1)
        total = np.sum(x * x, axis=1, keepdims=True, dtype=np.float32)
        factor = one / np.sqrt(total * np.float32(1 / width) + np.float32(1e-5))
        normed = x * factor * gamma.astype(np.float32) + beta.astype(np.float32)
    scale = np.maximum(np.abs(normed).max(axis=1, keepdims=True), np.float32(1e-12)) * np.float32(1 / QMAX[out])
    spec = kinds(norm, rows, width, True, norm == "layer_norm", out)[0]
    vectors = [gamma] if norm == "rms_norm" else [gamma, beta]
    values, scales = run(spec, [x, *vectors], (S,) * (len(spec.args) + 2), rows)
    np.testing.assert_array_equal(scales, scale)
    np.testing.assert_array_equal(values, np.rint(normed * (one / scale)).astype(out.numpy))
