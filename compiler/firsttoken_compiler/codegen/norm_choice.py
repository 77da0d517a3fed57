"""Decides by cost what each norm keeps for its consumers, and says so with numbers.

Every way that a norm can go is made into the launches that it means (the norm and the products that read it), with the
operands where the placement has them, and estimated. `--norm-cache auto` takes the cheapest that the placement allows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from firsttoken_compiler.codegen.build import build
from firsttoken_compiler.codegen.estimate import Estimate, Estimator
from firsttoken_compiler.codegen.names import module_path
from firsttoken_compiler.codegen.template import Template
from firsttoken_compiler.errors import AllocationError
from firsttoken_compiler.isa.types import Dtype, Space
from firsttoken_compiler.options import Precision
from firsttoken_compiler.passes.cache_norms import CacheNorms, NormDecision, NormWay
from firsttoken_compiler.passes.canonicalise import Canonical
from firsttoken_compiler.passes.lower import Launch, Launches, Value
from firsttoken_compiler.passes.place import Placement
from firsttoken_compiler.passes.quantise import Quantised
from firsttoken_compiler.schedule.norm_definitions import statistics_of
from firsttoken_compiler.schedule.spec import NAMES, Arg, KernelSpec
from firsttoken_compiler.target.target import Target

NORMS: Final = ("rms_norm", "layer_norm")
WAYS: Final = {
    "scratchpad": NormWay("rows"), "dram": NormWay("rows", "dram"), "statistics": NormWay("statistics"),
    "off": NormWay("off"),
}  # fmt: skip
"""What a norm keeps, by the way it goes. Rows are in the scratchpad where the placement has room for them."""
SAID: Final = {
    "scratchpad": "rows in scratchpad", "dram": "rows in DRAM", "statistics": "from statistics",
    "off": "computed again",
}  # fmt: skip


@dataclass(frozen=True)
class Lowered:
    """A graph after the passes between types and schedules, with one choice of ways."""

    cached: Quantised
    fused: Quantised
    canonical: Canonical
    launches: Launches
    placement: Placement
    decisions: tuple[NormDecision, ...]


Lower = Callable[[CacheNorms], Lowered]


@dataclass(frozen=True)
class Group:
    """A norm whose rows are kept, and the launches that read them."""

    norm: Launch
    readers: tuple[Launch, ...]

    @property
    def rows(self) -> Value:
        """The rows."""
        return self.norm.outs[0]

    @property
    def splits(self) -> bool:
        """Whether every reader is a product that could make the rows itself."""
        return all(
            reader.spec.kind == "linear" and reader.args[0] == self.rows and self.rows not in reader.args[1:]
            for reader in self.readers
        )

    def launches(self, way: str) -> tuple[Launch, ...]:
        """What runs on a way."""
        if way == "statistics":
            return self._from_statistics()
        if way != "off":
            return (self.norm, *self.readers)
        made: list[Launch] = []
        for index, reader in enumerate(self.readers):
            outs = {out: replace(out, name=f"{out.name}.{index}") for out in self.norm.outs}
            made.append(replace(self.norm, outs=tuple(outs.values())))
            made.append(replace(reader, args=tuple(outs.get(arg, arg) for arg in reader.args)))
        return tuple(made)

    def _from_statistics(self) -> tuple[Launch, ...]:
        norm, rows = self.norm.spec, NAMES[self.rows.arg.dtype]
        count, own = len(statistics_of(norm.kind, rows)), {"norm": norm.kind, "rows": rows}
        column = Arg((self.rows.arg.shape[0], 1), Dtype.F32)
        numbers = tuple(Value("storage", f"{self.rows.name}.number{i}", column) for i in range(count))
        params = (("eps", norm["eps"]), ("norm", norm.kind), ("out", rows))
        stats = KernelSpec("norm_stats", params, norm.args, (column,) * count)
        made = [Launch(stats, self.norm.args, numbers, self.norm.label)]
        for reader in self.readers:
            operands = (self.norm.args[0], *numbers, *self.norm.args[1:])
            scale = {self.norm.outs[1]: numbers[-1]} if len(self.norm.outs) > 1 else {}
            args = (*operands, *(scale.get(arg, arg) for arg in reader.args[1:]))
            merged = {**dict(reader.spec.params), **own, "operands": len(operands)}
            spec = KernelSpec(
                "normed", tuple(sorted(merged.items())), tuple(arg.arg for arg in args), reader.spec.outs
            )
            made.append(Launch(spec, args, reader.outs, reader.label))
        return tuple(made)


@dataclass
class Costs:
    """Estimates of the ways of norms under one placement; what is alike is estimated once."""

    target: Target
    placement: Placement
    known: dict[tuple[object, ...], Estimate | None] = field(default_factory=dict)
    templates: dict[tuple[KernelSpec, tuple[Space, ...]], Template] = field(default_factory=dict)

    def of(self, group: Group) -> dict[str, Estimate | None]:
        """By way; None where it is not possible."""
        ways = WAYS if group.splits else ("scratchpad", "dram")
        return {way: self._estimate(group, way) for way in ways}

    def _estimate(self, group: Group, way: str) -> Estimate | None:
        launches = group.launches(way)
        names = {v.name for launch in launches for v in launch.outs} - {v.name for r in group.readers for v in r.outs}
        kept = Space.DRAM if way == "dram" else Space.SPAD
        if way == "off":
            kept = self.placement.space(group.rows)

        def space(value: Value) -> Space:
            return kept if value.kind == "storage" and value.name in names else self.placement.space(value)

        key = tuple((launch.spec, tuple(map(space, (*launch.args, *launch.outs)))) for launch in launches)
        if key not in self.known:
            free = self.placement.scratchpad_bytes - self.placement.resident_bytes
            try:
                self.known[key] = Estimator(self.target, free, self._template).run(launches, space)
            except AllocationError:
                self.known[key] = None
        return self.known[key]

    def _template(self, spec: KernelSpec, spaces: tuple[Space, ...]) -> Template:
        if (spec, spaces) not in self.templates:
            self.templates[spec, spaces] = build(spec, spaces, self.target, self.placement.room)
        return self.templates[spec, spaces]


def choose_norms(precision: Precision, target: Target, lower: Lower) -> tuple[Lowered, list[str]]:
    """The graph with the ways that options and costs choose, and a line per norm.

    Raises AllocationError when rows have to stay in a scratchpad that cannot hold them.
    """
    asked, place = precision.norm_cache, precision.norm_cache_place
    kept = lower(CacheNorms.of("auto" if asked in ("off", "statistics") else asked, place))
    costs, groups = Costs(target, kept.placement), groups_of(kept)
    estimates = {label: _summed(costs.of(group) for group in found) for label, found in groups.items()}
    chosen = {label: _now(kept.placement, found) for label, found in groups.items()}
    if asked in ("off", "statistics"):
        chosen = {label: asked if asked in estimates[label] else way for label, way in chosen.items()}
    elif asked == "auto" and place != "scratchpad":
        chosen = {label: _cheapest(estimates[label], way) for label, way in chosen.items()}
    final = kept
    ways = {label: NormWay(way) for label, way in chosen.items() if way in ("off", "statistics")}
    if ways:
        final = lower(CacheNorms.of(asked, place, ways))
    return final, [_line(decision, final, groups, estimates, chosen) for decision in final.decisions]


def groups_of(lowered: Lowered) -> dict[str, list[Group]]:
    """The norms whose rows are kept, by their variables in the canonical module."""
    labels = {decision.name for decision in lowered.decisions}
    readers: dict[tuple[str, str], list[Launch]] = {}
    for launch in lowered.launches.launches:
        for value in dict.fromkeys(launch.args):
            readers.setdefault((value.kind, value.name), []).append(launch)
    found: dict[str, list[Group]] = {}
    for launch in lowered.launches.launches:
        if launch.spec.kind in NORMS and launch.label in labels and launch.outs[0].kind == "storage":
            group = Group(launch, tuple(readers.get(("storage", launch.outs[0].name), ())))
            found.setdefault(launch.label, []).append(group)
    return found


def _now(placement: Placement, groups: list[Group]) -> str:
    """The way of rows under a placement."""
    return "scratchpad" if all(placement.space(group.rows) is Space.SPAD for group in groups) else "dram"


def _cheapest(estimates: Mapping[str, Estimate | None], now: str) -> str:
    """Of the ways that are possible; rows lie where the placement has them, which wins where costs are equal."""
    possible = {
        way: found.cycles
        for way, found in estimates.items()
        if found is not None and (way == now or way in ("statistics", "off"))
    }
    return min(possible, key=lambda way: (possible[way], way != now), default=now)


def _summed(parts: Iterable[Mapping[str, Estimate | None]]) -> dict[str, Estimate | None]:
    """Estimates of norms that are computed in several types, by the ways that all of them can go."""
    total: dict[str, Estimate | None] | None = None
    for part in parts:
        if total is None:
            total = dict(part)
            continue
        for way in list(total):
            if way not in part:
                del total[way]
                continue
            a, b = total[way], part[way]
            total[way] = None if a is None or b is None else Estimate(a.cycles + b.cycles, a.dram_bytes + b.dram_bytes)
    return total or {}


def _line(
    decision: NormDecision, lowered: Lowered, groups: Mapping[str, list[Group]],
    estimates: Mapping[str, Mapping[str, Estimate | None]], chosen: Mapping[str, str],
) -> str:  # fmt: skip
    """What a norm keeps, for how many products, where, and what the other ways would cost beside it."""
    behind = lowered.canonical.nodes.get(decision.name, ())
    name = module_path(behind[0]) if behind else decision.name
    products = f"{decision.consumers} product{'s' if decision.consumers > 1 else ''}"
    found, way = groups.get(decision.name, []), chosen.get(decision.name, "")
    nbytes = sum(out.arg.nbytes for group in found for out in group.norm.outs)
    said = {
        "scratchpad": f"kept as {decision.cached_as} in scratchpad for {products}, {nbytes:,} bytes",
        "dram": f"kept as {decision.cached_as} in DRAM for {products}, {nbytes:,} bytes{_why(lowered, found)}",
        "statistics": f"made from its statistics in each of {products}",
    }.get(way, f"computed again for {products}")
    mine, others = estimates.get(decision.name, {}).get(way), []
    for other, estimate in estimates.get(decision.name, {}).items():
        if other == way:
            continue
        if estimate is None or mine is None:
            others.append(f"{SAID[other]} does not fit")
            continue
        cycles, moved = estimate.cycles - mine.cycles, estimate.dram_bytes - mine.dram_bytes
        others.append(f"{SAID[other]} {cycles:+,} cycles" + (f" and {moved:+,} bytes of DRAM traffic" if moved else ""))
    return f"{name}: {said}; estimated: {', '.join(others)}" if others else f"{name}: {said}"


def _why(lowered: Lowered, groups: list[Group]) -> str:
    """Why rows are not in the scratchpad."""
    reasons = [lowered.placement.spilled.get(group.rows.name) for group in groups]
    return next((f" ({reason})" for reason in reasons if reason), "")
