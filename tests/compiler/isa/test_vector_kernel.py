"""Microprograms of the vector unit: text form, limits, cost, and the meaning of every operation against numpy."""

import contextlib
import math
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firsttoken_compiler.isa.vector_kernel import (
    COST_CLASSES,
    MAX_DEPTH,
    MAX_SOURCES,
    OPERATIONS,
    REDUCTIONS,
    Expr,
    VectorKernel,
)

LEAF = st.one_of(
    st.sampled_from([f"s{i}" for i in range(MAX_SOURCES)] + ["i0", "i1", "i2"]),
    st.floats(allow_nan=False),
)


def calls(inner: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    return st.sampled_from(sorted(OPERATIONS)).flatmap(
        lambda name: st.tuples(st.just(name), *[inner] * OPERATIONS[name][0])
    )


EXPR = st.recursive(LEAF, calls, max_leaves=12)


@settings(max_examples=200, deadline=None)
@given(EXPR, st.sampled_from([None, *REDUCTIONS]))
def test_text_gives_the_kernel_back(expr: Expr, reduction: str | None) -> None:
    kernel = VectorKernel(expr, reduction)
    assert VectorKernel.parse(str(kernel)) == kernel
    assert VectorKernel.parse(re.sub(r"\s", "", str(kernel))) == kernel
    assert str(VectorKernel.parse(str(kernel))) == str(kernel)


def test_text_form_is_the_documented_one() -> None:
    kernel = VectorKernel(("mul", "s0", ("rsqrt", ("add", "s1", 1e-6))))
    assert str(kernel) == "mul(s0, rsqrt(add(s1, 1e-06)))"
    assert str(VectorKernel(("mul", "s0", "s0"), "add")) == "add<- mul(s0, s0)"
    assert VectorKernel.parse(" max<-  abs( s0 ) ") == VectorKernel(("abs", "s0"), "max")
    assert math.isnan(float(VectorKernel.parse("nan").expr))  # type: ignore[arg-type]
    assert VectorKernel.parse("-inf").expr == -math.inf


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "ends early"),
        ("add(s0, s1", "expected ',' or '\\)'"),
        ("add(s0 s1)", "expected ',' or '\\)'"),
        ("add(s0,)", "unexpected '\\)'"),
        ("add()", "unexpected '\\)'"),
        ("(s0)", "unexpected '\\('"),
        ("add(s0, s1))", "text after the end"),
        ("s0 s1", "text after the end"),
        ("add(s0)", "add takes 2 arguments, not 1"),
        ("abs(s0, s1)", "abs takes 1 arguments, not 2"),
        ("sum(s0, s1)", "unknown vector operation 'sum'"),
        ("s6", "unknown stream 's6'; sources are s0 to s5, indices i0 to i2"),
        ("i3", "unknown stream 'i3'"),
        ("s10", "could not convert|unknown stream"),
        ("x", "could not convert"),
        ("s0; s1", "not a vector kernel"),
        ("<- s0", "unknown reduction ''; known: add, max, min"),
        ("mul<- s0", "unknown reduction 'mul'"),
        ("add<- max<- s0", "not a vector kernel"),
        ("add(" * 3000 + "s0", f"nests deeper than {MAX_DEPTH}"),
    ],
)
def test_malformed_text_says_what_was_expected(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VectorKernel.parse(text)


@settings(max_examples=300, deadline=None)
@given(
    st.text(max_size=30)
    | st.lists(st.sampled_from(["add", "abs", "(", ")", ",", "s0", "i1", "1.5", "<-"])).map("".join)
)
def test_any_text_parses_or_is_a_value_error(text: str) -> None:
    with contextlib.suppress(ValueError):
        VectorKernel.parse(text)


def nested(depth: int) -> Expr:
    expr: Expr = "s0"
    for _ in range(depth):
        expr = ("abs", expr)
    return expr


def test_depth_has_a_limit() -> None:
    assert VectorKernel.parse(str(VectorKernel(nested(MAX_DEPTH)))) == VectorKernel(nested(MAX_DEPTH))
    with pytest.raises(ValueError, match=f"deeper than {MAX_DEPTH}"):
        VectorKernel(nested(MAX_DEPTH + 1))


@pytest.mark.parametrize("expr", [None, ["s0"], ("add", "s0", None), ((), "s0"), (), b"s0"])
def test_what_is_no_expression_is_refused(expr: Any) -> None:
    with pytest.raises(ValueError, match=r"no stream|unknown vector operation"):
        VectorKernel(expr)


@pytest.mark.parametrize(
    ("text", "sources"),
    [("1.0", 0), ("i2", 0), ("s0", 1), ("add(s1, s0)", 2), ("abs(s5)", 6), ("add<- mul(s0, s0)", 1)],
)
def test_sources_run_up_to_the_highest_stream(text: str, sources: int) -> None:
    assert VectorKernel.parse(text).sources == sources


@pytest.mark.parametrize(
    ("text", "cost"),
    [
        ("s0", {"add": 1}),
        ("1.0", {"add": 1}),
        ("add<- s0", {"reduce": 1}),
        ("add<- mul(s0, s0)", {"mul": 1, "reduce": 1}),
        ("mul(s0, rsqrt(add(s1, 1e-06)))", {"mul": 1, "rsqrt": 1, "add": 1}),
        ("div(exp(s0), s1)", {"div": 1, "exp": 1}),
        ("round(f16(s0))", {"convert": 2}),
    ],
)
def test_cost_counts_operations_by_class(text: str, cost: dict[str, int]) -> None:
    assert dict(zip(COST_CLASSES, VectorKernel.parse(text).cost, strict=True)) == {
        **dict.fromkeys(COST_CLASSES, 0),
        **cost,
    }


@settings(max_examples=80, deadline=None)
@given(EXPR)
def test_cost_is_one_per_operation(expr: Expr) -> None:
    count = str(expr).count("(") if isinstance(expr, tuple) else 1
    assert sum(VectorKernel(expr).cost) == count


X = np.array([-3.5, -1.5, -0.5, 0.0, 0.25, 1.0, 2.5, 70000.0], np.float32).reshape(1, 2, 4)
Y = np.array([2.0, -1.5, 0.5, 0.0, 4.0, 1.0, 3.0, 2.0], np.float32).reshape(1, 2, 4)
F = np.float32
MEANING: dict[str, Any] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "div": lambda x, y: x / y,
    "max": lambda x, y: np.where(x > y, x, y),
    "min": lambda x, y: np.where(x < y, x, y),
    "abs": lambda x: np.where(x < 0, -x, x),
    "neg": lambda x: -x,
    "round": lambda x: [[[-4, -2, 0, 0, 0, 1, 2, 70000]]],  # half to even
    "floor": lambda x: [[[-4, -2, -1, 0, 0, 1, 2, 70000]]],
    "ceil": lambda x: [[[-3, -1, 0, 0, 1, 1, 3, 70000]]],
    "i32": lambda x: [[[-3, -1, 0, 0, 0, 1, 2, 70000]]],
    "exp": np.exp,
    "log": np.log,
    "tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x.astype(np.float64))),
    "sin": np.sin,
    "cos": np.cos,
    "erf": lambda x: [math.erf(value) for value in x.ravel().astype(float)],
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x.astype(np.float64)),
    "pow": lambda x, y: x**y,
    "lt": lambda x, y: [[[1, 0, 1, 0, 1, 0, 1, 0]]],
    "le": lambda x, y: [[[1, 1, 1, 1, 1, 1, 1, 0]]],
    "eq": lambda x, y: [[[0, 1, 0, 1, 0, 1, 0, 0]]],
    "and": lambda x, y: [[[1, 1, 1, 0, 1, 1, 1, 1]]],
    "or": lambda x, y: [[[1, 1, 1, 0, 1, 1, 1, 1]]],
    "f16": lambda x: [[[-3.5, -1.5, -0.5, 0, 0.25, 1, 2.5, np.inf]]],
}


