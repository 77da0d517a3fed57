"""What keeping normalised rows costs and gains: bytes, cycles, energy and error, for every built-in student and target.

    python reports/norm_cache.py [PAGE ...]

Writes pages into reports/norm-cache, and the list of them.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

import numpy as np

from firsttoken import RunOptions, Target, api
from firsttoken.divergence import score
from firsttoken.execution import load
from firsttoken.fidelity import Reference, equipped
from firsttoken.generation import token_feeds
from firsttoken.image_network import ImageNetworkConfig
from firsttoken.prose import Window, windows
from firsttoken.student import StudentConfig, find_student, providers
from firsttoken.subject import Built, subject_of
from firsttoken_compiler.errors import AllocationError
from firsttoken_models.weights import write_random_weights
from firsttoken_simulator.report.energy_table import low_high

STUDENTS: Final = ("smollm2-135m", "deepseek-r1-distill-qwen-1.5b")
TARGETS: Final = ("snapdragon-x-elite", "systolic-128")
PROMPT: Final = 64
CACHES: Final = ("off", "fp16", "int16", "int8", "statistics", "auto")
PLACES: Final = ("scratchpad", "dram", "auto")
SUMMARY: Final = (("off", "auto"), ("auto", "auto"))
LITTLE: Final = (("systolic-128", 256, 64),)
"""Presets with a scratchpad of so many KiB, where not everything fits, and prompts."""
PRECISIONS: Final = (("int4", "int8"), ("fp16", "fp16"))
STACK_LAYERS: Final = 2
STACK_VOCAB: Final = 4096
"""What is left of the student without weights where its numbers are executed."""
OUT: Final = Path(__file__).parent / "norm-cache"
WORKERS: Final = 2
NORMS: Final = re.compile(r" for \d+ products?|in each of \d+ products?")
ROWS: Final = re.compile(r"in (scratchpad|DRAM) for .*?, ([\d,]+) bytes")
INTRODUCTION: Final = """# What a cache of normalised rows costs and gains

Each norm is read by several products (q, k, v; gate, up). What is kept for them, and where, is `--norm-cache` and
`--norm-cache-place`: rows in a type, only the numbers of each row (`statistics`), nothing (`off`), or whatever is
estimated to be cheapest (`auto`). Redraw: `make norm-cache`, or `python reports/norm_cache.py PAGE`.

