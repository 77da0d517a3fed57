"""Decides by cost what each norm keeps for its consumers, and says so with numbers.

Under a first plan, in which all rows are kept, the ways of each norm are estimated. Where another way is cheaper, plans
with these ways are made and estimated as whole programs, since what one norm leaves of the scratchpad serves others;
the cheapest plan is compiled.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final, Protocol

from firsttoken_compiler.codegen.estimate import Estimate
from firsttoken_compiler.codegen.names import module_path
from firsttoken_compiler.codegen.norm_ways import WAYS, Costs, Group, Templates, groups_of
from firsttoken_compiler.errors import AllocationError, OptionError
from firsttoken_compiler.isa.types import Space
from firsttoken_compiler.options import Precision
from firsttoken_compiler.passes.cache_norms import CacheNorms, NormDecision
from firsttoken_compiler.passes.canonicalise import Canonical
from firsttoken_compiler.passes.lower import Launches
from firsttoken_compiler.passes.merge import UNMERGED, Decisions
from firsttoken_compiler.passes.place import Placement
from firsttoken_compiler.passes.quantise import Quantised, residual_stream
from firsttoken_compiler.passes.spread import ON_ONE_CORE, Spread
from firsttoken_compiler.schedule.choice import NO_SCHEDULES, Schedules
from firsttoken_compiler.target.target import Target
from firsttoken_compiler.tvm.api import bindings_of

SAID: Final = {
    "scratchpad": "rows in scratchpad", "dram": "rows in DRAM", "statistics": "from statistics",
    "off": "computed again",
}  # fmt: skip
KEEPING: Final = ("scratchpad", "dram")
"""Ways with rows that are kept."""


@dataclass(frozen=True)
class Lowered:
    """A graph after the passes between types and schedules, with one choice of ways."""

    cached: Quantised
    fused: Quantised
    canonical: Canonical
    launches: Launches
    placement: Placement
    decisions: tuple[NormDecision, ...]
    spread: Spread = ON_ONE_CORE
    merged: Decisions = UNMERGED
    """What a schedule makes one product."""


class Lower(Protocol):
    """Runs the passes between canonical operators and placed launches; `spilled` sums are fp16."""

    def __call__(self, norms: CacheNorms, spilled: frozenset[str] = ...) -> Lowered: ...  # noqa: D102


@dataclass(frozen=True)
class Plan:
    """What was decided: the lowered graph, the templates that are known already, and what to say."""

    lowered: Lowered
    templates: Templates
    lines: list[str]
    ways: tuple[tuple[str, str], ...] = ()
    """(name, way) of each norm whose rows products read."""


def choose_norms(precision: Precision, target: Target, lower: Lower, schedules: Schedules = NO_SCHEDULES) -> Plan:
    """The plan that options and costs choose, with kernels scheduled as `schedules` say.

    Raises AllocationError when rows have to stay in a scratchpad that cannot hold them.
    """
    return _Choice(precision, target, lower, schedules).run()


@dataclass(frozen=True)
class _Option:
    """A plan that could be compiled."""

    ways: Mapping[str, str]
    """Way by norm, as asked for: rows lie in the scratchpad where there is room."""
    lowered: Lowered
    costs: Costs


class _Choice:
    def __init__(self, precision: Precision, target: Target, lower: Lower, schedules: Schedules) -> None:
        self.schedules = schedules
        self.asked, self.place, self.spill = precision.norm_cache, precision.norm_cache_place, precision.residual_spill
        self.target, self.lower = target, lower

    def run(self) -> Plan:
        kept = self.asked if self.asked not in ("off", "statistics") else "auto"
        lowered = self.lower(CacheNorms.of(kept, self.place))
        first = _Option({}, lowered, Costs(self.target, lowered.placement, schedules=self.schedules))
        groups = groups_of(lowered.launches, (decision.name for decision in lowered.decisions))
        of = {} if lowered.spread.parts else groups
        estimates = {label: _summed(first.costs.of(group) for group in found) for label, found in of.items()}
        now = {label: _now(lowered.placement, found) for label, found in groups.items()}
        chosen, notes = first, list[str]()
        if self.asked in ("off", "statistics"):
            chosen = self._option({decision.name: self.asked for decision in lowered.decisions}, frozenset())
        elif lowered.spread.parts:
            pass  # what ways cost on several cores is not estimated: rows are kept
        elif self.schedules.graph.norms:
            asked = self._pinned(first, groups, now)
            chosen, notes = self._cheapest(first, estimates, now)
            if chosen.ways != asked:  # else it is the same plan, and the same is said about it
                chosen, notes = self._option(asked, frozenset()) if asked else first, []
        elif self.place == "auto" or (self.asked == "auto" and self.place == "dram"):
            chosen, notes = self._cheapest(first, estimates, now)
        ways = {**now, **chosen.ways}
        if self.spill == "fp16":
            spilled = frozenset(name for name, space in _residual(chosen.lowered) if space is Space.DRAM)
            chosen = self._option(chosen.ways, spilled) if spilled else chosen
        dearer = {label for label, way in chosen.ways.items() if way == "dram"} if self.place == "auto" else set[str]()
        lines = [
            _line(decision, chosen.lowered, groups, estimates, ways, decision.name in dearer)
            for decision in chosen.lowered.decisions
        ]
        lines += [*notes, *_residual_line(chosen.lowered, self.spill)]
        names = {decision.name: _named(decision, lowered) for decision in lowered.decisions}
        taken = tuple((names[label], way) for label, way in ways.items() if label in names)
        return Plan(chosen.lowered, chosen.costs.templates, lines, taken)

    def _option(self, ways: Mapping[str, str], spilled: frozenset[str]) -> _Option:
        keeps = {label: WAYS[way] for label, way in ways.items()}
        if self.place != "auto":
            keeps = {label: replace(way, place=self.place) for label, way in keeps.items()}
        lowered = self.lower(CacheNorms.of(self.asked, self.place, keeps), spilled)
        return _Option(ways, lowered, Costs(self.target, lowered.placement, schedules=self.schedules))

    def _pinned(self, first: _Option, groups: Mapping[str, list[Group]], now: Mapping[str, str]) -> dict[str, str]:
        """The schedule's ways where they are not those of the first plan; raises OptionError for one that cannot be.

        Rows that are to lie in the scratchpad and have no room there stay in DRAM.
        """
        allowed = KEEPING if self.asked != "auto" else tuple(WAYS)
        asked: dict[str, str] = {}
        for decision in first.lowered.decisions:
            name, found = _named(decision, first.lowered), groups.get(decision.name, [])
            way = self.schedules.graph.norm_way(name)
            possible = [each for each in allowed if all(each in group.ways for group in found)]
            if way is None or not found or way == now[decision.name]:
                continue
            if way not in possible:
                raise OptionError(
                    f"schedule: norm {name} is to go by {way!r}, and can go by {', '.join(possible)} with --norm-cache "
                    f"{self.asked}: change norms, or give --norm-cache auto"
                )
            if way != "scratchpad":
                asked[decision.name] = way
        return asked

    def _cheapest(
        self, first: _Option, estimates: Mapping[str, Mapping[str, Estimate | None]], now: Mapping[str, str]
    ) -> tuple[_Option, list[str]]:
        """The cheapest plan, and a line about those that were compared."""
        allowed = KEEPING if self.asked != "auto" else tuple(WAYS)
        best = {label: _best(found, now[label], allowed) for label, found in estimates.items()}
        if best == now:
            return first, []
        other = sorted(set(best.values()) - {"scratchpad"})
        plans = [best, *({label: way if estimates[label].get(way) else now[label] for label in best} for way in other)]
        options = {"rows where they fit": first}
        for ways in plans:
            asked = {label: way for label, way in ways.items() if way != now[label]}
            name = ", ".join(f"{n} {SAID[way]}" for way in WAYS if (n := list(ways.values()).count(way)))
            if all(option.ways != asked for option in options.values()):
                options[name] = self._option(asked, frozenset())
        cycles = {name: self._whole(option) for name, option in options.items()}
        chosen = min(options, key=lambda name: cycles[name])
        said = "; ".join(f"{name} {cycles[name]:,.0f} cycles" for name in options)
        return options[chosen], [f"whole program, estimated: {said}; the cheapest is compiled"]

    def _whole(self, option: _Option) -> float:
        try:
            return option.costs.whole(option.lowered.launches).cycles
        except AllocationError:
            return float("inf")


def _now(placement: Placement, groups: list[Group]) -> str:
    """The way of rows under a placement."""
    return "scratchpad" if all(placement.space(group.rows) is Space.SPAD for group in groups) else "dram"


def _best(estimates: Mapping[str, Estimate | None], now: str, allowed: Iterable[str]) -> str:
    """The cheapest of the ways that are possible: rows lie in the scratchpad only where the placement has them so."""
    possible = {
        way: found.cycles
        for way, found in estimates.items()
        if found is not None and way in allowed and (way != "scratchpad" or now == "scratchpad")
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


def _named(decision: NormDecision, lowered: Lowered) -> str:
    """A norm's name for people."""
    behind = lowered.canonical.nodes.get(decision.name, ())
    return module_path(behind[0]) if behind else decision.name


