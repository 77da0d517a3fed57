"""The ways that a norm can go, as the launches that they mean, and what each costs under a placement."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Final

from firsttoken_compiler.codegen.build import build
from firsttoken_compiler.codegen.estimate import Estimate, Estimator
from firsttoken_compiler.codegen.template import Template
from firsttoken_compiler.errors import AllocationError
from firsttoken_compiler.isa.types import Dtype, Space
from firsttoken_compiler.passes.cache_norms import NormWay
from firsttoken_compiler.passes.lower import Launch, Launches, Value
from firsttoken_compiler.passes.place import Placement
from firsttoken_compiler.schedule.choice import NO_SCHEDULES, Schedules
from firsttoken_compiler.schedule.norm_definitions import statistics_of
from firsttoken_compiler.schedule.spec import NAMES, Arg, KernelSpec
from firsttoken_compiler.target.target import Target

NORMS: Final = ("rms_norm", "layer_norm")
WAYS: Final = {
    "scratchpad": NormWay("rows"), "dram": NormWay("rows", "dram"), "statistics": NormWay("statistics"),
    "off": NormWay("off"),
}  # fmt: skip
"""What a norm keeps, by the way it goes. Rows are in the scratchpad where the placement has room for them."""
Templates = dict[tuple[KernelSpec, tuple[Space, ...]], Template]


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
    def feeds(self) -> bool:
        """Whether a product reads the rows as they are."""
        return any(reader.spec.kind == "linear" and reader.args[0] == self.rows for reader in self.readers)

    @property
    def ways(self) -> tuple[str, ...]:
        """What the norm can keep beside its rows.

        Products do without rows when they read nothing but them. Those on blocks make their weights already, and a
        scale that is given before the run is none of a row's numbers.
        """
        alone = all(
            reader.spec.kind == "linear" and reader.args[0] == self.rows and self.rows not in reader.args[1:]
            for reader in self.readers
        )
        split = not self.norm.spec.get("static") and not any(reader.spec.get("blocks") for reader in self.readers)
        return tuple(WAYS) if alone and split else ("scratchpad", "dram", "off") if alone else ("scratchpad", "dram")

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
            spec = KernelSpec("normed", tuple(sorted(merged.items())), tuple(arg.arg for arg in args), reader.spec.outs)
            made.append(Launch(spec, args, reader.outs, reader.label))
        return tuple(made)


@dataclass
class Costs:
    """Estimates of the ways of norms under one placement; what is alike is estimated once."""

    target: Target
    placement: Placement
    known: dict[tuple[object, ...], Estimate | None] = field(default_factory=dict)
    templates: Templates = field(default_factory=dict)
    schedules: Schedules = NO_SCHEDULES

    def whole(self, launches: Launches) -> Estimate:
        """All launches in order, without those of the host; raises AllocationError when a kernel does not fit."""
        mine = [launch for launch in launches.launches if launch.spec.kind != "host"]
        lying = {**self.placement.resident, **self.placement.dram}
        return self._estimator.run(mine, self.placement.space, lying, self.placement.dram_bytes)

    def of(self, group: Group) -> dict[str, Estimate | None]:
        """By way; None where it is not possible."""
        return {way: self._estimate(group, way) for way in group.ways}

    def _estimate(self, group: Group, way: str) -> Estimate | None:
        launches = tuple(launch for launch in group.launches(way) if launch.spec.kind != "host")
        names = {v.name for launch in launches for v in launch.outs} - {v.name for r in group.readers for v in r.outs}
        kept = Space.DRAM if way == "dram" else Space.SPAD
        if way == "off":
            kept = self.placement.space(group.rows)

        def space(value: Value) -> Space:
            return kept if value.kind == "storage" and value.name in names else self.placement.space(value)

        key = tuple((launch.spec, tuple(map(space, (*launch.args, *launch.outs)))) for launch in launches)
        if key not in self.known:
            try:
                self.known[key] = self._estimator.run(launches, space)
            except AllocationError:
                self.known[key] = None
        return self.known[key]

    @cached_property
    def _estimator(self) -> Estimator:
        free = self.placement.scratchpad_bytes - self.placement.resident_bytes
        return Estimator(self.target, free, self._template)

    def _template(self, spec: KernelSpec, spaces: tuple[Space, ...]) -> Template:
        if (spec, spaces) not in self.templates:
            choice = self.schedules.get(spec, spaces)
            self.templates[spec, spaces] = build(spec, spaces, self.target, self.placement.room, choice)
        return self.templates[spec, spaces]


def groups_of(launches: Launches, names: Iterable[str]) -> dict[str, list[Group]]:
    """The norms of these names, variables of the canonical module, whose rows are kept.

    A norm may be computed in several types; those that products read count, where there are any.
    """
    labels = set(names)
    readers: dict[tuple[str, str], list[Launch]] = {}
    for launch in launches.launches:
        for value in dict.fromkeys(launch.args):
            readers.setdefault((value.kind, value.name), []).append(launch)
    found: dict[str, list[Group]] = {}
    for launch in launches.launches:
        if launch.spec.kind in NORMS and launch.label in labels and launch.outs[0].kind == "storage":
            group = Group(launch, tuple(readers.get(("storage", launch.outs[0].name), ())))
            found.setdefault(launch.label, []).append(group)
    products = {label: [group for group in of if group.feeds] for label, of in found.items()}
    return {label: products[label] or of for label, of in found.items()}
