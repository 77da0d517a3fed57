"""Decides which cores compute a launch, on targets with several: the launch is cut, or core 0 computes it alone.

Cores have a scratchpad each and share the DRAM. A value that stays on chip is therefore one that the same core writes
and reads: all of it on core 0, or of each core its own rows, when every launch that touches the value is cut by these
rows. Whatever one core makes for another goes through the DRAM. Whole plans are estimated with their placements, since
it is this traffic that they differ in; the cheapest is compiled, and one core keeps the work that others do not speed
up by more than `LEAST_GAIN`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from firsttoken_compiler.errors import AllocationError, OptionError
from firsttoken_compiler.isa.types import Space
from firsttoken_compiler.isa.vector_kernel import VectorKernel
from firsttoken_compiler.passes.lower import Launch, Launches, Value
from firsttoken_compiler.passes.place import WORKING_SHARE, Place
from firsttoken_compiler.schedule import choosing, tiling
from firsttoken_compiler.schedule.choice import NO_SCHEDULES, CoreSplit, Schedules, launch_key
from firsttoken_compiler.schedule.parts import NONE, Part, cut, rows_at, ways
from firsttoken_compiler.schedule.rowwise import kernel_operands
from firsttoken_compiler.schedule.spec import KernelSpec
from firsttoken_compiler.target.rates import vector_cycles
from firsttoken_compiler.target.target import Target

LEAST_GAIN: Final = 0.1
"""Share of its time that a launch, and the program, must save by the estimate, which knows neither the rows of the DRAM
that cores close for one another nor how long they wait for each other."""
ESTIMATED: Final = ("linear", "conv", "attention")
"""Kernels with a cost of their own; others take their bytes and an operation per element."""
_ONCE = VectorKernel(("add", "s0", "s1"))
Spaces = Callable[[Value], Space]


@dataclass(frozen=True)
class Spread:
    """Who computes what. Without parts core 0 computes everything, as on a target of one core."""

    splits: tuple[CoreSplit, ...] = ()
    parts: tuple[tuple[Part, ...], ...] = ()
    """By launch."""
    exchanged: Mapping[str, str] = field(default_factory=dict)
    """Storages that lie in the DRAM because several cores touch them, and why."""
    rows: Mapping[str, int] = field(default_factory=dict)
    """Rows that a core holds at most, of storages of which each core keeps its own."""
    lines: tuple[str, ...] = ()
    """For the report."""

    @property
    def cores(self) -> int:
        """Cores in use."""
        return 1 + max((part.core for parts in self.parts for part in parts), default=0)


ON_ONE_CORE: Final = Spread()


@dataclass(frozen=True)
class SpreadCores:
    """Spreads launches over the cores of a target, or as many as a schedule says, cut as it says where it does."""

    target: Target
    schedules: Schedules = NO_SCHEDULES

    def run(self, launches: Launches) -> Spread:
        """The cheapest spread by the estimate.

        Raises AllocationError when a kernel fits in none of the ways, and OptionError for a schedule that asks for
        more cores than there are, or for a way in which a kernel cannot be cut.
        """
        cores, asked = self._cores(), self._asked(launches) if self.schedules.splits else {}
        if cores < 2:
            return ON_ONE_CORE
        alone = _Plans(self.target, cores, launches, asked)
        chosen = alone.spread([NONE] * len(launches.launches))
        least = alone.whole(chosen)
        name, said = "one core", [f"one core {least:,.0f} cycles"]
        for count in sorted({cores, *(1 << i for i in range(1, cores.bit_length()) if 1 << i < cores)}):
            found = _Plans(self.target, count, launches, asked)
            for what, way in (("rows where there are several", found.by_rows), ("each launch for itself", found.alone)):
                spread = found.spread([way(launch) for launch in launches.launches])
                cycles = found.whole(spread)
                plan = f"{count} cores, {what}"
                said.append(f"{plan} {cycles:,.0f} cycles")
                fewer = chosen.cores < spread.cores
                if cycles < least * (1 - LEAST_GAIN if fewer else 1):
                    chosen, least, name = spread, cycles, plan
        text = f"{'; '.join(said)}; {name} compiled"
        if all(launch.spec in asked for launch in launches.launches):
            text = f"{least:,.0f} cycles, cut as the schedule says"
        lines = (f"cores, estimated: {text}", *_lines(launches, chosen, alone))
        return replace(chosen if chosen.cores > 1 else ON_ONE_CORE, lines=lines)

    def _cores(self) -> int:
        """Cores to spread over."""
        asked = self.schedules.graph.cores
        if asked > self.target.cores:
            raise OptionError(
                f"schedule: work is to be divided over {asked} cores, target {self.target.name} has "
                f"{self.target.cores}: give at most as many"
            )
        return asked or self.target.cores

    def _asked(self, launches: Launches) -> dict[KernelSpec, CoreSplit]:
        """The splits that the schedule has for these launches."""
        found: dict[KernelSpec, CoreSplit] = {}
        for spec in dict.fromkeys(launch.spec for launch in launches.launches):
            split = self.schedules.split_of(spec)
            if split is None:
                continue
            if split.cores > self.target.cores:
                raise OptionError(
                    f"schedule of {launch_key(spec)}: {split.text()}, target {self.target.name} has "
                    f"{self.target.cores}: give at most as many"
                )
            if split.by != NONE and len(cut(spec, split, self.target)) < 2:
                possible = ", ".join(ways(spec, self.target, split.cores))
                raise OptionError(
                    f"schedule of {launch_key(spec)}: {split.text()}, and the kernel cannot be cut so: give {possible}"
                )
            found[spec] = split
        return found


class _Plans:
    """Estimates; every part is estimated once. `asked` has the last word on the launches of a spec."""

    def __init__(self, target: Target, cores: int, launches: Launches, asked: Mapping[KernelSpec, CoreSplit]) -> None:
        self.target, self.cores, self.launches, self.asked = target, cores, launches, asked
        self._known: dict[tuple[KernelSpec, tuple[Space, ...], int], float] = {}
        self._ways: dict[KernelSpec, tuple[str, ...]] = {}
        self._alone: dict[KernelSpec, str] = {}

    def ways(self, spec: KernelSpec) -> tuple[str, ...]:
        """The ways to cut a kernel; the one that is wanted alone, where there is one."""
        if spec not in self._ways:
            asked = self.asked.get(spec)
            self._ways[spec] = (asked.by,) if asked is not None else ways(spec, self.target, self.cores)
        return self._ways[spec]

    def by_rows(self, launch: Launch) -> str:
        """Rows, which leave values where they are; without several rows what is cheapest."""
        possible = self.ways(launch.spec)
        return "rows" if "rows" in possible else self.alone(launch)

    def alone(self, launch: Launch) -> str:
        """The cheapest way with all operands in the DRAM."""
        spec = launch.spec
        if spec not in self._alone:
            possible = self.ways(spec)
            costs = {way: self._alone_cost(spec, way) for way in possible}
            least = min(costs.values())
            keeps = NONE in costs and costs[NONE] * (1 - LEAST_GAIN) <= least
            self._alone[spec] = NONE if keeps else min(possible, key=lambda way: costs[way])
        return self._alone[spec]

    def spread(self, by: list[str]) -> Spread:
        """The spread in which launches go these ways, without lines."""
        splits, parts = [], []
        for launch, way in zip(self.launches.launches, by, strict=True):
            asked = self.asked.get(launch.spec)
            split = asked if asked is not None else CoreSplit(way, self.cores if way != NONE else 1)
            made = cut(launch.spec, split, self.target)
            splits.append(split if len(made) > 1 else CoreSplit())
            parts.append(made)
        return Spread(tuple(splits), tuple(parts), *_kept(self.launches, splits, parts))

    def whole(self, spread: Spread) -> float:
        """Cycles of all launches, one behind the other, with values where they would lie."""
        try:
            placement = Place(self.target, exchanged=spread.exchanged, rows=spread.rows).run(self.launches)
        except AllocationError:
            return math.inf
        handover, total = self._handover, 0.0
        for launch, parts in zip(self.launches.launches, spread.parts, strict=True):
            if launch.spec.kind == "host":
                continue
            values = kernel_operands(launch.spec, (*launch.args, *launch.outs))
            total += self._waves(parts, tuple(placement.space(value) for value in values))
            if any(value.name in spread.exchanged for value in values):
                total += handover
        return total

    def _alone_cost(self, spec: KernelSpec, way: str) -> float:
        count = len(kernel_operands(spec, (*spec.args, *spec.outs)))
        parts = cut(spec, CoreSplit(way, 1 if way == NONE else self.cores), self.target)
        return self._waves(parts, (Space.DRAM,) * count) + (self._handover if len(parts) > 1 else 0.0)

    @property
    def _handover(self) -> float:
        """Cycles in which a value that is ready on one core gets to another: a store, then a load of other rows."""
        dram, dma = self.target.dram, self.target.dma
        ns = dram.trp_ns + dram.trcd_ns + dram.tcl_ns + dram.controller_ns
        return 2 * (dma.setup_cycles + dma.bus_latency_cycles) + ns * self.target.clock_hz / 1e9

    def _waves(self, parts: tuple[Part, ...], spaces: tuple[Space, ...]) -> float:
        """The slowest of the parts that run side by side; partial sums come before what adds them."""
        first = [part for part in parts if part.operands[-1] < 0]
        waves = [first, [part for part in parts if part.operands[-1] >= 0]]
        return sum(max(self._cost(p.spec, p.spaces(spaces), len(wave)) for p in wave) for wave in waves if wave)

    def _cost(self, spec: KernelSpec, spaces: tuple[Space, ...], cores: int) -> float:
        """Cycles of a part beside `cores - 1` others; infinite where nothing fits."""
        key = (spec, spaces, cores)
        if key not in self._known:
            try:
                self._known[key] = self._estimate(spec, spaces, seen_by(self.target, cores))
            except AllocationError:
                self._known[key] = math.inf
        return self._known[key]

    def _estimate(self, spec: KernelSpec, spaces: tuple[Space, ...], target: Target) -> float:
        room = int(target.scratchpad.bytes * WORKING_SHARE)
        if spec.kind in ESTIMATED:
            choice = choosing.default_choice(spec, spaces, target, tiling.Room(room // 2, room))
            found = choosing.ranked(spec, spaces, target, choice) if choice is not None else None
            if found is not None:
                return found
        args = kernel_operands(spec, (*spec.args, *spec.outs))
        rate = min(target.dram.peak_bytes_per_s * tiling.DRAM_SHARE / target.clock_hz, target.dma.bus_bytes_per_cycle)
        moved = sum(arg.nbytes for arg, space in zip(args, spaces, strict=True) if space is Space.DRAM)
        out = spec.outs[0]
        work = vector_cycles(target, _ONCE, (1, max(1, math.prod(out.shape[:-1])), out.shape[-1])) if out.shape else 0
        return max(moved / rate + target.dma.setup_cycles, work)


def share_of(target: Target, cores: int) -> Target:
    """The target as one of so many busy cores sees it; a core alone sees the target, whatever it gets of the DRAM."""
    return target if cores < 2 else seen_by(target, cores)


def seen_by(target: Target, cores: int) -> Target:
    """The target with a core's part of DRAM and bus.

    It gets its share of what streams of so many cores get together, and no more than its own requests in flight bring:
    one core alone may be too few to use all of the DRAM.
    """
    dram, dma = target.dram, target.dma
    share = (meeting_share(target) if cores > 1 else 1.0) / cores
    burst_ns = dram.burst_length * 1e3 / dram.data_rate_mtps
    latency_ns = dram.trcd_ns + dram.tcl_ns + burst_ns + dram.controller_ns
    latency_ns += dma.bus_latency_cycles * 1e9 / target.clock_hz
    own = dma.outstanding * dram.burst_bytes / latency_ns * 1e9 / dram.peak_bytes_per_s
    rate = max(1, int(dram.data_rate_mtps * min(share, own)))
    bus = max(1, dma.bus_bytes_per_cycle // cores)
    return replace(target, dram=replace(dram, data_rate_mtps=rate), dma=replace(dma, bus_bytes_per_cycle=bus))


def meeting_share(target: Target) -> float:
    """Share of the DRAM's peak that streams of several cores get where they meet in the same banks.

    A controller of commands serves the row that is open first, and gives them most of the peak. One that looks ahead
    serves a bank in order of arrival: streams that alternate in it pay for a row each time, one after the other.
    """
    dram = target.dram
    if target.dram_commands is not None:
        return 1.0
    banks = {"row-linear": 1, "group-interleaved": dram.bank_groups}.get(
        dram.map, dram.bank_groups * dram.banks_per_group
    )
    burst_ns = dram.burst_length * 1e3 / dram.data_rate_mtps
    return min(1.0, banks * burst_ns / (dram.tras_ns + dram.trp_ns))


def _kept(
    launches: Launches, splits: list[CoreSplit], parts: list[tuple[Part, ...]]
) -> tuple[dict[str, str], dict[str, int]]:
    """(storages that cores exchange and why, rows per core of those of which each core keeps its own)."""
    uses: dict[str, set[tuple[int, ...] | str]] = {}
    for launch, split, made in zip(launches.launches, splits, parts, strict=True):
        values = kernel_operands(launch.spec, (*launch.args, *launch.outs))
        own = rows_at(launch.spec) if split.by == "rows" and len(made) > 1 else frozenset()
        for index, value in enumerate(values):
            if value.kind != "storage":
                continue
            use: tuple[int, ...] | str = "core 0" if len(made) == 1 else "several cores"
            if index in own:
                use = tuple(p.spec.args[index].shape[0] if index < len(p.spec.args) else p.spec.rows for p in made)
            uses.setdefault(value.name, set()).add(use)
    exchanged, rows = {}, {}
    for name, found in uses.items():
        if len(found) > 1 or found == {"several cores"}:
            exchanged[name] = "several cores read or write it"
        elif isinstance(one := next(iter(found)), tuple):
            rows[name] = max(one)
    return exchanged, rows


def _lines(launches: Launches, spread: Spread, found: _Plans) -> list[str]:
    """How many launches of each kind go which way; of those on core 0, whether they could have been cut."""
    counts: dict[str, int] = {}
    for launch, split in zip(launches.launches, spread.splits, strict=True):
        if launch.spec.kind == "host":
            continue
        said = f"{launch.spec.kind} {split.text()}"
        if split.by == NONE:
            cuttable = len(ways(launch.spec, found.target, found.cores)) > 1
            why = "others would not speed it up" if cuttable else "it cannot be cut"
            said += f" ({'as the schedule says' if launch.spec in found.asked else why})"
        counts[said] = counts.get(said, 0) + 1
    return [f"{count} x {said}" for said, count in counts.items()]


