"""The verbs: compile, simulate, run, generate, quality, mix. Whatever is heavy is imported when a verb needs it."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, overload

from firsttoken.cache import ResultCache, content_key
from firsttoken.options import Progress, RunOptions
from firsttoken.subject import File, StudentLike, Subject, subject_of
from firsttoken_compiler.errors import OptionError
from firsttoken_compiler.target.target import Target

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from firsttoken.answer import GenerateResult
    from firsttoken.fidelity import QualityResult
    from firsttoken.mix_search import Budget, MixResult
    from firsttoken_compiler.isa.program import Program
    from firsttoken_compiler.schedule.choice import Schedules
    from firsttoken_simulator.energy import EnergyResult
    from firsttoken_simulator.report.document import RunDocument
    from firsttoken_simulator.timeline import Timeline

TargetLike = str | Path | Target
REPORTS: Final = ("ops.csv", "program.txt", "program.npu", "trace.pftrace", "report.html", "run.json")
"""Files of a run, as `report.folder.write_run` names them."""
DECODE_REPORTS: Final = ("decode.npu", *REPORTS)
"""Those of a run that measures a decode step too."""
DEFAULTS: Final = RunOptions()
ANSWER_DEFAULTS: Final = RunOptions(weights="fp16")


@overload
def compile(
    student: StudentLike, target: TargetLike, *, prompt: int | None = ..., past: int | None = ...,
    bind: Mapping[str, int] | None = ..., options: RunOptions = ..., stop_after: None = ...,
    dump_after: str | None = ..., dump_dir: Path | None = ..., progress: Progress | None = ...,
) -> Program: ...  # fmt: skip
@overload
def compile(
    student: StudentLike, target: TargetLike, *, prompt: int | None = ..., past: int | None = ...,
    bind: Mapping[str, int] | None = ..., options: RunOptions = ..., stop_after: str | None,
    dump_after: str | None = ..., dump_dir: Path | None = ..., progress: Progress | None = ...,
) -> Program | None: ...  # fmt: skip
def compile(
    student: StudentLike,
    target: TargetLike,
    *,
    prompt: int | None = None,
    past: int | None = None,
    bind: Mapping[str, int] | None = None,
    options: RunOptions = DEFAULTS,
    stop_after: str | None = None,
    dump_after: str | None = None,
    dump_dir: Path | None = None,
    progress: Progress | None = None,
) -> Program | None:
    """The program of one graph: `prompt` new tokens after `past` cached ones; None when stopped after a pass.

    Args:
        student: an ONNX or GGUF file, a student's name, or a configuration.
        target: a preset's name, a `.toml` file, or a target.
        prompt: tokens; None for the length of the file's static input, or 64 where it is open or the graph is built.
        past: rows in the cache; None for the file's own, or 0.
        bind: values of other dimensions that an ONNX file leaves open, by name.
        options: number formats and seed.
        stop_after: name of the pass to stop after.
        dump_after: name of the pass to write the module after, or "all".
        dump_dir: folder for what `dump_after` writes.
        progress: called with (pass, done, total).

    Raises:
        FirsttokenError: the input is at fault; the message names the remedy.
    """
    machine, subject = target_of(target), subject_of(student, bind)
    tokens, rows = subject.lengths(prompt, past)
    return compile_subject(
        subject, machine, tokens, rows, options, progress,
        stop_after=stop_after, dump_after=dump_after, dump_dir=dump_dir,
    )  # fmt: skip


def simulate(program: Program, target: TargetLike, *, progress: Progress | None = None) -> Timeline:
    """When every instruction of a program runs on a target; weight values are never read. Raises ProgramError."""
    from firsttoken_simulator.machine import simulate_program

    machine = target_of(target)
    return simulate_program(program, machine, _stage("simulate", progress))


def run(
    student: StudentLike,
    target: TargetLike,
    *,
    prompt: int | None = None,
    past: int | None = None,
    decode: int = 0,
    bind: Mapping[str, int] | None = None,
    options: RunOptions = DEFAULTS,
    out: Path | None = None,
    cache: bool = True,
    progress: Progress | None = None,
) -> RunDocument:
    """Time and energy of a prompt, and of one token of the answer.

    With `decode` N > 0, `tpot_ms` is the time of decode step N alone: one token on a cache of prompt + N - 1 rows, the
    slowest of the N steps. It is one step measured, not a mean; the caches of all steps before it are full of rows.

    Args:
        student: an ONNX or GGUF file, a student's name, or a configuration.
        target: a preset's name, a `.toml` file, or a target.
        prompt: tokens; None for the length of the file's static input, or 64 where it is open or the graph is built.
        past: cached rows before the prompt; None for the file's own, or 0.
        decode: which token of the answer to measure as well, 0 for none.
        bind: values of other dimensions that an ONNX file leaves open, by name.
        options: number formats and seed.
        out: folder for run.json, ops.csv, program.txt, program.npu (decode.npu too), trace.pftrace and report.html.
        cache: whether results of earlier runs serve, and this one is kept.
        progress: called with (stage, done, total).

    Raises:
        FirsttokenError: the input is at fault; the message names the remedy.
    """
    from firsttoken_simulator.report.folder import prepared

    machine, subject = target_of(target), subject_of(student, bind)
    folder = None if out is None else Path(out)
    with prepared(folder):
        key = content_key("run", _run_parts(subject, machine, (prompt, past), decode, options), subject.packages)
        if cache and (kept := _kept(key, folder, DECODE_REPORTS if decode else REPORTS)) is not None:
            return kept
        document, files = _run(subject, machine, (prompt, past), decode, options, folder, progress)
    if cache and not (isinstance(subject, File) and not subject.self_contained):
        ResultCache().put(key, files)
    return document


def execute(
    student: StudentLike, target: TargetLike, feeds: Mapping[str, NDArray[Any]], *, prompt: int | None = None,
    past: int | None = None, bind: Mapping[str, int] | None = None, options: RunOptions = ANSWER_DEFAULTS,
    progress: Progress | None = None,
) -> dict[str, NDArray[Any]]:  # fmt: skip
    """What the program of one graph computes, bit by bit, instructions in the order in which they complete.

    Args:
        student: an ONNX file whose weights are here.
        target: a preset's name, a `.toml` file, or a target.
        feeds: inputs by their ONNX names, in their ONNX shapes.
        prompt: tokens, where the file leaves them open.
        past: rows in the cache, where the file leaves them open.
        bind: values of other dimensions that the file leaves open, by name.
        options: number formats and seed.
        progress: called with (stage, done, total).

    Raises:
        FirsttokenError: the input is at fault; the message names the remedy.
    """
    from firsttoken.execution import load

    machine, subject = target_of(target), subject_of(student, bind)
    tokens, rows = subject.lengths(prompt, past)
    program = compile_subject(subject, machine, tokens, rows, options, progress)
    timeline = simulate(program, machine, progress=progress)
    return load(program, timeline, subject.open(tokens, rows), machine).run(feeds)


def generate(
    student: StudentLike,
    prompt_text: str,
    *,
    max_new_tokens: int = 32,
    options: RunOptions = ANSWER_DEFAULTS,
    target: TargetLike = "snapdragon-x-elite",
    compare: Literal["onnxruntime"] | None = None,
    progress: Progress | None = None,
) -> GenerateResult:
    """The likeliest answer of a student with real weights, computed by the functional machine.

    Args:
        student: a GGUF file, or the name of a student that has weights and a tokenizer here, or its configuration.
        prompt_text: what the user says; the student's chat template is put around it.
        max_new_tokens: most tokens of the answer.
        options: number formats and seed.
        target: the machine that it is compiled for.
        compare: "onnxruntime" computes the answer of the float32 graph too, and how far the two agree.
        progress: called with (stage, done, total).

    Raises:
        FirsttokenError: the input is at fault; the message names the remedy.
    """
    from firsttoken.answer import answer

    return answer(
        subject_of(student), prompt_text, max_new_tokens, options, target_of(target), compare is not None, progress
    )


def quality(
    student: StudentLike,
    target: TargetLike = "snapdragon-x-elite",
    *,
    formats: Sequence[RunOptions] = (DEFAULTS,),
    windows: int = 4,
    tokens: int = 128,
    progress: Progress | None = None,
) -> QualityResult:
    """Divergence from the float32 run, agreement with it and perplexity of a student on the project's own text.

    Logits of all tokens come from the functional machine, which executes the program of each format, and from
    onnxruntime on the float32 graph.

    Args:
        student: a GGUF file, or the name of a student that has weights and a tokenizer here.
        target: the machine that it is compiled for.
        formats: number formats, a row of the result each.
        windows: stretches of the text, each read from position 0 on.
        tokens: tokens of each.
        progress: called with (stage, done, total).

    Raises:
        FirsttokenError: the input is at fault; the message names the remedy.
    """
    from firsttoken.fidelity import measure_quality

    return measure_quality(subject_of(student), formats, target_of(target), windows, tokens, progress)


def mix(
    student: StudentLike,
    target: TargetLike = "snapdragon-x-elite",
    *,
    budget: Budget,
    formats: Sequence[str] = ("int4", "int8"),
    options: RunOptions = DEFAULTS,
    blocks: int = 5,
    windows: int = 2,
    tokens: int = 128,
    progress: Progress | None = None,
) -> MixResult:
    """The formats of a student's matrices that diverge least from float32 within a budget.

    Args:
        student: the name of a student that has float32 weights and a tokenizer here.
        target: the machine that it is compiled for.
        budget: most bytes of weights, or milliseconds until the first token.
        formats: what a group of matrices can be, the smallest first.
        options: everything else of the number formats.
        blocks: ranges of layers; attention and feed-forward of each range are groups, and the head is one.
        windows: stretches of the text by which formats are chosen; as many after them measure the choice.
        tokens: tokens of each.
        progress: called with (stage, done, total).

    Raises:
        FirsttokenError: the input is at fault, or no mix keeps the budget; the message names the remedy.
    """
    from firsttoken.mix_search import search

    subject, machine = subject_of(student), target_of(target)
    return search(subject, formats, budget, options, machine, blocks, windows, tokens, progress)


def target_of(target: TargetLike) -> Target:
    """The target itself, or the one of that name or file; raises TargetError."""
    return target if isinstance(target, Target) else Target.load(target)


def compile_subject(
    subject: Subject,
    target: Target,
    tokens: int,
    past: int,
    options: RunOptions,
    progress: Progress | None = None,
    **control: Any,
) -> Any:
    """Compiles the graph of a subject for lengths that it has accepted; `control` is the pipeline's."""
    from firsttoken_compiler.pipeline import compile_onnx

    precision = options.precision(subject.layer_bits)
    meta = {
        **options.meta(),
        "student": subject.name,
        "target": target.name,
        "target_hash": target.content_hash,
        "prompt_tokens": tokens,
        "past": past,
        "phase": subject.phase(past),
    }
    student = subject.open(tokens, past)
    if isinstance(subject, File) and not options.weights_absent:
        student.require_data()
    return compile_onnx(
        student, target, precision, meta=meta, progress=progress, fallback=options.fallback,
        schedules=options.schedule, **control,
    )  # fmt: skip


