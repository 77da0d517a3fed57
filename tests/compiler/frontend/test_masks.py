"""Boolean masks of Attention as masks that are added: the same attention, one Where per mask."""

from pathlib import Path

import numpy as np
import onnx
from cases import whole, written
from onnx.reference import ReferenceEvaluator

from firsttoken_compiler.frontend.masks import add_masks
from firsttoken_compiler.frontend.onnx_file import from_model

SIGNATURE = "(float[1,2,4,8] q, float[1,2,4,8] k, bool[1,1,4,4] a, bool[1,1,4,4] b) => (float[1,2,4,8] y)"


def model(body: str, signature: str = SIGNATURE, **arrays: np.ndarray) -> onnx.ModelProto:
    return onnx.shape_inference.infer_shapes(written(signature, body, opset=23, **arrays))


def test_one_where_per_mask_and_the_same_numbers() -> None:
    body = "m = And(a, b) h = Attention(q, k, k, m) y = Attention(h, k, k, m)"
    student = from_model(model(body), Path(), "written")
    changed = add_masks(student)
    assert [node.op_type for node in changed.graph.node] == ["And", "Where", "Attention", "Attention"]
    r = np.random.default_rng(0)
    feeds = {name: r.standard_normal((1, 2, 4, 8)).astype(np.float32) for name in "qk"}
    feeds |= {name: np.tril(np.ones((1, 1, 4, 4), bool)) for name in "ab"}
    (expected,) = ReferenceEvaluator(model(body)).run(None, feeds)
    (actual,) = ReferenceEvaluator(whole(changed)).run(None, feeds)
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)


def test_masks_that_are_added_or_constant_are_left_alone() -> None:
    added = "(float[1,2,4,8] q, float[1,2,4,8] k, float[1,1,4,4] a) => (float[1,2,4,8] y)"
    alone = "(float[1,2,4,8] q) => (float[1,2,4,8] y)"
    for signature, body, arrays in (
        (added, "y = Attention(q, k, k, a)", {}),
        (alone, "y = Attention(q, q, q, c)", {"c": np.tril(np.ones((4, 4), bool))}),
        (alone, "y = Attention(q, q, q)", {}),
    ):
        student = from_model(model(body, signature, **arrays), Path(), "written")
        assert add_masks(student) is student
