"""From the time of one run to that of another: what every step and every class of operators contributes, exactly."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from firsttoken_simulator.report.document import DecodeSection, RunDocument
from firsttoken_simulator.report.explain import checked
from firsttoken_simulator.report.steps import BY_NAME, NAMES
from firsttoken_simulator.report.tables import pattern_of

DISPATCH: Final = "dispatch"
REST: Final = "all others"


@dataclass(frozen=True, slots=True)
class Contribution:
    """Time of one step, or of one class of operators, in both runs; femtoseconds."""

    name: str
    old_fs: int
    new_fs: int

    @property
    def change_fs(self) -> int:
        """What it adds to the time, negative for less."""
        return self.new_fs - self.old_fs


@dataclass(frozen=True, slots=True)
class Waterfall:
    """One time in both runs; the changes of either list sum to `change_fs` exactly.

    Attributes:
        what: `ttft` or `tpot`.
        by_step: in the order of the ladder.
        by_class: the same operator of all layers is one class; the largest change first.
    """

    what: str
    old_fs: int
    new_fs: int
    by_step: tuple[Contribution, ...]
    by_class: tuple[Contribution, ...]

    @property
    def change_fs(self) -> int:
        """How much longer the new run takes."""
        return self.new_fs - self.old_fs


def waterfalls(old: dict[str, Any], new: dict[str, Any]) -> tuple[list[Waterfall], str]:
    """Of the time to the first token, and of a token where both runs have it; or none and why.

    The documents are as `diff.load_run` gives them. Raises ReportError naming the field where one is malformed.
    """
    for name, document in (("old", old), ("new", new)):
        if document.get("steps") is None:
            return [], f"the {name} run has no ladder ('steps' is missing): make it again with 'firsttoken run -o'"
    before, after = (RunDocument.from_document(document) for document in (old, new))
    found = [_waterfall("ttft", before, after)]
    if before.decode is not None and after.decode is not None and before.decode.steps and after.decode.steps:
        found.append(_waterfall("tpot", before.decode, after.decode))
    return found, ""


def _waterfall(what: str, old: RunDocument | DecodeSection, new: RunDocument | DecodeSection) -> Waterfall:
    steps, classes = zip(*(_times(part) for part in (old, new)), strict=True)
    by_step = [Contribution(name, steps[0].get(name, 0), steps[1].get(name, 0)) for name in NAMES]
    names = dict.fromkeys([*classes[0], *classes[1]])
    by_class = [Contribution(name, classes[0].get(name, 0), classes[1].get(name, 0)) for name in names]
    by_class.sort(key=lambda one: (-abs(one.change_fs), one.name))
    return Waterfall(what, sum(steps[0].values()), sum(steps[1].values()), tuple(by_step), tuple(by_class))


def _times(part: RunDocument | DecodeSection) -> tuple[dict[str, int], dict[str, int]]:
    """Femtoseconds by step and by class."""
    table = checked(part)
    steps = {name: sum(row[at] for row in table.rows) for at, name in enumerate(table.names)}
    classes: dict[str, int] = {}
    for op, row in zip(part.ops, table.rows, strict=True):
        name = pattern_of(op.op)
        classes[name] = classes.get(name, 0) + sum(row)
    return {**steps, DISPATCH: table.dispatch_fs}, _with(classes, table.dispatch_fs)


def _with(classes: dict[str, int], dispatch_fs: int) -> dict[str, int]:
    """The dispatch is a class of its own, whatever operators are called."""
    return {**classes, DISPATCH: classes.get(DISPATCH, 0) + dispatch_fs}


def largest(rows: Iterable[Contribution], most: int, least_fs: float = 1) -> list[Contribution]:
    """The rows that change by `least_fs`, the largest `most` of them in their order, and all others as one."""
    changed = [row for row in rows if row.change_fs]
    kept = [row for row in changed if abs(row.change_fs) >= least_fs]
    kept = sorted(kept, key=lambda row: -abs(row.change_fs))[:most]
    rest = [row for row in changed if row not in kept]
    shown = [row for row in changed if row in kept]
    if rest:
        shown.append(Contribution(REST, sum(row.old_fs for row in rest), sum(row.new_fs for row in rest)))
    return shown


def title(name: str) -> str:
    """What a step is called; the name of a class as it is."""
    return BY_NAME[name].title if name in BY_NAME else name


def document(found: Waterfall) -> dict[str, Any]:
    """A waterfall as JSON values."""
    return {
        "old_fs": found.old_fs, "new_fs": found.new_fs, "change_fs": found.change_fs,
        "by_step": [{"step": row.name, **_fs(row)} for row in found.by_step],
        "by_class": [{"class": row.name, **_fs(row)} for row in found.by_class],
    }  # fmt: skip


def _fs(row: Contribution) -> dict[str, int]:
    return {"old_fs": row.old_fs, "new_fs": row.new_fs, "change_fs": row.change_fs}
