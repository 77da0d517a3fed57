"""The command line: one verb per job, every one with `--json`. Anything heavy is imported inside the command.

Exit codes: 0 done, 1 a `--fail-if` condition holds, 2 the input is at fault (one message on stderr, no traceback).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, NoReturn

import typer

from firsttoken.progress import Bar
from firsttoken.verbs.calibrate import calibrate
from firsttoken.verbs.compare import compare as compare_command
from firsttoken.verbs.costs import costs
from firsttoken.verbs.diff import diff
from firsttoken.verbs.explain import explain
from firsttoken.verbs.footprint import footprint
from firsttoken.verbs.latency import latency
from firsttoken.verbs.listings import students_app, targets_app
from firsttoken.verbs.mix import mix as mix_command
from firsttoken.verbs.quality import quality
from firsttoken.verbs.quantise import quantise
from firsttoken.verbs.ranges import ranges
from firsttoken.verbs.schedule import note_absent, schedule_app, schedule_of
from firsttoken.verbs.sweep import sweep
from firsttoken.verbs.tune import tune
from firsttoken.verbs.validate import validate
from firsttoken_compiler.errors import FirsttokenError, OptionError

if TYPE_CHECKING:
    from rich.console import Console

    from firsttoken.options import RunOptions
    from firsttoken_compiler.isa.program import Program
    from firsttoken_compiler.target.target import Target
    from firsttoken_simulator.report.document import RunDocument

PIPE_WIDTH: Final = 140
DEFAULT_TARGET: Final = "snapdragon-x-elite"

app = typer.Typer(
    help="First-token latency and energy of a language model on an NPU: compile, simulate, report.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(targets_app, name="targets")
app.add_typer(students_app, name="students")
app.command()(diff)
app.command()(explain)
app.add_typer(schedule_app, name="schedule")
app.command("compare")(compare_command)
app.command()(footprint)
app.command()(latency)
app.command()(quantise)
app.command()(ranges)
app.command()(sweep)
app.command()(tune)
app.command()(quality)
app.command("mix")(mix_command)
app.command()(validate)
app.command()(calibrate)
app.command()(costs)

Student = Annotated[str, typer.Argument(help="An ONNX or GGUF file, or a built-in student.", show_default=False)]
TargetName = Annotated[str, typer.Option("--target", help="A preset (see 'firsttoken targets') or a .toml file.")]
Prompt = Annotated[
    list[str] | None,
    typer.Option(
        "--prompt",
        metavar="TOKENS[,TOKENS...]",
        help="Tokens of the prompt, several for a program each; default: the ONNX file's own length, else 64.",
    ),
]
Past = Annotated[
    int | None, typer.Option("--past", min=0, help="Rows in the cache; default: the ONNX file's own, else 0.")
]
Bind = Annotated[
    list[str] | None,
    typer.Option("--bind", metavar="NAME=VALUE", help="Value of a dimension that the file leaves open; repeatable."),
]
Weights = Annotated[
    str, typer.Option("--weights", help="int4, int8, fp16, a type of blocks (q4_k) or a mixture of them (q4_k_m).")
]
Asymmetric = Annotated[bool, typer.Option("--asymmetric", help="Give int4 and int8 weights zero points.")]
Mix = Annotated[
    str | None,
    typer.Option("--mix", metavar="RULES", help="Weights of some: 'attn_*@0-3=int8,output=q6_k', or a TOML file."),
]
Acts = Annotated[
    Literal["int8", "int16", "fp16"] | None,
    typer.Option("--acts", help="Type of the activations; default: int8 for integer weights, else fp16."),
]
Group = Annotated[Literal["32", "64", "128", "channel"], typer.Option("--group", help="Weights that share a scale.")]
ActsRange = Annotated[
    str,
    typer.Option("--acts-range", metavar="dynamic|FILE", help="A scale per token, or what 'ranges' wrote."),
]
KvCache = Annotated[
    Literal["fp16", "int8"], typer.Option("--kv-cache", help="How keys and values are kept, int8 with a scale per row.")
]
NormCache = Annotated[
    Literal["int8", "int16", "fp16", "off", "statistics", "auto"] | None,
    typer.Option(
        "--norm-cache",
        help="How normalised rows are kept; 'statistics': only numbers per row, 'off': nothing, 'auto': the cheapest; "
        "default: what suits the activations.",
    ),
]
NormPlace = Annotated[
    Literal["auto", "scratchpad", "dram"], typer.Option("--norm-cache-place", help="Where rows that are kept lie.")
]
Spill = Annotated[
    Literal["fp32", "fp16"], typer.Option("--residual-spill", help="Type of the residual stream where it lies in DRAM.")
]
HostRoles = Annotated[
    str, typer.Option("--host-roles", metavar="ROLES", help="What the host computes: 'token_embd,output', or one.")
]
HostBits = Annotated[
    float, typer.Option("--host-weight-bits", help="Bits per weight of these on the host, scales included.")
]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1, help="Seed of every random choice.")]
Fallback = Annotated[
    bool, typer.Option(help="Let the host compute what the NPU cannot; without it that is an error.")
]
WeightsAbsent = Annotated[
    bool, typer.Option("--weights-absent", help="Time an ONNX file whose external weights are not here.")
]
ScheduleOption = Annotated[
    Path | None, typer.Option("--schedule", metavar="FILE", help="Choices of kernels, as 'schedule export' wrote them.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]


def main() -> None:
    """Entry point of the command `firsttoken`."""
    guarded(app)


def guarded(work: Callable[[], object]) -> None:
    """Runs a program; what the input or the machine's files are at fault for is one message and exit code 2."""
    try:
        work()
    except FirsttokenError as error:
        _refuse(str(error))
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _refuse(f"{where}{error.strerror or error}")


