"""`firsttoken latency`: what a user waits for, as a runtime of the target launches a student's graphs."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from firsttoken.progress import Bar
from firsttoken.subject import DEFAULT_PROMPT
from firsttoken.verbs.shared import NEW_TOKENS, AsJson, Formats, Given, taking

if TYPE_CHECKING:
    from firsttoken.latency import Prediction
    from firsttoken_compiler.target.target import Target


@taking(formats=Formats)
def latency(
    student: Annotated[str, typer.Argument(help="A GGUF file, or a built-in student.", show_default=False)],
    *,
    target: Annotated[str, typer.Option(help="A preset or a .toml file.")] = "snapdragon-x-elite",
    runtime: Annotated[
        str | None, typer.Option(help="A runtime of the target; default: its first.", show_default=False)
    ] = None,
    prompt: Annotated[
        int | None,
        typer.Option(min=1, help=f"Tokens of the prompt, or of an encoder's input; default: {DEFAULT_PROMPT}."),
    ] = None,
    context: Annotated[int, typer.Option(min=0, help="Most rows that graphs are for; 0: prompt and answer.")] = 0,
    new_tokens: Annotated[int, typer.Option(min=0, help="Tokens of the answer.")] = NEW_TOKENS,
    formats: Formats,
    schedule: Given = None,
    cache: Annotated[bool, typer.Option(help="Use results kept from earlier runs.")] = True,
    as_json: AsJson = False,
) -> None:
    """Time a prompt in chunks and the tokens after it, with what the runtime's launches cost."""
    from firsttoken import api
    from firsttoken import latency as rooms
    from firsttoken.cli import print_json
    from firsttoken.subject import ImageNetwork, subject_of
    from firsttoken.verbs.schedule import prompt_of, schedule_of, work_of

    machine, subject = api.target_of(target), subject_of(student)
    prompt = prompt_of(subject, prompt)
    options = formats.options(schedule_of(schedule, target))
    work = work_of(student, subject, options, prompt, context, new_tokens, runtime)
    with Bar() as bar:
        found = rooms.latency(work, machine, cache=cache, progress=bar.update)
    for line in found.schedule[1:]:
        print(f"note: the schedule has kernels {line}", file=sys.stderr)
    if as_json:
        print_json({"student": subject.name, "target": machine.name, "runtime": runtime_name(machine, runtime),
                    "prompt": prompt, "context": context, "new_tokens": new_tokens, **asdict(found)})  # fmt: skip
        return
    read = "one image" if isinstance(subject, ImageNetwork) else f"{prompt} tokens"
    _show(found, f"{subject.name} on {machine.name} by {runtime_name(machine, runtime)}, {read}")


def runtime_name(target: Target, runtime: str | None) -> str:
    """The runtime that is meant where none is named."""
    from firsttoken_compiler.target.target import DEFAULT_RUNTIME

    return runtime or next(iter(target.runtimes), DEFAULT_RUNTIME)


def _show(found: Prediction, title: str) -> None:
    from firsttoken.cli import table

    print(title)
    low, typical, high = found.polling_mj or (0.0, 0.0, 0.0)
    lines: list[tuple[str, Any, str, tuple[float, float] | None]] = [
        ("TTFT" if found.prefill_tok_s else "inference", found.ttft_ms, "ms", None),
        ("prefill", found.prefill_tok_s, "tokens/s", None),
        ("TPOT", found.tpot_ms, "ms", None), ("decode", found.decode_tok_s, "tokens/s", None),
        ("energy per token" if found.tpot_ms else "energy", found.energy_mj, "mJ", found.energy_band_mj),
        ("host polling, beside it", typical, "mJ", (low, high)), ("power", found.power_w, "W", found.power_band_w),
    ]  # fmt: skip
    shown = [[name, f"{value:,.2f}", unit, _width(band)] for name, value, unit, band in lines if value]
    table(["quantity", "value", "unit", "low to high"], shown)
    columns = ["ms", "launches", "NPU", "per launch", "per operator", "CPU", "total"]
    rows = []
    for name, part in found.parts.items():
        times = (part.device_s, part.launch_s, part.node_s, part.host_s, part.seconds)
        title = "per token" if name == "decode" else name
        rows.append([title, f"{part.launches:,.0f}", *(f"{1e3 * value:,.3f}" for value in times)])
    table(columns, rows)


def _width(band: tuple[float, float] | None) -> str:
    """Of energies: every energy of the target at its low, and at its high bound."""
    return "" if band is None else f"{band[0]:,.2f} to {band[1]:,.2f}"
