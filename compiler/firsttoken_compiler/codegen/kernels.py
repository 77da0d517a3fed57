"""The distinct kernels of a compiled graph: what a schedule can choose for, and which launches each covers."""

from __future__ import annotations

from dataclasses import dataclass

from firsttoken_compiler.codegen.assemble import kernel_key as lying
from firsttoken_compiler.codegen.assemble import parts_of
from firsttoken_compiler.codegen.memory_map import Compiled
from firsttoken_compiler.isa.types import Space
from firsttoken_compiler.passes.spread import share_of
from firsttoken_compiler.schedule.choice import KernelKey, kernel_key
from firsttoken_compiler.schedule.spec import KernelSpec
from firsttoken_compiler.schedule.tiling import Room
from firsttoken_compiler.target.target import Target


@dataclass(frozen=True)
class Kernel:
    """A kernel, and the launches that it is the template of, or of a part of, by their numbers."""

    key: KernelKey
    spec: KernelSpec
    spaces: tuple[Space, ...]
    target: Target
    """What one core has of it while so many work on the same launch."""
    room: Room
    launches: tuple[int, ...]


def kernels_of(compiled: Compiled, target: Target) -> tuple[Kernel, ...]:
    """In order of first use; launches of the host have none."""
    launches: dict[tuple[KernelSpec, tuple[Space, ...]], list[int]] = {}
    cores: dict[tuple[KernelSpec, tuple[Space, ...]], int] = {}
    for number, launch in enumerate(compiled.launches.launches):
        if launch.spec.kind == "host":
            continue
        _, spaces = lying(launch, compiled.placement)
        parts = parts_of(compiled, number)
        for part in parts:
            found = part.spec, part.spaces(spaces)
            cores.setdefault(found, len({each.core for each in parts}))
            if number not in launches.setdefault(found, []):
                launches[found].append(number)
    return tuple(
        Kernel(kernel_key(spec, spaces), spec, spaces, share_of(target, cores[spec, spaces]), compiled.placement.room,
               tuple(numbers))
        for (spec, spaces), numbers in launches.items()
    )  # fmt: skip
