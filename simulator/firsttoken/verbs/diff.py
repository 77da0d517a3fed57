"""`firsttoken diff`: two runs beside each other, and what every step and operator adds to the time between them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

if TYPE_CHECKING:
    from firsttoken_simulator.report.waterfall import Contribution, Waterfall

MOST_CLASSES: Final = 12


def diff(
    old: Annotated[Path, typer.Argument(help="A run.json, or the folder it is in.", show_default=False)],
    new: Annotated[Path, typer.Argument(help="The run to compare with it.", show_default=False)],
    fail_if: Annotated[list[str] | None, typer.Option("--fail-if", help="E.g. 'ttft_ms>+1%'; may be repeated.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with the waterfall from one to the other.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False,
) -> None:
    """Compare two runs; exit with 1 when a condition holds."""
    from firsttoken.cli import print_json
    from firsttoken_simulator.report import diff as comparison
    from firsttoken_simulator.report import waterfall
    from firsttoken_simulator.report.folder import write_file
    from firsttoken_simulator.report.waterfall_page import page

    conditions = [comparison.Condition.parse(text) for text in fail_if or []]
    before, after = comparison.load_run(old), comparison.load_run(new)
    rows = comparison.compare(before, after)
    failed = [condition.text for condition in conditions if condition.fails(rows)]
    ops = comparison.op_changes(before, after)
    inputs = comparison.differing_inputs(before, after)
    falls, why = waterfall.waterfalls(before, after)
    if html is not None:
        write_file(html, page(before, after, inputs, falls))
    if as_json:
        print_json(
            {
                "inputs": inputs,
                "metrics": {
                    row.metric: {"old": row.old, "new": row.new, "change": row.change} for row in rows.values()
                },
                "op_cycles": [{"op": row.metric, "old": row.old, "new": row.new} for row in ops],
                "waterfall": {fall.what: waterfall.document(fall) for fall in falls},
                "no_waterfall": why,
                "failed": failed,
            }
        )
    else:
        _show(inputs, list(rows.values()), ops)
        for fall in falls:
            _waterfall(fall)
        for line in (f"no waterfall: {why}" if why else "", f"wrote {html}" if html is not None else ""):
            if line:
                print(line)
    for text in failed:
        print(f"failed: {text}", file=sys.stderr)
    if failed:
        raise typer.Exit(1)


def _show(inputs: list[str], rows: list[Any], ops: list[Any]) -> None:
    """What differs: inputs, metrics, cycles of operators."""
    from firsttoken.cli import table
    from firsttoken_simulator.report.plain import plain

    changed = [row for row in rows if row.change]
    cells = [[r.metric, f"{r.old:.6g}", f"{r.new:.6g}", f"{r.change:+.6g}", f"{r.percent:+.2f} %"] for r in changed]
    cells += [[f"cycles of {r.metric}", f"{r.old:.0f}", f"{r.new:.0f}", f"{r.change:+.0f}", ""] for r in ops]
    for line in inputs:
        print(plain(line))
    table(["metric", "old", "new", "change", ""], cells) if cells else print("no difference")


def _waterfall(fall: Waterfall) -> None:
    """What every step, then every class of operators, adds to the old time; nothing where nothing changes."""
    from firsttoken.cli import table
    from firsttoken_simulator.report.waterfall import largest, title
    from firsttoken_simulator.report.waterfall_page import LEAST, WHAT

    def cells(name: str, old: int, new: int) -> list[str]:
        percent = f"{100 * (new - old) / fall.old_fs:+.2f} %" if fall.old_fs else ""
        return [name, *(f"{fs / 1e12:,.4f}" for fs in (old, new)), f"{(new - old) / 1e12:+,.4f}", percent]

    def rows(made: list[Contribution]) -> list[list[str]]:
        return [cells(title(row.name), row.old_fs, row.new_fs) for row in made]

    least = LEAST * max(fall.old_fs, fall.new_fs)
    steps, classes = largest(fall.by_step, len(fall.by_step), least), largest(fall.by_class, MOST_CLASSES, least)
    total = [cells(f"= {WHAT[fall.what]}", fall.old_fs, fall.new_fs)]
    for by, made in (("step from ideal to actual", steps), ("operator", classes)):
        if made:
            table([by, "old, ms", "new, ms", "change, ms", "of the old time"], rows(made) + total)
