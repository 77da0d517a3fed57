"""`firsttoken schedule`: shows how operators are scheduled, and writes schedules to files that `run` takes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from firsttoken.progress import Bar

if TYPE_CHECKING:
    from firsttoken.options import RunOptions
    from firsttoken.scheduled import Graph
    from firsttoken_compiler.schedule.choice import Schedules

schedule_app = typer.Typer(help="Schedules of kernels: show one, or write all to a file for 'run --schedule'.",
                           no_args_is_help=True)  # fmt: skip
Student = Annotated[str, typer.Argument(help="An ONNX or GGUF file, or a built-in student.", show_default=False)]
TargetName = Annotated[str, typer.Option("--target", help="A preset or a .toml file.")]
Prompt = Annotated[int | None, typer.Option(min=1, help="Tokens of the prompt; default: as in 'run'.")]
Past = Annotated[int | None, typer.Option(min=0, help="Rows in the cache; default: as in 'run'.")]
Decode = Annotated[int, typer.Option(min=0, help="Also the graph of this token of the answer.")]
Weights = Annotated[str, typer.Option(help="As in 'run'.")]
Acts = Annotated[Literal["int8", "int16", "fp16"] | None, typer.Option(help="As in 'run'.")]
Group = Annotated[Literal["32", "64", "128", "channel"], typer.Option(help="As in 'run'.")]
Mix = Annotated[str | None, typer.Option(metavar="RULES", help="As in 'run'.")]
NormCache = Annotated[
    Literal["int8", "int16", "fp16", "off", "statistics", "auto"] | None, typer.Option(help="As in 'run'.")
]
KvCache = Annotated[Literal["fp16", "int8"], typer.Option(help="As in 'run'.")]
Given = Annotated[Path | None, typer.Option("--schedule", metavar="FILE", help="As in 'run'.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
DEFAULT_TARGET = "snapdragon-x-elite"


def schedule_of(path: Path | None, target: str) -> Schedules | None:
    """The choices in a file, for a target; warnings go to stderr. Raises OptionError."""
    from firsttoken.api import target_of
    from firsttoken.schedule_file import read_schedule

    if path is None:
        return None
    file, machine = read_schedule(path), target_of(target)
    for line in file.check_target(machine.name, machine.content_hash, f"--schedule {path}"):
        print(f"note: {line}", file=sys.stderr)
    return file.schedules


def note_absent(options: RunOptions) -> None:
    """Names kernels of the schedule that occur in nothing that was compiled with these options, on stderr."""
    missing = options.schedule.absent() if options.schedule is not None else []
    if missing:
        print(f"note: the schedule has kernels that do not occur: {', '.join(missing)}", file=sys.stderr)


@schedule_app.command()
def show(
    student: Student,
    op: Annotated[str, typer.Option(help="An operator: layers.3.mlp.up_proj, layers.3.ffn.up, 'layers.*.attn.q'.")],
    target: TargetName = DEFAULT_TARGET,
    prompt: Prompt = None,
    past: Past = None,
    decode: Decode = 0,
    weights: Weights = "int4",
    acts: Acts = None,
    group: Group = "128",
    mix: Mix = None,
    norm_cache: NormCache = None,
    kv_cache: KvCache = "fp16",
    schedule: Given = None,
    script: Annotated[bool, typer.Option("--script", help="Also print the scheduled TVM function.")] = False,
    trace: Annotated[bool, typer.Option("--trace", help="Also print TVM's trace of the schedule's steps.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the schedule of an operator, what it takes and costs, why it was chosen, and the best others."""
    from firsttoken import api
    from firsttoken.cli import print_json
    from firsttoken.operator_names import matching
    from firsttoken.schedule_show import shown
    from firsttoken_simulator.energy import energy
    from firsttoken_simulator.report.build import build_run

    machine = api.target_of(target)
    graphs = _graphs(student, target, (prompt, past, decode), _options(
        weights=weights, acts=acts, group=group, mix=mix, norm_cache=norm_cache, kv_cache=kv_cache,
        schedule=schedule_of(schedule, target),
    ), check=lambda graph: matching(op, [each.name for each in graph.program.ops]))  # fmt: skip
    found: list[dict[str, Any]] = []
    for graph in graphs:
        timeline = api.simulate(graph.program, machine)
        run = build_run(graph.program, timeline, machine, energy(graph.program, timeline, machine))
        documents = shown(graph, machine, op, schedule is not None, {row.op: row for row in run.ops})
        found += [document | _functions(graph, document["key"], script, trace) for document in documents]
    if as_json:
        print_json(found)
        return
    for document in found:
        _print(document)


