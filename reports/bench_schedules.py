"""Every matrix product of the 1.5B student on every target, and its whole prefill, over what no schedule can beat.

    python reports/bench_schedules.py [--targets A,B] [--trials N] [--jobs N] [--minutes M] [--json]

A student of one layer has all products of all layers; equal ones are measured once. Each is measured alone, launched
several times in a row, with the compiler's choice and with the best of N trials. Its bound is the larger of its
multiply-accumulates at the matrix unit's rate and its operands in DRAM at the DRAM's peak. Where the DMA keeps fewer
reads in flight than the peak needs, the table shows beside it the ratio to a bound in which the weights come at the
rate that one long read reaches.

The whole prefill, all layers, is held against the busiest unit: the largest of what matrix unit and vector unit work
in all, and all bytes at the DRAM's peak, of the program with the compiler's choices. Tuned is the better of that
program and the one with every product's best choice.

Trials and programs are kept in the cache folder, so that a run that was ended goes on where it was. On one CPU a
product takes about half a second a trial at 64 tokens and two at 512, a prefill up to 15 seconds.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from dram import sequential, share

from firsttoken import RunOptions, Target
from firsttoken.api import compile_subject
from firsttoken.cache import PACKAGES, cache_folder, code_hash
from firsttoken.student import find_student
from firsttoken.subject import subject_of
from firsttoken.tuning.bounds import bound_cycles
from firsttoken.tuning.search import Kernel, Search, candidates
from firsttoken.tuning.store import TrialStore
from firsttoken.tuning.trials import Trials, workers
from firsttoken.tuning.whole import Graph
from firsttoken_compiler.errors import FirsttokenError
from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.types import ENGINES_PER_CORE, Engine
from firsttoken_compiler.schedule.choice import Choice, product_dims
from firsttoken_compiler.schedule.choosing import needs
from firsttoken_compiler.target.load import preset_names
from firsttoken_simulator.machine import simulate_program

STUDENT: Final = "deepseek-r1-distill-qwen-1.5b"
LENGTHS: Final = (64, 128, 512, 0)
"""Tokens of a prompt; 0 is a token of the answer behind 512 rows."""
PAST: Final = 512
TRIALS: Final = 16
BITS: Final = {"int4": 4, "int8": 8, "fp16": 16}
PAIRS: Final = {"int4": "int8xint4", "int8": "int8xint8"}
GOALS: Final = {"worst": 1.10, "median": 1.05}
"""Of tuned cycles over the bound."""
WHOLE: Final = 1.15
"""Of a tuned prefill over its busiest unit's work."""


@dataclass(frozen=True)
class Product:
    """One product on one target; cycles of one launch among others of its kind."""

    target: str
    formats: str
    tokens: int
    name: str
    dims: tuple[int, ...]
    default_cycles: float
    tuned_cycles: float
    bound_cycles: float
    reach_cycles: float
    """The bound, or the weights alone at the bandwidth that one long read reaches."""
    trials: int

    @property
    def ratio(self) -> float:
        """Tuned cycles over the bound."""
        return self.tuned_cycles / self.bound_cycles

    @property
    def reached(self) -> float:
        """Tuned cycles over the bound at the bandwidth that is reached."""
        return self.tuned_cycles / self.reach_cycles


@dataclass(frozen=True)
class Prefill:
    """A whole prefill on one target."""

    target: str
    formats: str
    tokens: int
    default_cycles: int
    tuned_cycles: int
    bound_cycles: float
    unit: str
    """The one that works longest."""


