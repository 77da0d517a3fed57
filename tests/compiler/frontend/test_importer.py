"""Import: graphs of students and of torch, weights that are never read, names, and operators that are listed."""

import resource
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cases import TINY, TORCH, imported_file, random, written

from firsttoken.student import StudentConfig
from firsttoken_compiler.errors import StudentError
from firsttoken_compiler.frontend.importer import import_onnx
from firsttoken_compiler.frontend.onnx_file import from_model, open_student
from firsttoken_compiler.passes.canonicalise import Canonicalise
from firsttoken_compiler.passes.split import split
from firsttoken_compiler.tvm.api import shape_of
from firsttoken_models.onnx_graph import build_graph
from firsttoken_models.students import DECODERS

SOME = ("deepseek-r1-distill-qwen-1.5b", "smollm2-135m", "qwen3-4b")
"""Built-in students: biases and an own head, most layers for its size, norms of heads."""

LARGE = """
import resource, sys, time
from pathlib import Path
from firsttoken_compiler.frontend.importer import import_onnx
from firsttoken_compiler.frontend.onnx_file import open_student
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.process_time()
imported = import_onnx(open_student(Path(sys.argv[1])))
seconds = time.process_time() - start
print(seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, len(imported.weights))
"""


@pytest.mark.parametrize(("tokens", "past"), [(64, 0), (1, 1024)])
@pytest.mark.parametrize("config", [DECODERS[name] for name in SOME], ids=lambda config: config.name)
def test_large_students_import_without_their_weights(
    config: StudentConfig, tokens: int, past: int, tmp_path: Path
) -> None:
    """Under 1 s and far under 1 GiB more memory, beside a weights file that does not exist."""
    path = tmp_path / "student.onnx"
    path.write_bytes(build_graph(config, tokens=tokens, past=past).SerializeToString())
    done = subprocess.run([sys.executable, "-c", LARGE, str(path)], capture_output=True, text=True, check=True)
    seconds, mebibytes, weights = map(float, done.stdout.split())
    assert seconds < 1.0
    assert mebibytes < 1024
    assert weights > 7 * config.layers
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("path", TORCH, ids=lambda path: path.stem)
def test_torch_exports(path: Path) -> None:
    imported = imported_file(path)
    assert imported.inputs == ("input_ids",)
    floats = {t.name for t in imported.student.graph.initializer if t.data_type == onnx.TensorProto.FLOAT}
    assert "model.model.norm.weight" in imported.weights.values()
    assert set(imported.weights.values()) <= floats
    nodes = {node.name for node in imported.student.graph.node}
    assert set(imported.origin.values()) <= nodes
    assert [int(extent) for extent in imported.module["main"].ret_ty.shape] == [1, 16, 128]


def test_parameters_are_the_inputs_then_the_weights() -> None:
    imported = import_onnx(from_model(build_graph(TINY, tokens=3, past=4), Path(), "tiny"))
    parameters = list(imported.module["main"].params)
    inputs = parameters[: len(imported.inputs)]
    declared = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in imported.student.graph.input}
    assert imported.inputs == tuple(declared)
    assert [list(shape_of(p)) for p in inputs] == list(declared.values())
    weights = parameters[len(imported.inputs) :]
    assert [p.name for p in weights] == list(imported.weights)
    for parameter in weights:
        assert shape_of(parameter) == imported.student.initializers[imported.weights[parameter.name]].shape


def test_old_files_list_weights_as_inputs_too() -> None:
    model = written("(float[1,4,8] x, float[8,6] w) => (float[1,4,6] y)", "y = MatMul(x, w)", w=random(8, 6))
    imported = import_onnx(from_model(model, Path(), "old"))
    assert imported.inputs == ("x",)
    assert set(imported.weights.values()) == {"w"}


def test_names_of_weights_stay_apart() -> None:
    """Names that TVM spells alike remain two weights."""
    body = "a = MatMul(x, u) y = MatMul(a, v)"
    model = written("(float[1,4,8] x) => (float[1,4,8] y)", body, u=random(8, 8), v=random(8, 8, seed=2))
    for old, new in (("u", "a.b"), ("v", "a_b")):
        for tensor in model.graph.initializer:
            tensor.name = new if tensor.name == old else tensor.name
        for node in model.graph.node:
            node.input[:] = [new if name == old else name for name in node.input]
    imported = import_onnx(from_model(model, Path(), "names"))
    assert sorted(imported.weights.values()) == ["a.b", "a_b"]
    assert len(imported.module["main"].params) == 3


def test_every_value_remembers_its_node() -> None:
    imported = import_onnx(from_model(build_graph(TINY, tokens=3, past=0), Path(), "tiny"))
    bindings = [b for block in imported.module["main"].body.blocks for b in block.bindings]
    nodes = {node.name for node in imported.student.graph.node}
    unknown = [b.var.name for b in bindings[:-1] if imported.origin.get(b.var.name) not in nodes]
    assert not unknown

REVERSED = "ReverseSequence<batch_axis=0, time_axis=1>(x, n)"
"""Nothing that the NPU has an operator for."""


