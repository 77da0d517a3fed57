"""Every matrix product of the 1.5B student on every target: tuned cycles over what no schedule can beat.

    python reports/bench_schedules.py [--targets A,B] [--trials N] [--jobs N] [--json]

A student of one layer has all products of all layers. Each product is measured alone, launched several times in a row,
with the compiler's choice and with the best of N trials. Its bound is the larger of its multiply-accumulates at the
matrix unit's rate and its operands in DRAM at the DRAM's peak. Where the DMA keeps fewer reads in flight than the peak
needs, the table shows beside it the ratio to a bound in which the weights come at the rate that one long read reaches.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

from dram import sequential, share

from firsttoken import RunOptions, Target
from firsttoken.cache import cache_folder
from firsttoken.student import find_student
from firsttoken.subject import subject_of
from firsttoken.tuning.store import TrialStore
from firsttoken.tuning.tune import KernelRow, Plan, tune
from firsttoken_compiler.errors import FirsttokenError
from firsttoken_compiler.target.load import preset_names

STUDENT: Final = "deepseek-r1-distill-qwen-1.5b"
LENGTHS: Final = (64, 128, 512, 0)
"""Tokens of a prompt; 0 is a token of the answer behind 512 rows."""
PAST: Final = 512
TRIALS: Final = 32
BITS: Final = {"int4": 4, "int8": 8, "fp16": 16}
GOALS: Final = {"worst": 1.10, "median": 1.05}
"""Of tuned cycles over the bound."""


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


def main() -> int:
    """Prints the table; always 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", default=",".join(preset_names()))
    parser.add_argument("--trials", type=int, default=TRIALS, help="choices of a product that are measured")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    found = measure(arguments.targets.split(","), arguments.trials, arguments.jobs)
    print(json.dumps([asdict(product) for product in found]) if arguments.json else "\n".join(table(found)))
    return 0


def measure(targets: Sequence[str], trials: int = TRIALS, jobs: int = 2) -> list[Product]:
    """All products; trials are kept in the cache folder, so that a second run reads them."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for name in targets:
        for tokens in LENGTHS:
            print(f"{name}, {tokens or 'decode'} ...", file=sys.stderr)
            try:
                found += products(Target.load(name), tokens, trials, jobs, folder / "bench-trials.sqlite3")
            except FirsttokenError as error:
                print(f"{name}, {tokens}: {error}", file=sys.stderr)
    return found


def products(target: Target, tokens: int, trials: int, jobs: int, store: Path) -> list[Product]:
    """The products of one graph on one target."""
    _, config = find_student(STUDENT)
    subject = subject_of(replace(config, name=f"{STUDENT}-1-layer", layers=1))
    options = formats_of(target)
    plan = (
        Plan("ttft", prompt=tokens, trials=trials, jobs=jobs)
        if tokens
        else Plan("tpot", prompt=PAST, decode=1, trials=trials, jobs=jobs)
    )
    result = tune(subject, target, options, plan, TrialStore(store))
    reach = share(target, sequential()) / 100
    said = f"{options.precision().weights}/{options.precision().acts}"
    return [
        Product(
            target.name, said, tokens, row.operators[0], row.dims, row.default_cycles, row.best_cycles,
            row.bound_cycles, reached(row, target, BITS[options.weights], reach), row.trials,
        )
        for row in result.kernels
        if len(row.dims) == 3 and "proj" in row.operators[0] + "lm_head"
    ]  # fmt: skip


def formats_of(target: Target) -> RunOptions:
    """The narrowest weights that the matrix unit multiplies as they are."""
    rates = target.matrix.macs_per_cycle
    if "int8xint4" in rates:
        return RunOptions(weights="int4", group="channel")
    return RunOptions(weights="int8", group="channel") if "int8xint8" in rates else RunOptions(weights="fp16")


def reached(row: KernelRow, target: Target, bits: int, reach: float) -> float:
    """The larger of the bound and of the weights alone with a DRAM that gives so much of its peak."""
    _, n, k = row.dims
    per_cycle = reach * target.dram.peak_bytes_per_s / target.clock_hz
    return max(row.bound_cycles, n * k * bits / 8 / per_cycle)


def table(found: Sequence[Product]) -> list[str]:
    """Markdown: a line per target and length, then the goals."""
    lines = [
        "| target | formats | tokens | products | default / bound: median, worst | tuned / bound: median, worst "
        "| within 1.10 | tuned / bound at the reached bandwidth: median, worst |",
        "|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, int], list[Product]] = {}
    for product in found:
        groups.setdefault((product.target, product.tokens), []).append(product)
    for (target, tokens), rows in groups.items():
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


def _pair(ratios: Sequence[float]) -> str:
    return f"{statistics.median(ratios):.3f}, {max(ratios):.3f}"


if __name__ == "__main__":
    sys.exit(main())