def measure(
    subject: Subject,
    target: Target,
    prompt: int | None,
    decode: int,
    options: RunOptions,
    progress: Progress | None = None,
    *,
    past: int | None = None,
) -> tuple[RunDocument, Program, Timeline]:
    """Compiles and simulates the prompt after `past` rows, and decode step `decode` where that is above 0."""
    document, program, timeline, _ = _measure(subject, target, (prompt, past), decode, options, progress)
    return document, program, timeline


def _measure(
    subject: Subject, target: Target, lengths: tuple[int | None, int | None], decode: int, options: RunOptions,
    progress: Progress | None,
) -> tuple[RunDocument, Program, Timeline, Program | None]:  # fmt: skip
    """As `measure`, with the program of the decode step."""
    from firsttoken_simulator.report.build import build_run

    if decode < 0:
        raise OptionError(f"--decode {decode}: give the number of the token to measure, or 0 for none")
    if decode and isinstance(subject, File):
        subject.check_decode()
    if options.schedule is not None:
        options = replace(options, schedule=options.schedule.marked())
    tokens, rows = subject.lengths(*lengths)
    step = subject.lengths(1, rows + tokens + decode - 1) if decode else None
    first = _execute(subject, target, tokens, rows, options, progress)
    later = None if step is None else _execute(subject, target, *step, options, _prefixed("decode: ", progress))
    _report(progress, 0.0)
    document = build_run(*first[:2], target, first[2], decode=later)
    if options.schedule is not None:
        lines = [*schedule_lines(options.schedule), *merged_lines(first[0])]
        document = document.model_copy(update={"schedule": lines})
    return document, first[0], first[1], None if later is None else later[0]


