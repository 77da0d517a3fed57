"""`firsttoken schedule`: shows how operators are scheduled, and writes schedules to files that `run` takes."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from firsttoken.progress import Bar
from firsttoken.subject import DEFAULT_PROMPT, Encoder, ImageNetwork, subject_of
from firsttoken.verbs.shared import NEW_TOKENS, AsJson, Formats, Given, taking
from firsttoken_compiler.errors import OptionError

if TYPE_CHECKING:
    from firsttoken.latency import Work
    from firsttoken.options import RunOptions
    from firsttoken.scheduled import Graph
    from firsttoken.subject import Subject
    from firsttoken_compiler.schedule.choice import Schedules

schedule_app = typer.Typer(help="Schedules of kernels: show one, or write all to a file for 'run --schedule'.",
                           no_args_is_help=True)  # fmt: skip
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


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Which graphs are meant: those of `run`, or with a runtime those that `latency` launches."""

    student: Annotated[str, typer.Argument(help="An ONNX or GGUF file, or a built-in student.", show_default=False)]
    target: Annotated[str, typer.Option(help="A preset or a .toml file.")] = DEFAULT_TARGET
    prompt: Annotated[int | None, typer.Option(min=1, help="Tokens of the prompt; default: as in 'run'.")] = None
    past: Annotated[int | None, typer.Option(min=0, help="Rows in the cache; default: as in 'run'.")] = None
    decode: Annotated[int, typer.Option(min=0, help="Also the graph of this token of the answer.")] = 0
    runtime: Annotated[
        str | None, typer.Option(help="The graphs that 'latency' launches with this runtime.", show_default=False)
    ] = None
    context: Annotated[int, typer.Option(min=0, help="With --runtime, as in 'latency'.")] = 0
    new_tokens: Annotated[
        int | None, typer.Option(min=0, help=f"With --runtime, as in 'latency'; default: {NEW_TOKENS}.")
    ] = None
    schedule: Given = None

    def graphs(self, options: RunOptions) -> list[Graph]:
        """Compiles them; kernels of the schedule that occur in none are named on stderr. Raises FirsttokenError."""
        from firsttoken import api
        from firsttoken.scheduled import graphs_of, launched_graphs

        self._check()
        subject, machine = subject_of(self.student), api.target_of(self.target)
        with Bar() as bar:
            if self.runtime is None:
                graphs = graphs_of(subject, machine, self.prompt, self.past, self.decode, options, bar.update)
            else:
                graphs = launched_graphs(self._work(subject, options), machine, bar.update)
        note_absent(options)
        return graphs

    def _check(self) -> None:
        """Raises OptionError for lengths that do not go together."""
        if self.runtime is None and (self.context or self.new_tokens is not None):
            name = "--context" if self.context else "--new-tokens"
            raise OptionError(f"{name} goes with --runtime NAME; of one graph give --prompt, --past and --decode")
        if self.runtime is not None and (self.past is not None or self.decode):
            name = "--decode" if self.decode else "--past"
            raise OptionError(f"{name} does not go with --runtime: give --prompt, --context and --new-tokens")

    def _work(self, subject: Subject, options: RunOptions) -> Work:
        tokens = NEW_TOKENS if self.new_tokens is None else self.new_tokens
        return work_of(
            self.student, subject, options, prompt_of(subject, self.prompt), self.context, tokens, self.runtime
        )


def prompt_of(subject: Subject, prompt: int | None) -> int:
    """Tokens of a prompt where a runtime is asked and maybe nothing was said; an image counts as 1."""
    return prompt or (1 if isinstance(subject, ImageNetwork) else DEFAULT_PROMPT)


def work_of(
    student: str, subject: Subject, options: RunOptions, prompt: int, context: int, new_tokens: int, runtime: str | None
) -> Work:
    """What a runtime is asked for: an inference of an encoder or of an image network, or a prompt and its answer."""
    from firsttoken.latency import EncoderWork, LlmWork

    asked = student if subject.kind != "an ONNX file" else Path(student)
    if isinstance(subject, (Encoder, ImageNetwork)):
        return EncoderWork(asked, options, prompt, runtime)
    return LlmWork(asked, options, prompt, context, new_tokens, runtime)


@schedule_app.command()
@taking(asked=Asked, formats=Formats)
def show(
    asked: Asked,
    formats: Formats,
    op: Annotated[str, typer.Option(help="An operator: layers.3.mlp.up_proj, layers.3.ffn.up, 'layers.*.attn.q'.")],
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

    machine = api.target_of(asked.target)
    graphs = asked.graphs(formats.options(schedule_of(asked.schedule, asked.target)))
    for graph in graphs:
        matching(op, [each.name for each in graph.program.ops])
    found: list[dict[str, Any]] = []
    for graph in graphs:
        timeline = api.simulate(graph.program, machine)
        run = build_run(graph.program, timeline, machine, energy(graph.program, timeline, machine))
        documents = shown(graph, machine, op, asked.schedule is not None, {row.op: row for row in run.ops})
        found += [document | _functions(graph, document["key"], script, trace) for document in documents]
    if as_json:
        print_json(found)
        return
    for document in found:
        _print(document)


@schedule_app.command()
@taking(asked=Asked, formats=Formats)
def export(
    asked: Asked,
    formats: Formats,
    out: Annotated[Path, typer.Option("-o", "--out", help="The file; TVM's traces lie beside it.")],
    as_json: AsJson = False,
) -> None:
    """Write the schedule of every distinct kernel to a TOML file, and TVM's replayable traces beside it."""
    from firsttoken import api
    from firsttoken.cli import print_json
    from firsttoken.scheduled import file_of, write

    options = formats.options(schedule_of(asked.schedule, asked.target))
    graphs = asked.graphs(options)
    name = str(graphs[0].program.meta["student"])
    file = file_of(graphs, name, api.target_of(asked.target), options)
    paths = write(out, graphs, file)
    facts = {"student": name, "target": file.target, "kernels": len(file.kernels), "files": [str(p) for p in paths]}
    if as_json:
        print_json(facts)
        return
    print(f"{name} on {file.target}: {len(file.kernels)} distinct kernels")
    for path in paths:
        print(f"wrote {path}")


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


