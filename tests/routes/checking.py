"""One exported model through the whole of firsttoken: compiled, timed, executed, and held against onnxruntime."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from firsttoken import RunOptions
from firsttoken.api import compile_subject, simulate, target_of
from firsttoken.execution import load
from firsttoken.subject import subject_of
from firsttoken_compiler.errors import FirsttokenError
from firsttoken_simulator.energy import energy
from firsttoken_simulator.report.build import build_run

FLOAT = RunOptions(weights="fp16")


@dataclass
class Checked:
    """What became of a route on a target."""

    route: str
    target: str
    ttft_ms: float = 0.0
    nodes: int = 0
    """ONNX nodes of the graph that was compiled, after specialisation."""
    host: dict[str, int] = field(default_factory=dict)
    """Operators that the host computes and how often."""
    reasons: list[str] = field(default_factory=list)
    max_rel: float = float("nan")
    cosine: float = float("nan")
    limit: tuple[float, float] = (0.0, 0.0)
    error: str = ""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether it ran and its numbers are within the tolerance."""
        return not self.error and self.max_rel <= self.limit[0] and self.cosine >= self.limit[1]

    @property
    def verdict(self) -> str:
        """One word."""
        return "ok" if self.passed else "error" if self.error else "WRONG"


def check(folder: Path, target: str) -> Checked:
    """Runs the model of a route's folder. What firsttoken refuses, and what it crashes on, is in `error`."""
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    result = Checked(meta["route"], target, limit=(meta["max_rel"], meta["cosine"]))
    start = time.monotonic()
    try:
        _run(folder, meta, result)
    except FirsttokenError as error:
        result.error = f"{type(error).__name__}: {error}"
    except Exception as error:  # every route has its row in the table, a crash too
        result.error = f"CRASH {type(error).__name__}: {error}"
    result.seconds = time.monotonic() - start
    return result


def _run(folder: Path, meta: dict[str, Any], result: Checked) -> None:
    machine = target_of(result.target)
    subject = subject_of(folder / "model.onnx", meta["bind"])
    tokens, rows = subject.lengths(meta["prompt"], meta["past"])
    program = compile_subject(subject, machine, tokens, rows, FLOAT)
    timeline = simulate(program, machine)
    document = build_run(program, timeline, machine, energy(program, timeline, machine))
    result.ttft_ms = document.ttft_ms
    student = subject.open(tokens, rows)
    on_host = [node for call in program.hosts for node in onnx.load_from_string(call.model).graph.node]
    result.nodes = len({n for op in program.ops for n in op.onnx_nodes} | {node.name for node in on_host})
    result.host = dict(Counter(node.op_type for node in on_host).most_common())
    result.reasons = sorted({call.reason for call in program.hosts})
    with np.load(folder / "inputs.npz") as inputs:
        outputs = load(program, timeline, student, machine).run(dict(inputs))
    with np.load(folder / "expected.npz") as expected:
        result.max_rel, result.cosine = agreement(outputs, dict(expected))


def agreement(outputs: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> tuple[float, float]:
    """(greatest difference over the range of the expected values, least cosine) of the worst output."""
    worst, least = 0.0, 1.0
    for name, right in expected.items():
        if name not in outputs:
            raise FirsttokenError(f"output {name!r} is missing; there are {', '.join(outputs)}")
        ours, reference = outputs[name].astype(np.float64).ravel(), right.astype(np.float64).ravel()
        if ours.shape != reference.shape:
            raise FirsttokenError(f"output {name!r} has {ours.size} elements, onnxruntime's has {reference.size}")
        span = float(reference.max() - reference.min()) or 1.0
        difference = np.abs(ours - reference)
        worst = max(worst, float(difference.max()) / span if np.isfinite(difference).all() else float("inf"))
        product = float(np.linalg.norm(ours) * np.linalg.norm(reference))
        least = min(least, float(ours @ reference) / product if product else float(np.array_equal(ours, reference)))
    return worst, least
