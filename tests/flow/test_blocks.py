"""What products on blocks take: bytes of the blocks, and units that work at the same time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from firsttoken_compiler.formats.types import BLOCK_TYPES
from firsttoken_compiler.frontend.onnx_file import from_model
from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.types import ENGINES_PER_CORE, Engine
from firsttoken_compiler.isa.vector_kernel import COST_CLASSES
from firsttoken_compiler.options import Precision
from firsttoken_compiler.pipeline import compile_onnx
from firsttoken_compiler.target.target import Target
from firsttoken_simulator.machine import simulate_program

K, N = 1024, 2048


def absent(tokens: int) -> onnx.ModelProto:
    """A product with weights that lie in a file that need not exist."""
    weight = onnx.TensorProto(name="w", data_type=10, dims=[K, N], data_location=onnx.TensorProto.EXTERNAL)
    for key, value in (("location", "w.bin"), ("offset", "0"), ("length", str(2 * K * N))):
        weight.external_data.add(key=key, value=value)
    info = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"], name="gemm")
    graph = onnx.helper.make_graph([node], "gemm", [info("x", 10, [tokens, K])], [info("y", 10, [tokens, N])], [weight])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)


def lanes_beside_tiles() -> Target:
    """A unit of tiles whose weights are made by lanes at a rate that pays for one row of codes and many of floats."""
    preset = Target.load("snapdragon-x-elite")
    rates = {pair: 4096 if pair.startswith("fp16") else rate for pair, rate in preset.matrix.macs_per_cycle.items()}
    cycles = {name: 12.0 if name in ("div", "rsqrt") else 16.0 if name == "exp" else 1.43 for name in COST_CLASSES}
    return replace(
        preset,
        matrix=replace(preset.matrix, macs_per_cycle=rates, weight_cycles={}),
        vector=replace(preset.vector, cycles=cycles),
        dma=replace(preset.dma, outstanding=768, bus_bytes_per_cycle=128),
    )


@pytest.mark.parametrize("tokens", [1, 32])
@pytest.mark.parametrize("name", ["q4_0", "q4_k", "q6_k", "iq4_nl"])
def test_bytes_and_overlap(name: str, tokens: int) -> None:
    target, kind = lanes_beside_tiles(), BLOCK_TYPES[name]
    student = from_model(absent(tokens), Path(), "gemm")
    program: Any = compile_onnx(student, target, Precision(name, "fp16", "channel", "off"))
    line = simulate_program(program, target)
    weights = {t.name: t for t in program.of_kind("weight")}
    assert sum(tensor.nbytes for tensor in weights.values()) == N * kind.row_bytes(K)
    first, stop = (np.array([t.address + end * t.nbytes for t in weights.values()]) for end in (0, 1))
    source = word.operand_column(1) + 1
    loads = program.code[:, word.QUEUE] % ENGINES_PER_CORE == Engine.DMA_IN
    of_weights = [bool(((first <= row[source]) & (row[source] < stop)).any()) for row in program.code]
    read = int(line.dram_read_bytes[loads & of_weights].sum())
    assert read == N * kind.row_bytes(K)  # once each, and nothing else of them
    queues = program.code[:, word.QUEUE] % ENGINES_PER_CORE
    matrix, vector = (int(line.busy_fs[queues == engine].sum()) for engine in (Engine.MATRIX, Engine.VECTOR))
    total = line.total_cycles * target.period_fs
    alone = program.ops[-1].tile.split()[0] == f"{tokens}x{N}x{K // 2}"  # two tiles, chosen for a product among others
    if min(matrix, vector) > max(matrix, vector) / 4 and not alone:  # the units work at the same time
        assert total < max(matrix, vector) + 0.75 * min(matrix, vector)
    assert program.ops[-1].tile.endswith("codes" if tokens == 1 else "floats")
