"""How well a program uses memory: what values between operators take beside what they must take, by memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from firsttoken_compiler.isa.program import Program, Tensor
from firsttoken_compiler.isa.types import Space


@dataclass(frozen=True, slots=True)
class ArenaUse:
    """The part of one memory that values between operators share.

    Attributes:
        space: the memory.
        values: how many lie there.
        value_bytes: their bytes, each counted once.
        bound_bytes: bytes of those that are live at the same operator, at the fullest one: no plan needs less.
        peak_bytes: from the first to the last byte that the plan uses.
    """

    space: Space
    values: int
    value_bytes: int
    bound_bytes: int
    peak_bytes: int

    @property
    def ratio(self) -> float:
        """Peak over bound; 1 where there is nothing."""
        return self.peak_bytes / self.bound_bytes if self.bound_bytes else 1.0

    @property
    def reuse(self) -> float:
        """How often each byte is used again: bytes of all values over the peak; 0 where there is nothing."""
        return self.value_bytes / self.peak_bytes if self.peak_bytes else 0.0

    @property
    def fragmentation(self) -> float:
        """Share of the peak that no value holds at the fullest operator."""
        return 1 - self.bound_bytes / self.peak_bytes if self.peak_bytes else 0.0


def arena_use(program: Program, space: Space) -> ArenaUse:
    """The values between operators that lie in a memory."""
    values = [tensor for tensor in program.of_kind("activation") if tensor.space is space]
    live = live_bytes(values, len(program.ops))
    start, end = min((t.address for t in values), default=0), max((t.address + t.nbytes for t in values), default=0)
    total = sum(tensor.nbytes for tensor in values)
    return ArenaUse(space, len(values), total, int(live.max(initial=0)), end - start)


def live_bytes(tensors: list[Tensor], operators: int) -> np.ndarray:
    """Bytes of the tensors that live at each operator, int64."""
    change = np.zeros(operators + 1, np.int64)
    for tensor in tensors:
        change[tensor.first] += tensor.nbytes
        change[operators if tensor.lasting else tensor.last + 1] -= tensor.nbytes
    return np.asarray(np.cumsum(change)[:operators])


def kind_bytes(program: Program) -> dict[str, int]:
    """Bytes of DRAM by kind of tensor; activations count what they share, once."""
    found: dict[str, int] = {}
    for tensor in program.tensors:
        if tensor.space is Space.DRAM and tensor.kind != "activation":
            found[tensor.kind] = found.get(tensor.kind, 0) + tensor.nbytes
    shared = arena_use(program, Space.DRAM).peak_bytes
    return {**found, "activation": shared} if shared else found
