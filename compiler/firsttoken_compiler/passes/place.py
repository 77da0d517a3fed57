"""Decides which planned storages stay in the scratchpad for the whole run, and what is left for the kernels to work in.

Storages that are touched most per byte come first; at least `WORKING_SHARE` of the scratchpad stays free for tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from firsttoken_compiler.errors import AllocationError
from firsttoken_compiler.isa.types import Space
from firsttoken_compiler.passes.lower import Launches, Value
from firsttoken_compiler.schedule.layout import resident_bytes
from firsttoken_compiler.schedule.tiling import Room
from firsttoken_compiler.target.target import Target

WORKING_SHARE: Final = 0.45
"""Share of the scratchpad that residents may not take: half of it holds the kernel that runs, half the next one's
first tiles, so that weights stream while vector work goes on."""


@dataclass(frozen=True)
class Placement:
    """Scratchpad addresses of the resident storages; all others lie in DRAM. Kernels work above `resident_bytes`."""

    resident: dict[str, int]
    sizes: dict[str, int]
    """Bytes of the residents."""
    resident_bytes: int
    scratchpad_bytes: int

    @property
    def room(self) -> Room:
        """What one kernel may use."""
        free = self.scratchpad_bytes - self.resident_bytes
        return Room(free // 2, free)

    def space(self, value: Value) -> Space:
        """Where a value lies."""
        return Space.SPAD if value.kind == "storage" and value.name in self.resident else Space.DRAM


@dataclass(frozen=True)
class Place:
    """See the module's docstring."""

    target: Target

    def run(self, launches: Launches) -> Placement:
        """Chooses the residents; raises AllocationError when the scratchpad is smaller than a tile could ever be."""
        pad = self.target.scratchpad
        align = pad.alignment_bytes
        if pad.bytes < 16 * align:
            raise AllocationError(
                f"target {self.target.name} has a scratchpad of {pad.bytes} bytes, which cannot hold one tile: "
                f"at least {16 * align} are needed, raise scratchpad.bytes"
            )
        traffic = dict.fromkeys((storage.name for storage in launches.storages), 0)
        for launch in launches.launches:
            for value in (*launch.args, *launch.outs):
                if value.kind == "storage":
                    traffic[value.name] += value.arg.nbytes
        needed = {storage.name: storage.nbytes for storage in launches.storages}
        for launch in launches.launches:
            for value in (*launch.args, *launch.outs):
                if value.kind == "storage":
                    needed[value.name] = max(needed[value.name], resident_bytes(value.arg, self.target))
        sizes = {name: -(-nbytes // align) * align for name, nbytes in needed.items()}
        budget = int(pad.bytes * (1 - WORKING_SHARE))
        for launch in launches.launches:
            if launch.spec.kind == "host":  # the host reaches DRAM only
                for value in (*launch.args, *launch.outs):
                    sizes.pop(value.name, None)
        for name in launches.reshaped:
            sizes.pop(name, None)
        demanded = _demanded(launches, sizes, budget, self.target)
        resident: dict[str, int] = {}
        used = 0
        for name in sorted(sizes, key=lambda name: (name not in demanded, -traffic[name] / max(1, sizes[name]), name)):
            if used + sizes[name] <= budget:
                resident[name], used = used, used + sizes[name]
        return Placement(resident, {name: sizes[name] for name in resident}, used, pad.bytes)


def _demanded(launches: Launches, sizes: dict[str, int], budget: int, target: Target) -> set[str]:
    """Storages of normalised rows that have to be resident; those that may not be are taken out of `sizes`.

    Raises AllocationError when not all of the former fit.
    """
    asked = [(launch, str(launch.spec.get("place"))) for launch in launches.launches if launch.spec.get("place")]
    for launch, place in asked:
        if place == "dram":
            sizes.pop(launch.outs[0].name, None)
    found: set[str] = set()
    for launch, place in asked:
        name = launch.outs[0].name
        if place != "scratchpad" or name in found:
            continue
        taken = sum(sizes[other] for other in found)
        if name not in sizes or taken + sizes[name] > budget:
            why = (
                f"they take {sizes[name]} bytes, and {budget - taken} of {target.scratchpad.bytes} are free for them"
                if name in sizes
                else "the host reads them, or they share their memory with what lies in DRAM"
            )
            raise AllocationError(
                f"target {target.name}: the rows of norm {launch.label} cannot stay in the scratchpad: {why}; choose "
                "--norm-cache-place auto, a narrower --norm-cache, or a shorter prompt"
            )
        found.add(name)
    return found
