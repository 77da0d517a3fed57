"""How long a prompt, a token, an inference or one kernel takes as a runtime launches it: graphs, launches, clock.

A runtime cuts a prompt into chunks and keeps graphs for some contexts (`Target.runtimes`). `plan` says which graphs a
work launches how often, a `Clock` how long each graph runs, and `predict` adds the launches up.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from firsttoken.cache import ResultCache, content_key
from firsttoken.group_tasks import group_tasks_s
from firsttoken.head_turns import head_turns_s
from firsttoken.options import RunOptions
from firsttoken.placement import EMBEDDING, HEAD, host_s
from firsttoken.subject import Built, StudentLike, Subject, subject_of
from firsttoken_compiler.errors import OptionError

if TYPE_CHECKING:
    from firsttoken.api import TargetLike
    from firsttoken.options import Progress
    from firsttoken_compiler.isa.program import Program
    from firsttoken_compiler.target.target import Runtime, Target

EXACT_CHUNKS: Final = 6
"""Chunks of one prompt that are all simulated; of more, some are, and the others lie on lines between them."""
SAMPLES: Final = 5
"""Chunks that are simulated of more than `EXACT_CHUNKS`: the first, the last full one, and evenly between."""
_FILE: Final = "time.json"


class Kernel(Protocol):
    """A small graph of its own; equal ones hash alike."""

    def subject(self) -> Subject:
        """What is compiled."""


@dataclass(frozen=True, slots=True)
class LlmWork:
    """A prompt and its answer.

    Attributes:
        student: a language model.
        options: number formats.
        prompt: tokens.
        context: most rows that graphs are compiled for; 0 for the prompt and the answer.
        new_tokens: tokens of the answer over which `tpot_ms` is the mean.
        runtime: name of the target's runtime; None for its first.
    """

    student: StudentLike
    options: RunOptions
    prompt: int
    context: int = 0
    new_tokens: int = 1
    runtime: str | None = None


@dataclass(frozen=True, slots=True)
class EncoderWork:
    """One inference of an encoder, or of a graph of one length."""

    student: StudentLike
    options: RunOptions
    tokens: int
    runtime: str | None = None


@dataclass(frozen=True, slots=True)
class KernelWork:
    """One launch of a small graph."""

    kernel: Kernel
    options: RunOptions
    runtime: str | None = None


Work = LlmWork | EncoderWork | KernelWork


@dataclass(frozen=True, slots=True)
class Step:
    """One graph: `tokens` new rows after `past` rows."""

    student: StudentLike | Kernel
    tokens: int
    past: int
    options: RunOptions
    host_roles: tuple[str, ...] = ()
    """What the CPU computes and the graph leaves out."""
    all_logits: bool = False
    """Whether the head computes every new row."""

    def subject(self) -> Subject:
        """What is compiled; raises FirsttokenError."""
        if not isinstance(self.student, StudentLike):
            return self.student.subject()
        found = subject_of(self.student)
        if not self.host_roles and not self.all_logits:
            return found
        if not isinstance(found, Built):
            raise OptionError(f"{found.name} is {found.kind}; only graphs of language models that are built are cut")
        return replace(found, host_roles=self.host_roles, all_logits=self.all_logits)


@dataclass(frozen=True, slots=True)
class StepTime:
    """What a clock says of a step.

    Attributes:
        device_s: seconds from the first instruction to the last completion.
        nodes: operators of the program.
        energy_mj: of the NPU and its DRAM while it runs, in millijoules.
        energy_low_mj: the same with every energy of the target at its low bound; None: as it is.
        energy_high_mj: at its high bound.
        kernels: those with a choice in the schedule of the step that occur in its program.
        attentions: operators of the program that are attention of several rows.
    """

    device_s: float
    nodes: float
    energy_mj: float
    energy_low_mj: float | None = None
    energy_high_mj: float | None = None
    kernels: tuple[str, ...] = ()
    attentions: float = 0.0


class Clock(Protocol):
    """How long graphs run."""

    def seconds(self, step: Step, target: Target) -> StepTime:
        """Raises FirsttokenError where the step cannot be compiled."""


@dataclass(frozen=True, slots=True)
class Launch:
    """A graph and how often it is launched; a fraction where its time stands for that of similar graphs too."""

    step: Step
    count: float


@dataclass(frozen=True, slots=True)
class Plan:
    """The launches of each phase: "prefill" and "decode", "inference", or "kernel".

    `decode` is of all tokens of the answer after the first.
    """

    work: Work
    phases: dict[str, tuple[Launch, ...]]
    answer_tokens: int = 0
    """Tokens that the phase "decode" makes."""
    heads: Mapping[str, int] = field(default_factory=dict)
    """How often the CPU computes the head in a phase; empty where the CPU has no part of the graph."""

    @property
    def steps(self) -> tuple[Step, ...]:
        """Different graphs, in order."""
        return tuple(dict.fromkeys(launch.step for launches in self.phases.values() for launch in launches))


@dataclass(frozen=True, slots=True)
class PhaseTime:
    """Where the time of a phase goes, in seconds, and its energy in millijoules."""

    launches: float
    device_s: float
    launch_s: float
    node_s: float
    host_s: float
    energy_mj: float
    energy_low_mj: float
    energy_high_mj: float

    @property
    def seconds(self) -> float:
        """All of it: nothing of the four overlaps."""
        return self.device_s + self.launch_s + self.node_s + self.host_s

    def per(self, tokens: int) -> PhaseTime:
        """The mean of so many tokens."""
        return PhaseTime(*(value / tokens for value in asdict(self).values()))


@dataclass(frozen=True)
class Prediction:
    """What a user measures; None is what a work does not have.

    Attributes:
        ttft_ms: until the first token, or of one inference.
        prefill_tok_s: tokens of the prompt over that time.
        tpot_ms: per later token, the mean of the answer.
        decode_tok_s: later tokens per second.
        time_us: of one kernel.
        energy_mj: per later token, per inference or per kernel, of the NPU and its DRAM.
        power_w: the mean over the same time.
        energy_band_mj: low and high of `energy_mj`: every energy of the target at its bound.
        power_band_w: the same of `power_w`.
        polling_mj: low, typical and high of the host while it polls, beside `energy_mj`; zero where it is not modelled.
        parts: where the time of each phase goes; of "decode" per token.
        schedule: how much of the schedule the graphs use, kernels of it that occur in none of them; empty without one.
    """

    ttft_ms: float | None = None
    prefill_tok_s: float | None = None
    tpot_ms: float | None = None
    decode_tok_s: float | None = None
    time_us: float | None = None
    energy_mj: float | None = None
    power_w: float | None = None
    energy_band_mj: tuple[float, float] | None = None
    power_band_w: tuple[float, float] | None = None
    polling_mj: tuple[float, float, float] | None = None
    parts: Mapping[str, PhaseTime] = field(default_factory=dict)
    schedule: tuple[str, ...] = ()


def plan(work: Work, target: Target) -> Plan:
    """The graphs of a work and how often each is launched; raises FirsttokenError for what the runtime cannot do."""
    runtime = target.runtime(work.runtime)
    if isinstance(work, KernelWork):
        return Plan(work, {"kernel": (Launch(Step(work.kernel, 1, 0, work.options), 1.0),)})
    if isinstance(work, EncoderWork):
        tokens, _ = subject_of(work.student).lengths(work.tokens, None)
        return Plan(work, {"inference": (Launch(Step(work.student, tokens, 0, work.options), 1.0),)})
    return _language_plan(work, runtime)


def steps(work: Work, target: Target) -> tuple[Step, ...]:
    """Different graphs of a work."""
    return plan(work, target).steps


def latency(work: Work, target: TargetLike, *, cache: bool = True, progress: Progress | None = None) -> Prediction:
    """Compiles and simulates the graphs of a work and adds up their launches.

    Args:
        work: a prompt with its answer, an inference, or a kernel.
        target: a preset's name, a `.toml` file, or a target.
        cache: whether graphs timed in earlier runs serve, and these are kept.
        progress: called with (stage, done, total).

    Raises:
        FirsttokenError: the input is at fault; the message names the remedy.
    """
    from firsttoken.api import schedule_lines, target_of

    machine = target_of(target)
    graphs, clock = steps(work, machine), ExactClock(cache)
    occurring: list[str] = []
    for done, step in enumerate(graphs):
        if progress is not None:
            progress("compile and simulate", float(done), float(len(graphs)))
        occurring += clock.seconds(step, machine).kernels
    found, given = predict(work, machine, clock), work.options.schedule
    return found if given is None else replace(found, schedule=tuple(schedule_lines(given.marked(occurring))))


def predict(work: Work, target: Target, clock: Clock) -> Prediction:
    """Adds up the launches of a work: the runtime's costs from `target`, everything else from the clock.

    Raises FirsttokenError where a graph cannot be compiled.
    """
    planned, runtime = plan(work, target), target.runtime(work.runtime)
    parts = {name: _phase(planned, name, runtime, target, clock) for name, some in planned.phases.items() if some}
    if isinstance(work, LlmWork):
        prefill = parts["prefill"]
        found: dict[str, Any] = {"ttft_ms": prefill.seconds * 1e3, "prefill_tok_s": work.prompt / prefill.seconds}
        if "decode" in parts:
            parts["decode"] = token = parts["decode"].per(planned.answer_tokens)
            found |= {"tpot_ms": token.seconds * 1e3, "decode_tok_s": 1 / token.seconds}
            return Prediction(**found, **_energy(token, target), parts=parts)
        return Prediction(**found, parts=parts)
    part = next(iter(parts.values()))
    encoder = isinstance(work, EncoderWork)
    time: dict[str, Any] = {"ttft_ms": part.seconds * 1e3} if encoder else {"time_us": part.seconds * 1e6}
    return Prediction(**time, **_energy(part, target), parts=parts)


def _energy(part: PhaseTime, target: Target) -> dict[str, Any]:
    """The fields of a prediction that say what a phase takes."""
    from firsttoken_simulator.energy import standing_w

    polling, band = standing_w(target)[1].scaled(part.seconds * 1e3), (part.energy_low_mj, part.energy_high_mj)
    return {
        "energy_mj": part.energy_mj,
        "power_w": part.energy_mj / 1e3 / part.seconds,
        "energy_band_mj": band,
        "power_band_w": (band[0] / 1e3 / part.seconds, band[1] / 1e3 / part.seconds),
        "polling_mj": (polling.low, polling.typical, polling.high),
    }


def _phase(planned: Plan, name: str, runtime: Runtime, target: Target, clock: Clock) -> PhaseTime:
    from firsttoken_simulator.energy import Band, standing_w

    count = device = nodes = rows = tasks = attentions = 0.0
    energy = Band(0.0, 0.0, 0.0)
    for launch in planned.phases[name]:
        time = clock.seconds(launch.step, target)
        count += launch.count
        device += launch.count * time.device_s
        nodes += launch.count * time.nodes
        attentions += launch.count * time.attentions
        low, high = (time.energy_mj if bound is None else bound for bound in (time.energy_low_mj, time.energy_high_mj))
        energy += Band(low, time.energy_mj, high).scaled(launch.count)
        rows += launch.count * launch.step.tokens
        tasks += launch.count * group_tasks_s(launch.step, runtime, target.host)
        tasks += launch.count * head_turns_s(launch.step, runtime.turned_bytes_per_s, target)
    launch_s, node_s = count * runtime.launch_us / 1e6, nodes * runtime.node_us / 1e6
    node_s += attentions * runtime.attention_us / 1e6
    on_host = tasks
    if planned.heads and isinstance(planned.work, LlmWork):
        subject = subject_of(planned.work.student)
        if isinstance(subject, Built):
            on_host += host_s(subject.config, rows, planned.heads[name], runtime, target.host)
    # The NPU is on while the host works; one watt for a second is a thousand millijoules.
    energy += standing_w(target)[0].scaled((launch_s + node_s + on_host) * 1e3)
    return PhaseTime(count, device, launch_s, node_s, on_host, energy.typical, energy.low, energy.high)


def _language_plan(work: LlmWork, runtime: Runtime) -> Plan:
    if work.prompt < 1 or work.new_tokens < 0:
        raise OptionError(f"a prompt of {work.prompt} and an answer of {work.new_tokens} tokens: at least 1 and 0")
    rows = work.prompt + work.new_tokens
    limit = work.context or rows
    if work.prompt > limit:
        raise OptionError(f"--prompt {work.prompt} exceeds --context {limit}: ask for a longer context")
    subject = subject_of(work.student)
    subject.lengths(limit, None)
    buckets = _buckets(runtime, limit, given=bool(work.context))
    step = _Steps(work, buckets, runtime)
    answer = range(work.prompt + 1, min(rows, limit) + 1)
    return Plan(
        work, {"prefill": _prefill(work.prompt, runtime.chunk_tokens, step), "decode": _decode(answer, step)},
        len(answer), {"prefill": 1, "decode": len(answer)} if runtime.host_roles else {},
    )  # fmt: skip


def _buckets(runtime: Runtime, limit: int, given: bool) -> tuple[int, ...]:
    """Contexts of the graphs that are there; empty where every length is."""
    if not runtime.context_buckets:
        return ()
    smaller = tuple(bucket for bucket in runtime.context_buckets if bucket < limit)
    if given:
        return (*smaller, limit)
    whole = [bucket for bucket in runtime.context_buckets if bucket >= limit]
    return (*smaller, whole[0] if whole else limit)


@dataclass(frozen=True, slots=True)
class _Steps:
    """Makes the step that adds `tokens` rows to reach `rows` rows."""

    work: LlmWork
    buckets: tuple[int, ...]
    runtime: Runtime

    def reaching(self, rows: int, tokens: int) -> Step:
        context = next((bucket for bucket in self.buckets if bucket >= rows), max(rows, tokens))
        options, roles = self.work.options, self.runtime.host_roles
        if HEAD in roles or EMBEDDING in roles:
            rules = tuple(rule for rule in options.rules if rule.role not in roles)
            options = replace(options, rules=rules, host_roles=())
        logits = self.runtime.all_logits and tokens > 1 and HEAD not in roles
        past = max(0, context - tokens)
        if self.runtime.concatenates_cache and past:
            options = replace(options, kv_concat=True)
        return Step(self.work.student, tokens, past, options, roles, logits)


def _prefill(prompt: int, chunk: int, step: _Steps) -> tuple[Launch, ...]:
    """Graphs of static length pad the last chunk; graphs of any length do not."""
    if chunk == 0 or (prompt <= chunk and not step.buckets):
        return (Launch(step.reaching(prompt, prompt), 1.0),)
    full, rest = divmod(prompt, chunk)
    if step.buckets:
        return _counted(step.reaching(min((i + 1) * chunk, step.buckets[-1]), chunk) for i in range(full + (rest > 0)))
    at = np.arange(full) if full <= EXACT_CHUNKS else np.unique(np.linspace(0, full - 1, SAMPLES).round().astype(int))
    # Row i: the weights of the sampled chunks in the time of chunk i.
    weights = np.stack([np.interp(np.arange(full), at, unit) for unit in np.eye(len(at))]).sum(axis=1)
    launches = [Launch(step.reaching((int(i) + 1) * chunk, chunk), float(w)) for i, w in zip(at, weights, strict=True)]
    return (*launches, *([Launch(step.reaching(prompt, rest), 1.0)] if rest else []))


def _decode(answer: range, step: _Steps) -> tuple[Launch, ...]:
    """Without buckets the token in the middle stands for all: the time of a token is a line over the rows before it."""
    if not answer:
        return ()
    if step.buckets:
        return _counted(step.reaching(rows, 1) for rows in answer)
    return (Launch(step.reaching((answer[0] + answer[-1]) // 2, 1), float(len(answer))),)


def _counted(every: Any) -> tuple[Launch, ...]:
    return tuple(Launch(step, float(count)) for step, count in Counter(every).items())


def compile_step(step: Step, target: Target) -> Program:
    """The program of a step; raises FirsttokenError."""
    from firsttoken.api import compile_subject

    subject = step.subject()
    tokens, past = subject.lengths(step.tokens, step.past)
    program: Program = compile_subject(subject, target, tokens, past, step.options)
    return program


def time_of(program: Program, target: Target) -> StepTime:
    """What simulating a program says; weight values are never read."""
    from firsttoken_simulator.energy import energy
    from firsttoken_simulator.machine import simulate_program

    timeline = simulate_program(program, target)
    spent = energy(program, timeline, target).device
    energies = spent.typical, spent.low, spent.high
    return StepTime(timeline.total_fs / 1e15, len(program.ops), *energies, attentions=attentions_of(program))


def attentions_of(program: Program) -> int:
    """Operators that are attention of several rows."""
    return sum(op.kind == "attention" and op.m > 1 for op in program.ops)


@dataclass
class ExactClock:
    """Compiles and simulates every step whole, once: results are kept in memory and by content hash on disk."""

    cache: bool = True
    _known: dict[tuple[str, Step], StepTime] = field(default_factory=dict)

    def seconds(self, step: Step, target: Target) -> StepTime:
        """See `Clock`."""
        key = (target.content_hash, step)
        if key not in self._known:
            self._known[key] = self.kept(step, target) or self._measured(step, target)
        return self._known[key]

    def kept(self, step: Step, target: Target) -> StepTime | None:
        """The time of an earlier equal step; None where none is kept."""
        if not self.cache:
            return None
        files = ResultCache().get(_key(step, target), (_FILE,))
        if files is None:
            return None
        values = json.loads(files[_FILE])
        return StepTime(**{**values, "kernels": tuple(values["kernels"])})

    def _measured(self, step: Step, target: Target) -> StepTime:
        given = step.options.schedule
        if given is None:
            time = time_of(compile_step(step, target), target)
        else:
            own = given.marked()
            program = compile_step(replace(step, options=replace(step.options, schedule=own)), target)
            time = replace(time_of(program, target), kernels=tuple(own.occurring()))
        if self.cache:
            ResultCache().put(_key(step, target), {_FILE: json.dumps(asdict(time)).encode()})
        return time


def _key(step: Step, target: Target) -> str:
    from firsttoken.api import run_parts

    subject = step.subject()
    parts = run_parts(subject, target, step.tokens, 0, step.options, step.past)
    return content_key("step", parts, subject.packages)
