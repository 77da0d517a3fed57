"""From a bad schedule to a good one: SmolLM2's prompt on a Snapdragon X Elite, and at every step what the ladder says.

    python reports/schedule_study.py

Writes reports/schedules/README.md and the schedule files of every step.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from firsttoken import RunOptions, Target, run
from firsttoken.schedule_file import ScheduleFile, to_toml
from firsttoken.scheduled import Graph, file_of, graphs_of
from firsttoken.subject import subject_of
from firsttoken.tuning.store import TrialStore
from firsttoken.tuning.tune import Plan, tune
from firsttoken.verbs.tune import file_of as tuned_file
from firsttoken_compiler.errors import FirsttokenError
from firsttoken_compiler.schedule.choice import AttentionChoice, Choice, ProductChoice
from firsttoken_compiler.schedule.choosing import check
from firsttoken_simulator.report.document import RunDocument
from firsttoken_simulator.report.explain import explain
from firsttoken_simulator.report.steps import BY_NAME
from firsttoken_simulator.report.waterfall import waterfalls

STUDENT: Final = "smollm2-135m"
TARGET: Final = "snapdragon-x-elite"
TOKENS: Final = 64
OPTIONS: Final = RunOptions(weights="int4")
TRIALS: Final = 48
SHOWN: Final = 5
"""Steps of the ladder, and of a waterfall, in the page's tables."""
LEAST: Final = 0.01
"""Of the time: what is less is not listed."""
OUT: Final = Path(__file__).parent / "schedules"


@dataclass(frozen=True)
class Stage:
    """One step of the way: what was done, why, and the run that it led to."""

    title: str
    why: str
    file: str
    document: RunDocument


def small(choice: ProductChoice | AttentionChoice) -> ProductChoice | AttentionChoice:
    """Small tiles and one buffer of each: what is written first, to have something that runs."""
    if isinstance(choice, AttentionChoice):
        return replace(choice, rows=min(choice.rows, 16), keys=min(choice.keys, 32), buffers=1)
    return replace(choice, m=min(choice.m, 16), n=min(choice.n, 64), k=min(choice.k, 128), whole=False, buffers=1)


def buffered(choice: ProductChoice | AttentionChoice) -> ProductChoice | AttentionChoice:
    """The same tiles, and the next one comes while one is worked on."""
    return replace(small(choice), buffers=2)


def taller(choice: ProductChoice | AttentionChoice) -> ProductChoice | AttentionChoice:
    """All rows in one tile: weights cross the bus once."""
    made = buffered(choice)
    return made if isinstance(made, AttentionChoice) else replace(made, m=TOKENS)


def schedule(graphs: list[Graph], target: Target, change: Callable[..., Choice]) -> ScheduleFile:
    """The compiler's own schedule with every product and attention changed; where that is illegal the own one stays."""
    own = file_of(graphs, STUDENT, target, OPTIONS)
    kernels = {kernel.key: kernel for graph in graphs for kernel in graph.kernels}
    entries = []
    for entry in own.kernels:
        made = change(entry.choice) if isinstance(entry.choice, (ProductChoice, AttentionChoice)) else entry.choice
        kernel = kernels[entry.key]
        try:
            check(kernel.spec, kernel.spaces, kernel.target, kernel.room, made)
        except FirsttokenError:
            made = entry.choice
        entries.append(replace(entry, choice=made))
    return replace(own, kernels=tuple(entries), made_by="reports/schedule_study.py")


def stages() -> list[Stage]:
    """The way, in order."""
    target, subject = Target.load(TARGET), subject_of(STUDENT)
    graphs = graphs_of(subject, target, TOKENS, 0, 0, OPTIONS)
    steps = (
        ("Small tiles, one buffer", "16 rows, 64 columns, 128 deep; each load is waited for.", "small", small),
        ("Two buffers", "The ladder's largest step was waiting for data: let the next tile come meanwhile.", "buffered", buffered),
        ("All rows in a tile", "With 16 rows a tile every weight is fetched four times: take all 64 at once.", "taller", taller),
    )  # fmt: skip
    found = [made(title, why, name, schedule(graphs, target, change)) for title, why, name, change in steps]
    own = file_of(graphs, STUDENT, target, OPTIONS)
    found.append(made("The compiler's own", "Tiles by its cost model.", "own", own))
    result = tune(subject, target, OPTIONS, Plan("ttft", TOKENS, trials=TRIALS, jobs=2), TrialStore())
    found.append(made("Tuned", f"At most {TRIALS} trials a kernel on the simulator, then together.", "tuned", tuned_file(result)))
    return found


