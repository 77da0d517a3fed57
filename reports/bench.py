"""Seconds and peak memory of the 1.5B student at 64 tokens, per number format; `make bench` runs it.

Every measurement is a process of its own. `cold` compiles and simulates without the result cache; `fill` puts the
result there and `cached` reads it, in a cache folder made for this run.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

STUDENT: Final = "deepseek-r1-distill-qwen-1.5b"
TARGET: Final = "snapdragon-x-elite"
PROMPT: Final = 64
FORMATS: Final = {"fp16": {"weights": "fp16"}, "int4/int8": {"weights": "int4", "acts": "int8"}}
LIMITS: Final = {"compile_s": 8.0, "simulate_s": 1.0, "rss_mib": 1024.0, "cached_s": 1.0}
"""What each column is meant to stay under on two cores."""
COLUMNS: Final = ("format", "kernels_s", "compile_s", "simulate_s", "rss_mib", "cached_s", "instructions", "ttft_ms")


def main() -> int:
    """Prints one line per format; 1 if a limit is passed and `--check` was given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--student", default=STUDENT)
    parser.add_argument("--target", default=TARGET)
    parser.add_argument("--prompt", type=int, default=PROMPT)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a limit is passed")
    parser.add_argument("--part", choices=("cold", "cached"), help=argparse.SUPPRESS)
    parser.add_argument("--format", choices=FORMATS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        part = cold if arguments.part == "cold" else cached
        print(json.dumps(part(arguments.student, arguments.target, arguments.prompt, FORMATS[arguments.format])))
        return 0
    rows = [measure(name, arguments) for name in FORMATS]
    over = [f"{row['format']} {key}" for row in rows for key, limit in LIMITS.items() if row[key] > limit]
    if arguments.json:
        print(json.dumps({"limits": LIMITS, "rows": rows, "over": over}, indent=1))
    else:
        show(rows, over)
    return int(arguments.check and bool(over))


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """All numbers of one format."""
    with tempfile.TemporaryDirectory() as folder:
        row = {"format": name, **_child("cold", name, arguments, folder)}
        _child("cached", name, arguments, folder)
        row["cached_s"] = _child("cached", name, arguments, folder)["cached_s"]
    return row


def _child(part: str, name: str, arguments: argparse.Namespace, folder: str) -> dict[str, Any]:
    print(f"{name}: {part} ...", file=sys.stderr)
    command = [sys.executable, __file__, "--part", part, "--format", name, "--student", arguments.student]
    command += ["--target", arguments.target, "--prompt", str(arguments.prompt)]
    done = subprocess.run(
        command, env={**os.environ, "FIRSTTOKEN_CACHE": folder}, stdout=subprocess.PIPE, check=False, text=True
    )
    if done.returncode:
        sys.exit(f"error: {name} {part} ended with {done.returncode}; what it said stands above")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def cold(student: str, target: str, prompt: int, formats: dict[str, str]) -> dict[str, Any]:
    """Compiles and simulates once; `kernels_s` is what numba needs to load or compile the hot loop."""
    started = time.perf_counter()
    from firsttoken import RunOptions, Target, compile, simulate

    machine = Target.load(target)
    program = compile(student, machine, prompt=prompt, options=RunOptions(**formats))
    compiled = time.perf_counter()
    _load_kernels(machine)
    ready = time.perf_counter()
    timeline = simulate(program, machine)
    done = time.perf_counter()
    return {
        "compile_s": compiled - started,
        "kernels_s": ready - compiled,
        "simulate_s": done - ready,
        "rss_mib": peak_rss_mib(),
        "instructions": len(program),
        "ttft_ms": timeline.total_ms,
    }


def _load_kernels(machine: Any) -> None:
    import numpy as np

    from firsttoken_compiler.isa import word
    from firsttoken_compiler.isa.program import Program
    from firsttoken_simulator.machine import simulate_program

    empty = Program(code=np.zeros((0, word.WIDTH), np.int64), kernels=(), tensors=(), ops=(), cores=1)
    simulate_program(empty, machine)


def cached(student: str, target: str, prompt: int, formats: dict[str, str]) -> dict[str, Any]:
    """One run with the result cache, from the first import to the document."""
    started = time.perf_counter()
    from firsttoken import RunOptions, run

    run(student, target, prompt=prompt, options=RunOptions(**formats))
    return {"cached_s": time.perf_counter() - started}


def peak_rss_mib() -> float:
    """Largest resident memory of this process so far, in MiB."""
    status = Path("/proc/self/status")
    if status.is_file():  # not ru_maxrss there: it also counts what the parent had when it started this process
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 1024
    scale = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


def show(rows: list[dict[str, Any]], over: list[str]) -> None:
    """A line per format, then the limits."""
    print(" ".join(f"{column:>13}" for column in COLUMNS))
    for row in rows:
        cells = [row[column] for column in COLUMNS]
        print(" ".join(f"{cell:>13.2f}" if isinstance(cell, float) else f"{cell:>13}" for cell in cells))
    limits = ", ".join(f"{key} <= {limit:g}" for key, limit in LIMITS.items())
    print(f"limits: {limits}; over: {', '.join(over) or 'none'}")


if __name__ == "__main__":
    sys.exit(main())
