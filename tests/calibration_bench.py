"""Measurements made by the simulator itself, for the fit to find the machine again that made them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from firsttoken import api
from firsttoken.calibration.forward import KeptClock
from firsttoken.calibration.parameters import parameters_of
from firsttoken.calibration.problem import Problem, Row
from firsttoken.options import RunOptions
from firsttoken.student import StudentConfig
from firsttoken_compiler.target.calibration import Tunable
from firsttoken_compiler.target.changed import with_values
from firsttoken_compiler.target.target import Target

STUDENT = StudentConfig(
    name="small", family="llama", hidden=256, intermediate=512, layers=2, heads=4, kv_heads=2, head_dim=64,
    vocab=512, rope_theta=1e4, max_positions=512, rms_eps=1e-5, tie_embeddings=True, qkv_bias=False,
    source="made up for tests",
)  # fmt: skip
WIDE = replace(STUDENT, name="wide", hidden=512, intermediate=1536, heads=8)
OPTIONS = RunOptions(weights="int8", acts="int8")


@dataclass(frozen=True)
class Step:
    """One graph."""

    student: StudentConfig
    tokens: int
    past: int
    options: RunOptions = OPTIONS


@dataclass(frozen=True)
class Time:
    """How long it takes."""

    device_s: float
    instructions: int


class Machinery:
    """Compiles and simulates by way of the facade."""

    def __init__(self) -> None:
        self.compiled = 0

    def compile(self, step: Step, target: Target) -> Any:
        self.compiled += 1
        return api.compile(step.student, target, prompt=step.tokens, past=step.past, options=step.options)

    def time(self, step: Step, program: Any, target: Target) -> Time:
        return Time(api.simulate(program, target).total_fs * 1e-15, len(program))

    def layers(self, step: Step) -> int:
        return step.student.layers

    def cut(self, step: Step, layers: int) -> Step:
        return replace(step, student=replace(step.student, layers=layers))


def predict(work: Step, target: Target, clock: Any) -> dict[str, float]:
    """The device's time and one dispatch of the host."""
    ms = clock.seconds(work, target).device_s * 1e3 + target.host.dispatch_us * 1e-3
    return {"ttft_ms": ms} if work.tokens > 1 else {"decode_tok_s": 1e3 / ms}


WORKS = tuple(
    Step(student, tokens, past) for student in (STUDENT, WIDE) for tokens, past in ((128, 0), (64, 128), (1, 255))
)


def tunable(path: str, low: float, high: float) -> Tunable:
    return Tunable((path,), low, high, "made up for tests")


def problem(target: Target, truth: dict[str, float], tunables: tuple[Tunable, ...], works: Any = WORKS) -> Problem:
    """What the target with other values would measure."""
    real = with_values(target, truth)
    clock = KeptClock(real, Machinery())
    rows = tuple(Row(str(at), work.student.name, work, predict(work, real, clock)) for at, work in enumerate(works))
    base = replace(target, calibration=tunables)
    return Problem(base, parameters_of(base), rows, predict)
