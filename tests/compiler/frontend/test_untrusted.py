"""Files that nobody's exporter wrote: each is one StudentError that says what and where, never another exception."""

import contextlib
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cases import TINY, TORCH, random, written
from hypothesis import given, settings
from hypothesis import strategies as st

from firsttoken_compiler.errors import StudentError
from firsttoken_compiler.frontend.check_graph import MAX_NODES
from firsttoken_compiler.frontend.importer import import_onnx
from firsttoken_compiler.frontend.onnx_file import MAX_OPSET, OnnxStudent, from_model, open_student
from firsttoken_compiler.passes.canonicalise import Canonicalise
from firsttoken_models.onnx_graph import build_graph
from firsttoken_models.weights import write_random_weights

FIXTURE = next(path for path in TORCH if path.stem == "llama-eager-opset18")
SIGNATURE = "(float[1,4,8] x) => (float[1,4,8] y)"


def product() -> onnx.ModelProto:
    return written(SIGNATURE, "y = MatMul(x, w)", w=random(8, 8))


def external(location: str = "w.bin", offset: Any = 0, length: Any = 256) -> onnx.ModelProto:
    """A product whose weight [8, 8] float32 lies outside the file."""
    model = product()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))
    return model


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "student.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def message(path: Path) -> str:
    with pytest.raises(StudentError) as caught:
        Canonicalise().run(import_onnx(open_student(path)))
    return str(caught.value)


# The file.


def test_a_missing_file_names_itself_and_the_built_in_students(tmp_path: Path) -> None:
    assert "absent.onnx is neither a file nor a built-in name" in message(tmp_path / "absent.onnx")
    assert "is neither a file" in message(tmp_path)
    assert "is neither a file" in message(tmp_path / "x\0y")


def test_an_empty_file_and_a_file_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "student.onnx"
    for data, expected in (
        (b"", "0 bytes"),
        (b"PK\x03\x04 zip", "not a readable ONNX file"),
        (b"\x00" * 64, "not a readable ONNX file"),
        (b"hello, world", "not a readable ONNX file"),
        (onnx.ModelProto(ir_version=10).SerializeToString(), "holds no graph"),
    ):
        path.write_bytes(data)
        assert expected in message(path)