def refused(model: onnx.ModelProto) -> str:
    with pytest.raises(StudentError) as caught:
        import_onnx(from_model(model, Path(), "bad"))
    return str(caught.value)


def unreadable(model: onnx.ModelProto) -> dict[str, str]:
    """Nodes that the importer leaves to the host; without the fallback they are an error that names each of them."""
    student = from_model(model, Path(), "bad")
    left = import_onnx(student).unreadable
    with pytest.raises(StudentError) as caught:
        split(student, fallback=False)
    assert str(caught.value).startswith(f"bad: {len(left)} nodes cannot run on the NPU:")
    for reason in left.values():
        assert f"({reason})" in str(caught.value)
    return left


def test_every_unknown_operator_is_listed_with_all_its_nodes() -> None:
    names = [f"v{i}" for i in range(10)]
    body = " ".join(f"{name} = {REVERSED}" for name in names) + " a = com.microsoft.Trilu(x) y = Add(v0, a)"
    typed = ", ".join(f"float[1,4,8] {name}" for name in (*names, "a"))
    model = written(f"(float[1,4,8] x) => (float[1,4,8] y) <{typed}>", body, n=np.array([3]))
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    left = unreadable(model)
    assert left == {
        **{f"ReverseSequence#{i}": "no NPU operator for ReverseSequence" for i in range(10)},
        "Trilu#10": "no NPU operator for com.microsoft.Trilu",
    }
    with pytest.raises(StudentError) as caught:
        split(from_model(model, Path(), "bad"), fallback=False)
    message = str(caught.value)
    assert "ReverseSequence (no NPU operator for ReverseSequence): ReverseSequence#0, ReverseSequence#1, " in message
    assert "ReverseSequence#7 and 2 more" in message
    assert "com.microsoft::Trilu (no NPU operator for com.microsoft.Trilu): Trilu#10" in message
    assert "remedy: leave them to the host (without --no-fallback), or export the student" in message


def test_what_reads_a_result_without_a_shape_runs_in_the_same_call_of_the_host() -> None:
    """Without a shape there is no memory that the result could lie in."""
    model = written("(float[1,4,8] x) => (float[1,4,8] y)", f"v = {REVERSED} y = Add(v, x)", n=np.array([3]))
    assert unreadable(model) == {
        "ReverseSequence#0": "no NPU operator for ReverseSequence",
        "Add#1": "the shape of 'v' depends on data",
    }
    (segment,) = split(from_model(model, Path(), "one"), fallback=True)[0].segments
    assert segment.nodes == ("ReverseSequence#0", "Add#1")
    assert segment.outputs == ("y",)


def test_a_result_without_a_shape_is_no_output_of_a_graph() -> None:
    message = refused(written("(float[1,4,8] x) => (float[1,4,k] y)", "y = ReverseSequence(x, n)", n=np.array([3])))
    assert "node 'ReverseSequence#0' cannot run on the NPU (no NPU operator for ReverseSequence)" in message
    assert "its result 'y', which the graph returns, has no static shape" in message


CONTROLLED = {
    "If": "y = If(c) <then_branch = t () => (float[1,4,8] r) { r = Neg(x) }, "
    "else_branch = e () => (float[1,4,8] r) { r = Abs(x) }>",
    "Loop": "y = Loop(n, c, x) <body = b (int64 i, bool go, float[1,4,8] v) => (bool go_on, float[1,4,8] w) "
    "{ go_on = Identity(go) w = Neg(v) }>",
    "Scan": "y = Scan(x) <num_scan_inputs = 1, body = b (float[4,8] v) => (float[4,8] w) { w = Neg(v) }>",
}


@pytest.mark.parametrize("op_type", CONTROLLED)
def test_control_flow_is_left_to_the_host(op_type: str) -> None:
    arrays = {"n": np.array(3)} if op_type == "Loop" else {}
    model = written("(float[1,4,8] x, bool c) => (float[1,4,8] y)", CONTROLLED[op_type], **arrays)
    onnx.checker.check_model(model)
    assert unreadable(model) == {f"{op_type}#0": f"no control flow on the NPU: {op_type}"}


@pytest.mark.parametrize("op_type", CONTROLLED)
def test_malformed_control_flow_is_refused(op_type: str) -> None:
    model = written("(float[1,4,8] x, bool c, int64 n) => (float[1,4,8] y)", CONTROLLED[op_type])
    model.graph.node[0].attribute[0].name = "surprise"
    assert f"node '{op_type}#0' is malformed" in refused(model)


def test_messages_print_control_characters_escaped() -> None:
    model = written("(float[1,4,8] x) => (float[1,4,8] y)", f"y = {REVERSED}", n=np.array([3]))
    model.graph.node[0].name = "evil\x1b[31m\nname"
    assert unreadable(model) == {"evil\x1b[31m\nname": "no NPU operator for ReverseSequence"}
    with pytest.raises(StudentError) as caught:
        split(from_model(model, Path(), "bad"), fallback=False)
    assert "evil\\x1b[31m\\nname" in str(caught.value)
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("shape", ["N,4,8", "1,4,?", "1,0,8"])
def test_dynamic_and_empty_inputs_are_refused(shape: str) -> None:
    same = shape.replace("?", "q")
    message = refused(written(f"(float[{same}] x) => (float[{same}] y)", "y = Identity(x)"))
    assert "input 'x' has the dynamic or empty dimensions" in message
    assert "static shapes" in message


