"""Graphs of single operators: every kind compiles without the host, and moves the bytes that the operator has."""

from __future__ import annotations

import pickle

import pytest

from firsttoken.api import target_of
from firsttoken.latency import KernelWork, Step, compile_step
from firsttoken.validation.kernel_graphs import Operator, graph_of
from firsttoken.validation.kernel_works import work_of
from firsttoken_compiler.errors import OptionError
from firsttoken_simulator.machine import simulate_program

OPERATORS = [
    (Operator("matmul", (64, 128, 96), "bf16"), 2 * (64 * 128 + 128 * 96), 2 * 64 * 96),
    (Operator("matmul", (64, 128, 96), "bf16>fp32"), 2 * (64 * 128 + 128 * 96), 4 * 64 * 96),
    (Operator("gemv", (256, 128), "bf16"), 2 * (128 + 128 * 256), 2 * 256),
    (Operator("layer_norm", (32, 128), "fp32"), 4 * 32 * 128, 4 * 32 * 128),
    (Operator("layer_norm", (32, 128), "bf16"), 2 * 32 * 128, 2 * 32 * 128),
    (Operator("rms_norm", (32, 128), "bf16"), 2 * 32 * 128, 2 * 32 * 128),
    (Operator("softmax", (32, 128), "fp32"), 4 * 32 * 128, 4 * 32 * 128),
    (Operator("add", (8192,), "bf16"), 2 * 2 * 8192, 2 * 8192),
    (Operator("silu_mul", (8192,), "bf16"), 2 * 2 * 8192, 2 * 8192),
    (Operator("rope", (64, 64), "bf16"), 2 * 2 * 64 * 64, 2 * 64 * 64),
    (Operator("attention", (64, 64, 32, 4, 2), "bf16"), 2 * 64 * 32 * (4 + 2 + 2), 2 * 64 * 32 * 4),
    (Operator("attention", (64, 64, 32, 4, 2), "bf16", causal=True), 2 * 64 * 32 * (4 + 2 + 2), 2 * 64 * 32 * 4),
]


@pytest.mark.parametrize(("operator", "reads", "writes"), OPERATORS, ids=lambda part: getattr(part, "text", ""))
def test_an_operator_reads_its_operands_and_writes_its_result(operator: Operator, reads: int, writes: int) -> None:
    program = compile_step(Step(operator, 1, 0, operator.options), target_of("tpu-v4"))
    assert not program.hosts
    account = simulate_program(program, target_of("tpu-v4"))
    assert reads <= int(account.dram_read_bytes.sum()) <= 1.6 * reads
    assert int(account.dram_write_bytes.sum()) == writes


def test_works_are_equal_where_operators_are_and_travel() -> None:
    first, second = (work_of(Operator("add", (64,), "bf16"), None) for _ in range(2))
    assert isinstance(first, KernelWork)
    assert first == second
    assert hash(first) == hash(pickle.loads(pickle.dumps(second)))


def test_bert_is_a_layer_without_embeddings() -> None:
    model = graph_of(Operator("bert", (), "bf16"))
    kinds = [node.op_type for node in model.graph.node]
    assert {kind: kinds.count(kind) for kind in ("MatMul", "Attention", "LayerNormalization", "Gelu")} == {
        "MatMul": 6, "Attention": 1, "LayerNormalization": 2, "Gelu": 1,
    }  # fmt: skip
    weights = {name: dims for name, *dims in ((w.name, *w.dims) for w in model.graph.initializer) if len(dims) == 2}
    assert sum(m * n for m, n in weights.values()) == 4 * 768 * 768 + 2 * 768 * 3072
    assert isinstance(work_of(Operator("bert", (), "bf16"), None), KernelWork)


@pytest.mark.parametrize(
    ("operator", "says"),
    [
        (Operator("sort", (64,), "bf16"), "no graph is built of sort; graphs are built of matmul"),
        (Operator("rope", (64, 63), "bf16"), "an even width, not 63"),
        (Operator("attention", (64, 64, 32, 4, 3), "bf16"), "no multiple of 3 heads"),
        (Operator("attention", (64, 128, 32, 4, 4), "bf16", causal=True), "is not defined here"),
    ],
)
def test_what_has_no_graph_says_why(operator: Operator, says: str) -> None:
    with pytest.raises(OptionError, match=says):
        work_of(operator, None)