@pytest.mark.parametrize("suffix", [".onnx", ".json", ".textproto", ".onnxtxt", ".onnxjson", ""])
def test_the_suffix_does_not_choose_the_parser(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"student{suffix}"
    path.write_bytes(product().SerializeToString())
    assert open_student(path).initializers["w"].shape == (8, 8)
    path.write_bytes(b"{ not a model }")
    assert "not a readable ONNX file" in message(path)


def test_an_unreadable_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    assert "is neither a file" in message(path)


def test_every_truncation_is_an_error_or_a_smaller_graph(tmp_path: Path) -> None:
    data = FIXTURE.read_bytes()
    path = tmp_path / "cut.onnx"
    ends = [*range(1, 60, 3), *np.linspace(60, len(data) - 1, 60).astype(int).tolist()]
    for end in ends:
        path.write_bytes(data[:end])
        message(path)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(at=st.integers(0, FIXTURE.stat().st_size - 1), new=st.binary(max_size=3), drop=st.integers(0, 40))
def test_damaged_bytes_are_an_error_or_harmless(tmp_path_factory: Any, at: int, new: bytes, drop: int) -> None:
    """Structure only: the tail of the file, behind the weights, and its head are hit more often than chance has it."""
    data = FIXTURE.read_bytes()
    at = at % 30_000 if at % 2 else at
    path = tmp_path_factory.getbasetemp() / "damaged.onnx"
    path.write_bytes(data[:at] + new + data[at + drop :])
    with contextlib.suppress(StudentError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Canonicalise().run(import_onnx(open_student(path)))


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.data())
def test_damaged_graphs_are_an_error_or_harmless(data: st.DataObject) -> None:
    """Fields that parse, but say something else: what bit flips rarely reach."""
    model = onnx.load(FIXTURE)
    for _ in range(data.draw(st.integers(1, 3))):
        damage(model.graph, data)
    with contextlib.suppress(StudentError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Canonicalise().run(import_onnx(from_model(model, FIXTURE.parent, "damaged")))


EXTENTS = st.sampled_from([0, 1, -1, 2, 3, 7, 16, 64, 2**31, 2**40, 2**62, -(2**63)])


def damage(graph: Any, data: st.DataObject) -> None:
    """One field of a node, a weight or an interface value."""
    node = graph.node[data.draw(st.integers(0, len(graph.node) - 1))]
    tensor = graph.initializer[data.draw(st.integers(0, len(graph.initializer) - 1))]
    value = data.draw(st.sampled_from([*graph.input, *graph.output])).type.tensor_type
    kind = data.draw(
        st.sampled_from(["drop", "wire", "unwire", "attribute", "operator", "shape", "type", "value", "interface"])
    )
    if kind == "drop":
        graph.node.remove(node)
    elif kind == "wire" and node.input:
        node.input[data.draw(st.integers(0, len(node.input) - 1))] = tensor.name
    elif kind == "unwire" and node.input:
        node.input[data.draw(st.integers(0, len(node.input) - 1))] = ""
    elif kind == "attribute" and node.attribute:
        attribute = node.attribute[data.draw(st.integers(0, len(node.attribute) - 1))]
        if attribute.ints:
            attribute.ints[0] = data.draw(EXTENTS)
        else:
            attribute.i = data.draw(EXTENTS)
    elif kind == "operator":
        node.op_type = graph.node[data.draw(st.integers(0, len(graph.node) - 1))].op_type
    elif kind == "shape" and tensor.dims:
        tensor.dims[data.draw(st.integers(0, len(tensor.dims) - 1))] = data.draw(EXTENTS)
    elif kind == "type":
        tensor.data_type = data.draw(st.sampled_from([0, 1, 2, 6, 7, 8, 9, 10, 11, 14, 16, 17, 21, 22, 99]))
    elif kind == "value" and tensor.data_type == onnx.TensorProto.INT64 and len(tensor.raw_data) >= 8:
        number = data.draw(EXTENTS).to_bytes(8, "little", signed=True)
        tensor.raw_data = number + tensor.raw_data[8:]
    elif kind == "interface" and value.shape.dim:
        value.shape.dim[data.draw(st.integers(0, len(value.shape.dim) - 1))].dim_value = data.draw(EXTENTS)


# The graph.


@pytest.mark.parametrize("opset", [0, 1, 10, MAX_OPSET + 1, 99, 2**40])
def test_opsets_out_of_range(opset: int, tmp_path: Path) -> None:
    model = product()
    model.opset_import[0].version = opset
    assert f"ONNX opset {opset}, supported are 11 to {MAX_OPSET}" in message(saved(model, tmp_path))


def test_no_opset_and_two_opsets(tmp_path: Path) -> None:
    model = product()
    model.opset_import.add(domain="ai.onnx", version=23)
    assert "ONNX opset 18 and 23" in message(saved(model, tmp_path))
    del model.opset_import[:]
    assert "ONNX opset none" in message(saved(model, tmp_path))
    model.opset_import.add(domain="com.microsoft", version=1)
    assert "ONNX opset none" in message(saved(model, tmp_path))


def test_an_unknown_domain_is_no_domain_of_ours(tmp_path: Path) -> None:
    model = product()
    model.graph.node[0].domain = "evil"
    model.opset_import.add(domain="evil", version=1)
    assert "operator evil::MatMul of node 'MatMul#0' is unknown to ONNX opset 18" in message(saved(model, tmp_path))


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("b = Add(a, x) a = Add(x, x) y = Add(b, b)", "node 'Add#0' reads 'a', which no earlier node"),
        ("a = Add(b, x) b = Add(a, x) y = Add(b, b)", "node 'Add#0' reads 'b', which no earlier node"),
        ("y = Add(y, x)", "node 'Add#0' reads 'y', which no earlier node"),
        ("a = Add(x, x) a = Mul(x, x) y = Add(a, a)", "node 'Mul#1' makes 'a', which is made before it"),
        ("x = Add(x, x) y = Add(x, x)", "node 'Add#0' makes 'x', which is made before it"),
        ("w = Add(x, x) y = MatMul(x, w)", "node 'Add#0' makes 'w', which is made before it"),
        ("a = Add(x, x)", "graph output 'y' is made by no node"),
    ],
)
def test_wiring(body: str, expected: str, tmp_path: Path) -> None:
    model = product()
    other = onnx.parser.parse_graph(f"g {SIGNATURE} {{ {body} }}")
    del model.graph.node[:]
    model.graph.node.extend(other.node)
    assert expected in message(saved(model, tmp_path))


