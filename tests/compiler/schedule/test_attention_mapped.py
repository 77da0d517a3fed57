"""Attention where a target maps it in its own way: the same numbers, other instructions and costs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from kernel_bench import Bench, small_target

from firsttoken_compiler.codegen.build import build
from firsttoken_compiler.codegen.template import Template
from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.matmul import ATTENDS, Matmul
from firsttoken_compiler.isa.types import Dtype, Space
from firsttoken_compiler.isa.vector import KERNEL_SHIFT, Vector
from firsttoken_compiler.isa.vector_kernel import LEAVING, SEEN, VectorKernel
from firsttoken_compiler.schedule.choice import AttentionChoice
from firsttoken_compiler.schedule.spec import Arg, KernelSpec
from firsttoken_compiler.schedule.tiling import Room
from firsttoken_compiler.target.rates import matmul_cost, vector_cycles
from firsttoken_compiler.target.target import Attention, Target

SPACES = (Space.DRAM,) * 4
OWN = Attention(rows=4, contexts=8, value_columns=8, skips_masked=False, row_cycles=10.0)
PLAIN = small_target()
MAPPED = replace(PLAIN, attention=OWN)


def spec_of(tokens: int, width: int, cached: bool = False, causal: int = 1) -> KernelSpec:
    """Four heads of queries, two of keys."""
    matrix, keys = Arg((tokens, 4 * width), Dtype.F16), 24 if cached else tokens
    kv = Arg((2, keys, width) if cached else (keys, 2 * width), Dtype.F16)
    params = (
        ("causal", causal), ("heads", 4), ("kv_heads", 2), ("mask", 0), ("past", keys - tokens), ("scale", 0.3),
    )  # fmt: skip
    return KernelSpec("attention", params, (matrix, kv, kv), (matrix,))


def made(spec: KernelSpec, target: Target) -> Template:
    room = Room(target.scratchpad.bytes, target.scratchpad.bytes)
    return build(spec, SPACES, target, room, AttentionChoice(4, 8, 2))


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("width", [8, 16, 24, 12])
@pytest.mark.parametrize("causal", [0, 1])
def test_numbers_are_those_of_the_plain_kernel(width: int, cached: bool, causal: int) -> None:
    """Also for a width that the columns do not divide: it is made at once."""
    spec, r = spec_of(13, width, cached, causal), np.random.default_rng(width)
    arrays = [r.standard_normal(arg.shape).astype(np.float16) for arg in spec.args]
    both = [Bench(spec, SPACES, target, (*spec.args, *spec.outs)).run(made(spec, target), arrays)[0]
            for target in (PLAIN, MAPPED)]  # fmt: skip
    np.testing.assert_array_equal(*both)


def test_scores_are_made_for_every_part_of_the_columns_and_for_masked_keys() -> None:
    spec = spec_of(16, 16)

    def macs(target: Target) -> int:
        code = made(spec, target).code
        return int(code[code[:, word.OPCODE] == Matmul.OPCODE, word.DIMS : word.DIMS + 3].prod(axis=1).sum())

    whole = 4 * 16 * 16 * 16
    assert macs(MAPPED) == 2 * whole + whole  # scores twice, values once in two halves
    assert macs(replace(MAPPED, attention=replace(OWN, value_columns=0))) == 2 * whole
    assert macs(replace(MAPPED, attention=replace(OWN, value_columns=0, skips_masked=True))) == macs(PLAIN) < 2 * whole


def test_only_instructions_of_a_mapped_prompt_are_marked() -> None:
    marked, plain, token = made(spec_of(8, 8), MAPPED), made(spec_of(8, 8), PLAIN), made_token()
    products = marked.code[marked.code[:, word.OPCODE] == Matmul.OPCODE]
    assert (products[:, word.FLAGS] & ATTENDS).all()
    vectors = marked.code[marked.code[:, word.OPCODE] == Vector.OPCODE, word.FLAGS] >> KERNEL_SHIFT
    assert {kernel.rows for kernel in marked.kernels} == {SEEN, LEAVING}
    leaving = [number for number, kernel in enumerate(marked.kernels) if kernel.rows == LEAVING]
    assert np.isin(vectors, leaving).sum() == 4 * 2  # once for each head and tile of rows
    for other in (plain, token):
        assert not any(kernel.rows for kernel in other.kernels)
        assert not (other.code[other.code[:, word.OPCODE] == Matmul.OPCODE, word.FLAGS] & ATTENDS).any()


def made_token() -> Template:
    """A single token's attention is like any other kernel."""
    matrix, kv = Arg((1, 32), Dtype.F16), Arg((2, 24, 8), Dtype.F16)
    params = (("causal", 1), ("heads", 4), ("kv_heads", 2), ("mask", 0), ("past", 23), ("scale", 0.3))
    spec = KernelSpec("attention", params, (matrix, kv, kv), (matrix,))
    room = Room(MAPPED.scratchpad.bytes, MAPPED.scratchpad.bytes)
    return build(spec, SPACES, MAPPED, room, AttentionChoice(2, 8, 2))


def test_costs_are_those_of_the_mapping() -> None:
    """Its own contexts, no drain, cycles per row, and its own rows of a product; nothing else changes."""
    base = Target.load("xdna2-strix")
    target = replace(base, attention=replace(OWN, contexts=4 * base.vector.contexts))
    kernel, dims, dtypes = VectorKernel(("mul", "s0", "s1")), (1, 512, 64), (Dtype.F32, Dtype.F32, Dtype.F32)
    plain = vector_cycles(target, kernel, dims, dtypes) - target.vector.startup_cycles
    seen = vector_cycles(target, replace(kernel, rows=SEEN), dims, dtypes, sums=True) - target.vector.startup_cycles
    assert seen == pytest.approx(plain / 4, abs=1)
    assert vector_cycles(target, kernel, dims, dtypes, sums=True) - target.vector.startup_cycles > plain
    rows = (1, 1, 512)
    leaving, one = (vector_cycles(target, replace(kernel, rows=mark), rows, dtypes) for mark in (LEAVING, SEEN))
    assert leaving - one == pytest.approx(512 * OWN.row_cycles, abs=1)
    few, many = (matmul_cost(target, 4, 64, 64, "fp16xfp16", attends).pass_cycles for attends in (True, False))
    assert few < many == matmul_cost(base, 4, 64, 64, "fp16xfp16").pass_cycles
    assert matmul_cost(PLAIN, 4, 64, 64, "fp16xfp16", True) == matmul_cost(PLAIN, 4, 64, 64, "fp16xfp16")
    assert vector_cycles(PLAIN, replace(kernel, rows=SEEN), dims) == vector_cycles(PLAIN, kernel, dims)
