"""Tunes a student on a target: every kernel alone, then the choices that pay in the whole program.

0. What a schedule chooses about the graph is chosen by simulating it: what norms keep and where, and on a target of
   several cores the number of cores that the work is divided over.
1. Each distinct kernel is searched by simulating it alone (`search`, `trials`).
2. Choices that were better there are taken one by one, those that gain most first, each only if the whole program gets
   better by it. Beside a kernel's best choices one is tried that works in less of the scratchpad and is about as fast:
   what it leaves lets the next operator's weights come earlier.
3. The program of the schedule file is compiled anew and must not be worse than the compiler's own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from firsttoken.tuning.measure import KernelTime
from firsttoken.tuning.search import Kernel, Search, candidates
from firsttoken.tuning.trials import Trials, workers
from firsttoken.tuning.whole import OBJECTIVES, Cost, Graph
from firsttoken_compiler.errors import AllocationError, OptionError

if TYPE_CHECKING:
    from firsttoken.options import Progress, RunOptions
    from firsttoken.subject import Subject
    from firsttoken.tuning.store import TrialStore
    from firsttoken_compiler.schedule.choice import Choice, GraphChoice, KernelKey, Schedules
    from firsttoken_compiler.target.target import Target

TRIALS: Final = 64
"""Choices of a kernel, unless told otherwise."""
BEST: Final = 2
"""Choices of a kernel that are tried in the whole program, beside one that needs less room."""
AS_FAST: Final = 1.03
"""A choice that needs less room may cost so much of the compiler's own, alone."""
SMALL: Final = 1e-3
"""Gains below this share of the whole are tried together."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked for.

    Attributes:
        objective: one of `OBJECTIVES`.
        prompt: tokens of the prompt, None for the student's own or 64.
        past: rows in the cache before it.
        decode: which token of the answer counts too, 0 for none; `tpot` needs one.
        trials: most choices of a kernel that are measured.
        jobs: worker processes.
        seed: of what is proposed beyond the cost model's ranking.
    """

    objective: str = "ttft"
    prompt: int | None = None
    past: int | None = None
    decode: int = 0
    trials: int = TRIALS
    jobs: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises OptionError naming the option, the value, and what is possible."""
        if self.objective not in OBJECTIVES:
            raise OptionError(f"--objective {self.objective!r} is not one of {', '.join(OBJECTIVES)}")
        if self.objective == "tpot" and not self.decode:
            object.__setattr__(self, "decode", 1)
        for name, value, least in (("trials", self.trials, 1), ("jobs", self.jobs, 1), ("decode", self.decode, 0)):
            if value < least:
                raise OptionError(f"--{name} is {value}, must be at least {least}")


@dataclass(frozen=True, slots=True)
class KernelRow:
    """What was found of one kernel; cycles are of one launch of it alone.

    Attributes:
        key: its name in the schedule file.
        operators: those that it serves, `layers.*` standing for all layers.
        graph: `prompt` or `decode`.
        dims: m, n and k of a product, or the extents of a result.
        launches: how many operators it serves.
        default_cycles: with the compiler's own choice.
        tuned_cycles: with the choice that the schedule has.
        best_cycles: of the best choice alone, whether the schedule has it or not.
        bound_cycles: the larger of the bounds of compute and DRAM.
        trials: choices that were measured.
        choices: choices that there are.
        default: the compiler's own choice.
        tuned: the schedule's; empty where it leaves the compiler's.
    """

    key: str
    operators: tuple[str, ...]
    graph: str
    dims: tuple[int, ...]
    launches: int
    default_cycles: float
    tuned_cycles: float
    best_cycles: float
    bound_cycles: float
    trials: int
    choices: int
    default: str
    tuned: str = ""


@dataclass(frozen=True)
class TuneResult:
    """A schedule, what it gains, and what it took to find it."""

    student: str
    target: str
    target_hash: str
    plan: Plan
    before: Cost
    after: Cost
    kernels: tuple[KernelRow, ...]
    schedules: Schedules
    measured: int
    """Trials that ran; the others came out of the store."""
    simulated: int
    """Whole programs that were simulated."""

    def to_json(self) -> str:
        """One document."""
        facts: dict[str, Any] = {
            "student": self.student, "target": self.target, "target_hash": self.target_hash, **asdict(self.plan),
            "before": asdict(self.before), "after": asdict(self.after), "kernels": [asdict(r) for r in self.kernels],
            **self.schedules.facts(), "measured": self.measured, "simulated": self.simulated,
        }  # fmt: skip
        return json.dumps(facts, indent=1, ensure_ascii=False)


def tune(
    subject: Subject, target: Target, options: RunOptions, plan: Plan, store: TrialStore,
    progress: Progress | None = None,
) -> TuneResult:  # fmt: skip
    """The best schedule found; the same for the same seed, whatever the jobs and however often it was interrupted.

    `progress` is called with (stage, done, total). Raises FirsttokenError where the student cannot run so.
    """
    return _Tuning(subject, target, options, plan, store, progress).run()


class _Tuning:
    def __init__(
        self, subject: Subject, target: Target, options: RunOptions, plan: Plan, store: TrialStore,
        progress: Progress | None,
    ) -> None:  # fmt: skip
        self.subject, self.target, self.plan, self.store, self.progress = subject, target, plan, store, progress
        from firsttoken_compiler.schedule.choice import GraphChoice

        self.options = options
        self.graphs = self._graphs(options)
        self.own: dict[KernelKey, Choice] = {}
        self.times: dict[KernelKey, dict[Choice, KernelTime]] = {}
        self.sizes: dict[KernelKey, int] = {}
        self.graph, self.simulated = GraphChoice(), 0

    def run(self) -> TuneResult:
        before = self._cost({})
        self._arrange()
        kernels = _merged(self.graphs)
        searches = self._searches(kernels)
        with workers(self.plan.jobs) as pool:
            trials = Trials(self.store, pool)
            total = sum(search.trials for _, search in searches)
            trials.say = lambda done: self._show("measure kernels", done, total)
            trials.run(searches, lambda time: self._score(time, before))
        for kernel, search in searches:
            self.times[kernel.key] = {
                choice: KernelTime(**trials.results[kernel.key, choice]) for choice in search.best
            }
        schedules, after = self._confirmed(self._together(searches, before), before)
        choices = dict(schedules.choices)
        return TuneResult(
            self.subject.name, self.target.name, self.target.content_hash, self.plan, before, after,
            tuple(self._row(kernel, search, choices) for kernel, search in searches if search.best), schedules,
            trials.measured, self.simulated + sum(graph.simulated for graph in self.graphs),
        )  # fmt: skip

    def _graphs(self, options: RunOptions) -> list[Graph]:
        """The graphs that the objective is about, compiled."""
        made = [
            Graph(self.subject, self.target, options, *which, self.store, self.progress) for which in self._lengths()
        ]
        for graph in made:
            graph.open()
        return made

    def _arrange(self) -> None:
        """Chooses about the graph as a whole; what the compiler does by itself stays where nothing is better."""
        from firsttoken_compiler.schedule.choice import Schedules

        best = self._cost({}).of(self.plan.objective)
        for number, choice in enumerate(self._arrangements()):
            self._show("arrangements", number, number + 1)
            try:
                graphs = self._graphs(replace(self.options, schedule=Schedules((), choice)))
            except (AllocationError, OptionError):
                continue  # a norm that cannot go that way under these options, or nothing to merge
            cost = _sum(graph.cost({}) for graph in graphs).of(self.plan.objective)
            worse = self.graphs if cost < best else graphs
            self.simulated += sum(graph.simulated for graph in worse)
            if cost < best:
                self.graphs, self.graph, best = graphs, choice, cost

    def _arrangements(self) -> Iterator[GraphChoice]:
        """Numbers of cores, or on one core ways that all norms go; then products that become one, beside the best."""
        from firsttoken_compiler.schedule.choice import MERGES, NORM_WAYS, GraphChoice

        if self.target.cores > 1:
            yield from (GraphChoice(count) for count in (1, 2, 4, 8, 16, 32) if count < self.target.cores)
        else:
            now = {way for graph in self.graphs for _, way in graph.norms}
            ways = NORM_WAYS if self.options.norm_cache == "auto" else NORM_WAYS[:2]  # rows are kept, the place is open
            yield from (GraphChoice(norms=(f"*={way}",)) for way in ways if now and now != {way})
        for kind in MERGES:
            yield replace(self.graph, merged=(*self.graph.merged, kind))

    def _schedules(self, choices: Mapping[KernelKey, Choice]) -> Schedules:
        """What the file says: the kernels' choices, and all that they stand on, so that it stays as it was measured."""
        from firsttoken.scheduled import norm_patterns
        from firsttoken_compiler.schedule.choice import GraphChoice, Schedules

        if not choices and self.graph == GraphChoice():
            return Schedules()
        splits = tuple(sorted({pair for graph in self.graphs for pair in graph.splits}))
        return Schedules(tuple(choices.items()), replace(self.graph, norms=norm_patterns(self.graphs)), splits)

    def _lengths(self) -> list[tuple[int, int, str]]:
        """Tokens, rows in the cache and name of each graph that the objective is about."""
        plan, subject = self.plan, self.subject
        tokens, past = subject.lengths(plan.prompt, plan.past)
        prompt = (tokens, past, "prompt")
        if not plan.decode:
            return [prompt]
        step = (*subject.lengths(1, past + tokens + plan.decode - 1), "decode")
        return {"ttft": [prompt], "tpot": [step]}.get(plan.objective, [prompt, step])

    def _searches(self, kernels: Sequence[Kernel]) -> list[tuple[Kernel, Search]]:
        made = []
        for number, kernel in enumerate(kernels):
            self._show("list choices", number, len(kernels))
            choices = candidates(kernel)
            if len(choices) > 1:
                self.own[kernel.key], self.sizes[kernel.key] = choices[0], len(choices)
                made.append((kernel, Search(choices, self.plan.trials, self.plan.seed)))
        return made

    def _score(self, time: KernelTime, before: Cost) -> float:
        """What a launch adds to the objective, about."""
        if self.plan.objective == "energy":
            return time.energy_mj
        if self.plan.objective == "edp":
            return time.energy_mj / before.energy_mj + time.cycles / before.cycles
        return time.cycles

    def _together(self, searches: Sequence[tuple[Kernel, Search]], before: Cost) -> dict[KernelKey, Choice]:
        """The choices that pay in the whole program."""
        whole = {"energy": before.energy_mj, "edp": 2.0}.get(self.plan.objective, float(before.cycles))
        worth: list[tuple[float, Kernel, list[Choice]]] = []
        for kernel, search in searches:
            tried = self._worth_trying(kernel, search)
            if tried:
                saved = _present(search.scores[self.own[kernel.key]]) - _present(search.scores[tried[0]])
                worth.append((saved * kernel.launches, kernel, tried))
        worth.sort(key=lambda item: -item[0])
        taken: dict[KernelKey, Choice] = {}
        rest: dict[KernelKey, Choice] = {}
        best = self._cost({}).of(self.plan.objective)
        for number, (saved, kernel, tried) in enumerate(worth):
            self._show("whole program", number, len(worth))
            if 0 < saved < SMALL * whole:
                rest[kernel.key] = tried[0]
                continue
            for choice in tried:
                cost = self._cost({**taken, kernel.key: choice}).of(self.plan.objective)
                if cost < best:
                    taken, best = {**taken, kernel.key: choice}, cost
        if rest and self._cost({**taken, **rest}).of(self.plan.objective) < best:
            taken = {**taken, **rest}
        return taken

    def _worth_trying(self, kernel: Kernel, search: Search) -> list[Choice]:
        """Choices that are better alone, best first, and the one of about the same time that leaves most room."""
        own, times = self.own[kernel.key], self.times[kernel.key]
        if own not in times:
            return []
        limit = _present(search.scores[own])
        better = [choice for choice in search.best if _present(search.scores[choice]) < limit][:BEST]
        lean = [
            choice for choice in search.best
            if _present(search.scores[choice]) <= limit * AS_FAST
            and times[choice].scratch_bytes < times[better[0] if better else own].scratch_bytes
        ]  # fmt: skip
        if lean and kernel.macs:
            smallest = min(lean, key=lambda choice: (times[choice].scratch_bytes, search.scores[choice]))
            better += [smallest] if smallest not in better else []
        return better

    def _confirmed(self, choices: dict[KernelKey, Choice], before: Cost) -> tuple[Schedules, Cost]:
        """The schedule and the cost of the program that it compiles to; an empty one where that is worse."""
        from firsttoken_compiler.schedule.choice import Schedules

        schedules = self._schedules(choices)
        if schedules == Schedules():
            return schedules, before
        after = _sum(graph.confirm(schedules) for graph in self.graphs)
        worse = after.of(self.plan.objective) > before.of(self.plan.objective)
        return (Schedules(), before) if worse else (schedules, after)

    def _cost(self, choices: Mapping[KernelKey, Choice]) -> Cost:
        return _sum(graph.cost(choices) for graph in self.graphs)

    def _row(self, kernel: Kernel, search: Search, choices: Mapping[KernelKey, Choice]) -> KernelRow:
        from firsttoken.tuning.bounds import bound_cycles
        from firsttoken_compiler.schedule.choice import product_dims

        own, times = self.own[kernel.key], self.times[kernel.key]
        tuned = choices.get(kernel.key)
        nothing = float("nan")
        return KernelRow(
            kernel.key, kernel.operators, kernel.phase, product_dims(kernel.spec) or kernel.spec.outs[0].shape,
            kernel.launches,
            times[own].cycles if own in times else nothing,
            times[tuned or own].cycles if (tuned or own) in times else nothing,
            min(time.cycles for time in times.values()), bound_cycles(kernel), len(search.scores),
            self.sizes[kernel.key], own.text(), "" if tuned is None else tuned.text(),
        )  # fmt: skip

    def _show(self, stage: str, done: float, total: float) -> None:
        if self.progress is not None:
            self.progress(stage, done, total)


def _merged(graphs: Sequence[Graph]) -> list[Kernel]:
    """The kernels of all graphs; one that two have must fit the room that is smaller."""
    found: dict[KernelKey, Kernel] = {}
    for graph in graphs:
        for kernel in graph.kernels:
            other = found.get(kernel.key)
            if other is None:
                found[kernel.key] = kernel
            else:
                room = min(kernel.room, other.room, key=lambda room: room.limit)
                found[kernel.key] = replace(other, room=room, launches=other.launches + kernel.launches)
    return list(found.values())


def _sum(costs: Iterable[Cost]) -> Cost:
    first, *others = costs
    for other in others:
        first = first + other
    return first


def _present(score: float | None) -> float:
    assert score is not None
    return score
