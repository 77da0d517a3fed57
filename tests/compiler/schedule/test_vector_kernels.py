"""General vector operators: elementwise expressions over every kind of operand, folds, softmax, layer norm."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rowwise_case import F16, F32, I8, I16, Case, D, S, random_half, results_of, spec_of

from firsttoken_compiler.isa.types import Dtype, Space
from firsttoken_compiler.isa.vector_kernel import VectorKernel
from firsttoken_compiler.schedule import expressions, rowwise
from firsttoken_compiler.schedule.spec import Arg
from firsttoken_compiler.tvm.api import tirx

ERF = np.vectorize(math.erf, otypes=[np.float64])
FUNCTIONS: dict[str, Callable[..., np.ndarray]] = {
    "mul(mul(s0, 0.5), add(1.0, erf(mul(s0, 0.7071067811865475))))": lambda x: x / 2 * (1 + ERF(x / math.sqrt(2))),
    "mul(s0, sigmoid(mul(s0, 1.702)))": lambda x: x / (1 + np.exp(-1.702 * x)),
    "max(s0, mul(s0, 0.01))": lambda x: np.where(x > 0, x, 0.01 * x),
    "select(lt(s0, 0.0), sub(exp(s0), 1.0), s0)": lambda x: np.where(x < 0, np.exp(x) - 1, x),
    "add(max(s0, 0.0), log(add(1.0, exp(neg(abs(s0))))))": lambda x: np.log1p(np.exp(x)),
    "add(floor(s0), mul(10.0, ceil(s0)))": lambda x: np.floor(x) + 10 * np.ceil(x),
    "sub(round(s0), tanh(s0))": lambda x: np.rint(x) - np.tanh(x),
    "and(lt(s0, 0.5), le(-0.5, s0))": lambda x: ((x < 0.5) & (x >= -0.5)).astype(float),
    "select(s0, div(1.0, s0), 7.0)": lambda x: np.divide(1, x, out=np.full_like(x, 7), where=x != 0),
    "add(sqrt(abs(s0)), mul(sin(s0), cos(s0)))": lambda x: np.sqrt(np.abs(x)) + np.sin(x) * np.cos(x),
    "add(i32(s0), pow(abs(s0), 1.5))": lambda x: np.trunc(x) + np.abs(x) ** 1.5,
    "min(add(s0, s1), s1)": lambda x, y: np.minimum(x + y, y),
    "mul(add(s0, s1), rsqrt(add(mul(s2, s2), 1.0)))": lambda x, y, z: (x + y) / np.sqrt(z * z + 1),
    "select(or(eq(s0, s1), lt(s0, s2)), s2, mul(s1, 2.0))":
        lambda x, y, z: np.where((x == y) | (x < z), z, y * 2) + 0 * x,
}  # fmt: skip
"""Expressions over operands of variance 1, and what they mean."""


def elementwise(
    r: np.random.Generator, rows: int, width: int, out: Dtype, text: str = "", forms: tuple[str, ...] = ()
) -> Case:
    """The first operand is a matrix, the others are matrices, rows, columns or single numbers."""
    text = text or sorted(FUNCTIONS)[int(r.integers(len(FUNCTIONS)))]
    count = VectorKernel.parse(text).sources
    shapes = {"matrix": (rows, width), "row": (width,), "line": (1, width), "column": (rows, 1), "number": (1,)}
    forms = ("matrix", *(forms or tuple(r.choice(list(shapes), count - 1))))
    dtypes = [F32 if r.integers(2) else F16 for _ in range(count)]
    args = tuple(Arg(shapes[form], dtype) for form, dtype in zip(forms, dtypes, strict=True))
    out = F32 if out in (I8, I16) else out
    spec = spec_of("map", args, Arg((rows, width), out), expr=text, rows=rows, width=width)
    arrays = tuple(r.standard_normal(arg.shape).astype(arg.dtype.numpy) for arg in args)
    return Case(spec, FUNCTIONS[text], arrays)


def fold(r: np.random.Generator, rows: int, width: int, out: Dtype) -> Case:
    inner, depth = int(r.integers(1, 5)), width
    kind = ("sum", "max", "min", "mean", "squares")[int(r.integers(5))]
    scale = 1.0 / depth if kind == "mean" else 1.0
    spec = spec_of(
        "reduce", (Arg((rows, depth * inner), F16),), Arg((rows, inner), F16 if out is F16 else F32),
        fold=kind if kind in ("max", "min") else "sum", expr="mul(s0, s0)" if kind == "squares" else "s0", scale=scale,
    )  # fmt: skip

    def reference(x: np.ndarray) -> np.ndarray:
        cube = x.reshape(rows, depth, inner)
        named = {"sum": np.sum, "max": np.max, "min": np.min, "mean": np.mean}
        return (cube**2).sum(axis=1) if kind == "squares" else named[kind](cube, axis=1)

    return Case(spec, reference, (random_half(r, rows, depth * inner),))


def softmax(r: np.random.Generator, rows: int, width: int, out: Dtype) -> Case:
    log = int(r.integers(2))
    out = F16 if out is F16 else F32
    spec = spec_of("softmax", (Arg((rows, width), F16),), Arg((rows, width), out), log=log)

    def reference(x: np.ndarray) -> np.ndarray:
        weights = np.exp(x - x.max(axis=1, keepdims=True))
        total = weights.sum(axis=1, keepdims=True)
        return np.log(weights / total) if log else weights / total

    return Case(spec, reference, ((4 * random_half(r, rows, width)).astype(np.float16),))


def layer_norm(r: np.random.Generator, rows: int, width: int, out: Dtype) -> Case:
    beta = bool(r.integers(2))
    vectors = (Arg((width,), F16),) * (2 if beta else 1)
    spec = spec_of("layer_norm", (Arg((rows, width), F16), *vectors), *results_of(rows, width, out), eps=1e-3)

    def reference(x: np.ndarray, gamma: np.ndarray, beta: np.ndarray | float = 0.0) -> np.ndarray:
        return (x - x.mean(axis=1, keepdims=True)) / np.sqrt(x.var(axis=1, keepdims=True) + 1e-3) * gamma + beta

    arrays = [random_half(r, rows, width), *(random_half(r, width) for _ in vectors)]
    return Case(spec, reference, tuple(arrays))


MAKERS = (elementwise, fold, softmax, layer_norm)


def spaces_of(on_chip: tuple[bool, ...]) -> tuple[Space, ...]:
    return tuple(S if on else D for on in on_chip)


@settings(max_examples=100, deadline=None, print_blob=True)
@given(st.data())
def test_equals_numpy(data: st.DataObject) -> None:
    make = data.draw(st.sampled_from(MAKERS))
    r = np.random.default_rng(data.draw(st.integers(0, 999)))
    rows = data.draw(st.integers(1, 9))
    width = data.draw(st.one_of(st.integers(1, 20), st.sampled_from([31, 67])))
    case = make(r, rows, width, data.draw(st.sampled_from([F16, F32, I8, I16])))
    on_chip = data.draw(st.tuples(*[st.booleans()] * len(case.operands)))
    case.check(spaces_of(on_chip), data.draw(st.integers(1, rowwise.rows_of(case.spec))))


@pytest.mark.parametrize("text", sorted(FUNCTIONS))
def test_every_expression(text: str) -> None:
    case = elementwise(np.random.default_rng(5), 6, 40, F32, text)
    case.check((D,) * len(case.operands), 4)


@pytest.mark.parametrize("forms", list(product(["matrix", "row", "line", "column", "number"], repeat=2)))
def test_every_kind_of_operand(forms: tuple[str, str]) -> None:
    text = "mul(add(s0, s1), rsqrt(add(mul(s2, s2), 1.0)))"
    for rows in (1, 5):
        case = elementwise(np.random.default_rng(6), rows, 12, F16, text, forms)
        for on_chip in ((False,) * 4, (True,) * 4, (False, True, False, True)):
            case.check(spaces_of(on_chip), min(rows, 2))


@pytest.mark.parametrize("out", [F16, F32, I8, I16])
def test_a_layer_norm_keeps_far_means(out: Dtype) -> None:
    """The variance is that of the differences: values near 1000 lose none of it."""
    case = layer_norm(np.random.default_rng(0), 4, 32, out)
    case.arrays[0][:] = (1000 + 4 * np.rint(8 * case.arrays[0].astype(np.float32))).astype(np.float16)
    case.check((D,) * len(case.operands), 4)


def test_the_cost_is_that_of_the_expression() -> None:
    """One instruction runs the whole expression, so its microprogram holds as many operations as the text."""
    text = "mul(mul(s0, 0.5), add(1.0, erf(mul(s0, 0.7071067811865475))))"
    case = elementwise(np.random.default_rng(5), 4, 32, F32, text)
    template = case.template((S, S), 4)
    assert [sum(kernel.cost) for kernel in template.kernels] == [sum(VectorKernel.parse(text).cost)]
    assert len(template.code) == 1


@pytest.mark.parametrize(("text", "reason"), [("i0", "names i0"), ("add(s0, s1)", "names s1"), ("f16(s0)", "f16")])
def test_an_expression_that_no_operator_can_have_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        expressions.apply(text, [tirx.Var("x", "float32")])


@pytest.mark.parametrize("on_chip", [(False, False, False), (True, True, True)])
def test_truth_values_and_integers_in_memory(on_chip: tuple[bool, ...]) -> None:
    """A byte each, 1 or 0; what is stored as one is whether the number is not 0, NaN included."""
    r = np.random.default_rng(0)
    args = (Arg((5, 12), Dtype.BOOL), Arg((5, 1), Dtype.I64))
    spec = spec_of("map", args, Arg((5, 12), Dtype.BOOL), expr="select(s0, mul(s1, 0.5), s0)", rows=5, width=12)
    arrays = (r.random((5, 12)) < 0.5, r.integers(-1, 2, (5, 1)))
    Case(spec, lambda flags, numbers: flags * numbers != 0, arrays).check(spaces_of(on_chip), 2)
    narrow = spec_of("map", (Arg((1, 3), F32),), Arg((1, 3), Dtype.BOOL), expr="s0", rows=1, width=3)
    numbers = np.array([[0.0, 0.25, np.nan]], np.float32)
    Case(narrow, lambda x: x != 0, (numbers,)).check((D, D), 1)
