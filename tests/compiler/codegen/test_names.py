"""Operators' names, dimensions and multiply-accumulates."""

from __future__ import annotations

import pytest

from firsttoken_compiler.codegen.names import OperatorNames, dimensions, macs, module_path
from firsttoken_compiler.isa.types import Dtype
from firsttoken_compiler.passes.lower import Launch
from firsttoken_compiler.schedule.spec import Arg, KernelSpec

MATRIX = Arg((5, 24), Dtype.I8)
LINEAR = KernelSpec("linear", (("k", 24), ("n", 40)), (MATRIX, Arg((24, 40), Dtype.I4)), (Arg((5, 40), Dtype.F16),))
Q = Arg((5, 24), Dtype.F16)
CACHED = KernelSpec("attention", (("heads", 3), ("kv_heads", 1)), (Q, *[Arg((1, 9, 8), Dtype.F16)] * 2), (Q,))
PLAIN = KernelSpec("attention", (("heads", 3), ("kv_heads", 1)), (Q, *[Arg((5, 8), Dtype.F16)] * 2), (Q,))
ADD = KernelSpec("add", (), (Q, Q), (Q,))


@pytest.mark.parametrize(
    ("node", "path"),
    [
        ("/model/layers.3/mlp/gate_proj/MatMul", "layers.3.mlp.gate_proj"),
        ("/lm_head/MatMul", "lm_head"),
        ("/model/Slice", "Slice"),
        ("node_linear_7", "node_linear_7"),
        ("", ""),
    ],
)
def test_module_path(node: str, path: str) -> None:
    assert module_path(node) == path


def test_multiply_accumulates() -> None:
    assert macs(LINEAR) == 5 * 24 * 40
    assert macs(CACHED) == 2 * 3 * 5 * 9 * 8
    assert macs(PLAIN) == 2 * 3 * 5 * 5 * 8
    assert macs(ADD) == 0
    assert dimensions(CACHED) == (5, 9, 8, 3)
    assert dimensions(ADD) == (5, 24, 0, 1)


def test_every_name_once_with_its_nodes_and_range() -> None:
    names = OperatorNames({"v": ("/model/layers.0/mlp/up_proj/MatMul", "/model/layers.0/mlp/up_proj/Add")})
    first = names.describe(Launch(LINEAR, (), (), "v"), "8x8x8", 0, 7)
    assert (first.name, first.module, first.onnx_nodes[1]) == (
        "layers.0.mlp.up_proj", "layers.0.mlp", "/model/layers.0/mlp/up_proj/Add"
    )  # fmt: skip
    assert (first.first, first.last, first.m, first.n, first.k, first.w_bits, first.a_bits) == (0, 7, 5, 40, 24, 4, 8)
    assert first.tile == "8x8x8"
    assert names.describe(Launch(LINEAR, (), (), "v"), "", 7, 8).name == "layers.0.mlp.up_proj#2"
    assert names.describe(Launch(CACHED, (), (), "v"), "", 8, 9).name == "layers.0.mlp.up_proj.attention"
    lost = names.describe(Launch(ADD, (), (), "w"), "", 9, 10)
    assert (lost.name, lost.module, lost.onnx_nodes) == ("add", "", ())
