"""Launches become a program: memory map, working memory in turns, errors that name the kernel."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from cases import TINY

from firsttoken_compiler.codegen.weights import packed_bytes
from firsttoken_compiler.frontend.onnx_file import from_model
from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.program import Program
from firsttoken_compiler.isa.types import Space
from firsttoken_compiler.options import resolve
from firsttoken_compiler.pipeline import compile_onnx
from firsttoken_compiler.target.target import Target
from firsttoken_models.onnx_graph import build_graph

TARGET = Target.load("systolic-128")


def compiled(tied: bool = False) -> Program:
    model = build_graph(replace(TINY, tie_embeddings=tied), tokens=5, past=3)
    program = compile_onnx(from_model(model, Path(), "tiny"), TARGET, resolve("int4", None, "32", None))
    assert program is not None
    return program


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def program(request: pytest.FixtureRequest) -> Program:
    return compiled(request.param)


def test_every_tensor_once_aligned_and_apart(program: Program) -> None:
    for space, end in ((Space.DRAM, program.dram_bytes), (Space.SPAD, program.spad_bytes)):
        placed = sorted((t for t in program.tensors if t.space is space), key=lambda t: t.address)
        assert all(t.address % 64 == 0 and t.address + t.nbytes <= end for t in placed)
        for op in range(len(program.ops)):
            living = [t for t in placed if t.lasting or t.first <= op <= t.last]
            assert all(one.address + one.nbytes <= other.address for one, other in pairwise(living))
    names = [tensor.name for tensor in program.tensors]
    assert len(names) == len(set(names))


def test_weights_have_recipes_and_their_packed_size(program: Program) -> None:
    weights = program.of_kind("weight")
    assert len(weights) > 20
    for tensor in weights:
        assert tensor.packing is not None
        if tensor.packing.form != "plain":
            assert tensor.nbytes == packed_bytes(tensor.packing)


def test_past_and_present_share_one_tensor(program: Program) -> None:
    caches = {tensor.name: tensor for tensor in program.of_kind("kv")}
    assert set(caches) == set(program.meta["kv"].values())
    assert not any(tensor.name.startswith("past") for tensor in program.tensors)
    assert all(tensor.shape == (2, 8, 16) for tensor in caches.values())


def test_every_address_lies_in_a_tensor_that_lives(program: Program) -> None:
    for row in program.code:
        op = int(row[word.OP])
        living = [t for t in program.tensors if t.lasting or t.first <= op <= t.last]
        for operand in range(word.MAX_OPERANDS):
            at = word.operand_column(operand)
            space, address = word.space_of(int(row[at])), int(row[at + 1])
            if space in (Space.DRAM, Space.SPAD):
                assert any(t.space is Space(space) and t.address <= address < t.address + t.nbytes for t in living)


def test_consecutive_kernels_work_in_different_memory_where_there_is_room(program: Program) -> None:
    """So that the next kernel's first loads need not wait for this one."""
    spans = [(t.address, t.address + t.nbytes) for t in program.of_kind("scratch")]
    apart = sum(a[1] <= b[0] or b[1] <= a[0] for a, b in pairwise(spans))
    assert apart >= 0.9 * (len(spans) - 1)
