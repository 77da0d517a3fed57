"""Operators of encoders and heads as exporters write them: what they become, and that it means the same."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cases import run, written
from interpret import calls, canonical_values, interpret
from numpy.typing import NDArray
from on_host import interpret_split

from firsttoken_compiler.frontend.onnx_file import from_model
from firsttoken_compiler.frontend.specialise import specialise
from firsttoken_compiler.passes.canonicalise import Canonical
from firsttoken_compiler.passes.split import split
from firsttoken_compiler.tvm.api import Call, shape_of

SIGNATURE = (
    "(float[2,3,4] x, float[2,3,4] z, float[2,3,1] column, float[2,1,1] image, float[1,1,4] line, float[1] one)"
    " => (float[{shape}] y)"
)
INPUTS = {"x": (2, 3, 4), "z": (2, 3, 4), "column": (2, 3, 1), "image": (2, 1, 1), "line": (1, 1, 4), "one": (1,)}


def _arrays() -> dict[str, NDArray[Any]]:
    r = np.random.default_rng(7)
    floats = {"g": (4,), "b": (4,), "g3": (3,), "b3": (3,), "side": (3, 1), "g34": (3, 4), "flat": (1, 1, 4)}
    arrays: dict[str, NDArray[Any]] = {n: r.standard_normal(shape).astype(np.float32) for n, shape in floats.items()}
    arrays |= {"last": np.array([-1]), "middle": np.array([1]), "first": np.array([0, 1]), "shape": np.array([2, 3, 4])}
    scalars = {"two": 2, "three": 3, "half": 0.5, "rate": 1.702, "root": 2**0.5, "unit": 1, "small": 1e-3, "low": -0.3}
    arrays |= {name: np.float32(value) for name, value in scalars.items()}
    return arrays | {"many": np.array([True, False, True, True])}


def _split(body: str, opset: int, shape: str) -> tuple[onnx.ModelProto, Any, Canonical]:
    words = set(re.findall(r"\w+", body))
    arrays = {name: array for name, array in _arrays().items() if name in words}
    model = written(SIGNATURE.format(shape=shape), body, opset, **arrays)
    imported, canonical = split(from_model(model, Path(), "written"), fallback=True)
    return model, imported, canonical


def check(body: str, kinds: list[str], opset: int = 18, shape: str = "2,3,4") -> list[str]:
    """The graph becomes calls of these kinds, none of the host, and computes what onnxruntime does; their texts."""
    model, imported, canonical = _split(body, opset, shape)
    assert not imported.segments, [segment.reason for segment in imported.segments]
    r = np.random.default_rng(1)
    feeds = {value.name: r.standard_normal(INPUTS[value.name]).astype(np.float32) for value in model.graph.input}
    expected = run(model, Path(), feeds)["y"]
    actual = interpret(canonical.module, canonical_values(imported, canonical, feeds))[0].reshape(expected.shape)
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-6)
    bindings = [b.value for block in canonical.module["main"].body.blocks for b in block.bindings]
    made = [value for value in bindings if isinstance(value, Call) and value.op.name.startswith("npu.")]
    assert [value.op.name.removeprefix("npu.") for value in made] == kinds
    return [str(value.attrs["expr"]) for value in made if "expr" in value.attrs.keys()]  # noqa: SIM118


FUNCTIONS = [
    "Abs", "Neg", "Exp", "Sqrt(Abs", "Log(Abs", "Tanh", "Sigmoid", "Erf", "Relu", "LeakyRelu<alpha=0.1>",
    "Elu<alpha=0.7>", "Selu", "Celu<alpha=0.6>", "Softplus", "Softsign", "HardSigmoid", "HardSwish", "Mish",
    "ThresholdedRelu<alpha=0.4>", "Shrink<bias=0.1,lambd=0.6>", "Floor", "Ceil", "Round", "Sign", "Reciprocal", "Sin",
    "Cos", "Tan", "Cosh", "Identity(Exp",
]  # fmt: skip


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_function_is_one_operator(function: str) -> None:
    outer, _, inner = function.partition("(")
    body = f"t = {inner}(x) y = {outer}(t)" if inner else f"y = {outer}(x)"
    check(body, ["map"])


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_of_opset_20(approximate: str) -> None:
    check(f'y = Gelu<approximate="{approximate}">(x)', ["map"], opset=20)


def test_swish_of_opset_24() -> None:
    assert check("y = Swish<alpha=1.3>(x)", ["map"], opset=24) == [
        "mul(s0, sigmoid(mul(s0, 1.2999999523162842)))"
    ]


PAIRS = [
    ("Add(x, column)", "add(s0, s1)"), ("Sub(image, x)", "sub(s0, s1)"), ("Mul(x, line)", "mul(s0, s1)"),
    ("Div(x, one)", "div(s0, s1)"), ("Mul(x, z)", "mul(s0, s1)"), ("Add(x, g)", "add(s0, s1)"),
    ("Mul(side, x)", "mul(s0, s1)"), ("Max(x, z, line)", "max(max(s0, s1), s2)"), ("Min(x, half)", "min(s0, 0.5)"),
    ("Mean(x, z)", "mul(add(s0, s1), 0.5)"), ("Clip(x, low, half)", "min(max(s0, -0.30000001192092896), 0.5)"),
    ("PRelu(x, g)", "select(lt(s0, 0.0), mul(s0, s1), s0)"), ("Pow(x, two)", "mul(s0, s0)"),
    ("Pow(x, three)", "mul(mul(s0, s0), s0)"), ("Add(column, line)", "add(s0, s1)"),
    ("Where(many, x, half)", "select(s0, s1, 0.5)"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "text"), PAIRS)
def test_operands_broadcast(call: str, text: str) -> None:
    shape = "2,3,4"
    assert check(f"y = {call}", ["map"], shape=shape) == [text]


def test_a_chain_is_one_operator() -> None:
    """GELU as older exporters write it, over a scaled sum: everything that nothing else reads is in one expression."""
    body = """
        s = Mul(x, half)  t = Add(s, g)
        d = Div(t, root)  e = Erf(d)  p = Add(e, unit)  m = Mul(t, p)  y = Mul(m, half)
    """
    texts = check(body, ["map", "map"])
    assert texts[0] == "add(mul(s0, 0.5), s1)"
    assert texts[1] == "mul(mul(s0, add(erf(div(s0, 1.4142135381698608)), 1.0)), 0.5)"


def test_a_value_that_others_read_is_not_computed_twice() -> None:
    texts = check("t = Exp(x) u = Add(t, z) v = Mul(t, line) y = Sub(u, v)", ["map", "map"])
    assert texts == ["exp(s0)", "sub(add(s0, s1), mul(s0, s2))"]


def test_truth_values_live_in_the_lanes() -> None:
    body = "n = Not(c) c2 = And(n, d) y = Where(c2, x, z)"
    texts = check(f"c = Less(x, z) d = Greater(x, line) {body}", ["map"])
    assert texts == ["select(and(eq(lt(s0, s1), 0.0), lt(s2, s0)), s0, s1)"]


def test_more_operands_than_ports_are_several_operators() -> None:
    body = """
        t = Mul(x, z)  u = Add(t, column)  v = Mul(u, one)  w = Add(v, line)  p = Mul(w, g)  q = Add(p, b)
        y = Mul(q, flat)
    """
    assert [text.count("s") for text in check(body, ["map", "map"])] == [6, 3]


def test_operands_that_split_the_axes_differently_are_several_operators() -> None:
    """A number for each image and one for each row: no matrix has both as columns."""
    assert check("u = Add(x, column) y = Mul(u, image)", ["map", "map"]) == ["add(s0, s1)", "mul(s0, s1)"]


@pytest.mark.parametrize("function", ["ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceSumSquare"])
@pytest.mark.parametrize(("axes", "kept", "shape"), [("last", 1, "2,3,1"), ("middle", 0, "2,4"), ("first", 1, "1,1,4")])
def test_folds(function: str, axes: str, kept: int, shape: str) -> None:
    check(f"y = {function}<keepdims={kept}>(x, {axes})", ["reduce"], shape=shape)


def test_an_expression_is_folded_as_it_is_computed() -> None:
    assert check("t = Exp(x) y = ReduceSum(t, last)", ["reduce"], shape="2,3,1") == ["exp(s0)"]
    assert check("y = ReduceL2(x, last)", ["reduce", "map"], shape="2,3,1") == ["mul(s0, s0)", "sqrt(s0)"]


def test_a_long_fold_takes_two_steps() -> None:
    r = np.random.default_rng(0)
    body = "y = ReduceMean<keepdims=0>(x, middle)"
    model = written("(float[1,300,128] x) => (float[1,128] y)", body, middle=np.array([1]))
    feeds = {"x": r.standard_normal((1, 300, 128)).astype(np.float32)}
    imported, canonical = split(from_model(model, Path(), "long"), fallback=False)
    assert [shape_of(call.args[0]) for _, call in calls(canonical.module, "npu.reduce")] == [(3, 12800), (1, 384)]
    actual = interpret(canonical.module, canonical_values(imported, canonical, feeds))[0]
    np.testing.assert_allclose(actual, feeds["x"].mean(axis=1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("call", ["Softmax(x)", "LogSoftmax(x)", "Softmax<axis=2>(x)"])
def test_softmax(call: str) -> None:
    check(f"y = {call}", ["softmax"])


@pytest.mark.parametrize("operands", ["x, g, b", "x, g"])
def test_layer_norm(operands: str) -> None:
    check(f"y = LayerNormalization<epsilon=0.01>({operands})", ["layer_norm"])


def test_layer_norm_over_two_axes() -> None:
    check("y = LayerNormalization<axis=1>(x, g34, g34)", ["layer_norm"])


NORM = "m = ReduceMean(x, last) d = Sub(x, m) {square} v = ReduceMean(q, last) e = Add(v, small) {rest}"
AFFINE = "h = Mul(n, g) y = Add(h, b)"


@pytest.mark.parametrize("square", ["q = Pow(d, two)", "q = Mul(d, d)", "d2 = Sub(x, m) q = Pow(d2, two)"])
@pytest.mark.parametrize(
    "rest",
    ["s = Sqrt(e) n = Div(d, s) " + AFFINE, "s = Sqrt(e) r = Reciprocal(s) n = Mul(d, r) h = Mul(g, n) y = Add(b, h)",
     "s = Sqrt(e) y = Div(d, s)", "s = Sqrt(e) n = Div(d, s) h = Mul(n, flat) y = Add(h, flat)"],
)  # fmt: skip
def test_a_decomposed_layer_norm_is_one_operator(square: str, rest: str) -> None:
    check(NORM.format(square=square, rest=rest), ["layer_norm"])


@pytest.mark.parametrize(
    "wrong",
    ["m = ReduceMean(z, last) d = Sub(x, m) q = Pow(d, two)", "m = ReduceMean(x, first) d = Sub(x, m) q = Pow(d, two)",
     "m = ReduceMean(x, last) d = Sub(x, m) q = Pow(d, three)", "m = ReduceMax(x, last) d = Sub(x, m) q = Pow(d, two)"],
)  # fmt: skip
def test_what_only_looks_like_a_layer_norm_is_none(wrong: str) -> None:
    body = f"{wrong} v = ReduceMean(q, last) e = Add(v, unit) s = Sqrt(e) n = Div(d, s) {AFFINE}"
    _, _, canonical = _split(body, 18, "2,3,4")
    assert not calls(canonical.module, "npu.layer_norm")


def test_instance_and_group_norms_are_layer_norms_over_channels() -> None:
    check("y = InstanceNormalization(x, g3, b3)", ["layer_norm", "map"])
    check("y = GroupNormalization<num_groups=1>(x, g3, b3)", ["layer_norm", "map"], opset=21)


@pytest.mark.parametrize("p", [1, 2])
def test_rows_of_zeros_have_no_length(p: int) -> None:
    model = written("(float[2,3,4] x) => (float[2,3,4] y)", f"y = LpNormalization<axis=2,p={p}>(x)", 18)
    imported, canonical = split(specialise(from_model(model, Path(), "lengths")), fallback=True)
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)}
    feeds["x"][1, 1] = 0
    actual = interpret_split(imported, canonical, feeds)["y"].reshape(2, 3, 4)
    np.testing.assert_allclose(actual, run(model, Path(), feeds)["y"], rtol=1e-6)


def test_a_tensor_is_repeated() -> None:
    assert check("y = Expand(line, shape)", ["map"]) == ["s0"]


@pytest.mark.parametrize("call", ["Softmax<axis=1>(x)", "Mod<fmod=1>(x, z)", "Atan(x)"])
def test_what_has_no_operator_runs_on_the_host(call: str) -> None:
    _, imported, _ = _split(f"y = {call}", 18, "2,3,4")
    assert len(imported.segments) == 1


TRUTHS = [
    ("y = Less(x, z)", "lt(s0, s1)"), ("y = GreaterOrEqual(x, line)", "le(s1, s0)"), ("y = IsNaN(x)", None),
    ("c = Equal(x, z) d = Less(x, z) y = Or(c, d)", "or(eq(s0, s1), lt(s0, s1))"),
    ("c = Less(x, half) y = Xor(c, many)", None), ("y = Cast<to=9>(x)", None), ("y = Not(many_x)", "eq(s0, 0.0)"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "text"), TRUTHS)
def test_truth_values_are_results(body: str, text: str | None) -> None:
    signature = SIGNATURE.replace("float[1] one)", "float[1] one, bool[2,3,4] many_x)")
    signature = signature.replace("(float[{shape}]", "(bool[2,3,4]")
    words = set(re.findall(r"\w+", body))
    model = written(signature, body, 18, **{name: array for name, array in _arrays().items() if name in words})
    imported, canonical = split(from_model(model, Path(), "truth"), fallback=True)
    assert not imported.segments
    r = np.random.default_rng(4)
    feeds: dict[str, NDArray[Any]] = {n: r.standard_normal(shape).astype(np.float32) for n, shape in INPUTS.items()}
    feeds |= {"many_x": r.random((2, 3, 4)) < 0.5}
    feeds["x"][0, 0] = [np.nan, 0.0, feeds["z"][0, 0, 2], -0.0]
    [(_, call)] = calls(canonical.module, "npu.map")
    assert str(call.attrs["out"]) == "bool"
    assert text is None or str(call.attrs["expr"]) == text
    actual = interpret(canonical.module, canonical_values(imported, canonical, feeds))[0].reshape(2, 3, 4)
    np.testing.assert_array_equal(actual, run(model, Path(), feeds)["y"])


@pytest.mark.parametrize("kind", ["int64", "int32", "int8", "bool"])
def test_integers_are_read_by_their_conversion_only(kind: str) -> None:
    body = "k = Cast<to=1>(keep) m = Sub(unit, k) f = Mul(m, low) y = Add(x, f)"
    arrays = {name: _arrays()[name] for name in ("unit", "low")}
    model = written(f"(float[2,3,4] x, {kind}[1,1,4] keep) => (float[2,3,4] y)", body, 18, **arrays)
    imported, canonical = split(from_model(model, Path(), "integers"), fallback=True)
    assert not imported.segments
    keep = np.array([[[1, 0, 1, 1]]]).astype(kind)
    feeds: dict[str, NDArray[Any]] = {"x": np.ones((2, 3, 4), np.float32), "keep": keep}
    actual = interpret(canonical.module, canonical_values(imported, canonical, feeds))[0].reshape(2, 3, 4)
    np.testing.assert_allclose(actual, run(model, Path(), feeds)["y"], rtol=1e-6)


@pytest.mark.parametrize("body", ["y = Less(a, b)", "y = Equal(a, b)"])
def test_integers_are_not_compared_in_fp32(body: str) -> None:
    model = written("(int64[4] a, int64[4] b) => (bool[4] y)", body, 18)
    assert len(split(from_model(model, Path(), "wide"), fallback=True)[0].segments) == 1


INDEXED = "(bool[1,4] keep, float[2,3,4] x) => (float[2,3,4] y)"


@pytest.mark.parametrize(("order", "segments"), [([0, 1, 2, 3], 0), ([0, -3, 2, -1], 0), ([0, 2, 1, 3], 1)])
def test_indices_that_name_all_elements_in_order_are_a_reshape(order: list[int], segments: int) -> None:
    places = np.stack([np.zeros(4, np.int64), np.array(order)], axis=-1).reshape(1, 1, 4, 2)
    body = "k = GatherND(keep, places) y = Where(k, x, low)"
    model = written(INDEXED, body, 18, places=places, low=_arrays()["low"])
    imported, canonical = split(specialise(from_model(model, Path(), "gathered")), fallback=True)
    assert len(imported.segments) == segments
    feeds = {"keep": np.array([[True, False, True, True]]), "x": np.ones((2, 3, 4), np.float32)}
    actual = interpret_split(imported, canonical, feeds)["y"].reshape(2, 3, 4)
    np.testing.assert_allclose(actual, run(model, Path(), feeds)["y"], rtol=1e-6)


@pytest.mark.parametrize(("first", "segments"), [(0, 0), (1, 1)])
def test_writing_all_elements_in_order_is_what_is_written(first: int, segments: int) -> None:
    places = np.stack([np.zeros(4, np.int64), (np.arange(4) + first) % 4], axis=-1).reshape(1, 4, 2)
    body = "f = Cast<to=1>(keep) s = ScatterND(old, places, f) y = Add(x, s)"
    model = written(INDEXED, body, 18, places=places, old=np.full((1, 4), 9, np.float32))
    imported, canonical = split(specialise(from_model(model, Path(), "scattered")), fallback=True)
    assert len(imported.segments) == segments
    feeds = {"keep": np.array([[True, False, True, True]]), "x": np.ones((2, 3, 4), np.float32)}
    actual = interpret_split(imported, canonical, feeds)["y"].reshape(2, 3, 4)
    np.testing.assert_allclose(actual, run(model, Path(), feeds)["y"], rtol=1e-6)


@pytest.mark.parametrize("rows", [[[0, 1, 2]], [[4, -1, 0]]])
def test_constant_rows_of_a_table_are_gathered(rows: list[list[int]]) -> None:
    r = np.random.default_rng(2)
    table = r.standard_normal((5, 4)).astype(np.float32)
    body = "p = Gather(table, rows) y = Mul(x, p)"
    model = written("(float[1,3,4] x) => (float[1,3,4] y)", body, 18, table=table, rows=np.array(rows))
    imported, canonical = split(from_model(model, Path(), "rows"), fallback=True)
    assert not imported.segments
    assert len(calls(canonical.module, "npu.gather")) == 1
    feeds = {"x": r.standard_normal((1, 3, 4)).astype(np.float32)}
    actual = interpret(canonical.module, canonical_values(imported, canonical, feeds))[0].reshape(1, 3, 4)
    np.testing.assert_allclose(actual, run(model, Path(), feeds)["y"], rtol=1e-6)


def test_integers_are_repeated_where_they_are_converted() -> None:
    body = "e = Expand(keep, shape) k = Cast<to=1>(e) y = Mul(x, k)"
    model = written("(float[2,3,4] x, int64[1,1,4] keep) => (float[2,3,4] y)", body, 18, shape=_arrays()["shape"])
    imported, canonical = split(from_model(model, Path(), "repeated"), fallback=True)
    assert not imported.segments
    [(_, call)] = calls(canonical.module, "npu.map")
    assert str(call.attrs["expr"]) == "mul(s0, s1)"
    feeds = {"x": np.full((2, 3, 4), 3, np.float32), "keep": np.array([[[1, 0, 5, 1]]])}
    actual = interpret(canonical.module, canonical_values(imported, canonical, feeds))[0].reshape(2, 3, 4)
    np.testing.assert_allclose(actual, run(model, Path(), feeds)["y"], rtol=1e-6)


def test_a_product_over_one_term_multiplies_a_column_by_a_row() -> None:
    """Rotary angles: frequencies by positions, here turned and doubled before their cosine."""
    body = """
        p = Cast<to=1>(n) f = MatMul(frequencies, p) t = Transpose<perm=[0,2,1]>(f) d = Concat<axis=-1>(t, t) y = Cos(d)
    """
    arrays = {"frequencies": np.array([[[1.0], [0.1], [0.01]]], np.float32)}
    model = written("(int64[1,1,5] n) => (float[1,5,6] y)", body, 18, **arrays)
    imported, canonical = split(from_model(model, Path(), "outer"), fallback=True)
    assert all("MatMul" not in node for segment in imported.segments for node in segment.nodes)
    feeds = {"n": np.arange(5).reshape(1, 1, 5)}
    actual = interpret_split(imported, canonical, feeds)["y"].reshape(1, 5, 6)
    np.testing.assert_allclose(actual, run(model, Path(), feeds)["y"], rtol=1e-6)


def test_all_rows_in_order_are_the_table() -> None:
    body = "k = Gather(keep, rows) y = Where(k, x, low)"
    arrays = {"rows": np.arange(4).reshape(1, 1, 4), "low": _arrays()["low"]}
    model = written("(bool[4] keep, float[2,3,4] x) => (float[2,3,4] y)", body, 18, **arrays)
    imported, canonical = split(from_model(model, Path(), "rows"), fallback=True)
    assert not imported.segments
    feeds = {"keep": np.array([True, False, False, True]), "x": np.ones((2, 3, 4), np.float32)}
    actual = interpret(canonical.module, canonical_values(imported, canonical, feeds))[0].reshape(2, 3, 4)
    np.testing.assert_allclose(actual, run(model, Path(), feeds)["y"], rtol=1e-6)


EDGE = 1 << 24


@pytest.mark.parametrize("operator", ["Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal"])
@pytest.mark.parametrize(("limit", "segments"), [(EDGE - 1, 0), (EDGE, 1)])
def test_integers_are_compared_with_what_fp32_holds(operator: str, limit: int, segments: int) -> None:
    """Rounding moves no integer across a constant below 2^24."""
    body = f"y = {operator}(n, limits)"
    limits = np.array([[limit, -limit, 3, 0]])
    model = written("(int64[6,1] n) => (bool[6,4] y)", body, 18, limits=limits)
    imported, canonical = split(from_model(model, Path(), "compared"), fallback=True)
    assert len(imported.segments) == segments
    feeds = {"n": np.array([[EDGE - 1], [EDGE + 1], [1 - EDGE], [-EDGE - 3], [0], [3]])}
    actual = interpret_split(imported, canonical, feeds)["y"].reshape(6, 4)
    np.testing.assert_array_equal(actual, run(model, Path(), feeds)["y"])