def test_repeated_and_missing_names(tmp_path: Path) -> None:
    for field in ("input", "output", "initializer"):
        model = product()
        values = getattr(model.graph, field)
        values.append(values[0])
        assert "named" in message(saved(model, tmp_path))
        model = product()
        getattr(model.graph, field)[0].name = ""
        assert "no name" in message(saved(model, tmp_path))


def test_a_node_without_results_is_an_error(tmp_path: Path) -> None:
    model = product()
    model.graph.node.add(op_type="Add", input=["x", "x"], name="silent")
    assert "node 'silent' has no output" in message(saved(model, tmp_path))


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ('y = Reshape("", s)', "input 0 is marked single but has an empty string"),
        ('y = Concat<axis=0>(x, "")', "one of its inputs has no name"),
        ("y = Add(x)", "has input size 1 not in range"),
        ("y = Add(x, x, x)", "has input size 3 not in range"),
        ("y = Add<bogus=1>(x, x)", "Unrecognized attribute: bogus"),
        ("y = Concat(x, x)", "Required attribute 'axis' is missing"),
    ],
)
def test_nodes_that_their_operator_does_not_allow(body: str, expected: str, tmp_path: Path) -> None:
    """TVM would follow an absent input into a segmentation fault."""
    model = written(SIGNATURE, body.replace('""', "absent"), s=np.array([1, 4, 8]))
    for node in model.graph.node:
        node.input[:] = ["" if name == "absent" else name for name in node.input]
    text = message(saved(model, tmp_path))
    assert f"node '{model.graph.node[0].op_type}#0' is malformed" in text
    assert expected in text


def test_too_many_nodes(tmp_path: Path) -> None:
    model = product()
    model.graph.node.extend([model.graph.node[0]] * MAX_NODES)
    assert f"{MAX_NODES + 1} nodes, the limit is {MAX_NODES}" in message(saved(model, tmp_path))


# Weights.


@pytest.mark.parametrize(
    "shape", [[2**62, 2**62], [2**40, 2**40], [2**32, 2**32], [2**33], [-1, 8], [-8, -8], [2**63 - 1], [1] * 9]
)
def test_declared_shapes_beyond_any_memory(shape: list[int], tmp_path: Path) -> None:
    model = product()
    model.graph.initializer[0].dims[:] = shape
    assert "weight w declares shape" in message(saved(model, tmp_path))


def test_embedded_data_that_does_not_fit_its_shape(tmp_path: Path) -> None:
    model = product()
    for data in (b"", bytes(12), bytes(300)):
        model.graph.initializer[0].raw_data = data
        with pytest.raises(StudentError, match=r"weight w of shape \[8, 8\], type 1, does not fit its data"):
            open_student(saved(model, tmp_path))


def test_embedded_constants_are_checked_at_import(tmp_path: Path) -> None:
    model = written(SIGNATURE, "y = Reshape(x, s)", s=np.array([1, 4, 8]))
    model.graph.initializer[0].raw_data = bytes(16)
    assert "weight s of shape [3]" in message(saved(model, tmp_path))