A page for each student and target has bytes, cycles and energy; presets with less scratchpad, where rows compete with
the residual stream and with tiles of weights, are among them. Weights int4 in groups of 128, activations int8. A place
of `scratchpad` is the program of `auto` where that keeps all rows there. The cycles are those of the whole prompt on the
timing machine.
Energies are typical, with the band that their sources leave ([energy](../../docs/energy.md)); two rows differ by far less
than their bands, as what is uncertain is the same in both.
`against off`: time of `off` over the row's, above 1 where keeping pays. Last column: how many norms keep rows in the
scratchpad and how many in DRAM, and the bytes of the largest one with its scales."""
NUMBERS: Final = """Logits of all tokens on the functional machine. KL is the divergence of the next token's distribution, mean over
the tokens, in nats. As long as the type of the rows is the same, it changes no bit where they lie, nor whether they are
kept, made from statistics or computed again: `off`, `statistics` and rows in the type of the activations give the same
logits. The type of the rows does change them. A cache of int16 makes the activations of its consumers int16. The values
of rows in fp16 are rounded twice before int8 activations, which moves some of them by a step."""


@dataclass(frozen=True)
class Measured:
    """One choice on one target."""

    cache: str
    place: str
    cycles: int = 0
    energy_mj: float = 0.0
    band_mj: tuple[float, float] = (0.0, 0.0)
    dram: int = 0
    scratchpad: int = 0
    norms: str = ""
    refused: str = ""
    kept: bool = False
    """Whether every norm keeps rows in the scratchpad."""


def choices() -> Iterator[tuple[str, str]]:
    """Cache and place; what keeps no rows has no place."""
    for cache in CACHES:
        for place in ("auto",) if cache in ("off", "statistics") else PLACES:
            yield cache, place


def measured(student: str, target: Target, prompt: int, choice: tuple[str, str]) -> Measured:
    """Compiles and simulates."""
    cache, place = choice
    options = RunOptions(weights="int4", acts="int8", norm_cache=cache, norm_cache_place=place)
    try:
        document, _, _ = api.measure(subject_of(student, None), target, prompt, 0, options)
    except AllocationError as error:
        return Measured(cache, place, refused=str(error))
    found = [match for line in document.norm_cache_decisions if (match := ROWS.search(line))]
    places = [match[1] for match in found]
    widest = max((int(match[2].replace(",", "")) for match in found), default=0)
    norms = f"{places.count('scratchpad')} + {places.count('DRAM')}, {widest:,} B" if found else "none"
    moved = document.dram_read_bytes + document.dram_write_bytes
    kept = len(places) == len(NORMS.findall("\n".join(document.norm_cache_decisions))) and "DRAM" not in places
    return Measured(
        cache, place, document.ttft_cycles, document.energy_mj, low_high(document), moved, document.sram_peak_bytes, norms, kept=kept
    )


def table(student: str, target: Target, prompt: int) -> list[str]:
    """One student on one target, and the sentence that says where keeping pays."""
    chosen = [choice for choice in choices() if choice[1] != "scratchpad"]
    with ProcessPoolExecutor(WORKERS, mp_context=get_context("spawn")) as pool:
        found = dict(zip(chosen, pool.map(partial(measured, student, target, prompt), chosen), strict=True))
    rows = []
    for cache, place in choices():
        row = found.get((cache, place))
        if row is None:  # rows that lie in the scratchpad by themselves lie there when asked to: the same program
            free = found[cache, "auto"]
            row = replace(free, place=place) if free.kept else measured(student, target, prompt, (cache, place))
        rows.append(row)
    off = rows[0]
    lines = [
        f"# {student}, {target.name}, {prompt} tokens", "",
        "| norm cache | place | cycles | against off | energy mJ | low to high | DRAM MB | scratchpad MB | norms in scratchpad + DRAM |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        if row.refused:
            lines.append(f"| {row.cache} | {row.place} | not possible: {row.refused} | | | | | | |")
            continue
        lines.append(
            f"| {row.cache} | {row.place} | {row.cycles:,} | {off.cycles / row.cycles:.3f}x | {row.energy_mj:.2f} | "
            f"{row.band_mj[0]:.2f} to {row.band_mj[1]:.2f} | {row.dram / 1e6:.2f} | {row.scratchpad / 1e6:.2f} | {row.norms} |"
        )
    return [*lines, "", verdict(rows), ""]


def everyone() -> list[str]:
    """Every built-in student that reads tokens on both targets: the cheapest way beside `off`."""
    known = [(provider, name) for provider in providers() for name in provider.names()]
    names = [name for provider, name in known if not isinstance(provider.config(name), ImageNetworkConfig)]
    cases = [(name, Target.load(target), choice) for name in names for target in TARGETS for choice in SUMMARY]
    with ProcessPoolExecutor(WORKERS, mp_context=get_context("spawn")) as pool:
        rows = list(pool.map(_measured_case, cases))
    lines = [
        f"# Every built-in student, {PROMPT} tokens: `auto` against `off`", "",
        "| student | target | cycles of off | auto against off | energy mJ, off / auto | DRAM MB, off / auto "
        "| scratchpad MB, off / auto | norms in scratchpad + DRAM |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for (name, target, _), off, auto in zip(cases[::2], rows[::2], rows[1::2], strict=True):
        both = (
            f"{first:.2f} / {second:.2f}"
            for first, second in (
                (off.energy_mj, auto.energy_mj), (off.dram / 1e6, auto.dram / 1e6),
                (off.scratchpad / 1e6, auto.scratchpad / 1e6),
            )
        )  # fmt: skip
        lines.append(
            f"| {name} | {target.name} | {off.cycles:,} | {off.cycles / auto.cycles:.3f}x | {' | '.join(both)} "
            f"| {auto.norms} |"
        )
    losing = [name for (name, _, _), off, auto in zip(cases[::2], rows[::2], rows[1::2], strict=True)
              if auto.cycles > off.cycles]  # fmt: skip
    return [*lines, "", f"It does not pay for: {', '.join(losing)}." if losing else "It pays for every one.", ""]


def _measured_case(case: tuple[str, Target, tuple[str, str]]) -> Measured:
    """`measured` of one case, for a pool."""
    student, target, choice = case
    return measured(student, target, PROMPT, choice)


def verdict(rows: list[Measured]) -> str:
    """What pays, what does not, and how far `auto` is from the best of the ways with rows of the activations' type."""
    ran = [row for row in rows if not row.refused]
    off, auto = ran[0], next(row for row in ran if (row.cache, row.place) == ("auto", "auto"))
    same = [row for row in ran if row.cache in ("off", "int8", "statistics")]
    best = min(same, key=lambda row: row.cycles)
    worse = [f"{row.cache} in {row.place}" for row in ran if row.cycles > off.cycles and row is not off]
    text = (
        f"Cheapest of the ways that keep the numbers of `off`: {best.cache}, place {best.place}; `auto` takes "
        f"{100 * (auto.cycles / best.cycles - 1):+.1f} % of its cycles."
    )
    return text + (f" It does not pay against `off`: {', '.join(worse)}." if worse else " All pay against `off`.")


def logits(student: Built, options: RunOptions, target: Target, chosen: list[Window]) -> np.ndarray:
    """Logits of all tokens of all windows, executed."""
    tokens = len(chosen[0].ids)
    program = api.compile_subject(student, target, tokens, 0, options)
    loaded = load(program, api.simulate(program, target), student.open(tokens, 0), target)
    return np.concatenate([loaded.run(token_feeds(window.ids))["logits"][0] for window in chosen])