def _refuse(message: str) -> NoReturn:
    from firsttoken_simulator.report.plain import plain_lines

    print(f"error: {plain_lines(message)}", file=sys.stderr)
    sys.exit(2)


@app.command()
def run(
    student: Student,
    prompt: Prompt = None,
    target: TargetName = DEFAULT_TARGET,
    past: Past = None,
    bind: Bind = None,
    decode: Annotated[int, typer.Option("--decode", min=0, help="Also measure this token of the answer.")] = 0,
    weights: Weights = "int4",
    acts: Acts = None,
    group: Group = "128",
    asymmetric: Asymmetric = False,
    mix: Mix = None,
    norm_cache: NormCache = None,
    norm_cache_place: NormPlace = "auto",
    residual_spill: Spill = "fp32",
    kv_cache: KvCache = "fp16",
    acts_range: ActsRange = "dynamic",
    host_roles: HostRoles = "",
    host_weight_bits: HostBits = 16.0,
    seed: Seed = 0,
    fallback: Fallback = True,
    weights_absent: WeightsAbsent = False,
    schedule: ScheduleOption = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder for the reports.")] = None,
    cache: Annotated[bool, typer.Option(help="Use results kept from earlier runs.")] = True,
    as_json: AsJson = False,
) -> None:
    """Compile and simulate a student; print the first screen and write the reports."""
    from firsttoken import api
    from firsttoken.buckets import prompt_lengths

    lengths = prompt_lengths(prompt or [])
    options = _options(
        mix, acts_range, weights=weights, acts=acts, group=group, asymmetric=asymmetric, norm_cache=norm_cache,
        kv_cache=kv_cache, norm_cache_place=norm_cache_place, residual_spill=residual_spill, seed=seed,
        fallback=fallback, weights_absent=weights_absent, host=(host_roles, host_weight_bits),
        schedule=schedule_of(schedule, target),
    )  # fmt: skip
    documents = []
    with Bar() as bar:
        for length in lengths:
            document = api.run(
                student, target, prompt=length, past=past, decode=decode, bind=_bindings(bind), options=options,
                out=out if out is None or len(lengths) == 1 else out / f"prompt-{length}", cache=cache,
                progress=bar.update,
            )  # fmt: skip
            documents.append(document)
    if as_json and len(documents) > 1:
        print(f"[{','.join(document.to_json() for document in documents)}]")
    elif as_json:
        print(documents[0].to_json(), end="")
    else:
        _runs(documents)
        if out is not None:
            print(f"wrote {out}")


