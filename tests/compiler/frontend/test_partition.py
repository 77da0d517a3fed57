"""Segments of the host: convex, in an order, self-contained, and costed by what their nodes do."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cases import random, run, session_of, written
from hypothesis import given, settings
from hypothesis import strategies as st

from firsttoken_compiler.errors import StudentError
from firsttoken_compiler.frontend.onnx_file import OnnxStudent, from_model, open_student
from firsttoken_compiler.frontend.partition import (
    EMBEDDED_BYTES,
    MAX_CONTRACTED,
    OPERATOR,
    Segment,
    extract,
    operations,
)
from firsttoken_compiler.frontend.values import TensorType, read_names, value_types


def student_of(model: onnx.ModelProto, folder: Path = Path()) -> OnnxStudent:
    return from_model(onnx.shape_inference.infer_shapes(model, data_prop=True), folder, "part")


@st.composite
def dags(draw: st.DrawFn) -> tuple[onnx.ModelProto, list[str]]:
    """Sums of random earlier values, some of them on the host; some values are outputs as well."""
    count = draw(st.integers(1, 16))
    values, body = ["x"], []
    for number in range(count):
        a, b = (draw(st.sampled_from(values[-6:])) for _ in range(2))
        body.append(f"v{number} = Add({a}, {b})")
        values.append(f"v{number}")
    returned = sorted({f"v{count - 1}", *draw(st.lists(st.sampled_from(values[1:]), max_size=3))})
    outputs = ", ".join(f"float[2,3] {name}" for name in returned)
    model = written(f"(float[2,3] x) => ({outputs})", " ".join(body))
    names = [f"Add#{number}" for number in range(count)]
    return model, draw(st.lists(st.sampled_from(names), unique=True))


def simulated(staged: OnnxStudent, segments: tuple[Segment, ...], x: np.ndarray) -> dict[str, np.ndarray]:
    """Node by node in the order of the graph; a value that is read before it is made raises KeyError."""
    known = {"x": x}
    for node in staged.graph.node:
        given = [known[name] for name in node.input]
        if node.op_type != OPERATOR:
            known[node.output[0]] = given[0] + given[1]
            continue
        segment = segments[node.attribute[0].i]
        if not segment.outputs:
            continue  # dead code: onnxruntime refuses to compute nothing
        results = session_of(segment.model).run(list(segment.outputs), dict(zip(segment.inputs, given, strict=True)))
        known |= dict(zip(segment.outputs, results, strict=True))
    return known


@settings(max_examples=80, deadline=None)
@given(dags())
def test_any_choice_of_nodes_gives_the_same_numbers(case: tuple[onnx.ModelProto, list[str]]) -> None:
    """Convex and acyclic: every unit of the graph can run as a whole once what it reads is made."""
    model, chosen = case
    staged, segments = extract(student_of(model), dict.fromkeys(chosen, "why"))
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    found = simulated(staged, segments, x)
    for name, expected in run(model, Path(), {"x": x}).items():
        np.testing.assert_array_equal(found[name], expected)
    inside = [node for segment in segments for node in segment.nodes]
    outside = [node.name for node in staged.graph.node if node.op_type != OPERATOR]
    assert sorted(inside + outside) == sorted(node.name for node in model_nodes(model))
    assert set(chosen) <= set(inside)
    called = [node.attribute[0].i for node in staged.graph.node if node.op_type == OPERATOR]
    assert sorted(called) == list(range(len(segments)))
    for segment in segments:
        if not segment.outputs:
            continue
        onnx.checker.check_model(onnx.load_model_from_string(segment.model), full_check=True)


def model_nodes(model: onnx.ModelProto) -> list[Any]:
    return list(from_model(model, Path(), "part").graph.node)


@settings(max_examples=40, deadline=None)
@given(dags())
def test_segments_are_as_few_as_the_changes_between_host_and_npu(case: tuple[onnx.ModelProto, list[str]]) -> None:
    """No path leads from a segment over the NPU back into it, and there are no more segments than such paths need."""
    model, chosen = case
    student = student_of(model)
    _, segments = extract(student, dict.fromkeys(chosen, "why"))
    home = {node: number for number, segment in enumerate(segments) for node in segment.nodes}
    maker = {name: node.name for node in student.graph.node for name in node.output}
    before: dict[str, dict[int, int]] = {}
    longest = 0
    for node in student.graph.node:
        mine: dict[int, int] = {}
        for name in node.input:
            for segment, changes in before.get(maker.get(name, ""), {}).items():
                left = home.get(maker[name]) != home.get(node.name)
                mine[segment] = max(mine.get(segment, 0), changes + left)
        if node.name in home:
            assert mine.get(home[node.name], 0) <= 0, "a path leaves the segment and comes back"
            mine[home[node.name]] = 0
            longest = max(longest, 1 + sum(1 for segment in mine if segment != home[node.name]))
        before[node.name] = mine
    assert len(segments) <= longest


def test_without_reasons_nothing_changes() -> None:
    student = student_of(written("(float[2,3] x) => (float[2,3] y)", "y = Add(x, x)"))
    assert extract(student, {}) == (student, ())


def test_reasons_and_names() -> None:
    body = "a = Neg(x) b = Abs(a) c = Exp(b) y = Neg(c)"
    student = student_of(written("(float[2,3] x) => (float[2,3] y)", body))
    staged, (first, second) = extract(student, {"Neg#0": "one", "Abs#1": "two", "Neg#3": "one"})
    assert (first.name, first.nodes, first.reason) == ("host.0", ("Neg#0", "Abs#1"), "one (Neg); two (Abs)")
    assert (second.name, second.nodes, second.reason) == ("host.1", ("Neg#3",), "one (Neg)")
    assert (first.inputs, first.outputs, second.inputs, second.outputs) == (("x",), ("b",), ("c",), ("y",))
    assert [node.name for node in staged.graph.node] == ["host.0", "Exp#2", "host.1"]


def test_views_between_nodes_of_the_host_join_them() -> None:
    """A call less; what the NPU reads too stays there."""
    body = "a = Neg(x) b = Reshape(a, s) y = Neg(b) z = Exp(b)"
    arrays = {"s": np.array([3, 2])}
    signature = "(float[2,3] x) => (float[3,2] y{})"
    alone = student_of(written(signature.format(""), body.replace(" z = Exp(b)", ""), **arrays))
    staged, (segment,) = extract(alone, {"Neg#0": "why", "Neg#2": "why"})
    assert segment.nodes == ("Neg#0", "Reshape#1", "Neg#2")
    assert segment.reason == "why (Neg); between nodes of the host (Reshape)"
    shared = student_of(written(signature.format(", float[3,2] z"), body, **arrays))
    staged, segments = extract(shared, {"Neg#0": "why", "Neg#2": "why"})
    assert [node.name for node in staged.graph.node] == ["host.0", "Reshape#1", "host.1", "Exp#3"]
    assert len(segments) == 2


def test_what_a_subgraph_takes_from_outside_is_an_operand() -> None:
    branch = "() => (float[2,3] r) {{ t = {}(a) r = Add(t, w) }}"
    body = f"a = Neg(x) y = If(c) <then_branch = t {branch.format('Abs')}, else_branch = e {branch.format('Exp')}>"
    student = student_of(written("(float[2,3] x, bool c) => (float[2,3] y)", body, w=random(2, 3)))
    node = student.graph.node[1]
    assert sorted(set(read_names(node))) == ["a", "c", "w"]
    _, (segment,) = extract(student, {node.name: "control flow"})
    assert segment.inputs == ("c", "a")
    assert [tensor.name for tensor in onnx.load_model_from_string(segment.model).graph.initializer] == ["w"]
    x = random(2, 3, seed=4)
    (found,) = session_of(segment.model).run(None, {"c": np.array(False), "a": x})
    np.testing.assert_allclose(found, np.exp(x) + random(2, 3), rtol=1e-6)


@pytest.mark.parametrize("outside", [False, True])
def test_small_initialisers_are_embedded_and_large_ones_are_operands(outside: bool, tmp_path: Path) -> None:
    most = EMBEDDED_BYTES // 8
    arrays = {"small": random(1, most), "large": random(1, most + 1, seed=2)}
    signature = f"(float[1,{most}] x, float[1,{most + 1}] z) => (float[1,{most}] y, float[1,{most + 1}] u)"
    model = written(signature, "y = Add(x, small) u = Add(z, large)", **arrays)
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=outside, location="w.bin", size_threshold=0)
    student = open_student(tmp_path / "m.onnx")
    _, (segment,) = extract(student, {"Add#0": "why", "Add#1": "why"})
    assert (segment.inputs, segment.weights) == (("x", "z"), ("large",))
    inside = onnx.load_model_from_string(segment.model)
    assert [tensor.name for tensor in inside.graph.initializer] == ["small"]
    assert [value.name for value in inside.graph.input] == ["x", "z", "large"]
    assert not any(tensor.external_data for tensor in inside.graph.initializer)
    if outside:
        (tmp_path / "w.bin").unlink()
        _, (bare,) = extract(open_student(tmp_path / "m.onnx"), {"Add#0": "why", "Add#1": "why"})
        assert bare.weights == ("small", "large")  # what is not here cannot be embedded
        assert (bare.flops, bare.nbytes) == (segment.flops, segment.nbytes)


def test_operations_and_bytes_of_a_segment() -> None:
    body = "p = MatMul(x, w) r = Relu(p) c = Conv(i, f) y = Add(r, p)"
    signature = "(float[4,8] x, float[1,3,6,6] i) => (float[4,5] y, float[1,2,4,4] c)"
    student = student_of(written(signature, body, w=random(8, 5), f=random(2, 3, 3, 3)))
    _, (segment,) = extract(student, dict.fromkeys(("MatMul#0", "Relu#1", "Conv#2", "Add#3"), "why"))
    assert segment.flops == 2 * 4 * 8 * 5 + 4 * 5 + 2 * (2 * 4 * 4) * (3 * 3 * 3) + 4 * 5
    floats = (32 + 40 + 20) + (20 + 20) + (108 + 54 + 32) + (20 + 20 + 20)  # each node reads and writes its own
    assert segment.nbytes == 4 * floats


@pytest.mark.parametrize(
    ("operator", "shapes", "expected"),
    [
        ("MatMul", [(2, 3, 4), (4, 5), (2, 3, 5)], 2 * 30 * 4),
        ("Gemm", [(3, 4), (4, 5), (3, 5)], 2 * 15 * 4),
        ("MatMulInteger", [(3, 4), (4, 5), (3, 5)], 2 * 15 * 4),
        ("Conv", [(1, 8, 5, 5), (6, 2, 3, 3), (1, 6, 3, 3)], 2 * 54 * 18),
        ("Softmax", [(4, 5), (4, 5)], 20),
        ("MatMul", [(1 << 30, 1 << 30), (1 << 30, 1 << 30), (1 << 30, 1 << 30)], MAX_CONTRACTED),
        ("MatMul", [(3,), (3,), ()], 2 * 3),
    ],
)
def test_operations_of_a_node(operator: str, shapes: list[tuple[int, ...]], expected: int) -> None:
    names = [f"v{number}" for number in range(len(shapes))]
    node = onnx.helper.make_node(operator, names[:-1], names[-1:])
    types = {name: TensorType(1, shape) for name, shape in zip(names, shapes, strict=True)}
    assert operations(node, types) == expected


def test_bytes_of_types() -> None:
    for elem_type, expected in ((1, 24), (10, 12), (7, 48), (9, 6), (2, 6), (22, 3), (21, 3), (11, 48)):
        assert TensorType(elem_type, (2, 3)).nbytes == expected
    assert TensorType(1, ()).elements == 1


def test_types_are_those_that_are_static() -> None:
    model = written("(float[1,4] x) => (float[1,4] y)", "a = Neg(x) y = Neg(a)")
    for name, shape in (("a", ["n", 4]), ("loose", None)):
        model.graph.value_info.append(onnx.helper.make_tensor_value_info(name, 1, shape))
    types = value_types(from_model(model, Path(), "part"))
    assert types == {"x": TensorType(1, (1, 4)), "y": TensorType(1, (1, 4))}


def test_shapes_that_depend_on_data_stay_inside_one_segment() -> None:
    body = "n = NonZero(x) t = Transpose(n) g = GatherND(x, t) s = ReduceSum<keepdims=0>(g) y = Exp(s)"
    student = student_of(written("(float[2,3] x) => (float y)", body))
    chosen = dict.fromkeys(("NonZero#0", "Transpose#1", "GatherND#2", "ReduceSum#3"), "why")
    _, (segment,) = extract(student, chosen)
    assert (segment.inputs, segment.outputs) == (("x",), ("s",))
    with pytest.raises(StudentError, match=r"node 'NonZero#0' runs on the host \(why\), and 'n' has no static shape"):
        extract(student, {"NonZero#0": "why"})


def test_equal_students_have_equal_segments() -> None:
    body = "a = com.microsoft.Trilu(x) y = Neg(a)"
    model = written("(float[3,3] x) => (float[3,3] y) <float[3,3] a>", body)
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    made = [extract(student_of(model), {"Trilu#0": "why", "Neg#1": "why"})[1] for _ in range(2)]
    assert made[0] == made[1]
    inside = onnx.load_model_from_string(made[0][0].model)
    assert {(entry.domain, entry.version > 0) for entry in inside.opset_import} == {("", True), ("com.microsoft", True)}
