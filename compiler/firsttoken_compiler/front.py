"""The passes up to launches, and the last results of them that this process keeps.

They read the graph, the target and the precision, and of a schedule what it says about cores. Trials of tiles and of
other choices of kernels therefore share them.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from firsttoken_compiler.frontend.onnx_file import OnnxStudent
from firsttoken_compiler.options import Precision
from firsttoken_compiler.target.target import Target

if TYPE_CHECKING:
    from firsttoken_compiler.codegen.norm_choice import Lowered
    from firsttoken_compiler.frontend.importer import Imported
    from firsttoken_compiler.passes.cache_norms import CacheNorms
    from firsttoken_compiler.passes.canonicalise import Canonical
    from firsttoken_compiler.passes.integer_images import IntegerImages
    from firsttoken_compiler.passes.kv_cache import KvCache
    from firsttoken_compiler.passes.quantise import Quantised
    from firsttoken_compiler.passes.static_ranges import StaticRanges
    from firsttoken_compiler.schedule.choice import Schedules

Done = Callable[[str, object], None]

PASSES: Final = ("specialise", "import", "canonicalise", "quantise", "kv-cache")
"""Those whose results a front is."""
KEPT_FRONTS: Final = 2
"""Graphs whose results are kept: a prompt, and a step of its answer."""
KEPT_LOWERED: Final = 4
"""Lowered forms of each: ways of norms, and what schedules say about cores."""
MAX_BYTES: Final = 4 << 20
"""Largest graph, weights in its file included, that is kept."""


@dataclass
class Front:
    """A graph with types, and what it is lowered to."""

    imported: Imported
    canonical: Canonical
    typed: Quantised
    nodes: Canonical
    inputs: dict[str, str]
    caches: KvCache
    parameters: dict[str, str]
    """ONNX names of the parameters that are inputs, before caches got scales."""
    scales: tuple[StaticRanges, IntegerImages]
    precision: Precision
    target: Target
    kept: OrderedDict[Any, Lowered] | None = None
    """By norms, spilled sums and what a schedule says about cores; None where nothing is kept."""

    def lowered(self, norms: CacheNorms, spilled: frozenset[str], schedules: Schedules) -> Lowered:
        """Placed launches with norms that go these ways; `spilled` sums are fp16."""
        if self.kept is None:
            return self._lowered(norms, spilled, schedules)
        cores = schedules.choices if self.target.cores > 1 else ()
        ways = tuple(sorted(norms.ways.items()))
        key = (norms.mode, norms.way, ways, spilled, schedules.graph, schedules.splits, cores)
        made = self.kept.pop(key, None) or self._lowered(norms, spilled, schedules)
        self.kept[key] = made
        while len(self.kept) > KEPT_LOWERED:
            self.kept.popitem(last=False)
        return made

    def _lowered(self, norms: CacheNorms, spilled: frozenset[str], schedules: Schedules) -> Lowered:
        from firsttoken_compiler.passes.quantise import Quantise

        typed, nodes = self.typed, self.nodes
        if spilled:
            narrow = Quantise(self.precision, self.target, spilled).run(self.canonical, self.imported.weights)
            typed, nodes, _ = self.caches.run(narrow, self.canonical, self.parameters)
        return lower(typed, nodes, norms, self.scales, self.target, schedules, self.imported.weights)


@dataclass
class KeptFronts:
    """By everything that decides them; the ones used longest ago go first."""

    limit: int = KEPT_FRONTS
    kept: OrderedDict[bytes, Front] = field(default_factory=OrderedDict)

    def get(self, student: OnnxStudent, target: Target, precision: Precision, fallback: bool, done: Done) -> Front:
        """The front of a graph; what the passes raise is raised every time, and then nothing is kept."""
        key = _key(student, target, precision, fallback)
        if key is None:
            return _front(student, target, precision, fallback, done)
        made = self.kept.pop(key, None)
        for name in PASSES if made is not None else ():
            done(name, None)
        if made is None:
            made = _front(student, target, precision, fallback, done)
            made.kept = OrderedDict()
        self.kept[key] = made
        while len(self.kept) > self.limit:
            self.kept.popitem(last=False)
        return made


KEPT: Final = KeptFronts()
"""Of this process."""


def front(
    student: OnnxStudent, target: Target, precision: Precision, fallback: bool, done: Done, keep: bool = True
) -> Front:
    """The graph with types. `done` hears of each pass, and of its result unless that was kept, which `keep` allows."""
    take = KEPT.get if keep else _front
    return take(student, target, precision, fallback, done)


def _key(student: OnnxStudent, target: Target, precision: Precision, fallback: bool) -> bytes | None:
    """What decides a front; None for a graph that is large, or whose weights lie in other files that are here."""
    model = student.model
    if student.specialised or len(model.graph.initializer) != len(student.initializers):
        return None
    if model.ByteSize() > MAX_BYTES:
        return None
    outside = {entry.external[0]: name for name, entry in student.initializers.items() if entry.external is not None}
    if any(student.has_data(name) for name in outside.values()):
        return None
    digest = hashlib.sha256(model.SerializeToString(deterministic=True))
    for part in (
        student.name, str(student.folder), repr(student.initializers), repr(sorted(student.declared.items())),
        target.content_hash, target.name, precision.canonical_json(), repr(fallback),
    ):  # fmt: skip
        digest.update(b"\0" + part.encode())
    return digest.digest()


def _front(student: OnnxStudent, target: Target, precision: Precision, fallback: bool, done: Done) -> Front:
    from firsttoken_compiler.frontend.contrib import prepare
    from firsttoken_compiler.frontend.masks import add_masks
    from firsttoken_compiler.frontend.specialise import specialise
    from firsttoken_compiler.passes.block_tables import block_tables
    from firsttoken_compiler.passes.kv_cache import KvCache
    from firsttoken_compiler.passes.quantise import Quantise
    from firsttoken_compiler.passes.split import split

    student = specialise(student)
    done("specialise", student)
    student = prepare(add_masks(student))
    imported, canonical = split(
        student, fallback, done, frozenset(target.matrix.macs_per_cycle), precision.host_roles,
        precision.host_weight_bits,
    )  # fmt: skip
    canonical = block_tables(canonical, imported.weights, precision, target)
    quantised = Quantise(precision, target).run(canonical, imported.weights)
    done("quantise", quantised.module)
    scales = _static_scales(precision, student, imported)
    names = [parameter.name for parameter in imported.module["main"].params]
    parameters = dict(zip(names, imported.inputs, strict=False))  # the weights follow the inputs
    caches = KvCache(precision.kv_cache, precision.kv_concat)
    typed, nodes, inputs = caches.run(quantised, canonical, parameters)
    done("kv-cache", typed.module)
    return Front(imported, canonical, typed, nodes, inputs, caches, parameters, scales, precision, target)


def _static_scales(
    precision: Precision, student: OnnxStudent, imported: Imported
) -> tuple[StaticRanges, IntegerImages]:
    """The passes of activations whose scales are known before the run."""
    from firsttoken_compiler.codegen.stored_weights import columns_of
    from firsttoken_compiler.passes.integer_images import IntegerImages
    from firsttoken_compiler.passes.static_ranges import StaticRanges, multiplied

    ranges = StaticRanges(dict(precision.ranges), multiplied(student.graph.node, student.initializers))
    known = ranges.ranges
    made = {node.name: known[name] for node in student.graph.node for name in node.output if name in known}
    return ranges, IntegerImages(columns_of(imported.student), imported.weights, made)


def lower(
    quantised: Quantised, canonical: Canonical, norms: CacheNorms, scales: tuple[StaticRanges, IntegerImages],
    target: Target, schedules: Schedules, weights: dict[str, str],
) -> Lowered:  # fmt: skip
    """The passes from typed operators to placed launches, with norms that go these ways."""
    from firsttoken_compiler.codegen.names import module_path
    from firsttoken_compiler.codegen.norm_choice import Lowered
    from firsttoken_compiler.codegen.share_choice import place_by_cost
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
    placement = place_by_cost(Place(target, names, spread.exchanged, spread.rows, cores=spread.cores), launches)
    return Lowered(cached, merged.quantised, nodes, launches, placement, decisions, spread, merged.decisions)
