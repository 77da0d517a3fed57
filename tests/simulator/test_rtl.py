"""The matrix unit's cycles are those of a systolic array in Verilog, whose results are those of numpy.

tests/rtl has the arrays with their controllers: what they wait for are marks that travel through the cells, so the
cycles are the array's own and no formula's. Run by Icarus Verilog, else by Verilator; skipped where neither is
installed.
"""

import random
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from harness import make_program, make_target, matmul

from firsttoken_compiler.target.rates import matmul_cost
from firsttoken_simulator.machine import simulate_program

SOURCES = Path(__file__).resolve().parents[1] / "rtl"
ICARUS, VERILATOR = shutil.which("iverilog"), shutil.which("verilator")
SHAPES = 12
"""Random products per array."""

ARRAYS = [
    pytest.param(dataflow, double, rows, columns, id=f"{dataflow}{'-double' if double else ''}-{rows}x{columns}")
    for dataflow, double in (("ws", False), ("ws", True), ("os", False))
    for rows, columns in ((4, 4), (2, 5), (8, 3))
]

pytestmark = pytest.mark.skipif(
    not (ICARUS or VERILATOR), reason="needs iverilog or verilator to run the array in tests/rtl"
)


def build(folder: Path, dataflow: str, double: bool, rows: int, columns: int) -> list[str]:
    """Compiles an array; the command that runs it."""
    source = str(SOURCES / {"ws": "weight_stationary.v", "os": "output_stationary.v"}[dataflow])
    parameters = {"R": rows, "C": columns} | ({"DOUBLE": int(double)} if dataflow == "ws" else {})
    if ICARUS:
        given = [f"-Pbench.{name}={value}" for name, value in parameters.items()]
        command, run = [ICARUS, "-g2005-sv", *given, "-o", "bench.vvp", source], ["vvp", "-n", "bench.vvp"]
    else:
        given = [f"-G{name}={value}" for name, value in parameters.items()]
        options = ["--binary", "--timing", "-Wno-fatal", "-Wno-lint", "-Wno-style", "--top-module", "bench"]
        command, run = [str(VERILATOR), *options, *given, "-Mdir", ".", "-o", "bench", source], ["./bench"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=120)
    return run


def run(command: list[str], folder: Path, a: np.ndarray, w: np.ndarray) -> tuple[int, np.ndarray]:
    """Cycles and result of a product of int8 matrices on the array."""
    for name, matrix in (("a", a), ("w", w)):
        (folder / f"{name}.hex").write_text("\n".join(f"{value & 255:02x}" for value in matrix.ravel().tolist()))
    sizes = [f"+m={len(a)}", f"+k={len(w)}", f"+n={w.shape[1]}"]
    shown = subprocess.run([*command, *sizes], cwd=folder, check=True, capture_output=True, text=True, timeout=60)
    line = next(line for line in shown.stdout.splitlines() if line.startswith("cycles "))
    result = np.array((folder / "y.txt").read_text().split(), np.int64)
    return int(line.removeprefix("cycles ")), result.reshape(len(a), -1)


@pytest.mark.parametrize(("dataflow", "double", "rows", "columns"), ARRAYS)
def test_cycles_and_results(dataflow: str, double: bool, rows: int, columns: int, tmp_path: Path) -> None:
    command = build(tmp_path, dataflow, double, rows, columns)
    target = make_target(
        matrix_rows=rows, matrix_columns=columns, matrix_dataflow=dataflow, matrix_double_buffered=double,
        matrix_issue_cycles=0, matrix_macs_per_cycle={"int8xint8": rows * columns}, scratchpad_bank_bytes=1 << 14,
    )  # fmt: skip
    draw, values = random.Random(f"{dataflow}{double}{rows}{columns}"), np.random.default_rng(rows * columns)
    for _ in range(SHAPES):
        m, k, n = (draw.randint(1, 24) for _ in range(3))
        a, w = (values.integers(-128, 128, shape).astype(np.int8) for shape in ((m, k), (k, n)))
        cycles, result = run(command, tmp_path, a, w)
        assert np.array_equal(result, a.astype(np.int64) @ w.astype(np.int64)), (m, k, n)
        assert matmul_cost(target, m, n, k, "int8xint8").cycles == cycles, (m, k, n)
        assert simulate_program(make_program(matmul(m, n, k)), target).total_cycles == cycles, (m, k, n)