@app.command("compile")
def compile_command(
    student: Student,
    prompt: Prompt = None,
    target: TargetName = DEFAULT_TARGET,
    past: Past = None,
    bind: Bind = None,
    weights: Weights = "int4",
    acts: Acts = None,
    group: Group = "128",
    asymmetric: Asymmetric = False,
    mix: Mix = None,
    norm_cache: NormCache = None,
    norm_cache_place: NormPlace = "auto",
    residual_spill: Spill = "fp32",
    kv_cache: KvCache = "fp16",
    acts_range: ActsRange = "dynamic",
    host_roles: HostRoles = "",
    host_weight_bits: HostBits = 16.0,
    seed: Seed = 0,
    fallback: Fallback = True,
    weights_absent: WeightsAbsent = False,
    schedule: ScheduleOption = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="The program file.")] = Path("student.npu"),
    stop_after: Annotated[str | None, typer.Option(help="Stop after this pass; no program file is written.")] = None,
    dump_after: Annotated[str | None, typer.Option(help="Write the module after this pass, or after 'all'.")] = None,
    dump_dir: Annotated[Path, typer.Option(help="Folder for what --dump-after writes.")] = Path("dump"),
    as_json: AsJson = False,
) -> None:
    """Compile a student to a program file, or to one for each prompt length."""
    from firsttoken import api
    from firsttoken.buckets import bucket_path, prompt_lengths
    from firsttoken_simulator.report.folder import write_file

    lengths = prompt_lengths(prompt or [])
    options = _options(
        mix, acts_range, weights=weights, acts=acts, group=group, asymmetric=asymmetric, norm_cache=norm_cache,
        kv_cache=kv_cache, norm_cache_place=norm_cache_place, residual_spill=residual_spill, seed=seed,
        fallback=fallback, weights_absent=weights_absent, host=(host_roles, host_weight_bits),
        schedule=schedule_of(schedule, target),
    )  # fmt: skip
    written: dict[Path, Program] = {}
    with Bar() as bar:
        for length in lengths:
            several = length is not None and len(lengths) > 1
            folder = dump_dir / f"prompt-{length}" if several else dump_dir
            program = api.compile(
                student, target, prompt=length, past=past, bind=_bindings(bind), options=options, progress=bar.update,
                stop_after=stop_after, dump_after=dump_after, dump_dir=None if dump_after is None else folder,
            )  # fmt: skip
            if program is not None:
                written[bucket_path(out, length) if several and length is not None else out] = program
    note_absent(options)
    for path, program in written.items():
        write_file(path, program.encode())
    _print_written(written, stop_after, dump_after and str(dump_dir), as_json)


@app.command()
def simulate(
    program_file: Annotated[Path, typer.Argument(metavar="PROGRAM", help="A file that 'firsttoken compile' wrote.")],
    target: Annotated[str | None, typer.Option(help="Another target; default: the one it was compiled for.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Write a Perfetto trace.")] = None,
    ops: Annotated[Path | None, typer.Option(help="Write a CSV with a line per operator.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a self-contained page.")] = None,
    as_json: AsJson = False,
) -> None:
    """Simulate a program file; print the first screen."""
    from firsttoken_compiler.isa.program import Program
    from firsttoken_simulator.energy import energy
    from firsttoken_simulator.report.build import build_run
    from firsttoken_simulator.report.folder import write_file
    from firsttoken_simulator.report.html import page
    from firsttoken_simulator.report.ops_csv import ops_csv
    from firsttoken_simulator.report.trace import trace as perfetto_trace

    program = Program.load(program_file)
    machine = _target_of(program.meta, target)
    from firsttoken import api

    with Bar() as bar:
        timeline = api.simulate(program, machine, progress=bar.update)
    document = build_run(program, timeline, machine, energy(program, timeline, machine))
    if trace is not None:
        write_file(trace, perfetto_trace(program, timeline))
    if ops is not None:
        write_file(ops, ops_csv(document.ops))
    if html is not None:
        write_file(html, page(document))
    if as_json:
        print(document.to_json(), end="")
    else:
        _screen([document])