@given(st.lists(st.floats(-100, 100, width=32), min_size=16, max_size=16), st.lists(st.integers(-3, 20), min_size=1))
def test_lookup_reads_a_table_up_to_its_ends(table: list[float], indices: list[int]) -> None:
    kernel = VectorKernel.parse(f"lookup(s0, {', '.join(map(repr, table))})")
    assert (kernel.sources, sum(kernel.cost)) == (1, 1)
    source = np.array(indices, np.float32).reshape(1, 1, -1)
    found = kernel.evaluate([source], (1, 1, len(indices)))
    assert found.reshape(-1).tolist() == [np.float32(table[min(max(i, 0), 15)]) for i in indices]
    assert str(VectorKernel.parse(str(kernel))) == str(kernel)


@pytest.mark.parametrize("name", sorted(set(OPERATIONS) - {"select", "lookup"}))
def test_each_operation_means_what_numpy_says(name: str) -> None:
    arity = OPERATIONS[name][0]
    kernel = VectorKernel((name, *("s0", "s1")[:arity]))
    with np.errstate(all="ignore"):
        expected = np.asarray(MEANING[name](*(X, Y)[:arity]), np.float32).reshape(X.shape)
    actual = kernel.evaluate([X, Y], (1, 2, 4))
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, rtol=3e-7)


