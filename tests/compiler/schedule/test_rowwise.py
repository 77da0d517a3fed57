"""Row-wise kernels: every kind, type of result, place of operands and block of rows, against numpy."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_bench import Bench
from rowwise_case import F16, F32, I8, I16, I64, QMAX, TARGET, Case, D, S, random_half, results_of, spec_of

from firsttoken_compiler.isa.types import Dtype, Space
from firsttoken_compiler.schedule import rowwise
from firsttoken_compiler.schedule.spec import Arg


def rms_norm(r: np.random.Generator, rows: int, width: int, out: Dtype) -> Case:
    spec = spec_of("rms_norm", (Arg((rows, width), F16), Arg((width,), F16)), *results_of(rows, width, out), eps=1e-5)

    def reference(x: np.ndarray, gamma: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean(axis=1, keepdims=True) + 1e-5) * gamma

    return Case(spec, reference, (random_half(r, rows, width), random_half(r, width)))


def swiglu(r: np.random.Generator, rows: int, width: int, out: Dtype) -> Case:
    matrix = Arg((rows, width), F16)
    spec = spec_of("swiglu", (matrix, matrix), *results_of(rows, width, out))
    return Case(spec, lambda g, u: g / (1 + np.exp(-g)) * u, (random_half(r, rows, width), random_half(r, rows, width)))


def quantise(r: np.random.Generator, rows: int, width: int, out: Dtype) -> Case:
    wide = bool(r.integers(2))
    results = results_of(rows, width, out if out in QMAX else I8)
    spec = spec_of("quantise", (Arg((rows, width), F32 if wide else F16),), *results)
    x = r.standard_normal((rows, width)).astype(np.float32 if wide else np.float16)
    x[r.integers(rows)] = 0
    return Case(spec, lambda x: x, (x,))


def add(r: np.random.Generator, rows: int, width: int, out: Dtype) -> Case:
    out = F32 if out in QMAX else out
    spec = spec_of("add", (Arg((rows, width), F16), Arg((rows, width), F16)), Arg((rows, width), out))
    return Case(spec, np.add, (random_half(r, rows, width), random_half(r, rows, width)))


def rope(r: np.random.Generator, rows: int, width: int, out: Dtype) -> Case:
    heads = int(r.integers(1, 4))
    half = -(-width // 2)
    table = half * int(r.integers(1, 3))  # tables of half a head, or of a whole one
    args = (Arg((rows, heads * 2 * half), F16), Arg((rows, table), F32), Arg((rows, table), F32))
    spec = spec_of("rope", args, Arg(args[0].shape, F32 if out is F32 else F16), heads=heads)

    def reference(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
        a, b = np.split(x.reshape(rows, heads, 2 * half), 2, axis=-1)
        low, high = (slice(None, half), slice(-half, None))
        cos, sin = cos[:, None], sin[:, None]
        turned = [a * cos[..., low] - b * sin[..., low], b * cos[..., high] + a * sin[..., high]]
        return np.concatenate(turned, axis=-1).reshape(rows, -1)

    angle = r.uniform(0, 7, (rows, table)).astype(np.float32)
    return Case(spec, reference, (random_half(r, rows, 2 * half * heads), np.cos(angle), np.sin(angle)))


def gather(r: np.random.Generator, rows: int, width: int, out: Dtype) -> Case:
    table, dtype = 7, F32 if out is F32 else F16
    spec = spec_of("gather", (Arg((table, width), dtype), Arg((rows,), I64)), Arg((rows, width), dtype))
    values = r.standard_normal((table, width)).astype(dtype.numpy)
    return Case(spec, lambda t, i: t[i.astype(int)], (values, r.integers(0, table, rows)))


def row(r: np.random.Generator, rows: int, width: int, out: Dtype) -> Case:
    index = int(r.integers(rows))
    spec = spec_of("row", (Arg((rows, width), F16),), Arg((1, width), F16), index=index)
    return Case(spec, lambda x: x[index : index + 1], (random_half(r, rows, width),))


def columns(r: np.random.Generator, rows: int, width: int, out: Dtype) -> Case:
    before, behind, dtype = int(r.integers(0, 9)), int(r.integers(0, 9)), F32 if out is F32 else F16
    source = Arg((rows, before + width + behind), dtype)
    spec = spec_of("columns", (source,), Arg((rows, width), dtype), first=before, width=width)
    x = r.standard_normal(source.shape).astype(dtype.numpy)
    return Case(spec, lambda x: x[:, before : before + width], (x,))


def kv_append(r: np.random.Generator, rows: int, width: int, out: Dtype) -> Case:
    heads, past = int(r.integers(1, 4)), int(r.integers(0, 6))
    cache = Arg((heads, past + rows, width), F16)
    args = (Arg((rows, heads * width), F16), *([cache] if past else []))
    spec = spec_of("kv_append", args, cache, kv_heads=heads, past=past)

    def reference(x: np.ndarray, before: np.ndarray) -> np.ndarray:
        after = before.copy()
        after[:, past:] = x.reshape(rows, heads, width).transpose(1, 0, 2)
        return after

    return Case(spec, reference, (random_half(r, rows, heads * width), random_half(r, *cache.shape)))


MAKERS = (rms_norm, swiglu, quantise, add, rope, gather, row, columns, kv_append)
IN_DRAM = {"gather": (0,)}
"""Operands that the machine can only read from DRAM."""


def spaces_of(case: Case, on_chip: tuple[bool, ...]) -> tuple[Space, ...]:
    fixed = IN_DRAM.get(case.spec.kind, ())
    return tuple(S if on and i not in fixed else D for i, on in enumerate(on_chip))


@settings(max_examples=120, deadline=None, print_blob=True)
@given(st.data())
def test_equals_numpy(data: st.DataObject) -> None:
    make = data.draw(st.sampled_from(MAKERS))
    r = np.random.default_rng(data.draw(st.integers(0, 99)))
    rows = data.draw(st.integers(1, 12))
    width = data.draw(st.one_of(st.integers(1, 20), st.sampled_from([31, 67, 128])))
    case = make(r, rows, width, data.draw(st.sampled_from([F16, F32, I8, I16])))
    count = len(case.operands)
    on_chip = data.draw(st.tuples(*[st.booleans()] * count))
    case.check(spaces_of(case, on_chip), data.draw(st.integers(1, rowwise.rows_of(case.spec))))


QUANTISED = [(make, out) for make in (rms_norm, swiglu, quantise) for out in (I8, I16)]


@pytest.mark.parametrize(("make", "out"), [(m, F16) for m in MAKERS if m is not quantise] + QUANTISED)
def test_every_combination_of_spaces_and_whole_or_ragged_blocks(make: Callable[..., Case], out: Dtype) -> None:
    case = make(np.random.default_rng(3), 5, 40, out)
    assert case.spec.outs[0].dtype is out
    total = rowwise.rows_of(case.spec)
    for on_chip in product((False, True), repeat=len(case.operands)):
        for rows in sorted({total, min(2, total)}):
            case.check(spaces_of(case, on_chip), rows)


def test_a_row_of_zeros_quantises_to_zeros() -> None:
    spec = spec_of("quantise", (Arg((2, 5), F16),), *results_of(2, 5, I8))
    case = Case(spec, lambda x: x, (np.zeros((2, 5), np.float16),))
    got = Bench(spec, (D, D, D), TARGET, case.operands, results=2).run(case.template((D, D, D), 1), list(case.arrays))
    assert (got[0] == 0).all()
    assert (got[1] > 0).all()
