"""What one launch of a kernel takes, by simulating a few launches in a row."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from firsttoken.tuning.alone import LAUNCHES, alone

if TYPE_CHECKING:
    from firsttoken_compiler.codegen.template import Template
    from firsttoken_compiler.isa.program import Program
    from firsttoken_compiler.isa.types import Space
    from firsttoken_compiler.schedule.choice import Choice
    from firsttoken_compiler.schedule.spec import KernelSpec
    from firsttoken_compiler.schedule.tiling import Room
    from firsttoken_compiler.target.target import Target


@dataclass(frozen=True, slots=True)
class KernelTime:
    """One launch among others of its kind.

    Attributes:
        cycles: from the end of a launch to the end of the next, the mean over all launches but the first.
        energy_mj: of a launch, with its share of what lasts as long as the run.
        dram_bytes: read and written.
        scratch_bytes: scratchpad that it works in.
        tile: the tile as reports show it.
    """

    cycles: float
    energy_mj: float
    dram_bytes: int
    scratch_bytes: int = 0
    tile: str = ""

    def facts(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def measure_kernel(
    spec: KernelSpec, spaces: tuple[Space, ...], target: Target, room: Room, choice: Choice | None = None
) -> KernelTime:
    """Builds a kernel with a choice, None for the compiler's own, and simulates launches of it alone.

    Raises AllocationError or OptionError for a choice that the target cannot do, naming the limit that it breaks.
    """
    from firsttoken_compiler.codegen.build import build

    return measure_template(spec, spaces, build(spec, spaces, target, room, choice), target, room)


def measure_template(
    spec: KernelSpec, spaces: tuple[Space, ...], template: Template, target: Target, room: Room
) -> KernelTime:
    """The time of a template; raises AllocationError when it does not fit, ProgramError when it breaks a rule."""
    from firsttoken_compiler.codegen.verify import verify

    program = alone(spec, spaces, template, target, room)
    verify(program, target)
    return replace(time_of(program, target), scratch_bytes=template.scratch_bytes, tile=template.tile)


def time_of(program: Program, target: Target) -> KernelTime:
    """The time of one launch in a program that `alone` made."""
    from firsttoken_compiler.isa import word
    from firsttoken_simulator.energy import energy
    from firsttoken_simulator.machine import simulate_program

    timeline = simulate_program(program, target)
    op = program.code[:, word.OP]
    ends = [int(timeline.end_fs[op == launch].max(initial=0)) for launch in (1, LAUNCHES)]
    counted = LAUNCHES - 1
    moved = (timeline.dram_read_bytes + timeline.dram_write_bytes)[op == LAUNCHES].sum()
    spent = energy(program, timeline, target).fj[2:].sum()
    return KernelTime(
        cycles=(ends[1] - ends[0]) / counted / timeline.period_fs,
        energy_mj=int(spent) / counted / 1e12,
        dram_bytes=int(moved),
    )
