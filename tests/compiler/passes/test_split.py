"""The split between NPU and host is found by trying, ends, and says what it left and why."""

import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from cases import random, written
from interpret import calls
from on_host import interpret_split

from firsttoken_compiler.errors import StudentError
from firsttoken_compiler.frontend.onnx_file import OnnxStudent, from_model
from firsttoken_compiler.passes.split import split

REVERSE = "ReverseSequence<batch_axis=0, time_axis=1>"


def student_of(signature: str, body: str, **arrays: np.ndarray) -> OnnxStudent:
    model = written(signature, body, **arrays)
    return from_model(onnx.shape_inference.infer_shapes(model, data_prop=True), Path(), "split")


MIXED = f"a = MatMul(x, w) b = {REVERSE}(a, n) c = CumSum(b, one) d = MatMul(c, w) y = CumSum(d, one)"
ARRAYS = {"w": random(8, 8), "n": np.array([3]), "one": np.array(1)}
SIGNATURE = "(float[1,4,8] x) => (float[1,4,8] y)"


def test_a_graph_that_the_npu_covers_has_no_segments() -> None:
    heard: list[str] = []
    student = student_of(SIGNATURE, "y = MatMul(x, w)", w=random(8, 8))
    imported, canonical = split(student, fallback=False, done=lambda name, _: heard.append(name))
    assert (imported.segments, canonical.hosts, canonical.left) == ((), {}, {})
    assert heard == ["import", "canonicalise"]


def test_what_is_left_over_becomes_segments_with_reasons() -> None:
    imported, canonical = split(student_of(SIGNATURE, MIXED, **ARRAYS), fallback=True)
    first, second = imported.segments
    assert first.nodes == ("ReverseSequence#1", "CumSum#2")
    assert first.reason == (
        "no NPU operator for ReverseSequence (ReverseSequence); no NPU operator for this use (CumSum)"
    )
    assert second.nodes == ("CumSum#4",)
    assert not canonical.left
    assert [len(calls(canonical.module, f"npu.{kind}")) for kind in ("linear", "host")] == [2, 2]
    assert set(canonical.hosts) == {0, 1}
    assert canonical.hosts[0].results == ((1, 4, 8),)
    assert canonical.hosts[0].operands[0] == ((1, 4, 8), (0, 8, 1))


def test_passes_are_heard_once_however_often_they_were_tried() -> None:
    heard: list[str] = []
    split(student_of(SIGNATURE, MIXED, **ARRAYS), fallback=True, done=lambda name, _: heard.append(name))
    assert heard == ["import", "canonicalise"]


def test_without_fallback_all_that_is_left_is_one_error() -> None:
    heard: list[str] = []
    with pytest.raises(StudentError) as caught:
        split(student_of(SIGNATURE, MIXED, **ARRAYS), fallback=False, done=lambda name, _: heard.append(name))
    message = str(caught.value)
    assert message.startswith("split: 3 nodes cannot run on the NPU:")
    assert "ReverseSequence (no NPU operator for ReverseSequence): ReverseSequence#1" in message
    assert re.search(r"CumSum \(no NPU operator for .*\): CumSum#4, CumSum#2", message)
    assert heard == []


def test_numbers_survive_the_split() -> None:
    imported, canonical = split(student_of(SIGNATURE, MIXED, **ARRAYS), fallback=True)
    x = np.random.default_rng(2).standard_normal((1, 4, 8)).astype(np.float32)
    a = x[0] @ ARRAYS["w"]
    c = np.cumsum(np.concatenate([a[2::-1], a[3:]]), axis=0)
    expected = np.cumsum(c @ ARRAYS["w"], axis=0)
    np.testing.assert_allclose(interpret_split(imported, canonical, {"x": x})["y"], expected, rtol=1e-5, atol=1e-5)


def test_a_graph_of_the_host_alone() -> None:
    imported, canonical = split(student_of(SIGNATURE, "a = CumSum(x, one) y = CumSum(a, one)", **{"one": np.array(1)}),
                                fallback=True)  # fmt: skip
    assert [segment.nodes for segment in imported.segments] == [("CumSum#0", "CumSum#1")]
    x = np.ones((1, 4, 8), np.float32)
    found = interpret_split(imported, canonical, {"x": x})["y"].reshape(4, 8)
    assert found[:, 0].tolist() == [1, 3, 6, 10]


def test_a_student_is_not_changed_by_its_split() -> None:
    student = student_of(SIGNATURE, MIXED, **ARRAYS)
    before = student.model.SerializeToString(deterministic=True)
    first, second = (split(student, fallback=True) for _ in range(2))
    assert student.model.SerializeToString(deterministic=True) == before
    assert first[0].segments == second[0].segments
    assert str(first[1].module) == str(second[1].module)


def test_a_node_may_be_named_like_a_segment() -> None:
    for number in (0, 1, 2):
        model = onnx.shape_inference.infer_shapes(written(SIGNATURE, MIXED, **ARRAYS), data_prop=True)
        model.graph.node[number].name = "host.0"
        imported, canonical = split(from_model(model, Path(), "split"), fallback=True)
        assert len(imported.segments) == 2
        assert not canonical.left