def schedule_lines(schedules: Schedules) -> list[str]:
    """How much of a schedule programs use that were compiled with it, and kernels of it that occur in none of them."""
    missing, count = schedules.absent(), len(schedules.choices)
    lines = [f"{count - len(missing)} of the {count} kernels that it has choices for occur"]
    return lines + ([f"not in this run: {', '.join(missing)}"] if missing else [])


def merged_lines(program: Program) -> list[str]:
    """What became of products that a schedule makes one; layers of which the same is said share a line."""
    from firsttoken.schedule_file import patterns

    alike: dict[str, list[str]] = {}
    for line in map(str, program.meta.get("merged", [])):
        name, _, said = line.partition(": ")
        alike.setdefault(said, []).append(name)
    modules = list(dict.fromkeys(op.module for op in program.ops))
    return [f"{', '.join(patterns(names, modules))}: {said}" for said, names in alike.items()]


def run_parts(
    subject: Subject, target: Target, prompt: int | None, decode: int, options: RunOptions, past: int | None = None
) -> dict[str, Any]:
    """What decides every number of a run, as JSON values."""
    return {
        "student": subject.content(),
        "target": target.content_hash,
        "prompt": prompt if isinstance(subject, File) else subject.lengths(prompt, past)[0],
        "past": past or 0,
        "decode": decode,
        "precision": options.precision(subject.layer_bits).canonical_json(),
        "seed": options.seed,
        "fallback": options.fallback,
        "weights_absent": options.weights_absent,
        **({"schedule": options.schedule.canonical_json()} if options.schedule is not None else {}),
    }


