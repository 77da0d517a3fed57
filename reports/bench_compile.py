"""CPU seconds of compiling the 1.5B student again in one process: another length, one tile changed, another width.

The first program of a process is the cold one, which `bench.py` measures. `make bench` runs this script.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final

STUDENT: Final = "deepseek-r1-distill-qwen-1.5b"
TARGET: Final = "snapdragon-x-elite"
PROMPT: Final = 64
LENGTHS: Final = (72, 96, 80)
WIDTHS: Final = (8192, 7680)
"""Of the feed-forward network: students that a search over shapes would ask for."""
TILES: Final = 4
FORMATS: Final = {"fp16": {"weights": "fp16"}, "int4/int8": {"weights": "int4", "acts": "int8"}}
LIMITS: Final = {"another length": 1.0, "one tile changed": 1.0}
"""CPU seconds, of the median."""


def main() -> int:
    """Prints what each format takes; always 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--format", choices=FORMATS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.format:
        print(json.dumps(measured(FORMATS[arguments.format])))
        return 0
    rows = [{"format": name, **_child(name)} for name in FORMATS]
    over = [f"{row['format']} {name}" for row in rows for name, limit in LIMITS.items() if row[name]["median"] > limit]
    if arguments.json:
        print(json.dumps({"limits": LIMITS, "rows": rows, "over": over}, indent=1))
        return 0
    for row in rows:
        for name, found in row.items():
            if name != "format":
                print(f"{row['format']:>10} {name:>18}: median {found['median']:.2f} s of {found['seconds']}")
    print(f"goals: {LIMITS}; over: {', '.join(over) or 'none'}")
    return 0


def _child(name: str) -> dict[str, Any]:
    """A process of its own per format."""
    command = [sys.executable, __file__, "--format", name]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False, text=True)
    if done.returncode:
        sys.exit(f"error: {name} ended with {done.returncode}; what it said stands above")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measured(formats: dict[str, str]) -> dict[str, Any]:
    """CPU seconds from the graph to the verified program, by what differs from programs before."""
    from firsttoken import RunOptions, Target, compile
    from firsttoken.student import find_any

    machine, options = Target.load(TARGET), RunOptions(**formats)
    config = find_any(STUDENT)[1]

    def seconds(student: Any, prompt: int, options: RunOptions = options) -> float:
        started = time.process_time()
        compile(student, machine, prompt=prompt, options=options)
        return round(time.process_time() - started, 3)

    found = {"first": [seconds(STUDENT, PROMPT)], "the same again": [seconds(STUDENT, PROMPT)]}
    schedules = list(_tiles(machine, options))
    found["one tile changed"] = [seconds(STUDENT, PROMPT, replace(options, schedule=one)) for one in schedules]
    found["another length"] = [seconds(STUDENT, prompt) for prompt in LENGTHS]
    found["another width"] = [seconds(replace(config, intermediate=width), PROMPT) for width in WIDTHS]
    return {name: {"median": statistics.median(taken), "seconds": taken} for name, taken in found.items()}


def _tiles(machine: Any, options: Any) -> Iterator[Any]:
    """Schedules that give one product of a layer half of the columns, or of k, that the compiler gives its tile."""
    from firsttoken.subject import subject_of
    from firsttoken_compiler.codegen.kernels import kernels_of
    from firsttoken_compiler.errors import FirsttokenError
    from firsttoken_compiler.pipeline import compile_onnx
    from firsttoken_compiler.schedule.choice import Schedules, kernel_key
    from firsttoken_compiler.schedule.choosing import check, default_choice

    subject, seen = subject_of(STUDENT), list[Any]()
    compile_onnx(
        subject.open(PROMPT, 0), machine, options.precision(subject.layer_bits), observe=lambda made, _: seen.append(made)
    )
    count = 0
    for kernel in kernels_of(seen[0], machine):
        if kernel.spec.kind != "linear" or count == TILES:
            continue
        own: Any = default_choice(kernel.spec, kernel.spaces, machine, kernel.room)
        for other in (replace(own, n=own.n // 2), replace(own, k=own.k // 2), replace(own, m=own.m // 2)):
            try:
                check(kernel.spec, kernel.spaces, machine, kernel.room, other)
            except FirsttokenError:
                continue
            count += 1
            yield Schedules(((kernel_key(kernel.spec, kernel.spaces), other),))
            break


if __name__ == "__main__":
    sys.exit(main())
