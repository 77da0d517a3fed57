"""`firsttoken tune`: the best schedule of a student's kernels on a target, found by simulating them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

import typer

from firsttoken.progress import Bar

SMALL: Final = 0.01
"""Share of the whole below which a kernel that stays as it was is not shown."""

if TYPE_CHECKING:
    from firsttoken.schedule_file import ScheduleFile
    from firsttoken.tuning.tune import KernelRow, TuneResult


def tune(
    student: Annotated[str, typer.Argument(help="An ONNX or GGUF file, or a built-in student.", show_default=False)],
    target: Annotated[str, typer.Option(help="A preset or a .toml file.")] = "snapdragon-x-elite",
    objective: Annotated[
        Literal["ttft", "tpot", "energy", "edp"],
        typer.Option(help="Time of the prompt, of one token of the answer, energy, or energy times time."),
    ] = "ttft",
    prompt: Annotated[int | None, typer.Option(min=1, help="Tokens of the prompt; default as in 'run'.")] = None,
    past: Annotated[int | None, typer.Option(min=0, help="Rows in the cache before it.")] = None,
    decode: Annotated[
        int, typer.Option(min=0, help="Token of the answer: the one that tpot is about (default 1), or counts too.")
    ] = 0,
    trials: Annotated[int, typer.Option(min=1, help="Most choices of a kernel that are simulated.")] = 64,
    jobs: Annotated[int, typer.Option(min=1, help="Processes that simulate.")] = 1,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of what is tried beyond the cheapest.")] = 0,
    weights: Annotated[str, typer.Option(help="Formats as in 'run'.")] = "int4",
    acts: Annotated[str | None, typer.Option(help="Type of the activations.")] = None,
    group: Annotated[str, typer.Option(help="Weights that share a scale: 32, 64, 128, channel.")] = "128",
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="Give int4 and int8 weights zero points.")] = False,
    mix: Annotated[str | None, typer.Option(metavar="RULES", help="Weights of some, as in 'run'.")] = None,
    norm_cache: Annotated[str | None, typer.Option(help="How normalised rows are kept, as in 'run'.")] = None,
    kv_cache: Annotated[Literal["fp16", "int8"], typer.Option(help="Type of keys and values.")] = "fp16",
    store: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where trials are kept; default: the cache folder.")
    ] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="The schedule file that --schedule reads.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False,
) -> None:
    """Search schedules of all kernels by simulating them, alone and then together; a killed search goes on."""
    from firsttoken import api
    from firsttoken.options import RunOptions
    from firsttoken.schedule_file import to_toml
    from firsttoken.subject import subject_of
    from firsttoken.tuning.store import TrialStore
    from firsttoken.tuning.tune import Plan
    from firsttoken.tuning.tune import tune as search
    from firsttoken.weight_rules import rules_of
    from firsttoken_simulator.report.folder import write_file

    options = RunOptions(
        weights=weights, acts=acts, group=group, asymmetric=asymmetric, norm_cache=norm_cache, kv_cache=kv_cache,
        rules=() if mix is None else rules_of(mix),
    )  # fmt: skip
    plan = Plan(objective, prompt, past, decode, trials, jobs, seed)
    with Bar() as bar:
        result = search(subject_of(student), api.target_of(target), options, plan, TrialStore(store), bar.update)
    if out is not None:
        write_file(out, to_toml(file_of(result)).encode())
    if as_json:
        print(result.to_json())
        return
    show(result)
    if out is not None:
        print(f"wrote {out}")


def file_of(result: TuneResult) -> ScheduleFile:
    """The schedule file: the choices that pay, with what each gains."""
    from firsttoken.schedule_file import Entry, ScheduleFile

    rows = {row.key: row for row in result.kernels}
    entries = []
    for key, choice in result.schedules.choices:
        row = rows[key]
        note = f"{row.default_cycles:,.0f} -> {row.tuned_cycles:,.0f} cycles a launch, {row.launches} launches"
        entries.append(Entry(key, choice, row.operators, row.dims if len(row.dims) == 3 else (), row.graph, note))
    made_by = (
        f"firsttoken tune --objective {result.plan.objective} --trials {result.plan.trials} --seed {result.plan.seed}: "
        f"{result.before.cycles:,} -> {result.after.cycles:,} cycles"
    )
    graph, splits = result.schedules.graph, result.schedules.splits
    return ScheduleFile(result.student, result.target, tuple(entries), graph, result.target_hash, made_by, splits)


def show(result: TuneResult) -> None:
    """Prints the kernels, then the whole."""
    from firsttoken.cli import table
    from firsttoken_simulator.report.plain import plain

    before, after = result.before, result.after
    shown = [row for row in result.kernels if row.tuned or row.default_cycles * row.launches >= SMALL * before.cycles]
    columns = ["kernel", "M x N x K", "launches", "default", "tuned", "bound", "/ bound", "gain", "trials", "choice"]
    table(columns, [_cells(row) for row in shown])
    if len(shown) < len(result.kernels):
        print(f"{len(result.kernels) - len(shown)} more kernels take less than 1 % each and stay as they were")
    measures = (
        ("cycles", before.cycles, after.cycles, ",.0f"), ("ms", before.ms, after.ms, ",.4f"),
        ("mJ", before.energy_mj, after.energy_mj, ",.4f"),
    )  # fmt: skip
    print(f"{plain(result.student)} on {plain(result.target)}, {result.plan.objective}: whole program")
    for name, old, new, form in measures:
        print(f"  {name:6} {old:{form}} -> {new:{form}} ({_percent(old, new)})")
    print(
        f"cycles of kernels are of one launch among its kind; {result.measured} trials simulated now, "
        f"{sum(row.trials for row in result.kernels) - result.measured} known; {result.simulated} whole programs"
    )
    graph = result.schedules.graph
    if graph.cores:
        print(f"work is divided over {graph.cores} cores")
    if graph.norms:
        print(f"norms keep {', '.join(graph.norms)}")
    if graph.merged:
        print(f"products that are one: {', '.join(graph.merged)}")
    if not result.schedules.choices:
        print("no choice makes the whole program better than the compiler's own")


def _cells(row: KernelRow) -> list[str]:
    bound = f"{row.bound_cycles:,.0f}" if row.bound_cycles >= 1 else "-"
    share = f"{row.tuned_cycles / row.bound_cycles:.2f}" if row.bound_cycles >= 1 else "-"
    gain = _percent(row.default_cycles, row.tuned_cycles) if row.tuned else "-"
    return [
        ", ".join(row.operators), " x ".join(map(str, row.dims)), str(row.launches), f"{row.default_cycles:,.0f}",
        f"{row.tuned_cycles:,.0f}", bound, share, gain, f"{row.trials}/{row.choices}", row.tuned or "as it was",
    ]  # fmt: skip


def _percent(old: float, new: float) -> str:
    return f"{100 * (new / old - 1):+.1f} %" if old else "-"
