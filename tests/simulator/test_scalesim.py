"""Matrix-unit cycles against SCALE-Sim 3.0.0 itself (GEMM mode, infinite bandwidth), which prints the last index."""

import csv
from pathlib import Path

import pytest
from harness import make_target

from firsttoken_compiler.target.rates import matmul_cost

FILE = Path(__file__).resolve().parents[3] / "shared" / "facts" / "scalesim_cycles.csv"
FIGURES = (
    # m, k, n, dataflow, rows, columns, the cycle count it printed
    (1, 8, 8, "os", 8, 8, 21),
    (1, 64, 64, "os", 8, 8, 623),
    (8, 8, 8, "os", 8, 8, 21),
    (64, 1536, 8960, "ws", 128, 128, 374_639),
    (128, 4096, 4096, "ws", 128, 128, 522_239),
    (1, 1536, 1536, "ws", 128, 128, 55_151),
)
"""Three rows of its output-stationary runs; three weight-stationary ones, run on the same GEMMs as other simulators."""


def cycles(m: int, k: int, n: int, dataflow: str, rows: int, columns: int) -> int:
    target = make_target(
        matrix_rows=rows, matrix_columns=columns, matrix_dataflow=dataflow, matrix_double_buffered=False,
        matrix_macs_per_cycle={"int8xint8": rows * columns},
    )  # fmt: skip
    return matmul_cost(target, m, n, k, "int8xint8").cycles


@pytest.mark.parametrize(("m", "k", "n", "dataflow", "rows", "columns", "printed"), FIGURES)
def test_figures(m: int, k: int, n: int, dataflow: str, rows: int, columns: int, printed: int) -> None:
    assert cycles(m, k, n, dataflow, rows, columns) == printed + 1


def test_every_row_that_is_at_hand() -> None:
    rows = list(csv.DictReader(FILE.read_text("utf-8").splitlines())) if FILE.is_file() else []
    for row in rows:
        m, k, n, height, width = (int(row[name]) for name in ("M", "K", "N", "array_h", "array_w"))
        assert cycles(m, k, n, row["dataflow"], height, width) == int(row["compute_cycles"]) + 1, row
    assert len(rows) > 50 or not FILE.is_file()
    assert {row["dataflow"] for row in rows} == {"ws", "os", "is"} or not FILE.is_file()