def main() -> int:
    """Prints the tables; always 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", default=",".join(preset_names()))
    parser.add_argument("--trials", type=int, default=TRIALS, help="choices of a product that are measured")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no further length is begun after this")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    end = time.monotonic() + 60 * arguments.minutes
    found: list[Product] = []
    whole: list[Prefill] = []
    for products, prefill in measure(arguments.targets.split(","), arguments.trials, arguments.jobs, end):
        found, whole = found + products, whole + prefill
    document = {"products": [asdict(row) for row in found], "prefills": [asdict(row) for row in whole]}
    print(json.dumps(document) if arguments.json else "\n".join([*table(found), "", *prefill_table(whole)]))
    return 0


def measure(
    targets: Sequence[str], trials: int, jobs: int, end: float
) -> Iterator[tuple[list[Product], list[Prefill]]]:
    """What was found, length by length, until `end`."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    store = TrialStore(folder / "bench-trials.sqlite3")
    for name in targets:
        target = Target.load(name)
        for options in formats_of(target):
            for tokens in LENGTHS:
                if time.monotonic() > end:
                    print(f"{name}, {options.weights}, {tokens or 'decode'}: no time left", file=sys.stderr)
                    continue
                print(f"{name}, {options.weights}, {tokens or 'decode'} ...", file=sys.stderr)
                try:
                    yield one_length(target, options, tokens, trials, jobs, store)
                except FirsttokenError as error:
                    print(f"{name}, {options.weights}, {tokens or 'decode'}: {error}", file=sys.stderr)


def one_length(
    target: Target, options: RunOptions, tokens: int, trials: int, jobs: int, store: TrialStore
) -> tuple[list[Product], list[Prefill]]:
    """The products of one graph on one target, and the prefill."""
    said = f"{options.precision().weights}/{options.precision().acts}"
    graph = graph_of(target, options, tokens, 1, store)
    searches = [
        (kernel, Search(candidates(kernel), trials, 0))
        for kernel in graph.kernels
        if product_dims(kernel.spec) and "proj" in kernel.operators[0] + "lm_head" and kernel.macs
    ]
    with workers(jobs) as pool:
        Trials(store, pool).run(searches, lambda measured: measured.cycles)
    reach = share(target, sequential()) / 100
    rows = [product(target, said, tokens, kernel, search, BITS[options.weights], reach) for kernel, search in searches]
    if not tokens:
        return rows, []
    best = {kernel.key: search.best for kernel, search in searches}
    return rows, [prefill(target, options, said, tokens, best, store)]


def graph_of(target: Target, options: RunOptions, tokens: int, layers: int, store: TrialStore) -> Graph:
    """The prompt's graph, or a token's behind `PAST` rows, of the student cut to so many layers; 0: all of them."""
    _, config = find_student(STUDENT)
    cut = replace(config, name=f"{STUDENT}-{layers}-layer", layers=layers) if layers else config
    rows, past, phase = (tokens, 0, "prompt") if tokens else (1, PAST, "decode")
    graph = Graph(subject_of(cut if layers else STUDENT), target, options, rows, past, phase, store)
    graph.open()
    return graph


def product(
    target: Target, formats: str, tokens: int, kernel: Kernel, search: Search, bits: int, reach: float
) -> Product:
    """One product as it was measured."""
    dims, bound = product_dims(kernel.spec), bound_cycles(kernel)
    assert dims is not None
    own = search.scores[search.choices[0]]
    tuned = search.scores[search.best[0]]
    assert own is not None
    assert tuned is not None
    per_cycle = reach * target.dram.peak_bytes_per_s / target.clock_hz
    slow = max(bound, dims[1] * dims[2] * bits / 8 / per_cycle)
    return Product(target.name, formats, tokens, kernel.operators[0], dims, own, tuned, bound, slow, len(search.scores))


def prefill(
    target: Target, options: RunOptions, formats: str, tokens: int, best: dict[Any, list[Choice]], store: TrialStore
) -> Prefill:
    """The whole program with the compiler's choices and with the best of every product, and its busiest unit."""
    graph = graph_of(target, options, tokens, 0, store)
    key = f"bench {STUDENT} {target.content_hash} {formats} {tokens}", code_hash(PACKAGES)
    kept = store.get(*key)
    if kept is None:
        kept = work_of(graph, options)
        store.put(*key, kept)
    choices = {
        kernel.key: choice  # the whole student may leave less room than its first layer
        for kernel in graph.kernels
        for choice in reversed(best.get(kernel.key, []))
        if needs(kernel.spec, kernel.spaces, kernel.machine, choice)[0] <= kernel.room.limit
    }
    tuned = graph.cost(choices).cycles
    units = {name: kept[name] for name in ("matrix", "vector", "dram")}
    unit = max(units, key=lambda name: units[name])
    return Prefill(
        target.name, formats, tokens, int(kept["cycles"]), min(tuned, int(kept["cycles"])), units[unit], unit
    )


