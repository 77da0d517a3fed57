"""Four matrix products on `systolic-128` beside what other simulators say of them.

    python reports/gemm.py

Writes reports/gemm/README.md. int8 operands, a scale per channel and token; the graph's input and output are float16.
"""

import time
from dataclasses import dataclass, replace
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
PEERS: Final = {
    "Timeloop, analytic, mapping search": ((34_741, 8.6), (212_270, 77), (212_270, 46), (262_144, 95)),
    "AccelForge 1.0.467, analytic": ((34_741, 3.5), (212_269, 3.8), (212_269, 3.8), (262_144, 4.1)),
    "ZigZag 3.9.1, analytic, mapping search": ((34_754, 2.7), (213_847, 5.0), (214_273, 4.4), (266_526, 5.0)),
    "Stream 1.13, analytic, layer fusion": ((37_051, 2.4), (219_301, 2.6), (219_301, 2.5), (272_636, 2.0)),
    "LLMCompass, analytic tiles": ((34_741, 0.5), (230_475, 39), (222_798, 13), (267_923, 4.1)),
    "mNPUsim (64 GB/s), cycle-level": ((38_953, 15), (277_408, 94), (237_551, 110), (335_748, 147)),
    "ONNXim, tile-level cores, cycle-level DRAM": ((41_252, 1.0), (302_777, 8.1), (341_862, 8.7), (450_561, 12)),
    "SCALE-Sim 3.0.0, infinite bandwidth": ((55_151, 13), (374_639, 86), (374_639, None), (522_239, 127)),
}
"""(cycles, CPU seconds) per product; None: not taken."""
REFRESH: Final = {"trefi_ns": 0.0}
TURNS: Final = dict.fromkeys(("trtw_ns", "twtr_ns", "tcwl_ns"), 0.0)
OPENING: Final = dict.fromkeys(("trcd_ns", "trp_ns", "tras_ns", "twr_ns", "trtp_ns", "trrd_ns", "tfaw_ns"), 0.0)
IDEAL: Final = {
    "no refresh": REFRESH, "no turns of the bus": TURNS, "rows open in no time": OPENING,
    "none of the three": {**REFRESH, **TURNS, **OPENING}, "a queue of 128": {"queue_depth": 128},
}  # fmt: skip
"""What the DRAM is freed of, one at a time, with the same program."""
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
    bytes_bound: int
    """All DRAM bytes of the program at the DRAM's peak."""
    without: dict[str, int]
    """Cycles of the same program on a DRAM freed of something; the names of `IDEAL`."""


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
    seconds = time.process_time() - start
    rate = target.dram.peak_bytes_per_s / target.clock_hz
    moved = int((timeline.dram_read_bytes + timeline.dram_write_bytes).sum())
    ideal = {name: replace(target, dram=replace(target.dram, **freed)) for name, freed in IDEAL.items()}
    return Measured(
        shape, timeline.total_cycles, m * k * n // target.matrix.macs_per_cycle["int8xint8"], int(k * n / rate), moved,
        seconds, program.ops[-1].tile, int(moved / rate),
        {name: simulate_program(program, machine).total_cycles for name, machine in ideal.items()},
    )  # fmt: skip


def beside(rows: list[Measured], once: float) -> list[str]:
    """Every peer's cycles and CPU seconds, ours last; `once` is what the process needs before its first product."""
    ours = tuple((row.cycles, round(row.seconds, 2)) for row in rows)
    head = " | ".join("{} x {} x {}".format(*row.shape) for row in rows)
    lines = ["## All peers: cycles (CPU seconds)", "", f"| | {head} |", "|---" * (1 + len(rows)) + "|"]
    for name, figures in {**PEERS, "**firsttoken**, burst-level DRAM": ours}.items():
        cells = " | ".join(f"{c:,}" + ("" if s is None else f" ({s:g})") for c, s in figures)
        lines.append(f"| {name} | {cells} |")
    note = (
        f"Ours compile and simulate; the process needs another {once:.1f} s once, to load Python, TVM and the hot loop."
    )
    return [*lines, "", note]


def explanation(rows: list[Measured], wide: Measured) -> list[str]:
    """Why the cycles are above the bound: the same programs on a DRAM freed of one cost at a time."""
    lines = [
        "## What lies between the bound and the cycles",
        "",
        "Activations in and results out are the graph's inputs and outputs, so they cross the DRAM too: the second column has all "
        "bytes of the program at the DRAM's peak. The others are cycles of the same program, simulated again on a DRAM freed of "
        "one cost.",
        "",
        "| m x k x n | all bytes at peak | as it is | " + " | ".join(IDEAL) + " |",
        "|---" * (3 + len(IDEAL)) + "|",
    ]
    for row in rows:
        freed = " | ".join(f"{cycles:,}" for cycles in row.without.values())
        m, k, n = row.shape
        lines.append(f"| {m} x {k} x {n} | {row.bytes_bound:,} | {row.cycles:,} | {freed} |")
    return [
        *lines,
        "",
        "Refresh of all banks takes 280 of 3906 ns. Results leave in batches of half the controller's queue, 16 bursts; each "
        "batch turns the bus twice and opens rows that the weights' stream does not use, and closes some that it does: that "
        "makes the second and the fourth product slow; a longer queue, with longer batches, loses less. "
        f"With a float32 result (twice the bytes written) the second takes {wide.cycles:,} cycles, above "
        "ONNXim's. What remains without the three costs is the quantisation of the input before the first product, the first "
        "load and the last product. No measured mix of reads and writes has been compared with this yet.",
    ]


def main() -> None:
    """Measures all and writes the page."""
    measure((1, 64, 64))  # the first one pays for imports and for loading the hot loop
    once = time.process_time()
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
    lines += ["", *beside(rows, once), "", *explanation(rows, wide), ""]
    OUT.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