@schedule_app.command()
def export(
    student: Student,
    out: Annotated[Path, typer.Option("-o", "--out", help="The file; TVM's traces lie beside it.")],
    target: TargetName = DEFAULT_TARGET,
    prompt: Prompt = None,
    past: Past = None,
    decode: Decode = 0,
    weights: Weights = "int4",
    acts: Acts = None,
    group: Group = "128",
    mix: Mix = None,
    norm_cache: NormCache = None,
    kv_cache: KvCache = "fp16",
    schedule: Given = None,
    as_json: AsJson = False,
) -> None:
    """Write the schedule of every distinct kernel to a TOML file, and TVM's replayable traces beside it."""
    from firsttoken import api
    from firsttoken.cli import print_json
    from firsttoken.scheduled import file_of, write

    options = _options(
        weights=weights, acts=acts, group=group, mix=mix, norm_cache=norm_cache, kv_cache=kv_cache,
        schedule=schedule_of(schedule, target),
    )  # fmt: skip
    graphs = _graphs(student, target, (prompt, past, decode), options)
    name = str(graphs[0].program.meta["student"])
    file = file_of(graphs, name, api.target_of(target), options)
    paths = write(out, graphs, file)
    facts = {"student": name, "target": file.target, "kernels": len(file.kernels), "files": [str(p) for p in paths]}
    if as_json:
        print_json(facts)
        return
    print(f"{name} on {file.target}: {len(file.kernels)} distinct kernels")
    for path in paths:
        print(f"wrote {path}")


def _options(*, mix: str | None, **chosen: Any) -> RunOptions:
    from firsttoken.options import RunOptions
    from firsttoken.weight_rules import rules_of

    return RunOptions(rules=() if mix is None else rules_of(mix), **chosen)


def _graphs(
    student: str, target: str, lengths: tuple[int | None, int | None, int], options: RunOptions, check: Any = None
) -> list[Graph]:
    from firsttoken import api
    from firsttoken.scheduled import graphs_of
    from firsttoken.subject import subject_of

    with Bar() as bar:
        graphs = graphs_of(subject_of(student, None), api.target_of(target), *lengths, options, bar.update)
    note_absent(options)
    for graph in graphs if check is not None else ():
        check(graph)
    return graphs


def _functions(graph: Graph, key: str, script: bool, trace: bool) -> dict[str, Any]:
    """Loops, and the TVM function and trace where they were asked for."""
    from firsttoken.schedule_show import loops
    from firsttoken_compiler.schedule.traces import traces

    kernel, choice = next((k, c) for k, c in zip(graph.kernels, graph.choices, strict=True) if k.key == key)
    if choice is None:
        return {"loops": []}
    parts = traces(kernel.spec, kernel.spaces, kernel.target, choice) if script or trace else []
    return {
        "loops": loops(kernel, choice),
        **({"script": [part.module.script() for part in parts]} if script else {}),
        **({"trace": [part.text for part in parts]} if trace else {}),
    }  # fmt: skip


def _print(document: dict[str, Any]) -> None:
    from firsttoken.cli import table
    from firsttoken_simulator.report.plain import plain

    dims = document["dims"]
    size = "M {} x N {} x K {}".format(*dims) if len(dims) == 3 else " x ".join(map(str, dims))
    print(plain(f"{', '.join(document['operators'])} ({document['graph']}): {document['kind']}, {size}"))
    print(f"kernel {document['key']}, {document['launches']} launches: {', '.join(document['covers'])}")
    shown = [[row["name"], "x".join(map(str, row["shape"])), row["type"], row["lies_in"]] for row in
             document["operands"]]  # fmt: skip
    table(["operand", "shape", "type", "lies in"], shown)
    facts = [
        ["schedule", document["text"] or "nothing to choose"], ["why", document["why"]],
        ["matrix unit", f"{document['dataflow']}; the target's own, no instruction chooses it"],
        ["scratchpad", f"{document['scratchpad_bytes']:,} bytes of {document['free_scratchpad_bytes']:,} free, "
                       f"{document['preferred_scratchpad_bytes']:,} preferred"],
        ["accumulators", f"{document['accumulator_bytes']:,} bytes of {document['accumulators_of_target']:,}"],
        ["instructions", f"{document['instructions']:,}"],
        ["estimated", _cycles(document.get("estimated_cycles"))],
        ["simulated", f"{_cycles(document['simulated_cycles'])} in which it alone decides, "
                      f"{_cycles(document['simulated_span'])} from its first to its last instruction"],
        ["roofline", _cycles(document["roofline_cycles"])],
    ]  # fmt: skip
    table(["", ""], facts)
    for line in document["loops"]:
        print(f"  {line}")
    others = [["compiler's own", document["own_choice"]]] if document.get("own_choice") else []
    others += [[str(number), row] for number, row in enumerate(document.get("alternatives", []), 1)]
    if others:
        print(f"best of {document['legal_choices']:,} choices that fit, by the estimate that chooses tiles:")
        cells = [
            [name, row["text"], _cycles(row["estimated_cycles"]), f"{row['scratchpad_bytes']:,}",
             "" if row["preferred"] else "beyond the preferred half"]
            for name, row in others
        ]  # fmt: skip
        table(["", "schedule", "estimated", "scratchpad bytes", ""], cells)
    for name in ("trace", "script"):
        for text in document.get(name, []):
            print(text)


def _cycles(count: float | None) -> str:
    return "no account" if count is None else f"{count:,.0f} cycles"


