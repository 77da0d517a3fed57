"""The compiler, pass by pass: read this first.

ONNX ─ specialise ─ import ─ canonicalise ─ quantise ─ kv-cache ─ cache-norms ─ fuse ─ lower ─ merge ─ place ─ schedule
─ emit ─ verify ─ Program
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from firsttoken_compiler.errors import OptionError
from firsttoken_compiler.frontend.onnx_file import OnnxStudent
from firsttoken_compiler.isa.program import Program
from firsttoken_compiler.options import Precision
from firsttoken_compiler.target.target import Target

if TYPE_CHECKING:
    from firsttoken_compiler.codegen.assemble import Templates
    from firsttoken_compiler.codegen.memory_map import Compiled
    from firsttoken_compiler.codegen.norm_choice import Lowered
    from firsttoken_compiler.passes.cache_norms import CacheNorms
    from firsttoken_compiler.schedule.choice import Schedules

PIPELINE: Final = (
    "specialise",  # ONNX → ONNX; static shapes, float32, no node whose value follows from the file
    "import",  # ONNX → Relax; weights stay parameters without data
    "canonicalise",  # exporters' spellings → npu.* operators on matrices
    "quantise",  # types of weights and activations, recipes of packed weights
    "kv-cache",  # keys and values that are kept in int8
    "cache-norms",  # what each norm keeps for its consumers
    "fuse",  # activations into the products that they follow, windows and rows of norms into those that read them
    "lower",  # TVM: one PrimFunc per operator, fusion → kernel launches, a life for every value
    "merge",  # products of the same rows that a schedule makes one
    "place",  # which values lie in the scratchpad, and where they share bytes
    "schedule",  # a tile and a tensorised schedule per distinct kernel → instruction templates
    "emit",  # templates relocated, semaphores inserted
    "verify",  # bounds, order, deadlock
)
"""Names for --stop-after and --dump-after."""

Progress = Callable[[str, float, float], None]
Observer = Callable[["Compiled", "Templates"], None]


def compile_onnx(
    student: OnnxStudent, target: Target, precision: Precision, *, meta: dict[str, Any] | None = None,
    stop_after: str | None = None, dump_after: str | None = None, dump_dir: Path | None = None,
    progress: Progress | None = None, fallback: bool = True, observe: Observer | None = None,
    schedules: Schedules | None = None,
) -> Program | None:  # fmt: skip
    """The program of a student on a target; None when stopped early.

    `fallback`: nodes that the NPU cannot run go to the host; without it they are a StudentError. `observe` is called
    once before assembly, with the placed launches and the templates of their kernels. `schedules`: what kernels have
    been given in place of the compiler's own choices; those that occur are marked in it.
    Raises StudentError (the graph), OptionError (precision, pass names), AllocationError (the target is too small,
    or a schedule asks for more than it has).
    """
    for option, name in (("--stop-after", stop_after), ("--dump-after", dump_after)):
        if name is not None and name not in PIPELINE and not (option == "--dump-after" and name == "all"):
            raise OptionError(f"{option} {name!r} is no pass; passes are {', '.join(PIPELINE)}")
    run = _Run(stop_after, dump_after, dump_dir, progress, fallback, observe, schedules)
    return run.all(student, target, precision, dict(meta or {}))


class _Stopped(Exception):
    """Raised after the pass that --stop-after names."""


class _Run:
    """One compilation; `done` is called after every pass with what it made."""

    def __init__(
        self, stop: str | None, dump: str | None, folder: Path | None, progress: Progress | None, fallback: bool,
        observe: Observer | None = None, schedules: Schedules | None = None,
    ) -> None:  # fmt: skip
        from firsttoken_compiler.schedule.choice import NO_SCHEDULES

        self.stop, self.dump, self.folder, self.progress, self.fallback = stop, dump, folder, progress, fallback
        self.observe, self.schedules = observe, schedules or NO_SCHEDULES

    def all(self, student: OnnxStudent, target: Target, precision: Precision, meta: dict[str, Any]) -> Program | None:
        """Every pass in order."""
        try:
            return self._all(student, target, precision, meta)
        except _Stopped:
            return None

    def _all(self, student: OnnxStudent, target: Target, precision: Precision, meta: dict[str, Any]) -> Program:
        from firsttoken_compiler.codegen.assemble import assemble, schedule_all
        from firsttoken_compiler.codegen.format_rows import format_rows, in_effect
        from firsttoken_compiler.codegen.memory_map import Compiled
        from firsttoken_compiler.codegen.names import signature, stored_lines
        from firsttoken_compiler.codegen.norm_choice import choose_norms
        from firsttoken_compiler.front import front
        from firsttoken_compiler.passes.merge import check

        kept = self.stop is None and self.dump is None
        graph = front(student, target, precision, self.fallback, self.done, kept)
        imported, inputs = graph.imported, graph.inputs

        def lower(norms: CacheNorms, spilled: frozenset[str] = frozenset()) -> Lowered:
            return graph.lowered(norms, spilled, self.schedules)

        plan = choose_norms(precision, target, lower, self.schedules)
        check(self.schedules.graph, plan.lowered.merged.groups)
        lowered, canonical = plan.lowered, plan.lowered.canonical
        quantised, launches, placement = lowered.fused, lowered.launches, lowered.placement
        for name, made in (
            ("cache-norms", lowered.cached.module), ("fuse", quantised.module), ("lower", launches.module),
            ("merge", launches), ("place", placement),
        ):  # fmt: skip
            self.done(name, made)
        inline = frozenset(n for n, item in imported.student.initializers.items() if item.external is None)
        parts = (canonical, quantised, launches, placement, imported.weights, inputs, imported.segments, inline)
        compiled = Compiled(*parts, lowered.spread, plan.ways)
        show = partial(self._show, "schedule")
        templates = schedule_all(compiled, target, show, plan.templates, self.schedules)
        self.done("schedule", templates)
        self.schedules.mark(templates)
        if self.observe is not None:
            self.observe(compiled, templates)
        notes = {"norm_decisions": plan.lines, "stored_weights": stored_lines(launches), **lowered.merged.notes}
        program = assemble(compiled, templates, target, {**meta, **signature(imported), **notes})
        program.meta["weight_formats"] = rows = format_rows(quantised.formats, program.tensors)
        program.meta.update(in_effect(rows, launches))
        return self._verified(program, target)

    def _verified(self, program: Program, target: Target) -> Program:
        """The program, which is proved to keep every rule."""
        from firsttoken_compiler.codegen.verify import verify

        self.done("emit", program)
        verify(program, target)
        self.done("verify", program)
        return program

    def done(self, name: str, made: Any) -> None:
        """Shows progress, writes the text form, stops."""
        self._show(name, 1.0)
        if self.folder is not None and self.dump in (name, "all"):
            from firsttoken_compiler.codegen.dump import dump

            dump(self.folder, PIPELINE.index(name), name, made)
        if self.stop == name:
            raise _Stopped

    def _show(self, name: str, part: float) -> None:
        if self.progress is not None:
            self.progress("compile", PIPELINE.index(name) + part, len(PIPELINE))
