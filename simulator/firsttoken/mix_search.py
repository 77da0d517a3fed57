"""The best formats of a student's matrices under a budget, from what each group of them is measured to do.

The divergence of a mix is taken as the sum of what its groups do alone, and its cost as that of the program with the
first format everywhere plus what each group adds to it. Both are assumptions; the mix that they choose is then
compiled, simulated and executed, and what was predicted stands beside what was found.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Final, Literal

import numpy as np

from firsttoken.divergence import Scores, standard_error
from firsttoken.fidelity import QualityRow, Reference, equipped, row_of, scores
from firsttoken.knapsack import choose
from firsttoken.matrices import Group, groups_of, lowered, matrices_of
from firsttoken.options import Progress, RunOptions
from firsttoken.prose import TEXT, windows
from firsttoken.sensitivity import Weighed
from firsttoken.subject import Built, Subject
from firsttoken_compiler.errors import OptionError
from firsttoken_compiler.options import WeightRule

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from firsttoken_compiler.target.target import Target

Kind = Literal["weight_bytes", "ttft_ms"]
TRIES: Final = 6
"""Mixes that are simulated until one keeps a budget that it was predicted to keep."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Most that a mix may take: bytes of the program's weights, or milliseconds of a prompt of so many tokens."""

    kind: Kind
    limit: float
    prompt: int = 64

    def text(self, value: float) -> str:
        """A value with its unit."""
        return f"{value / 1e6:.2f} MB" if self.kind == "weight_bytes" else f"{value:.3f} ms"


@dataclass(frozen=True, slots=True)
class Option:
    """One format of one group, everything else as it is.

    Attributes:
        weights: the format.
        kl: mean divergence from float32, nats per token, with this group alone in the format.
        kl_error: its standard error.
        cost: what the group adds to the program in which every group has the first format, in the budget's unit.
    """

    weights: str
    kl: float
    kl_error: float
    cost: float


@dataclass(frozen=True, slots=True)
class Row:
    """A group, its options, and the format chosen."""

    group: str
    matrices: int
    options: tuple[Option, ...]
    chosen: str


@dataclass(frozen=True, slots=True)
class MixResult:
    """A mix under a budget.

    Attributes:
        student: its name.
        target: the machine.
        text: file of the text inside the package.
        windows: stretches of the text on which divergence was measured, and as many after them that were held out.
        window_tokens: tokens of each.
        budget: kind, limit and prompt.
        cost_predicted: cost of the mix as the sum of its groups'.
        cost: cost of its program.
        kl_predicted: sum of its groups' divergences.
        kl_weights: divergence with all its matrices in their formats, in onnxruntime.
        kl_executed: divergence of the program on the same text, executed.
        held_out: the program on the text that was held out.
        options: what it runs with, besides the rules.
        groups: a row each.
        rules: the mix, as `--mix` reads it.
    """

    student: str
    target: str
    text: str
    windows: int
    window_tokens: int
    budget: Budget
    cost_predicted: float
    cost: float
    kl_predicted: float
    kl_weights: float
    kl_executed: float
    held_out: QualityRow
    options: dict[str, str]
    groups: tuple[Row, ...]
    rules: tuple[WeightRule, ...]

    def to_json(self) -> str:
        """One document; the same question gives the same bytes."""
        from firsttoken_simulator.report.plain import plain_json

        rules = [rule.text() for rule in self.rules]
        return plain_json(json.dumps({**asdict(self), "rules": rules}, indent=1, ensure_ascii=False))