def test_an_input_without_rank_or_type_is_refused() -> None:
    model = written("(float[1,4,8] x) => (float[1,4,8] y)", "y = Identity(x)")
    model.graph.input[0].type.tensor_type.ClearField("shape")
    assert "input 'x'" in refused(model)
    model.graph.input[0].type.Clear()
    assert "input 'x'" in refused(model)
    model.graph.input[0].type.sequence_type.elem_type.tensor_type.elem_type = 1
    model.graph.output[0].type.CopyFrom(model.graph.input[0].type)
    assert "input 'x'" in refused(model)


@pytest.mark.parametrize(
    ("body", "opset", "message"),
    [
        ("y = RotaryEmbedding<interleaved=1, num_heads=2>(x, c, c)", 23, "interleaved"),
        ("y = Attention<q_num_heads=2, kv_num_heads=2, softcap=2.0>(x, x, x)", 23, "Attention with softcap=2.0"),
        ("y = RMSNormalization<axis=1>(x, g)", 23, "over more than the last axis"),
    ],
)
def test_variants_of_known_operators_are_left_by_node_and_reason(body: str, opset: int, message: str) -> None:
    arrays: dict[str, Any] = {"c": random(1, 4, 2)} if "(x, c" in body else {"g": random(8)} if "(x, g" in body else {}
    left = unreadable(written("(float[1,4,8] x) => (float[1,4,8] y)", body, opset, **arrays))
    ((node, reason),) = left.items()
    assert node == body.split()[2].split("<")[0] + "#0"
    assert message in reason


@pytest.mark.parametrize("index", [99, 3, -4, 2**40, -(2**63)])
@pytest.mark.parametrize("values", [np.array([1, 4, 8]), np.ones((3, 8), np.float32)], ids=["shape", "table"])
def test_gather_far_out_of_range_is_an_error(values: np.ndarray, index: int) -> None:
    body = "g = Gather(values, index) " + ("y = Reshape(x, g)" if values.ndim == 1 else "y = Add(x, g)")
    model = written("(float[1,4,8] x) => (float[1,4,8] y)", body, values=values, index=np.array(index))
    shape = "s = Shape(x) g = Gather(s, index) y = Reshape(x, g)"
    for bad in (model, written("(float[1,4,8] x) => (float[1,4,8] y)", shape, index=np.array([index]))):
        with pytest.raises(StudentError):
            Canonicalise().run(import_onnx(from_model(bad, Path(), "bad")))


@pytest.mark.parametrize(
    "body",
    [
        "c = ConstantOfShape(n) y = Add(x, c)",
        "c = Range(zero, n0, one) d = Cast<to=1>(c) y = Add(x, d)",
        "c = Tile(t, n) y = Add(x, c)",
        "c = Expand(t, n) y = Add(x, c)",
    ],
)
def test_huge_constants_are_refused_before_they_are_made(body: str) -> None:
    arrays = {"n": np.array([2**31]), "n0": np.array(2**31), "zero": np.array(0), "one": np.array(1),
              "t": np.ones(1, np.float32)}  # fmt: skip
    used = {name: array for name, array in arrays.items() if f"{name})" in body or f"{name}," in body}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "bad: " in refused(written("(float[1,4,8] x) => (float[1,4,8] y)", body, **used))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 * 1024


@pytest.mark.parametrize("operator", ["Identity(v)", "Mul(v, v)", "Add(v, v)", "Reshape(v, s)", "MatMul(v, w)"])
def test_deep_chains(operator: str) -> None:
    """Two thousand operators in a row: no recursion, no quadratic time."""
    names = ["x", *(f"v{i}" for i in range(1999)), "y"]
    body = " ".join(f"{b} = {operator.replace('v', a)}" for a, b in pairwise(names))
    arrays = {"s": np.array([1, 4, 8]), "w": random(8, 8)}
    used = {name: array for name, array in arrays.items() if f", {name})" in operator}
    imported = import_onnx(from_model(written("(float[1,4,8] x) => (float[1,4,8] y)", body, **used), Path(), "deep"))
    assert len(imported.student.graph.node) == 2000


def test_a_student_that_is_imported_can_be_imported_again() -> None:
    student = open_student(TORCH[0])
    assert str(import_onnx(student).module) == str(import_onnx(student).module)


def test_refusals_leave_nothing_on_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    """TVM announces blocks that an exception left open; it has none to announce."""
    body = "a = MatMul(x, w) y = Reshape(a, s)"
    model = written("(float[1,4,8] x) => (float[1,5,8] y)", body, w=random(8, 8), s=np.array([1, 5, 8]))
    assert list(unreadable(model)) == ["Reshape#1"]
    assert "dynamic or empty" in refused(written("(float[N,8] x) => (float[N,8] y)", "y = Neg(x)"))
    assert capfd.readouterr() == ("", "")
