"""Which choices of a kernel are tried, in which order: a function of the trials' results and a seed, of nothing else.

The compiler's own choice comes first, so that no result is worse than it. Where all choices fit the budget, all are
tried. Beyond that the first half of the budget goes to those that the compiler's cost model ranks cheapest, the rest
to what a tree-structured Parzen estimator (optuna) proposes after them. Choices go out in rounds of a fixed size, so
the number of workers plays no part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from firsttoken_compiler.errors import FirsttokenError

if TYPE_CHECKING:
    from firsttoken_compiler.isa.types import Space
    from firsttoken_compiler.schedule.choice import Choice, KernelKey
    from firsttoken_compiler.schedule.spec import KernelSpec
    from firsttoken_compiler.schedule.tiling import Room
    from firsttoken_compiler.target.target import Target

ROUND: Final = 8
"""Choices of a round."""
WORST: Final = 10.0
"""What a choice that could not be measured counts as for the estimator: so many times the first one."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel to tune: what decides its template, and how often a program launches it.

    Attributes:
        key: its name in a schedule file.
        spec: what it computes; with `spaces` and `room` what `build` is told.
        spaces: where its operands and results lie.
        room: what it may use of the scratchpad.
        machine: the target, or what one core has of it where several cores work side by side.
        launches: how many operators of the program it serves.
        operators: their names, `layers.*` standing for all layers.
        macs: multiply-accumulates of one launch.
        phase: the graph that it is of, `prompt` or `decode`.
    """

    key: KernelKey
    spec: KernelSpec
    spaces: tuple[Space, ...]
    room: Room
    machine: Target
    launches: int
    operators: tuple[str, ...] = ()
    macs: int = 0
    phase: str = ""

    @property
    def name(self) -> str:
        """The operators for people: the first, and how many more."""
        more = f" +{len(self.operators) - 1}" if len(self.operators) > 1 else ""
        return f"{self.operators[0]}{more}" if self.operators else self.key


def candidates(kernel: Kernel) -> list[Choice]:
    """The compiler's own choice, then all other legal ones, cheapest by the cost model first.

    Empty for a kernel that leaves nothing to choose, or that does not fit at all.
    """
    from firsttoken_compiler.schedule.choosing import default_choice, legal_costs

    of = (kernel.spec, kernel.spaces, kernel.machine)
    try:
        own = default_choice(*of, kernel.room)
    except FirsttokenError:
        return []
    if own is None:
        return []
    costs = dict(legal_costs(*of, kernel.room))
    costs.pop(own, None)
    order = sorted(costs, key=lambda choice: costs[choice] or 0.0)  # stable: without a cost as they are listed
    return [own, *order]


class Search:
    """Rounds of choices for one kernel; `tell` the results of one before the next."""

    def __init__(self, choices: Sequence[Choice], trials: int, seed: int) -> None:
        self.choices, self.trials, self.seed = list(choices), min(trials, len(choices)), seed
        self.scores: dict[Choice, float | None] = {}

    def rounds(self) -> Iterator[list[Choice]]:
        """Choices to measure, `ROUND` at most."""
        exhaustive = self.trials == len(self.choices)
        listed = self.trials if exhaustive else max(1, -(-self.trials // 2))
        for at in range(0, listed, ROUND):
            yield self.choices[at : min(at + ROUND, listed)]
        proposals = None if exhaustive else _Estimator(self.choices, self.seed)
        while proposals is not None and len(self.scores) < self.trials:
            yield proposals.ask(self.scores, min(ROUND, self.trials - len(self.scores)))

    def tell(self, choice: Choice, score: float | None) -> None:
        """What a choice was worth, less is better; None: it could not be built or broke a rule."""
        self.scores[choice] = score

    @property
    def best(self) -> list[Choice]:
        """Choices that could be measured, best first; of equal ones the one tried first."""
        found = {choice: score for choice, score in self.scores.items() if score is not None}
        return sorted(found, key=lambda choice: found[choice])


class _Estimator:
    """Proposes untried choices by optuna's TPE over their fields, each an ordered list of the values that occur."""

    def __init__(self, choices: Sequence[Choice], seed: int) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        rows = [_fields(choice) for choice in choices]
        names = sorted({name for row in rows for name in row})
        self.values = {name: sorted({row[name] for row in rows}) for name in names}
        self.place = {
            choice: tuple(self.values[name].index(row[name]) for name in names)
            for choice, row in zip(choices, rows, strict=True)
        }
        self.distributions: dict[str, optuna.distributions.BaseDistribution] = {
            name: optuna.distributions.IntDistribution(0, len(of) - 1)
            for name, of in self.values.items()
            if len(of) > 1
        }
        self.names = names
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=1, n_ei_candidates=48)
        self.study = optuna.create_study(sampler=sampler)
        self.told: set[Choice] = set()

    def ask(self, scores: dict[Choice, float | None], count: int) -> list[Choice]:
        """So many choices that have no score yet: those nearest to what the estimator proposes."""
        import optuna

        first = next((score for score in scores.values() if score is not None), 1.0)
        for choice, score in scores.items():
            if choice not in self.told:
                params = {n: i for n, i in zip(self.names, self.place[choice], strict=True) if n in self.distributions}
                value = first * WORST if score is None else score
                made = optuna.trial.create_trial(params=params, distributions=self.distributions, value=value)
                self.study.add_trial(made)
                self.told.add(choice)
        chosen: list[Choice] = []
        for _ in range(count):
            trial = self.study.ask(self.distributions)
            wanted = tuple(trial.params.get(name, 0) for name in self.names)
            self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
            free = [c for c in self.place if c not in scores and c not in chosen]
            chosen.append(min(free, key=lambda choice: self._distance(self.place[choice], wanted)))
        return chosen

    def _distance(self, a: tuple[int, ...], b: tuple[int, ...]) -> float:
        sizes = (max(1, len(self.values[name]) - 1) for name in self.names)
        return sum(abs(x - y) / size for x, y, size in zip(a, b, sizes, strict=True))


def _fields(choice: Choice) -> dict[str, Any]:
    """Fields of a choice as values that can be ordered among their kind."""
    return dict(asdict(choice))
