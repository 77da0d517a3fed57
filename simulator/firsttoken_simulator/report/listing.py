"""`program.txt`: the program's listing with the cycles in which each instruction ran."""

from collections.abc import Iterator

from firsttoken_compiler.isa.program import Program
from firsttoken_simulator.report.plain import plain
from firsttoken_simulator.timeline import Timeline


def listing(program: Program, timeline: Timeline) -> str:
    """The text. Times are comments, so `parse_listing` reads it back.

    Every operator's instructions are announced by its name; names are printed with control characters escaped.
    """
    return "\n".join(_lines(program, timeline)) + "\n"


def _lines(program: Program, timeline: Timeline) -> Iterator[str]:
    yield f"# {len(program)} instructions, {timeline.total_cycles} cycles of {timeline.period_fs} fs"
    for index, kernel in enumerate(program.kernels):
        yield f".kernel {index} {kernel}"
    period = timeline.period_fs
    start, end = (timeline.start_fs // period).tolist(), (-(-timeline.end_fs // period)).tolist()
    current = -1
    for i, instruction in enumerate(program.instructions()):
        if instruction.op != current:
            current = instruction.op
            yield f"# {plain(program.ops[current].name)}"
        yield f"{instruction}  # [{i}] {start[i]}..{end[i]}"