def made(title: str, why: str, name: str, file: ScheduleFile) -> Stage:
    """The run of a schedule, whose file is written."""
    print(f"{title} ...", file=sys.stderr)
    OUT.mkdir(exist_ok=True)
    (OUT / f"{name}.toml").write_text(to_toml(file))
    options = replace(OPTIONS, schedule=file.schedules)
    return Stage(title, why, f"{name}.toml", run(STUDENT, TARGET, prompt=TOKENS, options=options))


def page(found: list[Stage]) -> str:
    """The case study."""
    first, last = found[0].document, found[-1].document
    lines = [
        "# From a bad schedule to a good one",
        "",
        f"`{STUDENT}`, {TOKENS} tokens, int4 weights, int8 activations, on `{TARGET}`. Redraw: `make schedule-study`; try a step: "
        f"`firsttoken run {STUDENT} --target {TARGET} --prompt {TOKENS} --schedule reports/schedules/buffered.toml`.",
        "",
        f"{first.ttft_ms:.2f} ms become {last.ttft_ms:.2f} ms, {first.ttft_ms / last.ttft_ms:.2f} times as fast, with "
        f"{last.energy_mj / first.energy_mj:.2f} of the energy. Only tiles and buffers change: the products, the number formats and the "
        "machine are the same.",
        "",
        "| schedule | TTFT ms | energy mJ | DRAM MB | MAC utilisation % | instructions |",
        "|---|---|---|---|---|---|",
    ]
    for stage in found:
        run_ = stage.document
        moved = (run_.dram_read_bytes + run_.dram_write_bytes) / 1e6
        lines.append(
            f"| [{stage.title}]({stage.file}) | {run_.ttft_ms:.3f} | {run_.energy_mj:.2f} | {moved:.1f} | {run_.mac_util_pct:.1f} "
            f"| {run_.instructions:,} |"
        )
    for number, stage in enumerate(found):
        lines += ["", f"## {number + 1}. {stage.title}", "", stage.why, "", *ladder(stage.document)]
        if number:
            lines += ["", *waterfall(found[number - 1].document, stage.document)]
    return "\n".join([*lines, ""])


def ladder(document: RunDocument) -> list[str]:
    """The largest steps from the ideal to the actual time."""
    found = explain(document)
    total = sum(rung.fs for rung in found.rungs)
    rungs = sorted((r for r in found.rungs if r.fs >= LEAST * total), key=lambda rung: -rung.fs)[:SHOWN]
    said = "; ".join(f"{r.step.title} {r.fs / 1e12:.2f} ms ({100 * r.fs / total:.0f} %)" for r in rungs)
    return [f"Where its {total / 1e12:.2f} ms go: {said}. What binds: {found.binding}."]


def waterfall(before: RunDocument, after: RunDocument) -> list[str]:
    """What every step of the ladder contributed to the change."""
    found, problem = waterfalls(json.loads(before.to_json()), json.loads(after.to_json()))
    if problem:
        return [problem]
    one = found[0]
    rows = sorted((row for row in one.by_step if row.change_fs), key=lambda row: -abs(row.change_fs))[:SHOWN]
    said = "; ".join(f"{BY_NAME[row.name].title} {row.change_fs / 1e12:+.2f} ms" for row in rows)
    return [f"Against the one before: {one.change_fs / 1e12:+.2f} ms. {said}."]


def main() -> None:
    """Writes the page."""
    (OUT / "README.md").parent.mkdir(exist_ok=True)
    (OUT / "README.md").write_text(page(stages()))


if __name__ == "__main__":
    main()