def _line(
    decision: NormDecision, lowered: Lowered, groups: Mapping[str, list[Group]],
    estimates: Mapping[str, Mapping[str, Estimate | None]], ways: Mapping[str, str], cheaper: bool,
) -> str:  # fmt: skip
    """What a norm keeps, for how many products, where, and what the other ways would cost beside it.

    `cheaper`: its rows lie in DRAM because that costs less.
    """
    name = _named(decision, lowered)
    products = f"{decision.consumers} product{'s' if decision.consumers > 1 else ''}"
    found, way = groups.get(decision.name, []), ways.get(decision.name, "")
    nbytes = sum(out.arg.nbytes for group in found for out in group.norm.outs)
    why = " (cheaper there)" if cheaper else _why(lowered, found)
    said = {
        "scratchpad": f"kept as {decision.cached_as} in scratchpad for {products}, {nbytes:,} bytes",
        "dram": f"kept as {decision.cached_as} in DRAM for {products}, {nbytes:,} bytes{why}",
        "statistics": f"made from its statistics in each of {products}",
        "off": f"computed again for {products}",
    }.get(way, f"kept as {decision.cached_as} for {products}, as a result of the graph")
    mine, others = estimates.get(decision.name, {}).get(way), []
    for other, estimate in estimates.get(decision.name, {}).items():
        if other == way or mine is None:
            continue
        if estimate is None:
            others.append(f"{SAID[other]} does not fit")
            continue
        cycles, moved = estimate.cycles - mine.cycles, estimate.dram_bytes - mine.dram_bytes
        others.append(f"{SAID[other]} {cycles:+,} cycles" + (f" and {moved:+,} bytes of DRAM traffic" if moved else ""))
    return f"{name}: {said}; estimated: {', '.join(others)}" if others else f"{name}: {said}"


def _why(lowered: Lowered, groups: list[Group]) -> str:
    """Why rows are not in the scratchpad."""
    reasons = [lowered.placement.spilled.get(group.rows.name) for group in groups]
    return next((f" ({reason})" for reason in reasons if reason), "")


def _residual(lowered: Lowered) -> list[tuple[str, Space]]:
    """The sums of the residual stream that launches write into storages, by their variables, and where they lie."""
    bindings = bindings_of(lowered.canonical.module["main"])
    sums = {value.name for value in residual_stream(bindings)}
    return [
        (launch.label, lowered.placement.space(launch.outs[0]))
        for launch in lowered.launches.launches
        if launch.label in sums and launch.spec.kind in ("linear", "add") and launch.outs[0].kind == "storage"
    ]


def _residual_line(lowered: Lowered, spill: str) -> list[str]:
    """Where the residual stream lies."""
    places = [space for _, space in _residual(lowered)]
    if not places:
        return []
    away = places.count(Space.DRAM)
    there = f", {away} in DRAM as {spill}" if away else ""
    return [f"residual stream: {len(places) - away} of {len(places)} sums in scratchpad as fp32{there}"]