def errors(student: Built, chosen: list[Window], target: Target) -> list[str]:
    """Every type of cache beside `off`, and beside float32 where the weights are real."""
    reference = Reference(student, len(chosen[0].ids))
    exact = np.concatenate([reference.logits(window) for window in chosen])
    following = tuple(token for window in chosen for token in window.following)
    lines = [
        "| weights / activations | norm cache | cosine with off, least | largest difference from off | KL from off "
        "| KL from float32 |",
        "|---|---|---|---|---|---|",
    ]
    for weights, acts in PRECISIONS:
        off = np.zeros(0)
        for cache in CACHES[:5]:
            if weights == "fp16" and cache in ("int16", "int8"):
                continue
            options = RunOptions(weights=weights, acts=acts, norm_cache=cache)
            found = logits(student, options, target, chosen).astype(np.float64)
            off = found if cache == "off" else off
            same = (found * off).sum(axis=1) / np.sqrt((found**2).sum(axis=1) * (off**2).sum(axis=1))
            lines.append(
                f"| {weights} / {acts} | {cache} | {same.min():.7f} | {np.abs(found - off).max():.3g} of "
                f"{np.abs(off).max():.3g} | {score(found, off, following).kl.mean():.3g} | "
                f"{score(found, exact, following).kl.mean():.3g} |"
            )
    return lines


def real_numbers() -> list[str]:
    """Real weights on text."""
    target = Target.load(TARGETS[0])
    real, tokenizer = equipped(subject_of(STUDENTS[0], None))
    title = f"# Error: {STUDENTS[0]}, real weights, {PROMPT} tokens of the text that `firsttoken quality` uses"
    return [title, "", NUMBERS, "", *errors(real, windows(tokenizer, 1, PROMPT), target), ""]


def stack_numbers() -> list[str]:
    """The student without weights as two layers with random ones."""
    provider, config = find_student(STUDENTS[1])
    small = replace(config, name=f"{config.name}-stack", layers=STACK_LAYERS, vocab=STACK_VOCAB)
    lines = [
        f"# Error: {small.layers} layers of {STUDENTS[1]}, random weights",
        "",
        f"This student has no weights here. Executed: {small.layers} of its layers at full width, {small.vocab:,} tokens of "
        f"vocabulary, weights drawn at random, {PROMPT} random tokens. Such logits are close to one another, so that KL "
        "says little; cosine and difference compare the types.",
        "",
    ]
    with tempfile.TemporaryDirectory() as folder:
        store = write_random_weights(small, Path(folder))
        drawn = Built(provider, small, weights=store, all_logits=True)
        lines += errors(drawn, [random_window(small)], Target.load(TARGETS[0]))
    return [*lines, ""]


def random_window(config: StudentConfig) -> Window:
    """Tokens drawn at random."""
    ids = np.random.default_rng(0).integers(0, config.vocab, PROMPT + 1).tolist()
    return Window(tuple(ids[:-1]), tuple(ids[1:]))


def parts() -> dict[str, Callable[[], list[str]]]:
    """The pages by name, and what makes them."""
    made: dict[str, Callable[[], list[str]]] = {}
    for student in STUDENTS:
        for name in TARGETS:
            made[f"{student}-{name}"] = partial(table, student, Target.load(name), PROMPT)
    for name, kib, prompt in LITTLE:
        whole = Target.load(name)
        little: Any = replace(whole.scratchpad, bytes=kib << 10)
        target = replace(whole, name=f"{name} with {kib} KiB", scratchpad=little)
        made[f"{STUDENTS[0]}-{name}-{kib}-kib"] = partial(table, STUDENTS[0], target, prompt)
    return {**made, "every-student": everyone, "error": real_numbers, "error-of-a-stack": stack_numbers}


def main() -> None:
    """Makes the pages that are named, or all, and the list of those that are there."""
    known = parts()
    OUT.mkdir(exist_ok=True)
    for name in sys.argv[1:] or known:
        if name not in known:
            raise SystemExit(f"no page {name!r}; pages are {', '.join(known)}")
        lines = known[name]()
        (OUT / f"{name}.md").write_text("\n".join(lines), encoding="utf-8")
        print("\n".join(lines), flush=True)
    write_index(list(known))


def write_index(names: list[str]) -> None:
    """The list of the pages that are there."""
    there = [name for name in names if (OUT / f"{name}.md").is_file()]
    titles = {name: (OUT / f"{name}.md").read_text(encoding="utf-8").partition("\n")[0].strip("# ") for name in there}
    index = [f"- [{titles[name]}]({name}.md)" for name in there]
    (OUT / "README.md").write_text("\n".join([INTRODUCTION, "", *index, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
