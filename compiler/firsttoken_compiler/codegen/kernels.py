"""The distinct kernels of a compiled graph: what a schedule can choose for, and which launches each covers."""

from __future__ import annotations

from dataclasses import dataclass

from firsttoken_compiler.codegen.memory_map import Compiled
from firsttoken_compiler.isa.types import Space
from firsttoken_compiler.passes.lower import Launch
from firsttoken_compiler.passes.place import Placement
from firsttoken_compiler.passes.spread import share_of
from firsttoken_compiler.schedule.choice import CoreSplit, KernelKey, kernel_key, launch_key
from firsttoken_compiler.schedule.parts import Part
from firsttoken_compiler.schedule.rowwise import kernel_operands
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


def spaces_of(launch: Launch, placement: Placement) -> tuple[Space, ...]:
    """Where the operands and results of a launch lie."""
    values = kernel_operands(launch.spec, (*launch.args, *launch.outs))
    return tuple(placement.space(value) for value in values)


def parts_of(compiled: Compiled, number: int) -> tuple[Part, ...]:
    """What the cores compute of launch `number`; one part, the launch itself, where core 0 computes everything."""
    launch, parts = compiled.launches.launches[number], compiled.spread.parts
    if parts:
        return parts[number]
    count = len(kernel_operands(launch.spec, (*launch.args, *launch.outs)))
    return (Part(0, launch.spec, tuple(range(count)), (0,) * count),)


def splits_of(compiled: Compiled) -> tuple[tuple[KernelKey, CoreSplit], ...]:
    """How launches are cut, in the order of their keys; none on a target of one core. Equal launches are cut alike."""
    if not compiled.spread.splits:
        return ()
    launches = zip(compiled.launches.launches, compiled.spread.splits, strict=True)
    return tuple(sorted({launch_key(launch.spec): split for launch, split in launches}.items()))


def kernels_of(compiled: Compiled, target: Target) -> tuple[Kernel, ...]:
    """In order of first use; launches of the host have none."""
    launches: dict[tuple[KernelSpec, tuple[Space, ...]], list[int]] = {}
    cores: dict[tuple[KernelSpec, tuple[Space, ...]], int] = {}
    for number, launch in enumerate(compiled.launches.launches):
        if launch.spec.kind == "host":
            continue
        spaces = spaces_of(launch, compiled.placement)
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
