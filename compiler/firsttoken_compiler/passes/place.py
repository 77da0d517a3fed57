"""Decides which values lie in the scratchpad, where they and the others lie, and what is left for kernels to work in.

Values that are touched most per byte come first; a value stays where the bytes live beside it leave room. At least
`WORKING_SHARE` of the scratchpad, or another share, stays free for tiles. Values share bytes when they are never live
together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np

from firsttoken_compiler.errors import AllocationError
from firsttoken_compiler.isa.types import Space
from firsttoken_compiler.passes.arena import Packed, Piece, pack
from firsttoken_compiler.passes.lower import Launches, Value
from firsttoken_compiler.schedule.layout import resident_bytes
from firsttoken_compiler.schedule.tiling import Room
from firsttoken_compiler.target.target import Target

WORKING_SHARE: Final = 0.45
"""Share of the scratchpad that residents may not take, where no other is asked for: half of it holds the kernel that
runs, half the next one's first tiles, so that weights stream while vector work goes on."""


@dataclass(frozen=True)
class Placement:
    """Where the storages lie: residents in the scratchpad, all others in DRAM. Kernels work above `resident_bytes`."""

    resident: dict[str, int]
    """Scratchpad addresses."""
    sizes: dict[str, int]
    """Bytes of the residents."""
    resident_bytes: int
    scratchpad_bytes: int
    dram: dict[str, int]
    """Offsets of the others in a region of DRAM."""
    dram_bytes: int
    """Bytes of that region."""
    spilled: dict[str, str]
    """Why each of them does not lie in the scratchpad."""

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
    names: Mapping[str, str] = field(default_factory=dict)
    """What readers know variables of the canonical module by."""
    exchanged: Mapping[str, str] = field(default_factory=dict)
    """Storages that cores exchange, which only DRAM lets them, and why."""
    rows: Mapping[str, int] = field(default_factory=dict)
    """Of storages of which each core keeps its own rows, at the same address: how many at most."""
    share: float = WORKING_SHARE
    """Share of the scratchpad that residents may not take."""
    cores: int = 1
    """Cores in use; of several each keeps some bytes above the residents, where fences load to."""

    def run(self, launches: Launches) -> Placement:
        """Chooses the residents.

        Raises AllocationError when the scratchpad is smaller than a tile could ever be, and for a value that was asked
        to lie there and cannot.
        """
        pad = self.target.scratchpad
        if pad.bytes < 16 * pad.alignment_bytes:
            raise AllocationError(
                f"target {self.target.name} has a scratchpad of {pad.bytes} bytes, which cannot hold one tile: "
                f"at least {16 * pad.alignment_bytes} are needed, raise scratchpad.bytes"
            )
        choice = _Choice(launches, self, int(pad.bytes * (1 - self.share)))
        packed = choice.residents()
        align = self.target.alignment(Space.DRAM)
        others = [
            Piece(storage.name, storage.nbytes, storage.first, storage.last, align)
            for storage in launches.storages
            if storage.name not in packed.offsets
        ]
        dram = pack(others)
        unit = self.target.alignment(Space.SPAD, matrix_weights=True)
        taken = -(-packed.nbytes // unit) * unit + (unit if self.cores > 1 else 0)
        return Placement(
            packed.offsets, {name: choice.pieces[name].nbytes for name in packed.offsets}, taken, pad.bytes,
            dram.offsets, dram.nbytes, choice.spilled,
        )  # fmt: skip


class _Choice:
    """Which values stay, within a budget of bytes."""

    def __init__(self, launches: Launches, place: Place, budget: int) -> None:
        self.launches, self.place, self.budget = launches, place, budget
        self.target, self.names = place.target, place.names
        self.wanted = {
            launch.outs[0].name: launch
            for launch in launches.launches
            if launch.spec.get("place") == "scratchpad" and launch.outs[0].kind == "storage"
        }
        """Values that the options want in the scratchpad, by the launch that writes them."""
        traffic, needed = self._uses()
        unit = self.target.alignment(Space.SPAD)
        self.pieces = {s.name: Piece(s.name, needed[s.name], s.first, s.last, unit) for s in launches.storages}
        self.order = sorted(
            self.pieces.values(),
            key=lambda p: (p.name not in self.wanted, -traffic[p.name] / max(1, p.nbytes), p.first, p.name),
        )
        self.spilled = self._barred()

    def residents(self) -> Packed:
        """The residents packed; whoever does not fit is in `spilled` afterwards."""
        live = np.zeros(len(self.launches.launches) + 1, np.int64)
        chosen: dict[str, Piece] = {}
        for piece in self.order:
            span = slice(piece.first, piece.last + 1)
            taken = int(live[span].max())
            if piece.name in self.spilled:
                self._require(piece, self.spilled[piece.name])
            elif taken + piece.nbytes > self.budget:
                self._spill(piece, f"{self.budget - taken} of {self.budget} bytes are free while it lives")
            else:
                live[span] += -(-piece.nbytes // piece.alignment) * piece.alignment
                chosen[piece.name] = piece
        packed = pack(list(chosen.values()))
        while packed.nbytes > self.budget:
            above = [p for p in chosen.values() if packed.offsets[p.name] + p.nbytes > self.budget]
            self._spill(above[-1], f"{self.budget} bytes have no gap for it while it lives")
            del chosen[above[-1].name]
            packed = pack(list(chosen.values()))
        return packed

    def _uses(self) -> tuple[dict[str, int], dict[str, int]]:
        """Bytes that launches move to and from each value, and what it takes of a scratchpad."""
        traffic = dict.fromkeys((storage.name for storage in self.launches.storages), 0)
        needed = {s.name: 0 if s.name in self.place.rows else s.nbytes for s in self.launches.storages}
        for launch in self.launches.launches:
            for value in (*launch.args, *launch.outs):
                if value.kind == "storage":
                    traffic[value.name] += value.arg.nbytes
                    arg = value.arg
                    if value.name in self.place.rows:
                        arg = replace(arg, shape=(self.place.rows[value.name], *arg.shape[1:]))
                    needed[value.name] = max(needed[value.name], resident_bytes(arg, self.target))
        return traffic, needed

    def _barred(self) -> dict[str, str]:
        """Values that the scratchpad cannot hold whatever its size, and why."""
        found = {**self.place.exchanged}
        found |= dict.fromkeys(self.launches.reshaped, "it is also read as a matrix of other rows")
        for launch in self.launches.launches:
            if launch.spec.kind == "host":
                values = (value for value in (*launch.args, *launch.outs) if value.kind == "storage")
                found |= dict.fromkeys((v.name for v in values), "the host reaches DRAM only")
            elif launch.spec.get("place") == "dram" and launch.outs[0].kind == "storage":
                found[launch.outs[0].name] = "the options want it in DRAM"
        return found

    def _spill(self, piece: Piece, why: str) -> None:
        self._require(piece, why)
        self.spilled[piece.name] = f"{piece.nbytes} bytes, {why}"

    def _require(self, piece: Piece, why: str) -> None:
        """An error for what must not be spilled."""
        if piece.name in self.wanted:
            label = self.wanted[piece.name].label
            raise AllocationError(
                f"target {self.target.name}: {self.names.get(label, label)}: its normalised rows take {piece.nbytes} "
                f"bytes and cannot lie in the scratchpad: {why}; choose --norm-cache-place auto or a narrower "
                "--norm-cache, or shorten the prompt"
            )
