"""`firsttoken explain`: the ladder from the ideal to the actual time of an operator or a run, and what would help."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from firsttoken.progress import Bar

if TYPE_CHECKING:
    from firsttoken.what_if import Effect
    from firsttoken_compiler.target.target import Target
    from firsttoken_simulator.report.document import RunDocument
    from firsttoken_simulator.report.explain import Explanation


def explain(
    run: Annotated[Path, typer.Argument(help="A run.json, or the folder it is in.", show_default=False)],
    op: Annotated[
        str | None, typer.Option(help="An operator, or a pattern as layers.*.mlp.up_proj; default: the whole run.")
    ] = None,
    decode: Annotated[bool, typer.Option("--decode", help="Of the decode step, not of the prompt.")] = False,
    target: Annotated[str | None, typer.Option(help="The .toml file of a target that is no preset.")] = None,
    what_if: Annotated[bool, typer.Option(help="Simulate what would help, with the program beside run.json.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")] = False,
) -> None:
    """Show where the time of an operator goes, from its ideal to the actual time, and what would help."""
    from firsttoken.cli import print_json
    from firsttoken.what_if import changes
    from firsttoken_simulator.report.diff import load_document
    from firsttoken_simulator.report.explain import document
    from firsttoken_simulator.report.explain import explain as ladder

    loaded = load_document(run)
    found = ladder(loaded, op, decode=decode)
    machine, why = _target(loaded, target)
    tried: list[Effect] = []
    if machine is not None and what_if:
        tried, why = _simulated(run, machine, found, decode)
    elif machine is not None:
        why = "--no-what-if"
    known = [effect.change for effect in tried] or ([] if machine is None else changes(machine, found))
    if as_json:
        rows = [_row(change, next((e for e in tried if e.change is change), None)) for change in known]
        print_json({"student": loaded.student, "target": loaded.target, "decode": decode, **document(found),
                    "what_would_help": rows, "not_simulated": why})  # fmt: skip
        return
    _show(loaded, found, decode)
    _help(found, [_row(change, next((e for e in tried if e.change is change), None)) for change in known], why)


def _target(run: RunDocument, name: str | None) -> tuple[Target | None, str]:
    """The target of a run, or None and why it is not known here."""
    from firsttoken_compiler.errors import TargetError
    from firsttoken_compiler.target.load import load_target, preset_names

    if name is None and run.target not in preset_names():
        return None, f"target {run.target} is no preset: name its file with --target"
    machine = load_target(run.target if name is None else name)
    if machine.content_hash == run.target_hash:
        return machine, ""
    why = f"target {machine.name} has hash {machine.content_hash} here, the run was made with {run.target_hash}"
    if name is not None:
        raise TargetError(f"{why}: name the file of that run")
    return None, f"{why}: run again, or name the file with --target"


def _simulated(run: Path, target: Target, found: Explanation, decode: bool) -> tuple[list[Effect], str]:
    """Effects by simulation, or none and why."""
    from firsttoken.what_if import effects
    from firsttoken_compiler.isa.program import Program
    from firsttoken_simulator.report.errors import ReportError
    from firsttoken_simulator.report.folder import DECODE, PROGRAM

    file = (run if run.is_dir() else run.parent) / (DECODE if decode else PROGRAM)
    if not file.is_file():
        return [], f"there is no {file}: write it with 'firsttoken run -o'"
    program = Program.load(file)
    try:
        with Bar() as bar:
            return effects(program, target, found, lambda done: bar.update("simulate", done, 1.0)), ""
    except ReportError as error:
        return [], f"{file} is not the program of this run ({error}): run again with -o"


def _row(change: Any, effect: Effect | None) -> dict[str, Any]:
    """One change as JSON values."""
    return {
        "step": change.step, "change": change.text, "values": change.values, "at_stake_fs": change.at_stake_fs,
        "op_fs": None if effect is None else effect.op_fs, "run_fs": None if effect is None else effect.run_fs,
    }  # fmt: skip


def _show(run: RunDocument, found: Explanation, decode: bool) -> None:
    from firsttoken.cli import table
    from firsttoken_simulator.report.explain import facts, verdict
    from firsttoken_simulator.report.plain import plain

    part = run.decode if decode else run
    phase = f"one token after {part.past}" if decode and part else run.read
    print(plain(f"{run.student} on {run.target}, {phase}, weights {run.weights}, activations {run.activations}"))
    print(plain(facts(found)))
    rows: list[list[str]] = []
    until = 0
    for rung in found.rungs:
        until += rung.fs
        if rung.fs:
            cells = (f"{rung.cycles:,}", f"{rung.fs / 1e9:,.3f}", f"{rung.percent:.1f}", f"{until / 1e9:,.3f}")
            rows.append([("+ " if rows else "") + rung.step.title, *cells, rung.step.resource, rung.step.note])
    cycles = sum(rung.cycles for rung in found.rungs)
    rows.append(["= actual", f"{cycles:,}", f"{found.total_fs / 1e9:,.3f}", "100.0", "", "", ""])
    table(["step", "cycles", "us", "%", "sum, us", "resource", "what it is"], rows)
    for line in verdict(found):
        print(line)


def _help(found: Explanation, rows: list[dict[str, Any]], why: str) -> None:
    """Changes that make it faster by a tenth of a percent at least; without simulation what each has at stake."""
    from firsttoken.cli import table

    def percent(fs: int | None, whole: int) -> str:
        return "" if fs is None else f"{100 * (fs - whole) / whole:+.1f} %" if whole else ""

    simulated = [row for row in rows if row["op_fs"] is not None]
    helpful = [row for row in simulated if row["op_fs"] < found.total_fs * 0.999]
    if helpful:
        columns = ["what would help, simulated", "this", "whole run", "its step"]
        cells = [
            [r["change"], percent(r["op_fs"], found.total_fs), percent(r["run_fs"], found.run_fs), r["step"]]
            for r in helpful
        ]
        table(columns, cells)
        if len(helpful) < len(simulated):
            others = "; ".join(row["change"] for row in simulated if row not in helpful)
            print(f"tried, and no help: {others}")
    elif simulated:
        print(f"no change that was tried helps: {'; '.join(row['change'] for row in simulated)}")
    elif rows:
        shown = sorted((r for r in rows if r["at_stake_fs"] > found.total_fs * 0.001), key=lambda r: -r["at_stake_fs"])
        cells = [[r["change"], percent(found.total_fs - r["at_stake_fs"], found.total_fs), r["step"]] for r in shown]
        table(["what may help", "at stake", "its step"], cells)
    if why:
        print(f"effects are not simulated: {why}")
