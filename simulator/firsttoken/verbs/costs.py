"""`firsttoken costs`: measures a space of students once, states the error, and keeps the table in a file."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer

from firsttoken.progress import Bar
from firsttoken_compiler.errors import OptionError

if TYPE_CHECKING:
    from firsttoken.cost_tables.space import Axis
    from firsttoken.cost_tables.table import CostTable

_VARY: Final = (
    "Values of layers, hidden, heads, kv_heads, head_dim, intermediate, vocab or weight_bits: 1024,1536, or "
    "FIRST:LAST:STEP[:POINTS], of which POINTS values are measured; repeatable."
)


def costs(
    student: Annotated[str, typer.Argument(help="A built-in student, which gives what does not vary.")],
    target: Annotated[str, typer.Option(help="A preset or a .toml file.")] = "snapdragon-x-elite",
    vary: Annotated[list[str] | None, typer.Option(metavar="DIM=VALUES", help=_VARY)] = None,
    points: Annotated[
        int | None,
        typer.Option(min=2, help="Measured values of a range that does not say how many; default 6, of hidden 12."),
    ] = None,
    lines: Annotated[
        int, typer.Option(min=0, help="Values of hidden with which all values of heads and intermediate are measured.")
    ] = 2,
    prompt: Annotated[
        str, typer.Option(metavar="VALUES", help="Tokens of the prompt: 64, or values as of --vary.")
    ] = "64",
    context: Annotated[
        str | None,
        typer.Option(metavar="VALUES", help="Rows in the cache before a later token; default: those before --decode."),
    ] = None,
    decode: Annotated[
        int, typer.Option(min=0, help="Token of the answer to measure as well, behind each prompt; 0 for none.")
    ] = 0,
    weights: Annotated[str, typer.Option(help="Format of the weights, as in 'run'.")] = "int4",
    acts: Annotated[str | None, typer.Option(help="Type of the activations; default: as in 'run'.")] = None,
    kv_cache: Annotated[Literal["fp16", "int8"], typer.Option(help="Type of keys and values.")] = "fp16",
    check: Annotated[int, typer.Option(min=0, help="Random students that are compared with their exact costs.")] = 12,
    seed: Annotated[int, typer.Option(help="Of these students.")] = 0,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes; default: one per CPU.")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="File to write, .npz.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False,
) -> None:
    """Measure students of many widths once; Python then has the cost of any of them in microseconds."""
    from firsttoken import api
    from firsttoken.cli import print_json
    from firsttoken.cost import CostModel
    from firsttoken.cost_tables.space import CostSpace, axis_of
    from firsttoken.options import RunOptions
    from firsttoken.student import find_student
    from firsttoken.subject import SUFFIXES

    if student.endswith(SUFFIXES):
        raise OptionError(f"{student} is a file, whose widths are given: name a student whose graphs are built")
    given = dict(_pair(text) for text in vary or [])
    space = CostSpace.of(find_student(student)[1], given, points, lines)
    options = RunOptions(weights=weights, acts=acts, kv_cache=kv_cache)
    model = CostModel(api.target_of(target), axis_of("prompt", prompt).values[0], decode, options)
    with Bar() as bar:
        start = time.perf_counter()
        table = model.table(space, prompts=prompt, contexts=context, jobs=jobs, progress=bar.update)
        built_s = time.perf_counter() - start
        table = table.checked(check, seed=seed, jobs=jobs, progress=bar.prefixed("check: ")) if check else table
    if out is not None:
        table.save(out)
    if as_json:
        facts = {"student": student, "decode": decode, "weights": weights, "built_s": round(built_s, 3)}
        print_json({**facts, "file": None if out is None else str(out), **_document(table)})
        return
    print(f"{student} on {model.target.name}, {prompt} tokens: {len(table.space.probes)} probes in {built_s:.1f} s")
    _show(table)
    if out is not None:
        print(f"Written to {out}")


def _document(table: CostTable) -> dict[str, Any]:
    """What a table covers, and its errors, as JSON values."""
    space = table.space
    axes = {name: {"values": axis.values, "measured": axis.measured} for name, axis in space.axes}
    return {
        "target": table.model.target.name, "lengths": table.lengths.to_dict(), "space": axes, "lines": space.lines,
        "probes": len(space.probes), "accuracy": [asdict(entry) for entry in table.accuracy],
    }  # fmt: skip


def _pair(text: str) -> tuple[str, str]:
    name, equals, values = text.partition("=")
    if not equals:
        raise OptionError(f"--vary {text}: give DIM=VALUES, such as hidden=1024:2048:128")
    return name.strip(), values


def _show(table: CostTable) -> None:
    from firsttoken.cli import table as print_table

    axes = [*table.space.axes, ("prompt", table.lengths.prompts), ("context", table.lengths.contexts)]
    rows = [[name, str(axis), _measured(axis)] for name, axis in axes if len(axis.values) > 1]
    print_table(["dimension", "values", "measured"], rows)
    if not table.accuracy:
        return
    first = table.accuracy[0]
    print(f"Error against the exact cost of {first.students} random students (seed {first.seed})")
    print_table(
        ["cost", "median %", "p95 %", "worst %", "bias %", "the worst one"],
        [
            [
                entry.cost, f"{entry.median_pct:.2f}", f"{entry.p95_pct:.2f}", f"{entry.worst_pct:.2f}",
                f"{entry.bias_pct:+.2f}", entry.worst_student,
            ]
            for entry in table.accuracy
        ],
    )  # fmt: skip


def _measured(axis: Axis) -> str:
    """How many values of a dimension are measured."""
    more = f", {len(axis.line)} on lines" if axis.line != axis.measured else ""
    return f"{len(axis.measured)}{more}"