def search(
    subject: Subject, formats: Sequence[str], budget: Budget, options: RunOptions, target: Target, blocks: int,
    count: int, tokens: int, progress: Progress | None = None,
) -> MixResult:  # fmt: skip
    """See `api.mix`."""
    if len(set(formats)) < 2:
        raise OptionError(f"--formats {','.join(formats)}: give at least 2 formats to choose from, such as int4,int8")
    student, tokenizer = equipped(subject)
    student.lengths(max(tokens, budget.prompt), 0)
    text = windows(tokenizer, 2 * count, tokens)
    groups = groups_of(matrices_of(student.open(tokens, 0), target), blocks)
    if not groups:
        raise OptionError(f"{student.name}: all matrices are stored quantised, none is left to choose; give float ones")
    run = _Search(student, groups, tuple(dict.fromkeys(formats)), budget, options, target, progress)
    weighed = Weighed(student, text[:count])
    weighed.require(matrix for group in groups for matrix in group.matrices)
    costs, base = run.costs()
    losses = run.losses(weighed)
    chosen, predicted, cost = run.choose(losses, costs, base)
    picked = [group[index] for group, index in zip(losses, chosen, strict=True)]
    together = weighed.scores(run.replaced(weighed, groups, [run.formats[index] for index in chosen]))
    found, nbytes = scores(student, Reference(student, tokens), run.mixed(chosen), target, text, progress)
    half = count * tokens
    return MixResult(
        student=student.name,
        target=target.name,
        text=TEXT,
        windows=count,
        window_tokens=tokens,
        budget=budget,
        cost_predicted=predicted,
        cost=cost,
        kl_predicted=float(sum(one.kl.mean() for one in picked)),
        kl_weights=float(together.kl.mean()),
        kl_executed=float(found.kl[:half].mean()),
        held_out=row_of(student, run.mixed(chosen), found.cut(slice(half, None)), nbytes),
        options={"weights": run.formats[0], "group": options.group, "acts": run.mixed(chosen).precision().acts},
        groups=run.rows(losses, costs, chosen),
        rules=rules_of_groups(groups, [run.formats[index] for index in chosen]),
    )


def rules_of_groups(groups: Sequence[Group], formats: Sequence[str]) -> tuple[WeightRule, ...]:
    """One rule for each role and format, ranges of layers that touch made one."""
    ranges: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for group, weights in zip(groups, formats, strict=True):
        found = ranges.setdefault((group.role, weights), [])
        if group.layers is not None:
            first, last = group.layers
            if found and found[-1][1] + 1 == first:
                first = found.pop()[0]
            found.append((first, last))
    return tuple(WeightRule(role, weights, tuple(layers)) for (role, weights), layers in ranges.items())