@pytest.mark.parametrize("kind", [0, 8, 99])
def test_types_that_are_no_numbers(kind: int, tmp_path: Path) -> None:
    model = product()
    model.graph.initializer[0].data_type = kind
    assert "student: " in message(saved(model, tmp_path)) or "unknown ONNX element type" in message(
        saved(model, tmp_path)
    )


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("../w.bin", "outside the model's folder"),
        ("a/../../w.bin", "outside the model's folder"),
        ("/etc/passwd", "outside the model's folder"),
        ("", "outside the model's folder"),
        (".", "outside the model's folder"),
        ("nul\0byte", "is no file name"),
        ("x" * 5000, "is no file name"),
    ],
)
def test_external_data_outside_the_folder_is_refused_at_once(location: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(StudentError, match=expected):
        open_student(saved(external(location), tmp_path))


def test_links_are_followed_before_the_folder_is_compared(tmp_path: Path) -> None:
    folder, secret = tmp_path / "model", tmp_path / "secret.bin"
    folder.mkdir()
    secret.write_bytes(bytes(256))
    (folder / "w.bin").symlink_to(secret)
    with pytest.raises(StudentError, match="outside the model's folder"):
        open_student(saved(external(), folder))
    (folder / "w.bin").unlink()
    (folder / "w.bin").symlink_to("w.bin")
    with pytest.raises(StudentError, match="is no file name"):
        open_student(saved(external(), folder))
    (folder / "w.bin").unlink()
    (folder / "data").mkdir()
    (folder / "data" / "w.bin").write_bytes(random(8, 8).tobytes())
    (folder / "w.bin").symlink_to("data/w.bin")
    np.testing.assert_array_equal(open_student(saved(external(), folder)).array("w"), random(8, 8))


@pytest.mark.parametrize(
    ("offset", "length", "size"),
    [(0, 255, 256), (0, 257, 512), (1, 256, 256), (-1, 256, 512), (2**62, 256, 256), (0, -1, 256), (0, None, 255)],
)
def test_ranges_that_do_not_fit_the_file(offset: int, length: int | None, size: int, tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(size))
    with pytest.raises(
        StudentError, match=rf"weight w has shape \[8, 8\] and needs 256 bytes, but w.bin \({size} bytes\)"
    ):
        open_student(saved(external("w.bin", offset, length), tmp_path))


@pytest.mark.parametrize(("offset", "length"), [("x", 256), (0, "many"), ("0x10", 256), (1.5, 256)])
def test_malformed_ranges(offset: Any, length: Any, tmp_path: Path) -> None:
    with pytest.raises(StudentError, match="weight w has malformed external data"):
        open_student(saved(external("w.bin", offset, length), tmp_path))


def test_external_data_without_a_location(tmp_path: Path) -> None:
    model = external()
    del model.graph.initializer[0].external_data[:]
    with pytest.raises(StudentError, match="malformed external data"):
        open_student(saved(model, tmp_path))


def test_external_data_reads_what_was_written(tmp_path: Path) -> None:
    store = write_random_weights(TINY, tmp_path)
    student: OnnxStudent = open_student(saved(build_graph(TINY, tokens=2, past=0, weights=store), tmp_path))
    for name in store.slots:
        assert student.has_data(name)
        np.testing.assert_array_equal(student.array(name), store.tensor(name))


def test_absent_external_data_is_an_error_only_when_it_is_read(tmp_path: Path) -> None:
    student = open_student(saved(external(), tmp_path))
    assert not student.has_data("w")
    Canonicalise().run(import_onnx(student))
    with pytest.raises(StudentError, match=r"weight w is kept in w\.bin, which is not beside the model: copy it there"):
        student.array("w")
    (tmp_path / "w.bin").mkdir()
    assert not student.has_data("w")


def test_metadata() -> None:
    model = build_graph(TINY, tokens=2, past=0)
    assert from_model(model, Path(), "tiny").metadata["firsttoken.tokens"] == "2"