def test_select_takes_the_second_where_the_first_is_not_zero() -> None:
    chosen = VectorKernel.parse("select(s0, s1, -7.0)").evaluate([X, Y], (1, 2, 4))
    np.testing.assert_array_equal(chosen, np.where(X != 0, Y, F(-7)))


def test_erf_is_right_to_one_unit_in_the_last_place() -> None:
    """Everywhere: near 0, between the entries of its table, where it saturates, and beyond."""
    x = np.concatenate([np.linspace(-5, 5, 20011), [1e-30, -1e-6, 3e-3, 1e30]]).astype(np.float32)
    exact = np.array([math.erf(float(value)) for value in x])
    got = VectorKernel.parse("erf(s0)").evaluate([x.reshape(1, 1, -1)], (1, 1, x.size)).ravel()
    assert (np.abs(got - exact) <= np.spacing(np.abs(exact).astype(np.float32))).all()
    assert np.isnan(VectorKernel.parse("erf(nan)").evaluate([], (1, 1, 1))).all()


def test_lanes_are_fp32() -> None:
    """2^24 + 1 is no fp32 number, and 0.1 is rounded to one before it is used."""
    big = np.full((1, 1, 1), 2**24, np.float32)
    assert VectorKernel.parse("add(s0, 1.0)").evaluate([big], (1, 1, 1)).item() == 2**24
    tenth = VectorKernel.parse("mul(s0, 0.1)").evaluate([np.ones((1, 1, 1), np.float32)], (1, 1, 1))
    assert tenth.item() == float(F(0.1))


def test_indices_count_the_axes_and_sources_broadcast() -> None:
    shape = (2, 3, 4)
    i0, i1, i2 = np.indices(shape).astype(np.float32)
    np.testing.assert_array_equal(VectorKernel.parse("i0").evaluate([], shape), i0)
    kernel = VectorKernel.parse("add(mul(i0, 100.0), add(mul(i1, 10.0), i2))")
    np.testing.assert_array_equal(kernel.evaluate([], shape), 100 * i0 + 10 * i1 + i2)
    row = np.arange(4, dtype=np.float32).reshape(1, 1, 4)
    np.testing.assert_array_equal(VectorKernel.parse("mul(s0, i1)").evaluate([row], shape), row * i1)
    assert VectorKernel.parse("3.0").evaluate([], shape).shape == shape


@settings(max_examples=60, deadline=None)
@given(EXPR, st.integers(0, 2**32 - 1))
def test_nested_expressions_are_their_parts(expr: Expr, seed: int) -> None:
    """Evaluating a call is applying its operation to its evaluated arguments."""
    if not isinstance(expr, tuple):
        expr = ("neg", expr)
    shape = (2, 1, 3)
    sources = list(np.random.default_rng(seed).standard_normal((MAX_SOURCES, *shape)).astype(np.float32))
    parts = [VectorKernel(part).evaluate(sources, shape) for part in expr[1:]]
    whole = VectorKernel((expr[0], *(f"s{i}" for i in range(len(parts))))).evaluate(parts, shape)
    np.testing.assert_array_equal(VectorKernel(expr).evaluate(sources, shape), whole)
