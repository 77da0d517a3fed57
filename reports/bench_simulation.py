"""How fast the timing machine simulates: products beside ONNXim, and prefill of the 1.5B student; CPU seconds of one core.

    python reports/bench_simulation.py [--json] [--quick]

Compiling is not counted, nor is loading the compiled loop; turning the program into the loop's table is. `--quick` leaves
out the prompts of 512 tokens. The figures of ONNXim (tile-level cores, cycle-level DRAM and network, C++) are CPU seconds
of the same products on an equal machine (128x128 weight-stationary, int8, 1 GHz, 68 GB/s), taken on two shared cores.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).parent))

ONNXIM: Final = {
    (1, 1536, 1536): (41_252, 1.0), (64, 1536, 8960): (302_777, 8.1), (64, 8960, 1536): (341_862, 8.7),
    (128, 4096, 4096): (450_561, 12.0),
}  # fmt: skip
"""(cycles, CPU seconds) by (m, k, n)."""
TIMES_FASTER: Final = 100.0
"""What ours is meant to be of ONNXim's bytes per second."""
STUDENT: Final = "deepseek-r1-distill-qwen-1.5b"
TARGETS: Final = ("snapdragon-x-elite", "systolic-128")
FORMATS: Final = {"fp16": {"weights": "fp16"}, "int4/int8": {"weights": "int4", "acts": "int8"}}
LIMITS: Final = {64: 1.0, 512: 3.0}
"""Seconds by prompt."""
RSS_MIB: Final = 1024.0


def products() -> list[dict[str, Any]]:
    """A row per product: simulated cycles, bursts, and per CPU second cycles, bursts and bytes, with ONNXim's."""
    from gemm import TARGET, product

    from firsttoken_compiler.frontend.onnx_file import from_model
    from firsttoken_compiler.options import Precision
    from firsttoken_compiler.pipeline import compile_onnx
    from firsttoken_compiler.target.load import load_target
    from firsttoken_simulator.machine import simulate_program

    target, rows = load_target(TARGET), []
    for (m, k, n), (cycles, seconds) in ONNXIM.items():
        student = from_model(product(m, k, n), Path("."), "gemm")
        program: Any = compile_onnx(student, target, Precision("int8", "int8", "channel", "int8"))
        line = simulate_program(program, target)  # the first time loads the loop
        took = min(_seconds(lambda program=program: simulate_program(program, target)) for _ in range(5))
        bursts = line.counters["dram_bursts"]
        ours, theirs = k * n / took, k * n / seconds
        rows.append({
            "product": f"{m} x {k} x {n}", "cycles": line.total_cycles, "bursts": bursts, "seconds": took,
            "cycles_per_s": line.total_cycles / took, "bursts_per_s": bursts / took, "bytes_per_s": ours,
            "onnxim_seconds": seconds, "onnxim_cycles_per_s": cycles / seconds, "onnxim_bytes_per_s": theirs,
            "times_onnxim": ours / theirs,
        })  # fmt: skip
    return rows


def _seconds(action: Callable[[], object]) -> float:
    started = time.process_time()
    action()
    return time.process_time() - started


def prefills(prompts: list[int]) -> list[dict[str, Any]]:
    """A row per target, format and prompt; each compiles in one process and simulates in another."""
    import tempfile

    from firsttoken import RunOptions, Target, compile

    rows = []
    for target in TARGETS:
        for name, formats in FORMATS.items():
            for prompt in prompts:
                print(f"{target} {name} {prompt} ...", file=sys.stderr)
                program = compile(STUDENT, Target.load(target), prompt=prompt, options=RunOptions(**formats))
                with tempfile.TemporaryDirectory() as folder:
                    path = Path(folder) / "program"
                    program.save(path)
                    command = [sys.executable, __file__, "--program", str(path), "--target", target]
                    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                found = json.loads(done.stdout.splitlines()[-1])
                rows.append({"target": target, "format": name, "prompt": prompt, **found, "limit_s": LIMITS[prompt]})
    return rows