@app.command()
def generate(
    student: Student,
    prompt_text: Annotated[str, typer.Option("--prompt-text", help="What the user says.", show_default=False)],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, max=100_000)] = 32,
    target: TargetName = DEFAULT_TARGET,
    weights: Weights = "fp16",
    acts: Acts = None,
    group: Group = "128",
    asymmetric: Asymmetric = False,
    mix: Mix = None,
    norm_cache: NormCache = None,
    norm_cache_place: NormPlace = "auto",
    residual_spill: Spill = "fp32",
    kv_cache: KvCache = "fp16",
    acts_range: ActsRange = "dynamic",
    host_roles: HostRoles = "",
    host_weight_bits: HostBits = 16.0,
    seed: Seed = 0,
    schedule: ScheduleOption = None,
    compare: Annotated[
        Literal["onnxruntime"] | None, typer.Option("--compare", help="Print its answer too, and how far they agree.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Let a student with real weights answer on the functional machine."""
    from firsttoken import api

    options = _options(
        mix, acts_range, weights=weights, acts=acts, group=group, asymmetric=asymmetric, norm_cache=norm_cache,
        norm_cache_place=norm_cache_place, residual_spill=residual_spill, kv_cache=kv_cache, seed=seed,
        host=(host_roles, host_weight_bits), schedule=schedule_of(schedule, target),
    )  # fmt: skip
    with Bar() as bar:
        result = api.generate(
            student, prompt_text, max_new_tokens=max_new_tokens, options=options, target=target, compare=compare,
            progress=bar.update,
        )  # fmt: skip
    note_absent(options)
    if as_json:
        print(result.to_json())
        return
    from firsttoken.answer import lines
    from firsttoken_simulator.report.plain import plain_lines

    for line in lines(result):
        print(plain_lines(line))


@app.command()
def ops(as_json: AsJson = False) -> None:
    """List ONNX operators: where they run, in which forms, and why not on the NPU."""
    from firsttoken.operators import document

    rows = document()
    if as_json:
        print_json(rows)
    else:
        columns = ["operator", "domain", "operator sets", "runs on", "how, or why not"]
        cells = [
            [r["name"], r["domain"] or "ai.onnx", ", ".join(map(str, r["versions"])), r["runs"], r["why"]] for r in rows
        ]
        table(columns, cells)


def _options(mix: str | None, acts_range: str, *, host: tuple[str, float], **chosen: Any) -> RunOptions:
    """The options of these names, with the rules of `--mix`, the ranges of `--acts-range`, what the host has."""
    from firsttoken.act_ranges import ranges_of
    from firsttoken.options import RunOptions
    from firsttoken.weight_rules import rules_of

    roles = tuple(role.strip() for role in host[0].split(",") if role.strip())
    chosen |= {"host_roles": roles, "host_weight_bits": host[1]}
    return RunOptions(rules=() if mix is None else rules_of(mix), ranges=ranges_of(acts_range), **chosen)


def _print_written(
    written: dict[Path, Program], stop_after: str | None, dump: str | None, as_json: bool
) -> None:
    """What was compiled, one program or several."""
    from firsttoken.buckets import weight_bytes

    facts: dict[str, Any] = {"program": None, "stopped_after": stop_after, "dump": dump}
    if len(written) > 1:
        facts |= {"program": [str(path) for path in written]} | weight_bytes([*written.values()])
        programs = [_program_facts(program) | {"program": str(path)} for path, program in written.items()]
        _print_programs(facts, programs, as_json)
        return
    for path, program in written.items():
        facts |= _program_facts(program) | {"program": str(path)}
    print_facts(facts, as_json)


def _program_facts(program: Program) -> dict[str, Any]:
    from firsttoken_simulator.report.formats import formats_text

    return {
        "instructions": len(program),
        "operators": len(program.ops),
        "macs": sum(op.macs for op in program.ops),
        "dram_bytes": program.dram_bytes,
        "spad_bytes": program.spad_bytes,
        "acc_bytes": program.acc_bytes,
        "formats": formats_text(program.meta.get("weight_formats", [])),
        "meta": program.meta,
    }


def _target_of(meta: dict[str, Any], name: str | None) -> Target:
    """The target to simulate on: the named one, or the program's own if it is still the same."""
    from firsttoken_compiler.target.load import load_target

    if name is not None:
        return load_target(name)
    target = load_target(str(meta.get("target", "")))
    if target.content_hash != meta.get("target_hash"):
        raise OptionError(
            f"the program was compiled for target {target.name} with hash {meta.get('target_hash')}, "
            f"which now has hash {target.content_hash}: compile it again, or name a target with --target"
        )
    return target


def console() -> Console:
    """The terminal, or a page of fixed width in a pipe."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)


def _screen(documents: list[RunDocument]) -> None:
    from firsttoken_simulator.report.screen import show

    show(console(), documents)


def table(columns: list[str], rows: list[list[str]]) -> None:
    """Prints a table; whatever its cells hold is no more than text."""
    from rich.table import Table
    from rich.text import Text

    from firsttoken_simulator.report.plain import plain_lines

    made = Table(pad_edge=False)
    for column in columns:
        made.add_column(column, overflow="fold")
    for row in rows:
        made.add_row(*(Text(plain_lines(cell)) for cell in row))
    console().print(made)


def _runs(documents: list[RunDocument]) -> None:
    """The first screen of one run, or a line for each prompt length."""
    if len(documents) == 1:
        _screen(documents)
        return
    from firsttoken.buckets import bucket_row, columns

    first = documents[0]
    print(f"{first.student} on {first.target} ({first.target_hash}), weights {first.weights}")
    table(columns(documents), [bucket_row(document) for document in documents])


def _print_programs(facts: dict[str, Any], programs: list[dict[str, Any]], as_json: bool) -> None:
    """Several programs of one student."""
    if as_json:
        print_json(facts | {"programs": programs})
        return
    columns = [name for name in programs[0] if name != "meta"]
    cell = [[f"{row[name]:,}" if type(row[name]) is int else str(row[name]) for name in columns] for row in programs]
    table(columns, cell)
    print(f"weights: {facts['weight_bytes']:,} bytes, of which all programs share {facts['shared_weight_bytes']:,}")


def _bindings(texts: list[str] | None) -> dict[str, int] | None:
    from firsttoken_compiler.frontend.bind import parse_bindings

    return parse_bindings(texts) if texts else None


def print_facts(facts: dict[str, Any], as_json: bool) -> None:
    """Prints a document, or a table of its values and of those one level below."""
    if as_json:
        print_json(facts)
        return
    flat = {name: value for name, value in facts.items() if not isinstance(value, dict)}
    for part in facts.values():
        flat |= {k: v for k, v in part.items() if not isinstance(v, (dict, list))} if isinstance(part, dict) else {}
    table(["", ""], [[name, f"{v:,}" if type(v) is int else str(v)] for name, v in flat.items() if v is not None])


def print_json(document: object) -> None:
    """Prints a document whose texts steer nothing."""
    from firsttoken_simulator.report.plain import plain_json

    print(plain_json(json.dumps(document, indent=1, ensure_ascii=False)))
