"""Specialised graphs compute what the original ones do, bit for bit where nothing but constants was computed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from cases import written
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from firsttoken_compiler.errors import StudentError
from firsttoken_compiler.frontend import fold
from firsttoken_compiler.frontend.bind import bind_dims, bound
from firsttoken_compiler.frontend.onnx_file import OnnxStudent, from_model, open_student
from firsttoken_compiler.frontend.specialise import Walk, specialise
from firsttoken_compiler.frontend.values import value_types

ROUTES = sorted((Path(__file__).parents[2] / "fixtures" / "routes").glob("*/model.onnx"))
X = "(float[2,3,4] x)"
Arrays = dict[str, NDArray[Any]]


def opened(model: onnx.ModelProto) -> OnnxStudent:
    return from_model(model, Path(), "bad")


def whole(student: OnnxStudent) -> onnx.ModelProto:
    """The model with all its initialisers."""
    model = onnx.ModelProto()
    model.CopyFrom(student.model)
    del model.graph.initializer[:]
    for name in student.initializers:
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(student.array(name)), name))
    return model


def answers(model: onnx.ModelProto, feeds: Arrays) -> list[NDArray[Any]]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, {value.name: feeds[value.name] for value in session.get_inputs()}))


def specialised(model: onnx.ModelProto, feeds: Arrays | None = None) -> OnnxStudent:
    """The specialised student, whose answers are those of the model."""
    student = specialise(opened(model))
    given = feeds or {"x": np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)}
    for ours, right in zip(answers(whole(student), given), answers(model, given), strict=True):
        assert ours.dtype == right.dtype
        np.testing.assert_array_equal(ours, right)
    types = value_types(student)
    assert all(name in types for node in student.graph.node for name in node.output if name)
    return student


def kinds(student: OnnxStudent) -> list[str]:
    return [node.op_type for node in student.graph.node]


INTS = {"one": np.array([1]), "zero": np.array([0]), "minus": np.array([-1]), "two": np.array([2])}
FOLDED = {
    "shape": "s = Shape(x) g = Gather(s, two) c = Concat<axis=0>(g, minus) y = Reshape(x, c)",
    "shape of a part": "s = Shape<start=1,end=-1>(x) c = Concat<axis=0>(two, minus, s) y = Reshape(x, c)",
    "size": "n = Size(x) m = Reshape(n, one) c = Concat<axis=0>(m, one) y = Reshape(x, c)",
    "whole numbers": """s = Shape(x) a = Sub(s, two) b = Div(a, minus) d = Mul(b, minus) e = Add(d, two)
        f = Mod(e, e) g = Add(f, e) y = Reshape(x, g)""",
    "comparison": "s = Shape(x) e = Equal(s, two) n = Not(e) w = Where(n, s, two) y = Reshape(x, w)",
    "greatest": "s = Shape(x) m = Max(s, two) n = Min(m, s) y = Reshape(x, n)",
    "slices": """s = Shape(x) a = Slice(s, zero, one, zero) b = Slice(s, minus, zero, zero, minus)
        c = Concat<axis=0>(a, b) d = Unsqueeze(c, zero) e = Squeeze(d, zero) y = Reshape(x, e)""",
    "cast": """s = Shape(x) f = Cast<to=1>(s) g = Sqrt(f) h = Cast<to=7>(g) i = Mul(h, zero) j = Add(i, s)
        y = Reshape(x, j)""",
    "reduction": "s = Shape(x) p = ReduceProd<keepdims=1>(s) c = Concat<axis=0>(p, one) y = Reshape(x, c)",
    "expansion": "s = Shape(x) c = ConstantOfShape(s) y = Add(x, c)",
    "range": """l = Constant<value_int=12>() z = Constant<value_int=0>() d = Constant<value_int=3>()
        r = Range(z, l, d) f = Cast<to=1>(r) y = Add(x, f)""",
    "sine": """r = Constant<value_floats=[0.1, 2.0, 30.0, -4.5]>() a = Sin(r) b = Cos(r) c = Exp(a) d = Pow(c, b)
        y = Mul(x, d)""",
    "mask": """s = Shape(x) c = ConstantOfShape(s) t = Trilu<upper=1>(c, k) b = Cast<to=9>(t) m = Where(b, low, c)
        y = Add(x, m)""",
    "twice": "s = Shape(x) t = Tile(s, one) e = Expand(t, one) y = Reshape(x, e)",
    "non-zero": "f = Constant<value_ints=[3, 0, 4]>() n = NonZero(f) q = Squeeze(n, zero) y = Gather<axis=1>(x, q)",
    "compress": "f = Constant<value_ints=[2, 0]>() b = Cast<to=9>(f) c = Compress<axis=0>(f, b) y = Gather(x, zero)",
    "negative": "n = Neg(two) p = Abs(n) q = Sub(p, one) z = Gather<axis=0>(x, q) y = Neg(z)",
    "split": "s = Shape(x) a, b = Split<axis=0>(s, parts) c = Concat<axis=0>(b, a) y = Reshape(x, c)",
    "product": "a = Constant<value_floats=[1.5, 2.0, 3.0, 4.25]>() m = MatMul(table, a) n = Mul(m, a) y = Add(x, n)",
}  # fmt: skip
MORE = {
    "k": np.array(1), "low": np.array(-9.0, np.float32), "parts": np.array([1, 2]),
    "table": np.arange(16, dtype=np.float32).reshape(4, 4),
}  # fmt: skip
STAYING = {
    "shape": ["Reshape"], "mask": ["Add"], "expansion": ["Add"], "range": ["Add"], "sine": ["Mul"], "product": ["Add"],
    "non-zero": ["Gather"], "negative": ["Gather", "Neg"], "compress": ["Gather"], "twice": ["Identity"],
    "comparison": ["Identity"], "greatest": ["Identity"], "cast": ["Identity"], "whole numbers": ["Identity"],
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDED)
@pytest.mark.parametrize("opset", [18, 23])
def test_what_follows_from_the_file_is_computed(name: str, opset: int) -> None:
    body = FOLDED[name]
    if name == "compress":
        body = body.replace("Gather(x, zero)", "Gather<axis=1>(x, c)")
    arrays = {key: array for key, array in {**INTS, **MORE}.items() if f" {key}" in body or f"({key}" in body}
    student = specialised(written(f"{X} => (float[] y)", body, opset, **arrays))
    assert kinds(student) == STAYING.get(name, ["Reshape"])


@pytest.mark.parametrize("path", ROUTES, ids=lambda path: path.parent.name)
def test_exported_models(path: Path) -> None:
    """Every shape becomes static, the answers stay, and nothing is renamed."""
    meta = json.loads((path.parent / "meta.json").read_text())
    student = open_student(path)
    bindings = bind_dims(student, prompt=meta["prompt"] or 1, past=meta["past"] or 0, bind=meta["bind"])
    small = specialise(student, bindings)
    assert specialise(small) is small
    types = value_types(small)
    assert not [name for node in small.graph.node for name in node.output if name and name not in types]
    before = {name for node in student.graph.node for name in node.output} | set(student.initializers)
    inner = {"if-static"}
    if path.parent.name not in inner:
        assert {name for node in small.graph.node for name in node.output} <= before
        assert {node.name for node in small.graph.node} <= {node.name for node in student.graph.node}
    feeds = dict(np.load(path.parent / "inputs.npz"))
    wide = {n: a.astype(np.float32) if a.dtype == np.float16 or a.dtype.kind == "V" else a for n, a in feeds.items()}
    ours = answers(whole(small), wide)
    model = onnx.load(path)
    if any(value.type.tensor_type.elem_type in (10, 16) for value in (*model.graph.input, *model.graph.output)):
        expected = dict(np.load(path.parent / "expected.npz"))
        for value, got in zip(small.graph.output, ours, strict=True):
            if value.name in expected:
                np.testing.assert_allclose(got, expected[value.name], atol=4e-3 * np.abs(expected[value.name]).max())
        return
    for value, got, right in zip(small.graph.output, ours, answers(model, feeds), strict=True):
        np.testing.assert_allclose(got, right, rtol=1e-5, atol=1e-5, err_msg=value.name)
        assert got.shape == types[value.name].shape


def test_a_graph_that_needs_nothing_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(OnnxStudent, "array", never)
    weight = np.ones((4, 8), np.float32)
    student = specialise(opened(written(f"{X} => (float[2,3,8] y)", "t = Add(x, x) y = MatMul(t, w)", w=weight)))
    assert kinds(student) == ["Add", "MatMul"]
    assert list(student.initializers) == ["w"]
    assert {value.name for value in student.graph.value_info} == {"t"}


@pytest.mark.parametrize(
    ("body", "staying"),
    [
        ("a = Identity(x) b = Dropout(a) c = Cast<to=1>(b) y = Relu(c)", ["Relu"]),
        ("a = Relu(x) y = Identity(a)", ["Relu", "Identity"]),
        ("a, m = Dropout(x) b = Cast<to=1>(m) y = Add(a, b)", ["Dropout", "Cast", "Add"]),
        ("a = Concat<axis=1>(x, nothing) y = Relu(a)", ["Relu"]),
        ("a = Concat<axis=1>(x, nothing, x) y = Relu(a)", ["Concat", "Relu"]),
        ("y = Concat<axis=1>(x, nothing)", ["Identity"]),
        ("a = Slice(x, zero, far, one) y = Relu(a)", ["Relu"]),
        ("a = Slice(x, zero, two, one) y = Relu(a)", ["Slice", "Relu"]),
        ("a = Slice(x, minus, low, one, minus) y = Relu(a)", ["Slice", "Relu"]),
        ("s = Shape(x) a = Expand(x, s) y = Relu(a)", ["Relu"]),
        ("a = Expand(x, big) y = Relu(a)", ["Expand", "Relu"]),
        ("a = Transpose<perm=[0,1,2]>(x) y = Relu(a)", ["Relu"]),
        ("a = Transpose(x) y = Relu(a)", ["Transpose", "Relu"]),
        ("t = ConstantOfShape<value=bool[1]{1}>(one) n = Neg(x) w = Where(t, x, n) y = Relu(w)", ["Relu"]),
        ("a = Max(x) b = Sum(a) y = Relu(b)", ["Relu"]),
        ("a = Tile(x, ones) y = Relu(a)", ["Relu"]),
    ],
)
def test_what_changes_nothing_disappears(body: str, staying: list[str]) -> None:
    arrays = {
        **INTS, "nothing": np.zeros((2, 0, 4), np.float32), "far": np.array([1 << 40]), "low": np.array([-99]),
        "big": np.array([5, 2, 3, 4]), "ones": np.ones(3, np.int64),
    }  # fmt: skip
    used = {name: array for name, array in arrays.items() if f" {name}" in body or f"({name}" in body}
    student = specialised(written(f"{X} => (float[] y)", body, **used))
    assert kinds(student) == staying


BRANCHES = """<ir_version: 10, opset_import: ["" : 18]>
g (float[2,3,4] x, float[n,2] z) => (float[] y, float[] u) {
  s = Shape(z) n0 = Gather(s, zero) c = Greater(n0, five)
  a = If (c) <then_branch = yes () => (float[] o) { t = Relu(x) o = Mul(t, two) },
              else_branch = no () => (float[] o) { t = Neg(x) o = Identity(t) }>
  u = If (c) <then_branch = yes () => (float[] o) { t = Abs(a) o = Identity(t) },
              else_branch = no () => (float[] o) { t = Neg(a) o = Mul(t, two) }>
  y = Add(a, u)
}"""


def branches() -> onnx.ModelProto:
    model = onnx.parser.parse_model(BRANCHES)
    for name, array in {"zero": np.array(0), "five": np.array(5), "two": np.array(2.0, np.float32)}.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return model


@pytest.mark.parametrize(("rows", "staying"), [(3, ["Neg", "Neg", "Mul", "Add"]), (6, ["Relu", "Mul", "Abs", "Add"])])
def test_the_branch_of_an_if_takes_its_place(rows: int, staying: list[str]) -> None:
    """Values of the two branches have the same names; none is taken for another."""
    student = specialise(opened(branches()), {"n": rows})
    assert [kind for kind in kinds(student) if kind != "Identity"] == staying
    names = [name for node in student.graph.node for name in node.output]
    assert len(set(names)) == len(names)
    assert len({node.name for node in student.graph.node}) == len(student.graph.node)
    feeds = {"x": np.random.default_rng(1).standard_normal((2, 3, 4)).astype(np.float32), "z": np.ones((rows, 2), "f")}
    for ours, right in zip(answers(whole(student), feeds), answers(branches(), feeds), strict=True):
        np.testing.assert_array_equal(ours, right)


def test_a_condition_that_is_not_known_stays() -> None:
    body = """c = ReduceMax<keepdims=0>(x) z = Constant<value_float=0.0>() b = Greater(c, z) i = Identity(x)
        y = If (b) <then_branch = yes () => (float[2,3,4] o) { o = Relu(i) },
                    else_branch = no () => (float[2,3,4] p) { p = Neg(i) }>"""
    student = specialised(written(f"{X} => (float[] y)", body))
    assert kinds(student) == ["ReduceMax", "Greater", "If"]
    assert value_types(student)["y"].shape == (2, 3, 4)


def test_functions_are_inlined() -> None:
    text = """<ir_version: 10, opset_import: ["" : 18, "own" : 1]>
    g (float[2,3,4] x) => (float[] y) { a = own.twice<f=2.0>(x) y = own.twice<f=3.0>(a) }
    <domain: "own", opset_import: ["" : 18]>
    twice <f> (v) => (w) { c = Constant<value_float:float=@f>() t = Mul(v, c) w = Identity(t) }"""
    student = specialised(onnx.parser.parse_model(text))
    assert [kind for kind in kinds(student) if kind != "Identity"] == ["Mul", "Mul"]
    assert not student.model.functions


@pytest.mark.parametrize("kind", [10, 16])
def test_half_precision_becomes_float(kind: int) -> None:
    body = f"""h = Cast<to={kind}>(x) c = Constant<value_floats=[1.5]>() d = Cast<to={kind}>(c) m = Mul(h, d)
        y = Cast<to=1>(m)"""
    student = specialise(opened(written(f"{X} => (float[] y)", body)))
    assert [k for k in kinds(student) if k not in ("Cast", "Identity")] == ["Mul"]
    assert {entry.onnx_type for entry in student.initializers.values()} == {1}


def test_quantised_weights_stay_quantised() -> None:
    body = """w = DequantizeLinear(q, s, z) m = MatMul(x, w) b = DequantizeLinear(q1, s, z1) y = Add(m, b)"""
    arrays: Arrays = {
        "q": np.arange(32, dtype=np.int8).reshape(4, 8), "s": np.array(0.5, np.float32), "z": np.array(3, np.int8),
        "q1": np.arange(8, dtype=np.int32), "z1": np.array(0, np.int32),
    }  # fmt: skip
    student = specialised(written(f"{X} => (float[] y)", body, **arrays))
    assert kinds(student) == ["DequantizeLinear", "MatMul", "Add"]
    assert {"q", "s", "z"} < set(student.initializers)


@pytest.mark.parametrize("body", ["t = Transpose(w) y = MatMul(x, t)", "t = Reshape(w, shape) y = MatMul(x, t)"])
def test_weights_keep_their_names(body: str) -> None:
    arrays = {"w": np.arange(32, dtype=np.float32).reshape(8, 4), "shape": np.array([4, 8])}
    used = {name: array for name, array in arrays.items() if name in body.replace("y", "")}
    student = specialised(written(f"{X} => (float[] y)", body, **used))
    assert "w" in student.initializers
    assert len(student.graph.node) == 2


@pytest.mark.parametrize(
    "body",
    [
        "c = ConstantOfShape(n) y = ReduceSum(c)",
        """z = Constant<value_int=0>() o = Constant<value_int=1>() m = Squeeze(n) r = Range(z, m, o) f = Cast<to=1>(r)
        y = ReduceSum(f)""",
        "f = Cast<to=1>(n) c = Tile(f, n) y = ReduceSum(c)",
        "f = Cast<to=1>(n) c = Expand(f, n) y = ReduceSum(c)",
        "z = Constant<value_ints=[0]>() p = Concat<axis=0>(z, n) f = Cast<to=1>(n) c = Pad(f, p) y = ReduceSum(c)",
        "o = Constant<value_ints=[1]>() z = Sub(o, o) d = Div(n, z) f = Cast<to=1>(d) y = ReduceSum(f)",
        "o = Constant<value_ints=[1]>() z = Sub(o, o) d = Mod(n, z) f = Cast<to=1>(d) y = ReduceSum(f)",
    ],
)  # fmt: skip
def test_what_is_large_or_impossible_is_not_computed(body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    evaluate = fold.evaluate

    def watched(task: fold.Task, runtime: bool = True) -> list[Any] | None:
        nonlocal largest
        values = evaluate(task, runtime)
        largest = max(largest, *(value.size for value in values or [np.zeros(0)]))
        return values

    monkeypatch.setattr(fold, "evaluate", watched)
    student = specialise(opened(written(f"{X} => (float[] y)", body, n=np.array([1 << 26]))))
    assert largest <= 8
    assert "ReduceSum" in kinds(student)


@pytest.mark.parametrize(("carried", "shape"), [("Neg(a)", (1,)), ("Concat<axis=0>(a, a)", None)])
def test_a_loop_is_never_run(carried: str, shape: tuple[int, ...] | None) -> None:
    """What it carries has a known shape only where every round keeps it."""
    body = f"""c = Constant<value_int=9>() t = Constant<value=bool{{1}}>() v = Constant<value_floats=[1.0]>()
        w = Loop(c, t, v) <body = b (int64 i, bool k, float[n] a) => (bool q, float[m] r) {{
            q = Identity(k) r = {carried} }}> v0 = ReduceSum(w) y = Add(x, v0)"""
    student = specialise(opened(written(f"{X} => (float[2,3,4] y)", body)))
    assert kinds(student) == ["Loop", "ReduceSum", "Add"]
    types = value_types(student)
    assert (types["w"].shape if "w" in types else None) == shape


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("s = Shape(x) t = Gather(s, zero) y = Gather(x, t)",
         r"bad: node 'Gather#2' reads index 2 of an axis with 2 entries \('x'\): export .* or for shorter lengths"),
        ("s = Shape(x) c = Concat<axis=0>(s, zero) t = Neg(c) y = Reshape(x, t)",
         r"bad: node 'Reshape#3' \(Reshape\) cannot take inputs of the shapes \[2, 3, 4\], \[4\]: "),
        ("y = MatMul(x, x)", r"node 'MatMul#0' \(MatMul\) cannot take inputs of the shapes \[2, 3, 4\], \[2, 3, 4\]: "),
    ],
)  # fmt: skip
def test_what_the_lengths_make_impossible_is_an_error_that_names_the_node(body: str, message: str) -> None:
    arrays = {"zero": np.array([0])} if "zero" in body else {}
    model = written("(float[a,b,c] x) => (float[] y)", body, **arrays)
    with pytest.raises(StudentError, match=message):
        specialise(opened(model), {"a": 2, "b": 3, "c": 4})


def test_shapes_that_depend_on_data_stay_open() -> None:
    body = "b = Cast<to=9>(x) n = NonZero(b) f = Cast<to=1>(n) y = ReduceSum<keepdims=0>(f)"
    student = specialise(opened(written(f"{X} => (float[] y)", body)))
    types = value_types(student)
    assert "n" not in types
    assert types["y"].shape == ()


def test_inputs_that_hold_nothing_are_gone() -> None:
    body = "present = Concat<axis=1>(past, x) y = Relu(present)"
    model = written("(float[2,3,4] x, float[2,p,4] past) => (float[2,t,4] present, float[2,t,4] y)", body)
    student = specialise(opened(model), {"p": 0})
    assert [value.name for value in student.graph.input] == ["x"]
    assert kinds(student) == ["Identity", "Relu"]
    full = specialise(opened(model), {"p": 5})
    assert [value.name for value in full.graph.input] == ["x", "past"]
    assert value_types(full)["present"].shape == (2, 8, 4)


def test_what_the_results_do_not_need_is_gone() -> None:
    student = specialise(opened(written(f"{X} => (float[2,3,4] y)", "a = Relu(x) b = Neg(a) c = Abs(b) y = Add(x, x)")))
    assert kinds(student) == ["Add"]


def test_known_values_are_forgotten_when_nobody_reads_them() -> None:
    chain = " ".join(f"c{i + 1} = Add(c{i}, c{i})" for i in range(40))
    body = f"n = Shape(z) c0 = ConstantOfShape<value=float[1]{{1.0}}>(n) {chain} s = Shape(c40) f = Cast<to=1>(s)"
    student = opened(written("(float[2,3,4] x, float[n] z) => (float[] y)", f"{body} y = Add(x, f)"))
    walk = Walk(bound(student, {"n": 1 << 20}))
    student = walk.result()
    assert kinds(student) == ["Add"]
    assert walk.alive < 3 << 20


OPERATIONS = ("Add", "Sub", "Mul", "Div", "Mod", "Max", "Min", "Equal", "Less", "GreaterOrEqual", "Where", "Gather",
              "Slice", "Concat", "Neg", "Cast", "Transpose", "Squeeze")  # fmt: skip


@st.composite
def shape_chains(draw: st.DrawFn) -> onnx.ModelProto:
    """Random whole-number arithmetic on vectors of four, from the shape of the input to the result."""
    values, nodes = ["s", "a", "b"], ["s0 = Shape(x) s = Concat<axis=0>(s0, one)"]
    for number in range(draw(st.integers(1, 12))):
        op, left, right = (draw(st.sampled_from(options)) for options in (OPERATIONS, values, values))
        name = f"v{number}"
        if op in ("Div", "Mod"):
            text = f"{name} = {op}({left}, divisors)"
        elif op in ("Equal", "Less", "GreaterOrEqual"):
            text = f"{name}b = {op}({left}, {right}) {name} = Cast<to=7>({name}b)"
        elif op == "Where":
            text = f"{name}b = Less({left}, {right}) {name} = Where({name}b, {right}, {left})"
        elif op == "Gather":
            text = f"{name} = Gather({left}, picks)"
        elif op == "Slice":
            text = f"{name} = Slice({left}, minus, far, zero, minus)"
        elif op == "Concat":
            text = f"{name}f = Slice({left}, zero, two, zero) {name} = Concat<axis=0>({name}f, {name}f)"
        elif op == "Neg":
            text = f"{name} = Neg({left})"
        elif op == "Cast":
            text = f"{name}i = Cast<to=6>({left}) {name} = Cast<to=7>({name}i)"
        elif op in ("Transpose", "Squeeze"):
            text = f"{name}u = Unsqueeze({left}, zero) {name}t = Transpose({name}u) {name} = Squeeze({name}t, one)"
        else:
            text = f"{name} = {op}({left}, {right})"
        nodes.append(text)
        values.append(name)
    nodes.append(f"f = Cast<to=1>({values[-1]}) y = Add(x, f) w = Identity({values[-1]})")
    numbers = st.lists(st.integers(-9, 9), min_size=4, max_size=4)
    arrays = {
        **INTS, "a": np.array(draw(numbers)), "b": np.array(draw(numbers)), "far": np.array([-99]),
        "divisors": np.array([d or 5 for d in draw(numbers)]), "picks": np.array([n % 4 for n in draw(numbers)]),
    }  # fmt: skip
    body = " ".join(nodes)
    return written(f"{X} => (float[] y, int64[] w)", body, **arrays)


@settings(max_examples=60, deadline=None)
@given(shape_chains())
def test_arithmetic_on_shapes_is_onnxruntimes(model: onnx.ModelProto) -> None:
    student = specialised(model)
    assert kinds(student).count("Add") <= 2
    assert not {"Div", "Where", "Gather"} & {node.op_type for node in student.graph.node if "w" not in node.output}
