"""firsttoken.cost_tables: prompts and caches of several lengths in one table, and widths that are measured on lines."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from firsttoken import CostModel, Target
from firsttoken.cli import app
from firsttoken.cost_tables import cells
from firsttoken.cost_tables.accuracy import random_questions
from firsttoken.cost_tables.file import CostTableError
from firsttoken.cost_tables.lengths import QUESTION, Lengths
from firsttoken.cost_tables.space import Axis, CostSpace
from firsttoken.cost_tables.table import CostTable
from firsttoken.student import StudentConfig, find_student
from firsttoken_compiler.errors import OptionError

BASE = dataclasses.replace(
    find_student("smollm2-135m")[1], name="base", vocab=1024, head_dim=32, layers=2, hidden=128, heads=4, kv_heads=2,
    intermediate=256, max_positions=64,
)  # fmt: skip
SPACE = CostSpace.of(BASE, {"layers": "1:4:1", "intermediate": "256,384"})
MODEL = CostModel(Target.load("systolic-128"), prompt=8, decode=2)
PROMPTS = "8:24:8:2"


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CostTable]:
    """Prompts of 8, 16 and 24 tokens, of which the second is not measured, and tokens behind each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FIRSTTOKEN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield MODEL.table(SPACE, prompts=PROMPTS, jobs=1)


def student(**changes: object) -> StudentConfig:
    return dataclasses.replace(BASE, **{"layers": 3, "intermediate": 384, **changes})


# Lengths


def test_tokens_come_behind_each_prompt_unless_others_are_named() -> None:
    found = Lengths.of(MODEL, PROMPTS, None)
    assert (found.prompts.values, found.prompts.measured) == ((8, 16, 24), (8, 24))
    assert (found.contexts.values, found.contexts.measured) == ((9, 17, 25), (9, 25))
    assert found.graphs == ((8, 0), (24, 0), (1, 9), (1, 25))
    own = Lengths.of(MODEL, None, "32:64:16:2")
    assert (own.prompts.values, own.contexts.values) == ((8,), (32, 48, 64))
    assert Lengths.of(dataclasses.replace(MODEL, decode=0), None, None).contexts.values == ()
    assert Lengths.from_dict(json.loads(json.dumps(found.to_dict()))) == found