def simulated(path: Path, name: str) -> dict[str, Any]:
    """One saved program, simulated once: seconds of the table, of the whole, and the process's peak memory."""
    import numpy as np
    from bench import peak_rss_mib

    from firsttoken import Target
    from firsttoken_compiler.isa import word
    from firsttoken_compiler.isa.program import Program
    from firsttoken_simulator import table
    from firsttoken_simulator.machine import simulate_program

    target = Target.load(name)
    empty = Program(code=np.zeros((0, word.WIDTH), np.int64), kernels=(), tensors=(), ops=(), cores=1)
    simulate_program(empty, target)  # loads the compiled loop
    program = Program.load(path)
    tables = _seconds(lambda: table.build(program, target))
    started = time.process_time()
    line = simulate_program(program, target)
    seconds, bursts = time.process_time() - started, line.counters["dram_bursts"]
    return {
        "instructions": len(program), "bursts": bursts, "table_s": tables, "seconds": seconds,
        "ns_per_burst": seconds / bursts * 1e9, "rss_mib": peak_rss_mib(), "cycles": line.total_cycles,
    }  # fmt: skip


def measure(quick: bool = False) -> dict[str, Any]:
    """Everything: rows of products and of prefills, and what misses its limit."""
    found = {"products": products(), "prefills": prefills([64] if quick else [64, 512])}
    over = [f"{row['product']}: x {row['times_onnxim']:.0f}" for row in found["products"]
            if row["times_onnxim"] < TIMES_FASTER]  # fmt: skip
    over += [f"{row['target']} {row['format']} {row['prompt']}: {row['seconds']:.2f} s, {row['rss_mib']:.0f} MiB"
             for row in found["prefills"] if row["seconds"] > row["limit_s"] or row["rss_mib"] > RSS_MIB]  # fmt: skip
    return {**found, "limits": {"times_onnxim": TIMES_FASTER, "seconds": LIMITS, "rss_mib": RSS_MIB}, "over": over}


def show(found: dict[str, Any]) -> None:
    """Two tables and what misses its limit."""
    print(f"{'product':>18} {'cycles':>9} {'CPU s':>8} {'Mcycle/s':>9} {'Mburst/s':>9} {'MB/s':>8} {'ONNXim MB/s':>12} {'x':>6}")
    for row in found["products"]:
        print(f"{row['product']:>18} {row['cycles']:>9} {row['seconds']:>8.4f} {row['cycles_per_s'] / 1e6:>9.1f} "
              f"{row['bursts_per_s'] / 1e6:>9.1f} {row['bytes_per_s'] / 1e6:>8.0f} "
              f"{row['onnxim_bytes_per_s'] / 1e6:>12.2f} {row['times_onnxim']:>6.0f}")  # fmt: skip
    print(f"{'target':>20} {'format':>10} {'tokens':>6} {'Mbursts':>8} {'CPU s':>7} {'ns/burst':>8} {'MiB':>6} {'limit s':>7}")
    for row in found["prefills"]:
        print(f"{row['target']:>20} {row['format']:>10} {row['prompt']:>6} {row['bursts'] / 1e6:>8.1f} "
              f"{row['seconds']:>7.2f} {row['ns_per_burst']:>8.1f} {row['rss_mib']:>6.0f} {row['limit_s']:>7g}")  # fmt: skip
    print(f"over: {'; '.join(found['over']) or 'none'}")


def main() -> int:
    """Prints the tables, or one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--quick", action="store_true", help="leave out the prompts of 512 tokens")
    parser.add_argument("--program", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--target", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.program:
        print(json.dumps(simulated(arguments.program, arguments.target)))
        return 0
    found = measure(arguments.quick)
    if arguments.json:
        print(json.dumps(found, indent=1))
    else:
        show(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