class _Search:
    """What is measured of one student for one budget."""

    def __init__(
        self, student: Built, groups: Sequence[Group], formats: tuple[str, ...], budget: Budget, options: RunOptions,
        target: Target, progress: Progress | None,
    ) -> None:  # fmt: skip
        self.student, self.groups, self.formats, self.budget = student, groups, formats, budget
        self.options, self.target, self.progress = replace(options, weights=formats[0]), target, progress
        self.layers = student.config.layers

    def mixed(self, chosen: Sequence[int]) -> RunOptions:
        """The options of a mix, by the index of each group's format."""
        formats = [self.formats[index] for index in chosen]
        return replace(self.options, rules=rules_of_groups(self.groups, formats))

    def losses(self, weighed: Weighed) -> list[list[Scores]]:
        """By group and format, with that group alone in that format."""
        total = len(self.groups) * len(self.formats)
        found: list[list[Scores]] = []
        for index, group in enumerate(self.groups):
            found.append([])
            for weights in self.formats:
                self._show("measure groups", index * len(self.formats) + len(found[-1]), total)
                found[-1].append(weighed.scores(self.replaced(weighed, [group], [weights])))
        return found

    def replaced(
        self, weighed: Weighed, groups: Sequence[Group], formats: Sequence[str]
    ) -> dict[str, NDArray[np.float32]]:
        """The matrices of groups in low precision."""
        made = {}
        for group, weights in zip(groups, formats, strict=True):
            precision = replace(self.options, rules=(group.rule(weights),)).precision()
            for matrix in group.matrices:
                own = weighed.arrays[matrix.source]
                own = np.ascontiguousarray(own.T if matrix.transposed else own)
                kind = precision.format_of(matrix.role, matrix.layer, self.layers, matrix.k)
                low = lowered(own, kind, self.options.group)
                made[matrix.source] = np.ascontiguousarray(low.T) if matrix.transposed else low
        return made

    def costs(self) -> tuple[list[list[float]], float]:
        """By group and format what the program costs more than with the first format everywhere, and that cost.

        Groups of equal matrices cost the same: one of each shape is compiled. Raises OptionError where all are above
        the budget.
        """
        base = [0] * len(self.groups)
        shapes = {group.shape: index for index, group in reversed(list(enumerate(self.groups)))}
        total, done = 1 + len(shapes) * (len(self.formats) - 1), 1
        self._show("compile formats", 0, total)
        lowest = self.cost(base)
        added: dict[tuple[tuple[str, int, int], ...], list[float]] = {}
        for shape, index in shapes.items():
            added[shape] = [0.0]
            for option in range(1, len(self.formats)):
                self._show("compile formats", done, total)
                done += 1
                added[shape].append(self.cost([*base[:index], option, *base[index + 1 :]]) - lowest)
        costs = [added[group.shape] for group in self.groups]
        if lowest + sum(min(cost) for cost in costs) > self.budget.limit:
            raise self.refusal(costs, lowest)
        return costs, lowest

    def cost(self, chosen: Sequence[int]) -> float:
        """What the program of a mix takes of the budget, from its bytes or its simulation."""
        from firsttoken import api

        student = replace(self.student, all_logits=False)
        if self.budget.kind == "ttft_ms":
            return api.measure(student, self.target, self.budget.prompt, 0, self.mixed(chosen))[0].ttft_ms
        program = api.compile_subject(student, self.target, self.budget.prompt, 0, self.mixed(chosen))
        return float(sum(tensor.nbytes for tensor in program.of_kind("weight")))

    def choose(
        self, losses: list[list[Scores]], costs: list[list[float]], base: float
    ) -> tuple[list[int], float, float]:
        """Formats by index, what they were predicted to cost, and what their program does cost.

        A mix that breaks the budget after all lowers what the next one is allowed by as much; where that leaves
        nothing, the first format everywhere is left, whose cost is known.
        """
        harm = [[float(option.kl.mean()) for option in group] for group in losses]
        allowed = self.budget.limit
        for done in range(TRIES):
            self._show("choose", done, TRIES)
            chosen = choose(costs, harm, allowed - base)
            if chosen is None:
                break
            predicted = base + sum(cost[index] for cost, index in zip(costs, chosen, strict=True))
            cost = self.cost(chosen)
            if cost <= self.budget.limit:
                return chosen, predicted, cost
            allowed = min(allowed, predicted) - (cost - self.budget.limit)
        if base <= self.budget.limit:
            return [0] * len(costs), base, base
        raise self.refusal(costs, base)

    def refusal(self, costs: list[list[float]], base: float) -> OptionError:
        """What is said of a budget that no mix keeps."""
        smallest = base + sum(min(cost) for cost in costs)
        return OptionError(
            f"no mix of {', '.join(self.formats)} keeps {self.budget.text(self.budget.limit)}: the least they take is "
            f"about {self.budget.text(smallest)}; raise the budget, or add a smaller format"
        )

    def rows(self, losses: list[list[Scores]], costs: list[list[float]], chosen: Sequence[int]) -> tuple[Row, ...]:
        """What was measured of each group, and chosen."""
        made = []
        for group, measured, cost, index in zip(self.groups, losses, costs, chosen, strict=True):
            options = tuple(
                Option(weights, float(one.kl.mean()), standard_error(one.kl), price)
                for weights, one, price in zip(self.formats, measured, cost, strict=True)
            )
            made.append(Row(group.name, len(group.matrices), options, self.formats[index]))
        return tuple(made)

    def _show(self, stage: str, done: float, total: float) -> None:
        if self.progress is not None:
            self.progress(stage, done, total)
