"""Four matrix products on `systolic-128` beside what other simulators say of them.

    python reports/gemm.py

Writes reports/gemm/README.md. int8 operands, a scale per channel and token; the graph's input and output are float16.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import onnx

from firsttoken_compiler.frontend.onnx_file import from_model
from firsttoken_compiler.options import Precision
from firsttoken_compiler.pipeline import compile_onnx
from firsttoken_compiler.target.load import load_target
from firsttoken_simulator.machine import simulate_program

TARGET: Final = "systolic-128"
SHAPES: Final = ((1, 1536, 1536), (64, 1536, 8960), (64, 8960, 1536), (128, 4096, 4096))
"""(m, k, n)."""
ONNXIM: Final = (41_252, 302_777, 341_862, 450_561)
ANALYTIC: Final = (34_741, 212_269, 212_269, 262_144)
"""Simulated cycles of ONNXim, and of AccelForge 1.0.467 as the analytic models' representative, run on the same work
(128x128 weight-stationary, int8, 1 GHz, 68 GB/s) on two shared cores."""
OUT: Final = Path(__file__).parent / "gemm" / "README.md"


@dataclass(frozen=True)
class Measured:
    """One product: simulated cycles, lower bounds in cycles, processor seconds of compiling and simulating."""

    shape: tuple[int, int, int]
    cycles: int
    compute_bound: int
    dram_bound: int
    dram_bytes: int
    seconds: float
    tile: str


def product(m: int, k: int, n: int, element: int = onnx.TensorProto.FLOAT16) -> onnx.ModelProto:
    """A graph of one MatMul whose weights lie in a file that need not exist."""
    weight = onnx.TensorProto(name="w", data_type=element, dims=[k, n], data_location=onnx.TensorProto.EXTERNAL)
    size = 2 if element == onnx.TensorProto.FLOAT16 else 4
    for key, value in (("location", "w.bin"), ("offset", "0"), ("length", str(k * n * size))):
        weight.external_data.add(key=key, value=value)
    info = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"], name="gemm")
    graph = onnx.helper.make_graph([node], "gemm", [info("x", element, [m, k])], [info("y", element, [m, n])], [weight])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)


def measure(shape: tuple[int, int, int], element: int = onnx.TensorProto.FLOAT16) -> Measured:
    """Compiles and simulates one product."""
    m, k, n = shape
    target = load_target(TARGET)
    start = time.process_time()
    student = from_model(product(m, k, n, element), Path("."), "gemm")
    program: Any = compile_onnx(student, target, Precision("int8", "int8", "channel", "int8"))
    timeline = simulate_program(program, target)
    rate = target.dram.peak_bytes_per_s / target.clock_hz
    return Measured(
        shape, timeline.total_cycles, m * k * n // target.matrix.macs_per_cycle["int8xint8"], int(k * n / rate),
        int((timeline.dram_read_bytes + timeline.dram_write_bytes).sum()), time.process_time() - start,
        program.ops[-1].tile,
    )  # fmt: skip


def main() -> None:
    """Measures all and writes the page."""
    measure((1, 64, 64))  # the first one pays for imports and for compiling the hot loop
    rows = [measure(shape) for shape in SHAPES]
    wide = measure(SHAPES[1], onnx.TensorProto.FLOAT)
    lines = [
        "# Four products on systolic-128",
        "",
        "128x128 weight-stationary array, int8, 1 GHz, 4 MiB scratchpad, 68 GB/s LPDDR5. Redraw: `make gemm`. Bounds: "
        "multiply-accumulates at the array's peak; the weights' bytes at the DRAM's peak. Peers' figures were run on the same "
        "work beside one another.",
        "",
        "| m x k x n | compute bound | weight DRAM bound | AccelForge | **firsttoken** | ONNXim | DRAM bytes | tile | CPU s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row, onnxim, analytic in zip(rows, ONNXIM, ANALYTIC, strict=True):
        m, k, n = row.shape
        lines.append(
            f"| {m} x {k} x {n} | {row.compute_bound:,} | {row.dram_bound:,} | {analytic:,} | **{row.cycles:,}** "
            f"| {onnxim:,} | {row.dram_bytes:,} | {row.tile} | {row.seconds:.2f} |"
        )
    lines += [
        "",
        "Above the bound lie: all-bank refresh (280 of 3906 ns, 7 %), activations in and results out (they are inputs and "
        "outputs of the graph, so they cross the DRAM), the quantisation of "
        "the input before the first product, and the turns of the data bus between reads and posted writes. The last is what "
        f"makes the second product slow: with a float32 output it takes {wide.cycles:,} cycles, as its "
        "writes (twice the bytes) leave in batches of 16 bursts, each of which turns the bus twice. No measured mix of reads "
        "and writes has been compared with this yet.",
        "",
    ]
    OUT.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
