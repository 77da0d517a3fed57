"""The compiler, pass by pass: read this first.

ONNX ─ specialise ─ import ─ canonicalise ─ quantise ─ kv-cache ─ cache-norms ─ fuse ─ lower ─ merge ─ place ─ schedule
─ emit ─ verify ─ Program
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
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
    from firsttoken_compiler.frontend.importer import Imported
    from firsttoken_compiler.passes.cache_norms import CacheNorms
    from firsttoken_compiler.passes.canonicalise import Canonical
    from firsttoken_compiler.passes.integer_images import IntegerImages
    from firsttoken_compiler.passes.quantise import Quantised
    from firsttoken_compiler.passes.static_ranges import StaticRanges
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
        from firsttoken_compiler.frontend.contrib import prepare
        from firsttoken_compiler.frontend.masks import add_masks
        from firsttoken_compiler.frontend.specialise import specialise
        from firsttoken_compiler.passes.block_tables import block_tables
        from firsttoken_compiler.passes.kv_cache import KvCache
        from firsttoken_compiler.passes.merge import check
        from firsttoken_compiler.passes.quantise import Quantise
        from firsttoken_compiler.passes.split import split

        student = specialise(student)
        self.done("specialise", student)
        student = prepare(add_masks(student))
        imported, canonical = split(
            student, self.fallback, self.done, frozenset(target.matrix.macs_per_cycle), precision.host_roles,
            precision.host_weight_bits,
        )  # fmt: skip
        canonical = block_tables(canonical, imported.weights, precision, target)
        quantised = Quantise(precision, target).run(canonical, imported.weights)
        self.done("quantise", quantised.module)
        scales = _static_scales(precision, student, imported)
        inputs = dict(zip((p.name for p in imported.module["main"].params), imported.inputs, strict=False))
        caches, of = KvCache(precision.kv_cache, precision.kv_concat), (canonical, inputs)
        typed, nodes, inputs = caches.run(quantised, *of)
        self.done("kv-cache", typed.module)

        def lower(norms: CacheNorms, spilled: frozenset[str] = frozenset()) -> Lowered:
            made = typed, nodes
            if spilled:
                made = caches.run(Quantise(precision, target, spilled).run(of[0], imported.weights), *of)[:2]
            return _lowered(*made, norms, scales, target, self.schedules, imported.weights)

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


def _static_scales(
    precision: Precision, student: OnnxStudent, imported: Imported
) -> tuple[StaticRanges, IntegerImages]:
    """The passes of activations whose scales are known before the run."""
    from firsttoken_compiler.codegen.stored_weights import columns_of
    from firsttoken_compiler.passes.integer_images import IntegerImages
    from firsttoken_compiler.passes.static_ranges import StaticRanges, multiplied

    ranges = StaticRanges(dict(precision.ranges), multiplied(student.graph.node, student.initializers))
    return ranges, IntegerImages(columns_of(imported.student), imported.weights)


def _lowered(
    quantised: Quantised, canonical: Canonical, norms: CacheNorms, scales: tuple[StaticRanges, IntegerImages],
    target: Target, schedules: Schedules, weights: dict[str, str],
) -> Lowered:  # fmt: skip
    """The passes from typed operators to placed launches, with norms that go these ways."""
    from firsttoken_compiler.codegen.names import module_path
    from firsttoken_compiler.codegen.norm_choice import Lowered
    from firsttoken_compiler.passes.fuse import Fuse
    from firsttoken_compiler.passes.fuse_norms import FuseNorms
    from firsttoken_compiler.passes.fuse_windows import FuseWindows
    from firsttoken_compiler.passes.lower import Lower
    from firsttoken_compiler.passes.merge import Merge
    from firsttoken_compiler.passes.place import Place
    from firsttoken_compiler.passes.quantise_images import QuantiseImages
    from firsttoken_compiler.passes.spread import SpreadCores

    cached, decisions = norms.run(quantised)
    static, integers = scales
    names = {variable: module_path(behind[0]) for variable, behind in canonical.nodes.items() if behind}
    merge = Merge(schedules.graph, names, weights)
    while True:
        fused, nodes = FuseNorms().run(*FuseWindows().run(*Fuse(merge.apart).run(cached, canonical)))
        fused, nodes = static.run(*QuantiseImages(bool(static.ranges)).run(fused, nodes))
        fused, nodes = integers.run(*FuseWindows().run(fused, nodes))
        merged = merge.run(Lower().run(fused), fused, nodes)
        if not merged.unfused:
            break
        merge = replace(merge, refused={**merge.refused, **merged.unfused})
    launches, nodes = merged.launches, merged.canonical
    spread = SpreadCores(target, schedules).run(launches)
    placement = Place(target, names, spread.exchanged, spread.rows, spread.cores).run(launches)
    return Lowered(cached, merged.quantised, nodes, launches, placement, decisions, spread, merged.decisions)
