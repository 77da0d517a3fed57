"""`firsttoken compare`: one student with several schedules, or on several targets, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

import typer

from firsttoken.progress import Bar
from firsttoken_compiler.errors import OptionError

if TYPE_CHECKING:
    from firsttoken_simulator.report.document import RunDocument

OWN: Final = "default"
MOST_RUNS: Final = 16


def compare(
    student: Annotated[str, typer.Argument(help="An ONNX or GGUF file, or a built-in student.", show_default=False)],
    target: Annotated[
        list[str] | None, typer.Option("--target", help="A preset or a .toml file; several to compare them.")
    ] = None,
    schedule: Annotated[
        list[str] | None,
        typer.Option("--schedule", metavar="FILE", help="A schedule file, or 'default'; several to compare them."),
    ] = None,
    prompt: Annotated[int | None, typer.Option(min=1, help="As in 'run'.")] = None,
    past: Annotated[int | None, typer.Option(min=0, help="As in 'run'.")] = None,
    decode: Annotated[int, typer.Option(min=0, help="As in 'run'.")] = 0,
    weights: Annotated[str, typer.Option(help="As in 'run'.")] = "int4",
    acts: Annotated[Literal["int8", "int16", "fp16"] | None, typer.Option(help="As in 'run'.")] = None,
    group: Annotated[Literal["32", "64", "128", "channel"], typer.Option(help="As in 'run'.")] = "128",
    mix: Annotated[str | None, typer.Option(metavar="RULES", help="As in 'run'.")] = None,
    norm_cache: Annotated[
        Literal["int8", "int16", "fp16", "off", "statistics", "auto"] | None, typer.Option(help="As in 'run'.")
    ] = None,
    kv_cache: Annotated[Literal["fp16", "int8"], typer.Option(help="As in 'run'.")] = "fp16",
    cache: Annotated[bool, typer.Option(help="Use results kept from earlier runs.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False,
) -> None:
    """Run a student with two or more schedules, or on two or more targets, and print them side by side."""
    from firsttoken import api
    from firsttoken.cli import DEFAULT_TARGET, print_json
    from firsttoken.compare import document
    from firsttoken.options import RunOptions
    from firsttoken.verbs.schedule import schedule_of
    from firsttoken.weight_rules import rules_of

    pairs = combinations(target or [DEFAULT_TARGET], schedule or [])
    rules = () if mix is None else rules_of(mix)
    given = [schedule_of(None if name == OWN else Path(name), where) for where, name in pairs]
    runs: list[RunDocument] = []
    with Bar() as bar:
        for (where, _), choices in zip(pairs, given, strict=True):
            options = RunOptions(
                weights=weights, acts=acts, group=group, norm_cache=norm_cache, kv_cache=kv_cache, rules=rules,
                schedule=choices,
            )  # fmt: skip
            runs.append(
                api.run(student, where, prompt=prompt, past=past, decode=decode, options=options, cache=cache,
                        progress=bar.update)
            )  # fmt: skip
    labels = labelled(pairs)
    if as_json:
        print_json(document(labels, runs))
    else:
        _print(labels, runs)


def combinations(targets: list[str], schedules: list[str]) -> list[tuple[str, str]]:
    """(target, schedule) of each run, the first is what others are compared with; raises OptionError for one run.

    One schedule is compared with the compiler's own; several targets have one schedule, or one each.
    """
    names = schedules or [OWN]
    if len(targets) == 1 and len(names) == 1 and names != [OWN]:
        names = [OWN, *names]
    if len(targets) > 1 and len(names) not in (1, len(targets)):
        raise OptionError(
            f"compare: {len(targets)} targets and {len(names)} schedules; give one schedule for all targets, one for "
            "each in their order, or several for one target"
        )
    count = max(len(targets), len(names))
    pairs = list(zip(targets * (count // len(targets)), names * (count // len(names)), strict=True))
    if len(set(pairs)) < 2:
        raise OptionError("compare: there is only one run; give --schedule FILE, or --target twice with two targets")
    if len(pairs) > MOST_RUNS:
        raise OptionError(f"compare: {len(pairs)} runs, at most {MOST_RUNS} stand side by side")
    return pairs


def labelled(pairs: list[tuple[str, str]]) -> list[str]:
    """What tells the runs apart."""
    targets, schedules = ({pair[index] for pair in pairs} for index in (0, 1))
    several = [index for index, names in ((0, targets), (1, schedules)) if len(names) > 1]
    return [" ".join(Path(pair[i]).name if pair[i].endswith(".toml") else pair[i] for i in several) for pair in pairs]


def _print(labels: list[str], runs: list[RunDocument]) -> None:
    from firsttoken.cli import table
    from firsttoken.compare import MOST_OPERATORS, operators, quantities
    from firsttoken_simulator.report.plain import plain

    first = runs[0]
    where = first.target if len({run.target for run in runs}) == 1 else f"{len(runs)} targets"
    rows = f" after {first.past} rows" if first.past else ""
    print(plain(f"{first.student} on {where}, {first.read}{rows}, weights {first.weights}"))
    heads = [head for label in labels for head in ((label,) if label == labels[0] else (label, "change"))]
    cells = [[name, *_beside(values)] for name, values in quantities(runs).items() if any(values)]
    table(["", *heads], cells)
    found = operators(runs)
    different = [row for row in found if max(row[1]) > min(row[1])]
    shown = different[:MOST_OPERATORS]
    print(plain(f"operators that differ: {len(different)} of {len(found)}"
                f"{f', the {len(shown)} largest differences' if len(shown) < len(different) else ''}"))  # fmt: skip
    if shown:
        table(["ms, tile", *heads], [[name, *_beside(ms, tiles)] for name, ms, tiles in shown])
    for label, run in zip(labels, runs, strict=True):
        for line in run.schedule:
            print(plain(f"{label}: {line}"))


def _beside(values: list[float | None] | list[float], notes: list[str] | None = None) -> list[str]:
    """A value of each run, and by how much those after the first differ from it."""
    cells, first = [], values[0]
    for index, value in enumerate(values):
        shown = "-" if value is None else f"{value:,.0f}" if value >= 1e4 or value == int(value) else f"{value:,.3f}"
        cells.append(f"{shown}\n{notes[index]}" if notes and notes[index] else shown)
        if index:
            cells.append(_percent(first, value))
    return cells


def _percent(first: float | None, value: float | None) -> str:
    if first is None or value is None or first == value:
        return ""
    return f"{100 * (value - first) / first:+.1f} %" if first else "new"
