"""A student's graphs as the kernels that schedules choose for: what each covers, and the choice that is in effect."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from firsttoken.schedule_file import Entry, ScheduleFile, patterns, to_toml

if TYPE_CHECKING:
    from firsttoken.latency import Step, Work
    from firsttoken.options import Progress, RunOptions
    from firsttoken.subject import Subject
    from firsttoken_compiler.codegen.kernels import Kernel
    from firsttoken_compiler.isa.program import Program
    from firsttoken_compiler.schedule.choice import Choice, CoreSplit, KernelKey
    from firsttoken_compiler.target.target import Target

PROMPT: Final = "prompt"
DECODE: Final = "decode"
TRACES_VERSION: Final = 1


@dataclass(frozen=True)
class Graph:
    """One compiled graph."""

    phase: str
    """`PROMPT` or `DECODE`."""
    program: Program
    kernels: tuple[Kernel, ...]
    choices: tuple[Choice | None, ...]
    """Of each kernel; None where there is nothing to choose."""
    splits: tuple[tuple[KernelKey, CoreSplit], ...] = ()
    """Of launches, on a target of several cores."""
    norms: tuple[tuple[str, str], ...] = ()
    """(name, way) of norms."""

    def operators(self, kernel: Kernel) -> list[str]:
        """Names of the operators that a kernel computes, or a part of which it computes."""
        return [self.program.ops[number].name for number in kernel.launches]

    def entries(self) -> list[Entry]:
        """The kernels of a schedule file."""
        from firsttoken_compiler.schedule.choice import product_dims

        names = [op.name for op in self.program.ops]
        return [
            Entry(kernel.key, choice, patterns(self.operators(kernel), names), product_dims(kernel.spec) or (),
                  self.phase)
            for kernel, choice in zip(self.kernels, self.choices, strict=True)
            if choice is not None
        ]  # fmt: skip


def compiled_graph(
    subject: Subject, target: Target, tokens: int, past: int, options: RunOptions, phase: str = PROMPT,
    progress: Progress | None = None,
) -> Graph:  # fmt: skip
    """Compiles a graph with the schedule of the options, and the compiler's own choices for all other kernels."""
    from firsttoken import api
    from firsttoken_compiler.codegen.kernels import kernels_of, splits_of
    from firsttoken_compiler.schedule.choice import NO_SCHEDULES
    from firsttoken_compiler.schedule.choosing import default_choice

    found: list[Kernel] = []
    splits: list[tuple[KernelKey, CoreSplit]] = []
    norms: list[tuple[str, str]] = []

    def observe(compiled: Any, _templates: Any) -> None:
        found.extend(kernels_of(compiled, target))
        splits.extend(splits_of(compiled))
        norms.extend(compiled.norm_ways)

    program = api.compile_subject(subject, target, tokens, past, options, progress, observe=observe)
    given = options.schedule or NO_SCHEDULES
    choices = tuple(
        given.get(kernel.spec, kernel.spaces)
        or default_choice(kernel.spec, kernel.spaces, kernel.target, kernel.room)
        for kernel in found
    )
    return Graph(phase, program, tuple(found), choices, tuple(splits), tuple(norms))


def graphs_of(
    subject: Subject, target: Target, prompt: int | None, past: int | None, decode: int, options: RunOptions,
    progress: Progress | None = None,
) -> list[Graph]:  # fmt: skip
    """The graph of the prompt, and that of decode step `decode` where it is above 0, as `run` compiles them."""
    tokens, rows = subject.lengths(prompt, past)
    found = [compiled_graph(subject, target, tokens, rows, options, PROMPT, progress)]
    if decode:
        step = subject.lengths(1, rows + tokens + decode - 1)
        found.append(compiled_graph(subject, target, *step, options, DECODE, progress))
    return found


def launched_graphs(work: Work, target: Target, progress: Progress | None = None) -> list[Graph]:
    """The graphs that a runtime launches for a work, as `latency` compiles them, each once."""
    from firsttoken.latency import plan

    found: dict[Step, Graph] = {}
    for name, launches in plan(work, target).phases.items():
        for step in dict.fromkeys(launch.step for launch in launches):
            subject, phase = step.subject(), DECODE if name == "decode" else PROMPT
            lengths = subject.lengths(step.tokens, step.past)
            found.setdefault(step, compiled_graph(subject, target, *lengths, step.options, phase, progress))
    return [*found.values()]


def file_of(graphs: Sequence[Graph], student: str, target: Target, options: RunOptions) -> ScheduleFile:
    """What a file of these graphs says: a kernel that two graphs share is there once."""
    from firsttoken_compiler.schedule.choice import GraphChoice

    entries: dict[str, Entry] = {}
    for graph in graphs:
        for entry in graph.entries():
            entries.setdefault(entry.key, entry)
    given = options.schedule.graph if options.schedule is not None else GraphChoice()
    chosen = replace(given, norms=norm_patterns(graphs))
    splits = {key: split for graph in reversed(graphs) for key, split in graph.splits}
    kept = tuple(sorted(splits.items(), key=lambda item: item[0]))
    return ScheduleFile(student, target.name, tuple(entries.values()), chosen, target.content_hash, splits=kept)


class WithNorms(Protocol):
    """A graph of which it is known what its norms keep."""

    @property
    def norms(self) -> tuple[tuple[str, str], ...]:
        """(name, way) of norms."""


def norm_patterns(graphs: Iterable[WithNorms]) -> tuple[str, ...]:
    """What norms keep, as `layers.*.input_layernorm=scratchpad`; those that differ between graphs are left free."""
    ways: dict[str, set[str]] = {}
    for graph in graphs:
        for name, way in graph.norms:
            ways.setdefault(name, set()).add(way)
    alike: dict[str, list[str]] = {}
    for name, found in ways.items():
        if len(found) == 1:
            alike.setdefault(next(iter(found)), []).append(name)
    return tuple(f"{pattern}={way}" for way, names in alike.items() for pattern in patterns(names, ways))


def traces_document(graphs: Sequence[Graph]) -> dict[str, Any]:
    """The functions of all kernels before their schedules, and TVM's traces of the steps from there."""
    from firsttoken_compiler.schedule.traces import traces
    from firsttoken_compiler.tvm.api import PINS

    kernels: dict[str, Any] = {}
    for graph in graphs:
        for kernel, choice in zip(graph.kernels, graph.choices, strict=True):
            if choice is not None and kernel.key not in kernels:
                parts = traces(kernel.spec, kernel.spaces, kernel.target, choice)
                kernels[kernel.key] = [
                    {"name": part.name, "source": part.source.script(), "trace": part.steps} for part in parts
                ]
    return {"version": TRACES_VERSION, "tvm": PINS["apache-tvm"], "kernels": kernels}


def traces_path(path: Path) -> Path:
    """Where the traces of a schedule file lie."""
    return path.with_name(f"{path.name}.traces.json")


def write(path: Path, graphs: Sequence[Graph], file: ScheduleFile) -> list[Path]:
    """Writes the schedule and its traces; the paths of both."""
    from firsttoken_simulator.report.folder import write_file

    traces = traces_path(path)
    write_file(path, to_toml(file).encode())
    write_file(traces, json.dumps(traces_document(graphs), indent=1).encode())
    return [path, traces]
