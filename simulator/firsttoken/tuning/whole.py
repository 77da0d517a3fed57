"""Whole programs under schedules: what is compiled once, assembled with other templates, and simulated.

The passes before scheduling see the compiler's own schedules, so what norms keep and where values lie stays as it is
while choices are compared; `confirm` compiles anew, with everything that follows from a schedule.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Final

from firsttoken.cache import PACKAGES, code_hash
from firsttoken.tuning.search import Kernel
from firsttoken.tuning.trials import choice_text

if TYPE_CHECKING:
    from firsttoken.options import Progress, RunOptions
    from firsttoken.subject import Subject
    from firsttoken.tuning.store import TrialStore
    from firsttoken_compiler.codegen.assemble import Templates
    from firsttoken_compiler.codegen.memory_map import Compiled
    from firsttoken_compiler.codegen.template import Template
    from firsttoken_compiler.isa.program import Program
    from firsttoken_compiler.isa.types import Space
    from firsttoken_compiler.schedule.choice import Choice, CoreSplit, KernelKey, Schedules
    from firsttoken_compiler.schedule.spec import KernelSpec
    from firsttoken_compiler.target.target import Target

OBJECTIVES: Final = ("ttft", "tpot", "energy", "edp")
Choices = Mapping["KernelKey", "Choice"]


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one or more graphs that run one after the other: cycles of the NPU, milliseconds with the host, energy."""

    cycles: int
    ms: float
    energy_mj: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.cycles + other.cycles, self.ms + other.ms, self.energy_mj + other.energy_mj)

    def of(self, objective: str) -> float:
        """What an objective makes of it; less is better."""
        values = {"energy": self.energy_mj, "edp": self.energy_mj * self.ms}
        return values.get(objective, self.ms)


@dataclass
class Graph:
    """One graph of a student, compiled once with the compiler's own schedules."""

    subject: Subject
    target: Target
    options: RunOptions
    tokens: int
    past: int
    phase: str
    """`prompt` or `decode`."""
    store: TrialStore
    progress: Progress | None = None
    compiled: Compiled | None = None
    templates: Templates = field(default_factory=dict)
    kernels: list[Kernel] = field(default_factory=list)
    made: dict[tuple[KernelSpec, tuple[Space, ...], str], Template] = field(default_factory=dict)
    simulated: int = 0

    def open(self) -> None:
        """Compiles the graph; raises FirsttokenError where the student cannot run so."""
        program = self._compile(self.options)
        assert self.compiled is not None
        self.kernels = _kernels(self.compiled, program, self.target, self.phase)

    def cost(self, choices: Choices) -> Cost:
        """Of the program with these choices, the compiler's own for all other kernels; out of the store where known."""
        mine = {kernel.key: choices[kernel.key] for kernel in self.kernels if kernel.key in choices}
        text = json.dumps({key: choice_text(choice) for key, choice in mine.items()}, sort_keys=True)
        return self._kept("assembled", text, partial(self._assembled, mine))

    def confirm(self, schedules: Schedules) -> Cost:
        """Of the program that a schedule file compiles to, checked by the verifier."""
        make = partial(self._compile, replace(self.options, schedule=schedules))
        return self._kept("compiled", schedules.canonical_json(), make)

    def _kept(self, how: str, text: str, make: Callable[[], Program]) -> Cost:
        subject, choice = f"{how} {self._key}", hashlib.sha256(text.encode()).hexdigest()
        found = self.store.get(subject, choice)
        if found is None:
            cost = self._simulated(make())
            found = {"cycles": cost.cycles, "ms": cost.ms, "energy_mj": cost.energy_mj}
            self.store.put(subject, choice, found)
        return Cost(**found)

    @property
    def _key(self) -> str:
        from firsttoken.api import run_parts

        parts = run_parts(self.subject, self.target, self.tokens, 0, self.options, self.past)
        code = code_hash((*PACKAGES, *self.subject.packages))
        return hashlib.sha256(json.dumps({**parts, "code": code}, sort_keys=True).encode()).hexdigest()

    def _assembled(self, choices: Choices) -> Program:
        from firsttoken_compiler.codegen.assemble import assemble
        from firsttoken_compiler.codegen.build import build

        assert self.compiled is not None
        templates = dict(self.templates)
        for kernel in self.kernels:
            choice = choices.get(kernel.key)
            if choice is not None:
                known = (kernel.spec, kernel.spaces, choice_text(choice))
                if known not in self.made:
                    room = self.compiled.placement.room
                    self.made[known] = build(kernel.spec, kernel.spaces, kernel.machine, room, choice)
                templates[kernel.spec, kernel.spaces] = self.made[known]
        return assemble(self.compiled, templates, self.target, {"target": self.target.name})

    @property
    def splits(self) -> tuple[tuple[KernelKey, CoreSplit], ...]:
        """How its launches are cut, on a target of several cores."""
        from firsttoken_compiler.codegen.kernels import splits_of

        assert self.compiled is not None
        return splits_of(self.compiled)

    @property
    def norms(self) -> tuple[tuple[str, str], ...]:
        """(name, way) of its norms."""
        assert self.compiled is not None
        return self.compiled.norm_ways

    def _compile(self, options: RunOptions) -> Program:
        from firsttoken import api

        def observe(compiled: Compiled, templates: Templates) -> None:
            if self.compiled is None:
                self.compiled, self.templates = compiled, dict(templates)

        program: Program = api.compile_subject(
            self.subject, self.target, self.tokens, self.past, options, self.progress, observe=observe
        )
        return program

    def _simulated(self, program: Program) -> Cost:
        from firsttoken_simulator.energy import energy
        from firsttoken_simulator.machine import simulate_program

        timeline = simulate_program(program, self.target)
        self.simulated += 1
        spent = energy(program, timeline, self.target).total_mj
        ms = timeline.total_ms + self.target.host.dispatch_us / 1e3
        return Cost(timeline.total_cycles, ms, spent)


def _kernels(compiled: Compiled, program: Program, target: Target, phase: str) -> list[Kernel]:
    """The distinct kernels of a program, those with most multiply-accumulates first."""
    from firsttoken.schedule_file import patterns
    from firsttoken_compiler.codegen.kernels import kernels_of, parts_of

    names = [op.name for op in program.ops]
    made = []
    for found in kernels_of(compiled, target):
        first = found.launches[0]
        operators = patterns([names[number] for number in found.launches], names)
        macs = program.ops[first].macs // len(parts_of(compiled, first))
        made.append(
            Kernel(
                found.key, found.spec, found.spaces, found.room, found.target, len(found.launches), operators, macs,
                phase,
            )
        )
    return sorted(made, key=lambda kernel: -kernel.macs * kernel.launches)
