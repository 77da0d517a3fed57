"""Matching against the bindings around a value finds what matching against all of them does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from firsttoken.subject import subject_of
from firsttoken_compiler.frontend.contrib import prepare
from firsttoken_compiler.frontend.importer import Imported, import_onnx
from firsttoken_compiler.frontend.masks import add_masks
from firsttoken_compiler.frontend.onnx_file import OnnxStudent, from_model
from firsttoken_compiler.frontend.specialise import specialise
from firsttoken_compiler.passes import neighbourhood
from firsttoken_compiler.passes.canonicalise import Canonicalise
from firsttoken_compiler.passes.patterns import Context, PatternRule
from firsttoken_compiler.passes.rules import RULES
from firsttoken_compiler.tvm.api import is_op, tvm, wildcard

CHAIN = 60


def imported(student: OnnxStudent) -> Imported:
    return import_onnx(prepare(add_masks(specialise(student))))


def chain(count: int, folder: Path) -> OnnxStudent:
    """Additions one after the other."""
    nodes = [helper.make_node("Add", [f"x{i}", "b"], [f"x{i + 1}"], name=f"add{i}") for i in range(count)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 8]) for name in ("x0", f"x{count}")]
    bias = numpy_helper.from_array(np.ones((8,), np.float32), "b")
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], [bias])
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    return from_model(model, folder, "chain")


@pytest.mark.parametrize("name", ["smollm2-135m", "minilm-l6", "phi-3.5-mini"])
def test_the_canonical_form_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = imported(subject_of(name).open(8, 0))
    monkeypatch.setattr(neighbourhood, "WHOLE", 1 << 30)
    whole = Canonicalise().attempt(graph)
    monkeypatch.setattr(neighbourhood, "WHOLE", 0)
    near = Canonicalise().attempt(graph)
    tvm.ir.assert_structural_equal(near.module, whole.module, map_free_vars=True)
    assert (str(near.module), near.nodes) == (str(whole.module), whole.nodes)


def test_what_a_match_is_handed_does_not_grow_with_the_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed: list[int] = []
    given = Context.bindings_for

    def counted(self: Context, pattern: object, value: object) -> object:
        handed.append(len(found := given(self, pattern, value)))
        return found

    monkeypatch.setattr(Context, "bindings_for", counted)
    monkeypatch.setattr(neighbourhood, "WHOLE", 0)
    Canonicalise().attempt(imported(chain(CHAIN, tmp_path)))
    assert len(handed) > CHAIN
    assert max(handed) < CHAIN / 4


def test_every_pattern_has_a_depth() -> None:
    patterns = [rule.pattern for rules in RULES.values() for rule in rules if isinstance(rule, PatternRule)]
    assert len(patterns) > 20
    assert all(neighbourhood.depth_of(pattern) for pattern in patterns)


def test_depth_counts_nested_calls() -> None:
    inner = is_op("relax.add")(wildcard(), wildcard())
    assert neighbourhood.depth_of(wildcard()) == 0
    assert neighbourhood.depth_of(inner) == 1
    assert neighbourhood.depth_of(is_op("relax.multiply")(wildcard(), inner | wildcard())) == 3
    assert neighbourhood.depth_of(wildcard().has_dtype("float32")) is None
