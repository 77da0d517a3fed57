"""Matrix-unit cycles of systolic arrays equal SCALE-Sim's closed forms, summed over tiles.

In the rates that the scheduler uses, as measured on the timing machine with operands that are always there, and summed
over the instructions of compiled products. SCALE-Sim has no cost of issue; ours is apart, and tested apart.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
from harness import make_program, make_target, matmul
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from firsttoken_compiler.frontend.onnx_file import from_model
from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.matmul import Matmul
from firsttoken_compiler.isa.program import Program
from firsttoken_compiler.options import resolve
from firsttoken_compiler.pipeline import compile_onnx
from firsttoken_compiler.target.load import load_target
from firsttoken_compiler.target.rates import matmul_cost
from firsttoken_compiler.target.target import Target
from firsttoken_simulator.machine import simulate_program

EXTENT = st.integers(1, 300)
ARRAY = st.sampled_from([(8, 8), (16, 16), (32, 32), (8, 32), (32, 8), (128, 128)])
SLOW = [HealthCheck.too_slow]


def closed_form(dataflow: str, m: int, k: int, n: int, rows: int, columns: int) -> int:
    """SCALE-Sim's cycles, tile by tile: a fold of the array takes as long whether it is full or not."""
    down, across, fold = {
        "os": (m, n, rows + columns + k - 2),
        "ws": (k, n, 2 * rows + columns + m - 2),
        "is": (k, m, 2 * rows + columns + n - 2),
    }[dataflow]
    return sum(fold for _ in range(0, down, rows) for _ in range(0, across, columns))


def array(dataflow: str, rows: int, columns: int, *, double_buffered: bool = False, issue: int = 0) -> Target:
    """An array behind ports that never limit it."""
    return make_target(
        matrix_rows=rows, matrix_columns=columns, matrix_dataflow=dataflow, matrix_double_buffered=double_buffered,
        matrix_issue_cycles=issue, matrix_macs_per_cycle={"int8xint8": rows * columns}, scratchpad_bank_bytes=1 << 14,
    )  # fmt: skip


@given(st.sampled_from(["ws", "os", "is"]), EXTENT, EXTENT, EXTENT, ARRAY, st.integers(0, 20))
@settings(max_examples=100, deadline=None)
def test_without_double_buffering_it_is_scalesim(
    dataflow: str, m: int, k: int, n: int, size: tuple[int, int], issue: int
) -> None:
    target, expected = array(dataflow, *size, issue=issue), closed_form(dataflow, m, k, n, *size)
    assert matmul_cost(target, m, n, k, "int8xint8").cycles == expected
    line = simulate_program(make_program(matmul(m, n, k)), target)
    assert line.total_cycles == issue + expected
    assert line.stall_spad_fs[0] == 0


@given(EXTENT, EXTENT, EXTENT, ARRAY)
@settings(max_examples=100, deadline=None)
def test_double_buffering_hides_loads_and_skew_of_all_tiles_but_one(
    m: int, k: int, n: int, size: tuple[int, int]
) -> None:
    """Between the first load and the last drain a tile takes its m rows, or the next load where that is longer.

    So each tile but one hides its load and skew, 2R + C - 2 cycles, less what its load is longer than the rows before.
    """
    rows, columns = size
    tiles = -(-k // rows) * -(-n // columns)
    hidden = (tiles - 1) * (2 * rows + columns - 2 - max(0, rows - m))
    expected = closed_form("ws", m, k, n, rows, columns) - hidden
    target = array("ws", rows, columns, double_buffered=True)
    assert matmul_cost(target, m, n, k, "int8xint8").cycles == expected
    assert simulate_program(make_program(matmul(m, n, k)), target).total_cycles == expected
    assert hidden >= 0


@given(st.sampled_from(["ws", "os", "is"]), EXTENT, EXTENT, EXTENT, st.integers(1, 5), st.booleans())
@settings(max_examples=60, deadline=None)
def test_arrays_side_by_side_divide_a_product(dataflow: str, m: int, k: int, n: int, arrays: int, double: bool) -> None:
    """Each takes whole folds, all at the same time: the product takes as long as the one with the most of them."""
    one = array(dataflow, 16, 32, double_buffered=double)
    rate = {"int8xint8": 16 * 32 * arrays}
    several = replace(one, matrix=replace(one.matrix, arrays=arrays, macs_per_cycle=rate))
    folds = -(-(m if dataflow == "is" else n) // 32)
    most = 32 * -(-folds // arrays)
    widest = (most, n) if dataflow == "is" else (m, most)
    assert matmul_cost(several, m, n, k, "int8xint8").cycles == matmul_cost(one, *widest, k, "int8xint8").cycles
    assert (
        simulate_program(make_program(matmul(m, n, k)), several).total_cycles
        == matmul_cost(several, m, n, k, "int8xint8").cycles
    )


@given(st.lists(st.tuples(EXTENT, EXTENT, EXTENT), min_size=1, max_size=6), st.sampled_from(["ws", "os", "is"]), ARRAY)
@settings(max_examples=30, deadline=None)
def test_instructions_add_up(shapes: list[tuple[int, int, int]], dataflow: str, size: tuple[int, int]) -> None:
    program = make_program(*(matmul(m, n, k) for m, k, n in shapes))
    expected = sum(7 + closed_form(dataflow, m, k, n, *size) for m, k, n in shapes)
    assert simulate_program(program, array(dataflow, *size, issue=7)).total_cycles == expected


def compiled_product(m: int, k: int, n: int, target: Target) -> Program:
    tensor, info = onnx.TensorProto, onnx.helper.make_tensor_value_info
    weight = tensor(name="w", data_type=tensor.FLOAT, dims=[k, n], data_location=tensor.EXTERNAL)
    weight.external_data.add(key="location", value="absent.bin")
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = onnx.helper.make_graph([node], "g", [info("x", 1, [m, k])], [info("y", 1, [m, n])], [weight])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)])
    program: Any = compile_onnx(from_model(model, Path(), "one"), target, resolve("int8", "int8", "channel", None))
    return program


@given(st.sampled_from(["ws", "os", "is"]), st.integers(1, 300), st.integers(2, 700), st.integers(2, 700))
@settings(max_examples=24, deadline=None, suppress_health_check=SLOW)
def test_a_compiled_product_is_the_sum_of_its_tiles(dataflow: str, m: int, k: int, n: int) -> None:
    """Whatever tiles the scheduler takes: one fold of the array per 128 x 128 of what stays in it."""
    preset = load_target("systolic-128")
    target = replace(preset, matrix=replace(preset.matrix, double_buffered=False, dataflow=dataflow))
    program = compiled_product(m, k, n, target)
    line = simulate_program(program, target)
    products = program.code[:, word.OPCODE] == Matmul.OPCODE
    dims = program.code[products, word.DIMS : word.DIMS + 3]
    assert int(dims.prod(axis=1).sum()) == m * k * n
    folds = [closed_form(dataflow, tile_m, tile_k, tile_n, 128, 128) for tile_m, tile_n, tile_k in dims.tolist()]
    measured = line.busy_fs[products] // target.period_fs - target.matrix.issue_cycles
    assert measured.tolist() == folds
    if dataflow == "ws" and (dims[:, 0] == m).all():  # columns and k are cut only at multiples of the array
        assert sum(folds) == closed_form("ws", m, k, n, 128, 128)
