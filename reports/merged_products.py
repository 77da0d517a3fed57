"""Products that are one beside products by themselves: cycles, instructions and DRAM bytes of whole programs.

    python reports/merged_products.py [--students A,B] [--targets A,B] [--prompts 64,512] [--weights int4] [--layers N]
        [--json]

Every length is compiled with the compiler's own choices, with q, k and v as one product, with gate and up as one, and
with both; then one token of the answer behind the shortest prompt. `--layers` cuts students to their first layers.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Final

from firsttoken import RunOptions, Target, api
from firsttoken.student import StudentConfig, find_student
from firsttoken.subject import subject_of
from firsttoken_compiler.schedule.choice import MERGES, GraphChoice, Schedules
from firsttoken_simulator.machine import simulate_program

STUDENTS: Final = "smollm2-135m,deepseek-r1-distill-qwen-1.5b"
TARGETS: Final = "snapdragon-x-elite,systolic-128"
CHOICES: Final = ((), *((kind,) for kind in MERGES), MERGES)


@dataclass(frozen=True)
class Row:
    """One program."""

    student: str
    target: str
    tokens: int
    past: int
    merged: str
    cycles: int
    instructions: int
    dram_bytes: int


def measured(
    student: StudentConfig, target: Target, tokens: int, past: int, merged: Sequence[str], weights: str
) -> Row:
    """A program with these products as one."""
    options = RunOptions(weights=weights, schedule=Schedules(graph=GraphChoice(merged=tuple(merged))))
    program = api.compile_subject(subject_of(student), target, tokens, past, options)
    line = simulate_program(program, target)
    moved = int(line.dram_read_bytes.sum() + line.dram_write_bytes.sum())
    return Row(
        student.name, target.name, tokens, past, "+".join(merged) or "none", line.total_cycles, len(program.code), moved
    )


def cut(name: str, layers: int) -> StudentConfig:
    """A decoder, of its first layers where a number is given."""
    _, student = find_student(name)
    return replace(student, name=f"{name}, {layers} layers", layers=layers) if layers else student


def rows(
    students: Sequence[StudentConfig], targets: Sequence[str], prompts: Sequence[int], weights: str
) -> Iterator[Row]:
    """All programs, each beside those that differ from it in what is one product."""
    for student in students:
        for name in targets:
            target = Target.load(name)
            for tokens, past in (*((prompt, 0) for prompt in prompts), (1, min(prompts))):
                for merged in CHOICES:
                    yield measured(student, target, tokens, past, merged, weights)


def line(row: Row, alone: Row) -> str:
    """A row of the table; `alone` is the program without merged products."""
    what = f"{row.tokens} tokens" if not row.past else f"a token behind {row.past}"
    gain = "" if row is alone else f" ({100 * (row.cycles / alone.cycles - 1):+.2f} %)"
    return (
        f"| {row.student} | {row.target} | {what} | {row.merged} | {row.cycles:,}{gain} | {row.instructions:,} | "
        f"{row.dram_bytes / 1e6:,.2f} |"
    )


def main() -> None:
    """Prints the table, a row as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("students", STUDENTS), ("targets", TARGETS), ("prompts", "64,512"), ("weights", "int4")):
        parser.add_argument(f"--{name}", default=default)
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    prompts = [int(text) for text in given.prompts.split(",")]
    students = [cut(name, given.layers) for name in given.students.split(",")]
    found = rows(students, given.targets.split(","), prompts, given.weights)
    if given.json:
        print(json.dumps([asdict(row) for row in found], indent=1))
        return
    print("| student | target | graph | one product | cycles | instructions | DRAM MB |\n|---|---|---|---|---|---|---|")
    alone: Row | None = None
    for row in found:
        alone = row if row.merged == "none" or alone is None else alone
        print(line(row, alone), flush=True)


if __name__ == "__main__":
    main()
