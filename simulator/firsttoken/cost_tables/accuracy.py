"""How far a cost table is off: random students of its space, their costs out of the table beside the exact ones."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from firsttoken.student import LayerConfig, StudentConfig

if TYPE_CHECKING:
    from firsttoken.cost_tables.space import CostSpace
    from firsttoken.cost_tables.table import CostTable
    from firsttoken.options import Progress

COMPARED: Final = ("ttft_ms", "energy_mj", "tpot_ms", "token_energy_mj")


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Errors of one cost, |table - exact| / exact in percent, over `students` students.

    `bias_pct` is the mean error with its sign. `worst_student` has the dimensions of the one with `worst_pct`.
    """

    cost: str
    students: int
    seed: int
    median_pct: float
    p95_pct: float
    worst_pct: float
    bias_pct: float
    worst_student: str


def random_students(space: CostSpace, count: int, seed: int) -> list[StudentConfig]:
    """Students of the space, every second one with layers of different widths; the same for the same seed."""
    draw = random.Random(seed)
    return [_random(space, draw, at % 2 == 1, at) for at in range(count)]


def _random(space: CostSpace, draw: random.Random, mixed: bool, number: int) -> StudentConfig:
    names = ("layers", "hidden", "head_dim", "vocab")
    shared: dict[str, Any] = {name: draw.choice(space[name].values) for name in names}
    layers = tuple(_layer(space, draw) for _ in range(shared["layers"] if mixed else 1))
    per_layer = layers if mixed else layers * shared["layers"]
    first = per_layer[0]
    return replace(
        space.base, name=f"random-{number}", **shared, heads=first.heads, kv_heads=first.kv_heads,
        intermediate=first.intermediate, per_layer=per_layer,
    )  # fmt: skip


def _layer(space: CostSpace, draw: random.Random) -> LayerConfig:
    kv_heads = draw.choice(space["kv_heads"].values)
    heads = draw.choice(space.heads(kv_heads).values)
    bits = draw.choice(space["weight_bits"].values)
    return LayerConfig(heads, kv_heads, draw.choice(space["intermediate"].values), bits or None)


def errors_of(
    table: CostTable, count: int, seed: int, jobs: int | None = None, progress: Progress | None = None
) -> tuple[Accuracy, ...]:
    """The errors of each cost that the table has, over `count` random students."""
    from firsttoken.cost_tables.table import COSTS

    asked = random_questions(table, count, seed)
    exact = table.exact_many(asked, jobs=jobs, progress=progress)
    quick = [table.estimate(student, prompt=p, context=c, outside="raise") for student, p, c in asked]
    words = [described(student) + _lengths_in_words(table, p, c) for student, p, c in asked]
    found = []
    for cost in COMPARED:
        at = COSTS.index(cost)
        pairs = [(getattr(q, cost), line[at]) for q, line in zip(quick, exact, strict=True) if at < len(line)]
        if pairs:
            found.append(_accuracy(cost, words, seed, np.array(pairs)))
    return tuple(found)


def random_questions(table: CostTable, count: int, seed: int) -> list[tuple[StudentConfig, int, int]]:
    """(student, prompt, context) of the table, the same for the same seed."""
    draw, lengths = random.Random(f"lengths {seed}"), table.lengths
    contexts = lengths.contexts.values or (0,)
    students = random_students(table.space, count, seed)
    return [(student, draw.choice(lengths.prompts.values), draw.choice(contexts)) for student in students]


def _lengths_in_words(table: CostTable, prompt: int, context: int) -> str:
    axes = {"prompt": (prompt, table.lengths.prompts), "context": (context, table.lengths.contexts)}
    return "".join(f", {name} {value}" for name, (value, axis) in axes.items() if len(axis.values) > 1)


def _accuracy(cost: str, words: list[str], seed: int, pairs: NDArray[np.float64]) -> Accuracy:
    signed = 100 * (pairs[:, 0] / pairs[:, 1] - 1)
    size = np.abs(signed)
    return Accuracy(
        cost, len(words), seed, float(np.median(size)), float(np.percentile(size, 95)), float(size.max()),
        float(signed.mean()), words[int(size.argmax())],
    )  # fmt: skip


def described(student: StudentConfig) -> str:
    """The dimensions of a student in one line; of layers that differ, their ranges."""
    parts = [f"{name} {getattr(student, name)}" for name in ("layers", "hidden", "head_dim", "vocab")]
    for name in ("heads", "kv_heads", "intermediate", "weight_bits"):
        values = sorted({getattr(student.layer(at), name) or 0 for at in range(student.layers)})
        if values != [0]:
            parts.append(f"{name} {values[0]}" if len(values) == 1 else f"{name} {values[0]}-{values[-1]}")
    return ", ".join(parts)
