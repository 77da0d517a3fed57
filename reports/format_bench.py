"""How fast weights are quantised, packed and made floats again, beside gguf's numpy code, on one core.

    python reports/format_bench.py

Writes reports/formats/throughput.md. Seconds are those that one thread spends on a core, the least of several runs, so
that other programs count little.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import ggml_quantisers
import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from firsttoken_compiler.codegen.weights import materialise, packed_bytes
from firsttoken_compiler.formats.dequantise import dequantise
from firsttoken_compiler.formats.quantise import quantise
from firsttoken_compiler.formats.types import BLOCK_TYPES
from firsttoken_compiler.isa.program import Packing, Program, Tensor
from firsttoken_compiler.isa.types import Dtype, Space

OUT: Final = Path(__file__).parent / "formats" / "throughput.md"
SHAPE: Final = (1536, 8960)
"""The matrix: `ffn_gate` of DeepSeek-R1-Distill-Qwen-1.5B."""
PANEL: Final = 64
RUNS: Final = 5


def rate(halves: int, work: Callable[[], object]) -> str:
    """Millions of bytes per second, of so many halves; the first run, which compiles, does not count."""
    work()
    seconds = []
    for _ in range(RUNS):
        start = time.thread_time()
        work()
        seconds.append(time.thread_time() - start)
    return f"{2 * halves / min(seconds) / 1e6:,.0f}"


def materialised(bits: int, group: int, matrix: np.ndarray) -> Callable[[], None]:
    """The compiler's own path: integers and scales of a matrix, packed in panels and written to memory."""
    tensors, at = [], 0
    forms = (("panels", Dtype.I4 if bits == 4 else Dtype.I8), ("scales", Dtype.F16))
    for form, dtype in forms:
        packing = Packing("w", form, *matrix.shape, PANEL, bits, group, False)
        tensors.append(Tensor(form, "weight", Space.DRAM, at, packed_bytes(packing), dtype, matrix.shape, packing))
        at += packed_bytes(packing)
    program, memory = Program(np.zeros((0, 0), np.int64), (), tuple(tensors), ()), np.zeros(at, np.uint8)

    def write(address: int, data: np.ndarray) -> None:
        memory[address : address + data.size] = data

    return lambda: materialise(program, lambda _name: matrix, write)


def integers() -> list[str]:
    """Integers in groups of rows."""
    matrix = (np.random.default_rng(0).standard_normal(SHAPE) * 0.03).astype(np.float16)
    lines = ["## Integers in groups", ""]
    lines += [
        f"A matrix {list(SHAPE)} of fp16 as a graph has it, to int4 or int8 and fp16 scales in panels of {PANEL} columns, in memory:"
    ]
    lines += [
        "the way that `run` and `generate` take. MB/s of fp16 read.",
        "",
        "| group | int4 | int8 |",
        "|---|---|---|",
    ]
    for group in (32, 64, 128, SHAPE[0]):
        int4, int8 = (rate(matrix.size, materialised(bits, group, matrix)) for bits in (4, 8))
        lines.append(f"| {'channel' if group == SHAPE[0] else group} | {int4} | {int8} |")
        print(lines[-1])
    return [*lines, ""]


def blocks() -> list[str]:
    """Blocks of GGUF."""
    rows = (np.random.default_rng(1).standard_normal((1024, 4096)) * 0.03).astype(np.float32)
    built = ggml_quantisers.library()
    lines = ["## Blocks", ""]
    lines += [
        "4 million weights, float32 in and out; MB/s of the fp16 that they would be. gguf is the numpy code of the package, which"
    ]
    lines += [f"has no quantiser for the last five; ggml is C code, {built[1] if built else 'not installed'}.", ""]
    lines += ["| type | quantise: ours | gguf | ggml | dequantise: ours | gguf |", "|---|---|---|---|---|---|"]
    plain = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")
    for name in (*plain, *(name for name in BLOCK_TYPES if name not in plain)):
        kind = BLOCK_TYPES[name]
        number, made = GGMLQuantizationType(kind.ggml), quantise(rows, kind)
        theirs = rate(rows.size, lambda number=number: quantize(rows, number)) if name in plain else "-"
        c = "-"
        if built and name in ggml_quantisers.TYPES:
            c = rate(rows.size, lambda kind=kind: ggml_quantisers.quantise(rows, kind))
        mine = rate(rows.size, lambda kind=kind: quantise(rows, kind))
        back = rate(rows.size, lambda kind=kind, made=made: dequantise(made, kind))
        other = rate(rows.size, lambda number=number, made=made: dequantize(made, number))
        lines.append(f"| {name} | {mine} | {theirs} | {c} | {back} | {other} |")
        print(lines[-1])
    return [*lines, ""]


def processor() -> str:
    """What the system calls its processor."""
    found = [
        line for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if line.startswith("model name")
    ]
    return found[0].partition(":")[2].strip() if found else "unknown"


def main() -> None:
    """Measures everything and writes the page."""
    lines = [
        "# Speed of weights in blocks and groups",
        "",
        f"One core of {processor()}. Redraw: `make format-bench`.",
        "",
    ]
    lines += integers() + blocks()
    OUT.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    print(f"wrote {OUT}")


if __name__ == "__main__":
    main()