def work_of(graph: Graph, options: RunOptions) -> dict[str, float]:
    """Cycles of the compiler's own program, and those that its units work in all."""
    program = compile_subject(graph.subject, graph.target, graph.tokens, graph.past, options)
    line = simulate_program(program, graph.target)
    engine = program.code[:, word.QUEUE] % ENGINES_PER_CORE
    cores = max(1, program.cores)
    work = {
        name: float(line.busy_fs[engine == int(of)].sum()) / line.period_fs / cores
        for name, of in (("matrix", Engine.MATRIX), ("vector", Engine.VECTOR))
    }
    moved = int((line.dram_read_bytes + line.dram_write_bytes).sum())
    work["dram"] = moved / graph.target.dram.peak_bytes_per_s * graph.target.clock_hz
    return {**work, "cycles": float(line.total_cycles)}


def formats_of(target: Target) -> list[RunOptions]:
    """Integer weights per channel that the matrix unit multiplies as they are; fp16 where there are none."""
    rates = target.matrix.macs_per_cycle
    whole = [RunOptions(weights=name, group="channel") for name, pair in PAIRS.items() if pair in rates]
    return whole or [RunOptions(weights="fp16")]


def table(found: Sequence[Product]) -> list[str]:
    """Markdown: a line per target and length, then the goals."""
    lines = [
        "| target | formats | tokens | products | default / bound: median, worst | tuned / bound: median, worst "
        "| within 1.10 | tuned / bound at the reached bandwidth: median, worst |",
        "|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str, int], list[Product]] = {}
    for row in found:
        groups.setdefault((row.target, row.formats, row.tokens), []).append(row)
    for (target, _, tokens), rows in groups.items():
        plain = [row.default_cycles / row.bound_cycles for row in rows]
        tuned, reach = [row.ratio for row in rows], [row.reached for row in rows]
        within = sum(ratio <= GOALS["worst"] for ratio in tuned)
        lines.append(
            f"| {target} | {rows[0].formats} | {tokens or 'decode'} | {len(rows)} | {_pair(plain)} | {_pair(tuned)} "
            f"| {within} of {len(rows)} | {_pair(reach)} |"
        )
    if found:
        all_tuned, all_reach = [row.ratio for row in found], [row.reached for row in found]
        within = sum(ratio <= GOALS["worst"] for ratio in all_tuned)
        lines.append(
            f"| all | | | {len(found)} | {_pair([r.default_cycles / r.bound_cycles for r in found])} "
            f"| {_pair(all_tuned)} | {within} of {len(found)} | {_pair(all_reach)} |"
        )
    return lines


def prefill_table(found: Sequence[Prefill]) -> list[str]:
    """Markdown: a line per target, formats and length, then how many reach the goal."""
    lines = [
        "| target | formats | tokens | default / busiest unit | tuned / busiest unit | unit |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.target} | {row.formats} | {row.tokens} | {row.default_cycles / row.bound_cycles:.3f} "
        f"| {row.tuned_cycles / row.bound_cycles:.3f} | {row.unit} |"
        for row in found
    ]
    if found:
        within = sum(row.tuned_cycles <= WHOLE * row.bound_cycles for row in found)
        lines += ["", f"Goal {WHOLE:.2f}: {within} of {len(found)}."]
    return lines


def _pair(ratios: Sequence[float]) -> str:
    return f"{statistics.median(ratios):.3f}, {max(ratios):.3f}"


if __name__ == "__main__":
    sys.exit(main())
