"""How fast a cost table answers, one student at a time and many at once, on one core; `measure` is what benches call.

The table is a small one: SmolLM2 of narrow widths and two prompts on one target, measured (or taken from the result
cache) first. Every question has a prompt of its own.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

import numpy as np

from firsttoken import CostModel, Target
from firsttoken.cost_tables.accuracy import random_students
from firsttoken.cost_tables.space import CostSpace
from firsttoken.cost_tables.table import CostTable
from firsttoken.student import StudentConfig, find_student

STUDENT: Final = "smollm2-135m"
TARGET: Final = "snapdragon-x-elite"
VARY: Final = {
    "layers": "4:30:1", "hidden": "384:768:64:3", "heads": "6:12:3", "kv_heads": 3, "vocab": 4096,
    "intermediate": "1024:2048:128:3",
}  # fmt: skip
ONE: Final = 1_000
"""Different students that are asked one at a time."""
PROMPTS: Final = "32:64:8:2"
MANY: Final = 100_000
REPEATS: Final = 7
LIMITS: Final = {"one_us": 20.0, "one_layerwise_us": 20.0, "many_per_s": 100_000.0, "many_layerwise_per_s": 100_000.0}
"""Times are to stay below, rates above."""


def main() -> int:
    """Prints the numbers; 1 if a limit is passed and `--check` was given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a limit is passed")
    arguments = parser.parse_args()
    found = measure()
    over = [k for k, limit in LIMITS.items() if (found[k] > limit) == k.endswith("_us")]
    if arguments.json:
        print(json.dumps({**found, "limits": LIMITS, "over": over}, indent=1))
    else:
        print(f"table of {found['probes']} probes, {found['cells']} cells, {found['bytes']} bytes, in {found['built_s']} s")
        print(f"one student: {found['one_us']} us; of layers that differ: {found['one_layerwise_us']} us")
        print(f"many: {found['many_per_s']:,.0f} per second; layers that differ: {found['many_layerwise_per_s']:,.0f}")
        print(f"above their limits: {', '.join(over) or 'none'}")
    return int(arguments.check and bool(over))


def measure() -> dict[str, Any]:
    """Seconds to build, microseconds per single question, students per second of a batch."""
    _, config = find_student(STUDENT)
    assert isinstance(config, StudentConfig)
    model = CostModel(Target.load(TARGET), prompt=64)
    start = time.perf_counter()
    table = model.table(CostSpace.of(config, VARY), prompts=PROMPTS)
    built = time.perf_counter() - start
    mixed = random_students(table.space, 2 * ONE, 0)[1::2]
    layerwise = _padded(table, MANY)
    return {
        "student": STUDENT, "target": TARGET, "probes": len(table.space.probes), "cells": table._each.shape[1],
        "bytes": len(table.to_bytes()), "built_s": round(built, 2),
        "one_us": _one(table, [replace(student, per_layer=()) for student in mixed]),
        "one_layerwise_us": _one(table, mixed),
        "many_per_s": _many(table, {name: column if column.ndim == 1 else column[:, 0] for name, column in layerwise.items()}),
        "many_layerwise_per_s": _many(table, layerwise),
    }  # fmt: skip


def _one(table: CostTable, students: list[StudentConfig]) -> float:
    draw = np.random.default_rng(0)
    prompts = draw.choice(table.lengths.prompts.values, len(students)).tolist()

    def ask() -> None:
        for student, prompt in zip(students, prompts, strict=True):
            table.estimate(student, prompt=prompt, outside="raise")

    return round(_best(ask) / len(students) * 1e6, 2)


def _padded(table: CostTable, count: int) -> dict[str, np.ndarray]:
    """Random columns, with a line of layers for each width."""
    draw, space = np.random.default_rng(0), table.space
    most = space["layers"].values[-1]
    columns = {name: draw.choice(space[name].values, count) for name in ("layers", "hidden")}
    columns["prompt"] = draw.choice(table.lengths.prompts.values, count)
    columns["intermediate"] = draw.choice(space["intermediate"].values, (count, most))
    columns["heads"] = draw.choice(space.heads(3).values, (count, most))
    return columns


def _many(table: CostTable, columns: dict[str, np.ndarray]) -> float:
    return round(MANY / _best(lambda: table.estimate_many(columns, outside="raise")))


def _best(call: Callable[[], object]) -> float:
    """Seconds of the fastest of some calls, which is the one that other processes disturbed least."""
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


if __name__ == "__main__":
    raise SystemExit(main())