@pytest.mark.parametrize(
    ("prompts", "contexts", "message"),
    [
        ("16:24:8", None, r"prompts 16, 24 lack the model's own of 8: add it"),
        ("0:8:8", None, "prompt 0: must be at least 1"),
        (8, "a", "context=a: give a number"),
    ],
)
def test_mistakes_of_lengths(prompts: str, contexts: str | None, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Lengths.of(MODEL, prompts, contexts)


def test_between_measured_lengths_costs_lie_on_lines() -> None:
    found = Lengths.of(MODEL, PROMPTS, None)
    assert found.shares(1, later=False, squared=False).tolist() == [0.5, 0.5, 0, 0]
    assert found.shares(1, later=True, squared=True).tolist() == [0, 0, 0.5, 0.5]
    many = Lengths.of(dataclasses.replace(MODEL, decode=0), "8:96:8:5", None)
    assert many.prompts.measured == (8, 32, 56, 72, 96)
    line = np.array([7.0 + 3 * p for p in many.prompts.measured])
    square = np.array([7.0 + 3 * p + 5 * p * p for p in many.prompts.measured])
    for at, prompt in enumerate(many.prompts.values):
        assert many.shares(at, later=False, squared=False) @ line == pytest.approx(7 + 3 * prompt)
        assert many.shares(at, later=False, squared=True) @ square == pytest.approx(7 + 3 * prompt + 5 * prompt**2)
        assert np.count_nonzero(many.shares(at, later=False, squared=False)) <= 2


# One table for several prompts


def test_a_measured_length_costs_what_a_table_of_its_own_says(table: CostTable) -> None:
    for prompt, decode in ((8, 2), (24, 2)):
        alone = dataclasses.replace(MODEL, prompt=prompt, decode=decode).table(SPACE, jobs=1)
        one, own = table.estimate(student(), prompt=prompt, outside="raise"), alone.estimate(student())
        for name in ("ttft_ms", "energy_mj", "dram_bytes", "macs", "tpot_ms", "token_energy_mj"):
            assert getattr(one, name) == pytest.approx(getattr(own, name), rel=1e-12)
        assert [x.ms for x in one.by_layer] == pytest.approx([x.ms for x in own.by_layer], rel=1e-12)
    assert table.estimate(student()) == table.estimate(student(), prompt=8, context=9)


def test_every_length_is_close_to_exact(table: CostTable) -> None:
    asked = [(student(), prompt, context) for prompt in (8, 16, 24) for context in (9, 17, 25)]
    for (each, prompt, context), exact in zip(asked, table.exact_many(asked, jobs=1), strict=True):
        found = table.estimate(each, prompt=prompt, context=context, outside="raise")
        values = (found.ttft_ms, found.energy_mj, found.dram_bytes, found.macs, found.tpot_ms, found.token_energy_mj)
        assert values[:3] == pytest.approx(exact[:3], rel=0.03)
        assert values[4:] == pytest.approx(exact[4:], rel=0.03)
        assert sum(table.by_operator(each, prompt=prompt).values()) == pytest.approx(found.ttft_ms, rel=1e-12)


def test_errors_are_those_of_random_lengths(table: CostTable) -> None:
    asked = random_questions(table, 4, seed=2)
    assert asked == random_questions(table, 4, seed=2)
    assert len({(prompt, context) for _, prompt, context in asked}) > 1
    checked = table.checked(4, seed=2, jobs=1)
    assert [entry.cost for entry in checked.accuracy] == ["ttft_ms", "energy_mj", "tpot_ms", "token_energy_mj"]
    for entry in checked.accuracy:
        assert entry.worst_pct <= 8.0
        assert ", prompt " in entry.worst_student
        assert ", context " in entry.worst_student


# Outside


def test_what_is_beyond_the_lengths_is_simulated(table: CostTable, cache: Path) -> None:
    for prompt, context, outside in ((12, 13, ("prompt", "context")), (16, 9, ()), (24, 12, ("context",))):
        found = table.estimate(student(), prompt=prompt, context=context)
        assert (found.source, found.outside) == ("exact" if outside else "table", outside)
        if outside:
            later = dataclasses.replace(MODEL, prompt=context, decode=1).exact(student())
            first = dataclasses.replace(MODEL, prompt=prompt, decode=0).exact(student())
            assert (found.ttft_ms, found.energy_mj) == (first.ttft_ms, first.energy_mj)
            assert (found.tpot_ms, found.token_energy_mj) == (later.tpot_ms, later.token_energy_mj)
            assert np.isnan(table.estimate(student(), prompt=prompt, context=context, outside="nan").ttft_ms)
    with pytest.raises(OptionError, match=r"does not cover its prompt \(8, 16, 24|does not cover its prompt \(8 to 24"):
        table.estimate(student(), prompt=12, outside="raise")
    short = student(max_positions=24)
    assert table.estimate(short, prompt=16, context=17, outside="nan").outside == ()
    assert table.estimate(short, prompt=24, context=25, outside="nan").outside == ("max_positions",)


def test_many_have_a_length_each(table: CostTable, cache: Path) -> None:
    asked = random_questions(table, 20, seed=5)
    columns: dict[str, list[int]] = {
        "prompt": [p for _, p, _ in asked], "context": [c for _, _, c in asked], "layers": [2] * len(asked),
        "intermediate": [each.intermediate for each, *_ in asked],
    }  # fmt: skip
    found = table.estimate_many(columns, outside="raise")
    assert found.tpot_ms is not None
    for at, (each, prompt, context) in enumerate(asked):
        alike = dataclasses.replace(each, layers=2, per_layer=())
        one = table.estimate(alike, prompt=prompt, context=context, outside="raise")
        assert (found.ttft_ms[at], found.tpot_ms[at]) == pytest.approx((one.ttft_ms, one.tpot_ms), rel=1e-12)
    mixed = {"prompt": [8, 12, 24], "context": [9, 9, 13], "layers": 1}
    flags = table.estimate_many(mixed).outside.tolist()
    assert flags == [0, 1 << QUESTION.index("prompt"), 1 << QUESTION.index("context")]
    exact = table.estimate_many(mixed, outside="exact", jobs=1)
    assert exact.exact.tolist() == [False, True, True]
    alone = dataclasses.replace(MODEL, prompt=12, decode=0).exact(dataclasses.replace(BASE, layers=1))
    assert exact.ttft_ms[1] == alone.ttft_ms
    slopes = table.gradient({"prompt": [8, 24, 12], "intermediate": 300.0, "context": 9})["intermediate"]
    for prompt, slope in zip((8, 24), slopes.tolist(), strict=False):
        ends = [table.estimate(student(layers=2, intermediate=x), prompt=prompt, context=9).ttft_ms for x in (256, 384)]
        assert slope == pytest.approx((ends[1] - ends[0]) / 128, rel=1e-9)
    assert np.isnan(slopes[2])
    with pytest.raises(OptionError, match="prompts and contexts are whole numbers"):
        table.estimate_many({"prompt": [8.5]})


def test_a_file_keeps_its_lengths(table: CostTable, tmp_path: Path) -> None:
    table.save(tmp_path / "t.npz")
    read = CostTable.load(tmp_path / "t.npz", MODEL)
    assert read.lengths == table.lengths
    assert read.estimate(student(), prompt=16) == table.estimate(student(), prompt=16)
    other = CostTable.load(tmp_path / "t.npz", dataclasses.replace(MODEL, prompt=16))
    assert other.estimate(student()) == table.estimate(student(), prompt=16)
    with pytest.raises(CostTableError, match="another target, prompt"):
        CostTable.load(tmp_path / "t.npz", dataclasses.replace(MODEL, prompt=12))


# Widths on lines


def stairs(values: tuple[int, ...]) -> np.ndarray:
    """Costs that rise by steps, and one width of bad tiles."""
    return np.array([-(-value // 192) + 3.0 * (value == 640) for value in values])


@pytest.mark.parametrize("lines", [2, 3])
def test_costs_of_tiles_are_known_at_every_width_of_the_space(lines: int) -> None:
    hidden, values = (128, 256, 512, 768), tuple(range(256, 1025, 64))
    axis = Axis(values, (256, 640 + 64, 1024), values)
    true = np.outer(np.array(hidden) / 128, stairs(values)) + np.outer(np.arange(4.0), np.ones(len(values)))
    rows = [0, 3] if lines == 2 else [0, 1, 3]
    block = true.copy()
    for row in range(4):
        if row not in rows:
            block[row, [at for at, value in enumerate(values) if value not in axis.measured]] = np.nan
    found = cells._between(block[None, :, :, None], 1, axis, hidden, rows)[0, :, :, 0]
    np.testing.assert_allclose(found, true, rtol=1e-12)
    np.testing.assert_array_equal(found[rows], true[rows])


def test_lines_are_measured_at_some_widths_of_the_residual() -> None:
    vary = {"hidden": "128:512:128", "intermediate": "256:1024:64:3", "heads": "4:12:2", "kv_heads": 2}
    space = CostSpace.of(BASE, vary)
    assert space["hidden"].measured == (128, 256, 384, 512)
    assert space.line_hidden == (128, 512)
    assert space["intermediate"].measured == (256, 640, 1024)
    assert space["intermediate"].line == tuple(range(256, 1025, 64))
    plain = CostSpace.of(BASE, vary, lines=0)
    assert plain.line_hidden == ()
    assert plain["intermediate"].line == plain["intermediate"].measured
    assert len(plain.probes) < len(space.probes)
    long = CostSpace.of(BASE, {"intermediate": "256:8192:8:5"})
    assert len(long["intermediate"].line) <= 64 + 5
    with pytest.raises(OptionError, match="lines is -1, must be at least 0"):
        CostSpace.of(BASE, vary, lines=-1)


# The verb


def test_the_verb_takes_lengths(tmp_path: Path) -> None:
    dims = ("layers=1:2:1", "hidden=64", "heads=2", "kv_heads=1", "head_dim=32", "vocab=256", "intermediate=64,128")
    run = ["costs", "smollm2-135m", "--target", "systolic-128", "--prompt", "2:6:2:2", "--context", "8,16",
           "--jobs", "1", "--check", "1", "--lines", "1", *(f"--vary={what}" for what in dims)]  # fmt: skip
    done = CliRunner().invoke(app, [*run, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert found["lengths"] == {"prompt": [[2, 4, 6], [2, 6]], "context": [[8, 16], [8, 16]]}
    assert len(found["accuracy"]) == 4
    screen = CliRunner().invoke(app, run).output
    assert "prompt" in screen
    assert "context" in screen