def _run_parts(
    subject: Subject, target: Target, lengths: tuple[int | None, int | None], decode: int, options: RunOptions
) -> dict[str, Any]:
    """The numbers and the words of a run document: names, descriptions, sources."""
    words = json.dumps(asdict(target), sort_keys=True)
    return {**run_parts(subject, target, lengths[0], decode, options, lengths[1]), "name": subject.name, "words": words}


def _execute(
    subject: Subject, target: Target, tokens: int, past: int, options: RunOptions, progress: Progress | None
) -> tuple[Program, Timeline, EnergyResult]:
    from firsttoken_simulator.energy import energy

    program = compile_subject(subject, target, tokens, past, options, progress)
    timeline = simulate(program, target, progress=progress)
    return program, timeline, energy(program, timeline, target)


def _run(
    subject: Subject, target: Target, lengths: tuple[int | None, int | None], decode: int, options: RunOptions,
    folder: Path | None, progress: Progress | None,
) -> tuple[RunDocument, dict[str, bytes]]:  # fmt: skip
    """The document, and the files that the cache keeps: run.json, and the reports where they were asked for."""
    from firsttoken_simulator.report.folder import write_run

    document, program, timeline, later = _measure(subject, target, lengths, decode, options, progress)
    files = {"run.json": document.to_json().encode()}
    if folder is not None:
        written = write_run(folder, document, program, timeline, later)
        files = {path.name: path.read_bytes() for path in written}
    _report(progress, 1.0)
    return document, files


def _kept(key: str, folder: Path | None, reports: tuple[str, ...]) -> RunDocument | None:
    """The document of an earlier equal run, its reports written to `folder`; None unless everything is there."""
    from firsttoken_simulator.report.document import RunDocument
    from firsttoken_simulator.report.errors import ReportError

    files = ResultCache().get(key, ("run.json",) if folder is None else reports)
    if files is None:
        return None
    try:
        document = RunDocument.from_json(files["run.json"])
    except ReportError:
        return None
    if folder is not None:
        from firsttoken_simulator.report.folder import write_file

        for name in reports:
            write_file(folder / name, files[name])
    return document


def _report(progress: Progress | None, done: float) -> None:
    if progress is not None:
        progress("report", done, 1.0)


def _stage(name: str, progress: Progress | None) -> Any:
    return None if progress is None else lambda fraction: progress(name, fraction, 1.0)


def _prefixed(prefix: str, progress: Progress | None) -> Progress | None:
    return None if progress is None else lambda stage, done, total: progress(prefix + stage, done, total)
