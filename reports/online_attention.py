"""Attention of whole rows of scores beside attention with online softmax: cycles, DRAM bytes, scratchpad.

    python reports/online_attention.py [--student NAME] [--targets A,B] [--graphs 512+0,2048+0,1+4095] [--tries N]
        [--weights int4] [--kv-cache fp16] [--json]

A graph is tokens + past. Its attention is simulated alone, launch behind launch, with the compiler's own choice, and
with the N choices of each form that the compiler's account ranks first; of these the fastest is printed.
"""

import argparse
import heapq
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Final

from firsttoken import RunOptions, Target
from firsttoken.scheduled import compiled_graph
from firsttoken.student import find_student
from firsttoken.subject import subject_of
from firsttoken.tuning.measure import measure_kernel
from firsttoken_compiler.codegen.kernels import Kernel
from firsttoken_compiler.schedule.choice import SOFTMAXES, AttentionChoice
from firsttoken_compiler.schedule.choosing import default_choice, legal_costs

STUDENT: Final = "deepseek-r1-distill-qwen-1.5b"
TARGETS: Final = "snapdragon-x-elite,systolic-128"
GRAPHS: Final = "512+0,2048+0,1+4095"


@dataclass(frozen=True)
class Row:
    """One attention by one choice."""

    target: str
    graph: str
    what: str
    choice: str
    cycles: int
    dram_bytes: int
    scratch_bytes: int


def measured(kernel: Kernel, graph: str, what: str, choice: AttentionChoice) -> Row:
    """The launch alone."""
    time = measure_kernel(kernel.spec, kernel.spaces, kernel.target, kernel.room, choice)
    name = kernel.target.name
    return Row(name, graph, what, choice.text(), round(time.cycles), time.dram_bytes, time.scratch_bytes)


def rows(kernel: Kernel, graph: str, tries: int) -> Iterator[Row]:
    """The compiler's own choice, then the best of each form."""
    of = kernel.spec, kernel.spaces, kernel.target, kernel.room
    own = default_choice(*of)
    assert isinstance(own, AttentionChoice)
    yield measured(kernel, graph, "own", own)
    every = [(cost, index, choice) for index, (choice, cost) in enumerate(legal_costs(*of)) if cost is not None]
    for softmax in SOFTMAXES:
        form = [each for each in every if isinstance(each[2], AttentionChoice) and each[2].softmax == softmax]
        first = [choice for _, _, choice in heapq.nsmallest(tries, form) if isinstance(choice, AttentionChoice)]
        made = [measured(kernel, graph, softmax, choice) for choice in first]
        yield from sorted(made, key=lambda row: row.cycles)[:1]


def attention_of(student: str, target: Target, tokens: int, past: int, options: RunOptions) -> Kernel:
    """The attention of the student's first layer."""
    _, config = find_student(student)
    graph = compiled_graph(subject_of(replace(config, layers=1)), target, tokens, past, options)
    return next(kernel for kernel in graph.kernels if kernel.spec.kind == "attention")


def main() -> None:
    """Prints the table, a row as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("student", STUDENT), ("targets", TARGETS), ("graphs", GRAPHS), ("weights", "int4")):
        parser.add_argument(f"--{name}", default=default)
    parser.add_argument("--kv-cache", default="fp16")
    parser.add_argument("--tries", type=int, default=6)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    options = RunOptions(weights=given.weights, kv_cache=given.kv_cache)
    if not given.json:
        print("| target | tokens + past | form | choice | cycles | DRAM KB | scratchpad KB |\n|---|---|---|---|---|---|---|")
    for name in given.targets.split(","):
        for graph in given.graphs.split(","):
            tokens, past = (int(text) for text in graph.split("+"))
            kernel = attention_of(given.student, Target.load(name), tokens, past, options)
            for row in rows(kernel, graph, given.tries):
                if given.json:
                    print(json.dumps(asdict(row)), flush=True)
                else:
                    print(
                        f"| {row.target} | {row.graph} | {row.what} | {row.choice} | {row.cycles:,} | "
                        f"{row.dram_bytes / 1e3:,.0f} | {row.scratch_bytes / 1e3:,.0f} |", flush=True,
                    )  # fmt: skip


if __name__ == "__main__":
    main()
