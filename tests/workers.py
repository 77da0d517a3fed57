"""What tests run in spawned processes, which can import only what lies on the path."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from firsttoken import CostModel, Estimate
from firsttoken.cache import ResultCache
from firsttoken.student import StudentConfig

if TYPE_CHECKING:
    from firsttoken.cost_tables.table import CostTable, QuickEstimate


def hammer(folder: Path, worker: int) -> int:
    """Writes and reads entries that other workers write too; returns how often something else came back."""
    cache = ResultCache(folder)
    wrong = 0
    for i in range(40):
        key = str(i % 5)
        blobs = {"shared": key.encode() * 2000, f"own{worker}": bytes([worker]) * 100}
        cache.put(key, blobs)
        wrong += cache.get(key, ["shared", f"own{worker}"]) != blobs
    return wrong


def estimate(model: CostModel, student: StudentConfig) -> tuple[Estimate, list[str]]:
    """The cost of a student, and which heavy packages it took to know it."""
    return model.exact(student), [name for name in ("tvm", "numba", "onnx") if name in sys.modules]


def quick_estimate(table: CostTable, student: StudentConfig) -> tuple[QuickEstimate, list[str]]:
    """The cost of a student out of a table, and which heavy packages it took to know it."""
    return table.estimate(student, outside="raise"), [name for name in ("tvm", "onnx", "torch") if name in sys.modules]
