"""TIR as the schedules leave it becomes loops, nests and calls; what no instruction can do is an error."""

from __future__ import annotations

from typing import Any

import pytest

from firsttoken_compiler.codegen.loops import Alloc, GatherNest, Loop, MatmulCall, Nest
from firsttoken_compiler.codegen.tir_reader import read
from firsttoken_compiler.errors import ProgramError
from firsttoken_compiler.tvm.api import parse_function


def function(body: str, parameters: str = 'A: T.Buffer((64,), "float16"), B: T.Buffer((64,), "float16")') -> Any:
    lines = "\n".join(f"    {line}" for line in body.strip("\n").splitlines())
    return parse_function(f"@T.prim_func(s_tir=True)\ndef f({parameters}):\n{lines}")


def test_loops_around_a_store_are_one_nest() -> None:
    (nest,), (a, b) = read(function("for i, j in T.grid(4, 8):\n    B[i * 8 + j] = A[i * 16 + j * 2 + 3]"))
    assert isinstance(nest, Nest)
    assert (nest.extents, nest.dst.buffer, nest.dst.coefficients) == ((4, 8), b, (8, 1))
    load = nest.value[1]
    assert (load.buffer, load.coefficients, load.base([])) == (a, (16, 2), 3)


def test_annotated_loops_are_sequential_and_enter_through_the_environment() -> None:
    outer, inner = (f'T.serial({n}, annotations={{"npu.axis": "{axis}"}})' for n, axis in ((4, "m:2"), (8, "j")))
    body = f"for i in {outer}:\n    for j in {inner}:\n        B[i * 8 + j] = A[i * 16 + j]"
    (loop,), _ = read(function(body))
    assert isinstance(loop, Loop)
    assert (loop.extent, loop.axis, loop.step, loop.stages, loop.depth) == (4, "m", 2, (), 0)
    (nest,) = loop.body
    assert isinstance(nest, Nest)
    assert (nest.axes, nest.dst.base([3]), nest.dst.coefficients) == (("j",), 24, (1,))


def test_pipelined_loops_keep_their_stages_and_outer_loops_are_counted() -> None:
    body = 'for i in T.serial(4, annotations={"software_pipeline_stage": [0, 1, 2, 3]}):\n    B[i] = A[i]'
    (loop,), _ = read(function(body), outer=1)
    assert isinstance(loop, Loop)
    assert (loop.depth, loop.stages) == (1, (0, 1, 2, 3))
    (nest,) = loop.body
    assert isinstance(nest, Nest)
    assert nest.dst.base([9, 3]) == 3


def test_a_fourth_axis_stays_sequential() -> None:
    body = "for i, j, k, l in T.grid(2, 2, 2, 2):\n    B[i * 8 + j * 4 + k * 2 + l] = T.float16(0)"
    (loop,), _ = read(function(body))
    assert isinstance(loop, Loop)
    (nest,) = loop.body
    assert isinstance(nest, Nest)
    assert nest.extents == (2, 2, 2)


def test_arithmetic_has_its_operations() -> None:
    value = "T.max(T.exp(A[i]), A[i] * T.float16(2)) - T.if_then_else(i < 3, A[i], T.float16(0))"
    (nest,), _ = read(function(f"for i in range(8):\n    B[i] = {value}"))
    assert isinstance(nest, Nest)
    name, left, right = nest.value
    assert (name, left[0], left[1][0], left[2][0]) == ("sub", "max", "exp", "mul")
    assert (right[0], right[1][0], right[1][1][0], right[1][2]) == ("select", "lt", "index", ("const", 3.0))


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("width", [1, 4])
def test_gathers_of_any_extents(rows: int, width: int) -> None:
    loops = []
    if rows > 1:
        loops.append('for i in T.serial(5, annotations={"npu.axis": "m"}):')
    if width > 1:
        loops.append("for j in range(4):")
    row, column = ("i" if rows > 1 else "0"), ("j" if width > 1 else "0")
    body = "\n".join("    " * depth + text for depth, text in enumerate(loops))
    store = f"B[{row} * {width} + {column}] = A[T.Cast(\"int32\", I[{row}]) * {width} + {column}]"
    sizes = (("A", 7 * width, "float16"), ("I", rows, "int64"), ("B", rows * width, "float16"))
    parameters = ", ".join(f'{name}: T.Buffer(({size},), "{dtype}")' for name, size, dtype in sizes)
    (gather,), (table, indices, out) = read(function(body + "\n" + "    " * len(loops) + store, parameters))
    assert isinstance(gather, GatherNest)
    assert (gather.rows, gather.width, gather.table, gather.table_rows) == (rows, width, table, 7)
    assert (gather.dst.buffer, gather.indices.buffer) == (out, indices)
    assert gather.dst.coefficients == ((width,) if rows > 1 else (0,))
    assert gather.indices.coefficients == ((1,) if rows > 1 else (0,))


def test_intrinsic_calls() -> None:
    body = """
C = T.alloc_buffer((32,), "int32", scope="global.acc")
T.evaluate(T.call_extern("int32", "npu.matmul:m,p,k", C.access_ptr("rw"), A.access_ptr("r", offset=4),
    B.access_ptr("r"), 2, 16, 4, 8, 16, 4, 32, 8))
T.evaluate(T.call_extern("int32", "npu.copy:m,k", A.access_ptr("w"), B.access_ptr("r", offset=8), 2, 4, 16, 1, 8, 1))
"""
    statements, (a, b) = read(function(body))
    calls = [statement for statement in statements if not isinstance(statement, Alloc)]
    multiply, copy = calls
    assert isinstance(multiply, MatmulCall)
    assert (multiply.m, multiply.n, multiply.k, multiply.panel, multiply.axes) == (2, 16, 4, 8, ("m", "p", "k"))
    assert (multiply.acc.buffer.scope, multiply.a.buffer, multiply.a.base([]), multiply.w.buffer) == ("acc", a, 4, b)
    assert isinstance(copy, Nest)
    assert (copy.extents, copy.axes) == ((2, 4), ("m", "k"))
    assert (copy.dst.coefficients, copy.value[1].coefficients) == ((16, 1), (8, 1))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("for i, j in T.grid(4, 4):\n    B[i * j] = A[i]", "not affine"),
        ("for i in range(8):\n    B[i] = T.cosh(A[i])", "no operation for TIR"),
        ("for i in range(8):\n    B[i // 2] = A[i]", "not affine"),
        ('T.evaluate(T.call_extern("int32", "npu.dance"))', "unknown intrinsic"),
        ("if A[0] < T.float16(1):\n    B[0] = A[0]", "no instruction for TIR statement IfThenElse"),
    ],
)
def test_what_no_instruction_can_do(body: str, message: str) -> None:
    with pytest.raises(ProgramError, match=message):
        read(function(body))
