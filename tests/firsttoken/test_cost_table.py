"""firsttoken.cost_tables: the space, its probes, the lookup beside exact costs, the file."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import workers
from students import LLAMA, QWEN2
from typer.testing import CliRunner

from firsttoken import CostModel, RunOptions, Target
from firsttoken.cli import app
from firsttoken.cost_tables import lookup, probes
from firsttoken.cost_tables.accuracy import random_students
from firsttoken.cost_tables.cells import cells_of
from firsttoken.cost_tables.file import CostTableError, packed, unpacked
from firsttoken.cost_tables.lengths import Lengths
from firsttoken.cost_tables.space import DIMS, CostSpace
from firsttoken.cost_tables.table import CostTable
from firsttoken.student import LayerConfig, StudentConfig, find_student
from firsttoken_compiler.errors import OptionError

BASE = dataclasses.replace(find_student("smollm2-135m")[1], name="base", vocab=1024, head_dim=32, layers=2)
VARY = {
    "layers": "1:6:1", "hidden": "128:384:128:2", "heads": "4,6,8", "kv_heads": "2,4", "intermediate": "256:768:128:3",
    "weight_bits": "4,8",
}  # fmt: skip
SPACE = CostSpace.of(BASE, VARY)
MODEL = CostModel(Target.load("systolic-128"), prompt=16)
SMALL = CostSpace.of(
    BASE, {"layers": "1:4:1", "hidden": "192,256", "heads": 4, "kv_heads": 2, "intermediate": "256,512"}
)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[CostTable, list[probes.Row]]]:
    """A table, and the rows of its first probe."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FIRSTTOKEN_CACHE", str(tmp_path_factory.mktemp("cache")))
        table = MODEL.table(SPACE, jobs=1)
        yield table, probes.measure_all(MODEL, table.space.probes[:1], [(16, 0)], jobs=1)[0][0]


@pytest.fixture
def table(measured: tuple[CostTable, list[probes.Row]]) -> CostTable:
    return measured[0]


def student(**changes: object) -> StudentConfig:
    return dataclasses.replace(BASE, **{"hidden": 256, "heads": 4, "kv_heads": 2, "intermediate": 512, **changes})


# Space


def test_values() -> None:
    space = CostSpace.of(BASE, {"hidden": "1024:2048:128", "intermediate": [700, 300, 700], "vocab": 512}, points=4)
    assert space["hidden"].values == tuple(range(1024, 2049, 128))
    assert space["hidden"].measured == (1024, 1408, 1664, 2048)
    assert space["intermediate"].values == space["intermediate"].measured == (300, 700)
    assert (space["vocab"].values, space["heads"].values) == ((512,), (9,))
    assert (space["hidden"].step, space["intermediate"].step, space["vocab"].step) == (128, 400, 0)
    assert str(space["hidden"]) == "1024 to 2048 in steps of 128"
    assert [name for name, _ in space.axes] == list(DIMS)
    assert CostSpace.of(BASE, {"hidden": "64:128:8:3"})["hidden"].measured == (64, 96, 128)


def test_heads_go_with_key_heads() -> None:
    space = CostSpace.of(BASE, {"heads": "4:16:1", "kv_heads": "3,4"}, points=3)
    assert space.heads(3).values == (6, 9, 12, 15)
    assert space.heads(4).measured == (4, 12, 16)


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        ({"depth": 3}, "'depth' is no dimension of a student; those that vary are layers, hidden"),
        ({"hidden": "64:32:8"}, "hidden=64:32:8: give a number"),
        ({"hidden": "a"}, "hidden=a: give a number"),
        ({"hidden": "64:128:8:1"}, "at least 2 points are measured"),
        ({"hidden": "64:128:8:3:3"}, "hidden=64:128:8:3:3: give a number"),
        ({"hidden": []}, "give a number"),
        ({"hidden": "0,64"}, "hidden 0: must be at least 1"),
        ({"head_dim": "63,64"}, "head_dim 63: must be even"),
        ({"weight_bits": "4,5"}, "weight_bits 5: must be one of"),
        ({"heads": "4:8:2", "kv_heads": "5"}, "none is a multiple of 5 kv_heads"),
    ],
)
def test_mistakes_of_a_space(vary: dict[str, str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        CostSpace.of(BASE, vary)


def test_a_base_of_uneven_layers(uneven: StudentConfig) -> None:
    with pytest.raises(OptionError, match="layers of different widths"):
        CostSpace.of(uneven, {})
    with pytest.raises(OptionError, match="points is 1, must be at least 2"):
        CostSpace.of(BASE, {}, points=1)


def test_the_base_is_one_of_the_space() -> None:
    space = CostSpace.of(BASE, {"hidden": "64,128", "heads": "4:8:1", "kv_heads": "2,4", "layers": "1:9:1"})
    assert (space.base.hidden, space.base.heads, space.base.kv_heads, space.base.layers) == (64, 4, 2, 2)
    assert CostSpace.of(BASE, {"kv_heads": "5", "heads": "9,10"}).base.heads == 10


def test_a_space_in_words() -> None:
    base, _ = find_student("phi-3.5-mini")[1], None
    for space in (SPACE, CostSpace.of(base, {"hidden": "512,1024"}), CostSpace.of(find_student("llama-3.2-1b")[1], {})):
        assert CostSpace.from_dict(json.loads(json.dumps(space.to_dict()))) == space


def test_probes_hold_every_measured_place() -> None:
    space = CostSpace.of(
        BASE, {**VARY, "hidden": "128:384:128:3", "head_dim": "32,64", "vocab": "512:2048:512"}, points=3
    )
    assert space.line_hidden == (128, 384)
    layers = {(p.hidden, p.head_dim, layer) for p in space.probes for layer in p.per_layer}
    for hidden in space["hidden"].measured:
        for bits in (4, 8):
            for head_dim in (32, 64):
                found = {
                    (x.heads, x.kv_heads) for h, d, x in layers if (h, d, x.weight_bits) == (hidden, head_dim, bits)
                }
                assert found == {(heads, kv) for kv in (2, 4) for heads in space.heads(kv).measured}
            widths = {256, 512, 768} if hidden == 256 else set(range(256, 769, 128))
            assert {x.intermediate for h, _, x in layers if (h, x.weight_bits) == (hidden, bits)} == widths
        assert {p.vocab for p in space.probes if p.hidden == hidden} == set(space["vocab"].measured)
    assert all(p.per_layer[0] == p.per_layer[1] and p.per_layer[-1] == p.per_layer[-2] for p in space.probes)


# Costs beside exact ones


def test_a_probe_costs_what_it_was_measured_at(measured: tuple[CostTable, list[probes.Row]]) -> None:
    table, rows = measured
    probe = table.space.probes[0]
    assert probe.layers == 10
    lines = table.estimate(dataclasses.replace(probe, layers=6, per_layer=probe.per_layer[2:-2])).by_layer
    for number, line in enumerate(lines[1:-1], start=2):
        own = [metrics for op, metrics in rows if op.startswith(f"layers.{number}.")]
        # A place that was measured twice has the mean of both.
        assert line.ms == pytest.approx(sum(metrics[0] for metrics in own), rel=0.01)
        assert line.macs == sum(metrics[3] for metrics in own)
    operators = {name for name in table.operators if not name.startswith(("start.", "head."))}
    first = {op.split(".", 2)[2] for op, _ in rows if op.startswith("layers.1.")}
    assert first == {name.split(".", 1)[1] for name in operators}


def test_a_place_that_was_measured_once_has_its_numbers() -> None:
    one, ten = (1.0, 2.0, 3.0, 4.0), (10.0, 20.0, 30.0, 40.0)
    space = CostSpace.of(BASE, {"layers": "1:4:1", "intermediate": "256,512"}).resolved(4)
    rows: list[probes.Row] = [("dispatch", (0.5, 0.0, 0.0, 0.0)), ("embed_tokens", (7.0, 0.0, 0.0, 0.0))]
    for layer in range(4):
        rows.append((f"layers.{layer}.self_attn.q_proj", one))
        rows.append((f"layers.{layer}.post_attention_layernorm", ten))
        rows.append((f"layers.{layer}.mlp.up_proj", tuple(layer * value for value in ten)))
    rows += [("layers.0.self_attn.q_rotary", (0.25, 0.0, 0.0, 0.0)), ("lm_head", (100.0, 0.0, 0.0, 1.0))]
    table = CostTable(MODEL, space, Lengths.of(MODEL, None, None), *cells_of(space, [[rows]]))
    assert table.operators == (
        "start.dispatch", "start.embed_tokens", "head.lm_head", "start.self_attn.q_rotary", "start.first layer",
        "head.last layer", "attention.self_attn.q_proj", "feed_forward.post_attention_layernorm",
        "feed_forward.mlp.up_proj",
    )  # fmt: skip
    # Layers 1 and 2 are measured, of 256 and 512; layer 0 costs 10 less than its twin, layer 3 costs 10 more.
    found = table.estimate(dataclasses.replace(BASE, layers=3, intermediate=512))
    assert [line.ms for line in found.by_layer] == [0.5 + 7 + 0.25 - 10, 31, 31, 31, 110]
    between = table.estimate_many({"layers": [3], "intermediate": [320]}, relaxed=True)
    assert between.ttft_ms[0] == pytest.approx(-2.25 + 3 * (1 + 10 + 10 + 10 * 64 / 256) + 110)


def test_close_to_exact(table: CostTable) -> None:
    checked = table.checked(6, seed=1, jobs=1)
    costs = {entry.cost: entry for entry in checked.accuracy}
    assert set(costs) == {"ttft_ms", "energy_mj"}
    for entry in costs.values():
        assert entry.students == 6
        assert entry.median_pct <= 2.0
        assert entry.median_pct <= entry.p95_pct <= entry.worst_pct <= 10.0
        assert "intermediate" in entry.worst_student


def test_macs_are_exact_and_bytes_close(table: CostTable) -> None:
    for each in random_students(table.space, 2, seed=1):
        quick, exact = table.estimate(each, outside="raise"), MODEL.exact(each)
        assert quick.macs == pytest.approx(exact.macs, rel=1e-12)
        assert quick.dram_bytes == pytest.approx(exact.dram_read_bytes + exact.dram_write_bytes, rel=0.02)


def test_bits_of_the_options_are_those_of_the_layers(table: CostTable) -> None:
    assert table.space["weight_bits"].values == (4, 8)
    named = (LayerConfig(4, 2, 512, 4),) * 2
    quick = table.estimate(student(per_layer=named))
    assert table.estimate(student()).ttft_ms == pytest.approx(quick.ttft_ms, rel=1e-12)
    assert MODEL.exact(student()) == MODEL.exact(student(per_layer=named))


def test_layers_sum_up(table: CostTable) -> None:
    lines = (LayerConfig(4, 2, 256, 8), LayerConfig(8, 4, 768, 4), LayerConfig(6, 2, 384))
    for each in (student(layers=5), student(layers=3, per_layer=lines)):
        found = table.estimate(each)
        assert [layer.name for layer in found.by_layer] == [
            "start",
            *(f"layers.{i}" for i in range(each.layers)),
            "head",
        ]
        assert sum(layer.ms for layer in found.by_layer) == pytest.approx(found.ttft_ms, rel=1e-12)
        assert sum(layer.energy_mj for layer in found.by_layer) == pytest.approx(found.energy_mj, rel=1e-12)
        operators = table.by_operator(each)
        assert sum(operators.values()) == pytest.approx(found.ttft_ms, rel=1e-12)
        assert operators["feed_forward.mlp.up_proj"] > 0
        assert pickle.loads(pickle.dumps(found)) == found
        assert pickle.loads(pickle.dumps(found)).by_layer == found.by_layer


# Outside


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden": 512}, ("hidden",)),
        ({"hidden": 200}, ("hidden",)),
        ({"layers": 7}, ("layers",)),
        ({"intermediate": 128, "vocab": 2048}, ("vocab", "intermediate")),
        ({"kv_heads": 1}, ("kv_heads",)),
        ({"head_dim": 64}, ("head_dim",)),
        ({"heads": 10}, ("heads",)),
        ({"layers": 1, "per_layer": (LayerConfig(4, 2, 512, 16),)}, ("weight_bits",)),
        ({"tie_embeddings": False}, ("tie_embeddings",)),
        ({"max_positions": 15}, ("max_positions",)),
    ],
)
def test_what_is_not_covered(table: CostTable, changes: dict[str, object], named: tuple[str, ...]) -> None:
    found = table.estimate(student(**changes), outside="nan")
    assert found.outside == named
    assert np.isnan(found.ttft_ms)
    with pytest.raises(OptionError, match=rf"does not cover its {named[0]} \("):
        table.estimate(student(**changes), outside="raise")


def test_exact_where_the_table_ends(table: CostTable, cache: Path) -> None:
    beyond = student(hidden=512, layers=1)
    found = table.estimate(beyond)
    exact = MODEL.exact(beyond)
    assert (found.source, found.outside) == ("exact", ("hidden",))
    assert (found.ttft_ms, found.tpot_ms, found.by_layer) == (exact.ttft_ms, None, exact.by_layer)
    many = table.estimate_many({"hidden": [256, 512], "layers": 1, "heads": 4, "kv_heads": 2, "intermediate": 512},
                               outside="exact", jobs=1)  # fmt: skip
    assert many.exact.tolist() == [False, True]
    assert many.outside.tolist() == [0, 1 << DIMS.index("hidden")]
    assert many.ttft_ms[1] == exact.ttft_ms
    assert many.energy_mj[1] == exact.energy_mj


# Many at once


def test_many_are_one_by_one(table: CostTable) -> None:
    students = random_students(table.space, 30, seed=3)
    width = max(each.layers for each in students)
    lines = np.array(
        [
            [(x.heads, x.kv_heads, x.intermediate, x.weight_bits or 0) for x in map(each.layer, range(each.layers))]
            + [(0, 0, 0, 0)] * (width - each.layers)
            for each in students
        ]
    )
    columns = {name: [getattr(each, name) for each in students] for name in ("layers", "hidden", "head_dim", "vocab")}
    columns |= {name: lines[:, :, at] for at, name in enumerate(("heads", "kv_heads", "intermediate", "weight_bits"))}
    found = table.estimate_many(columns, outside="raise")
    one = [table.estimate(each, outside="raise") for each in students]
    for name in ("ttft_ms", "energy_mj", "dram_bytes", "macs"):
        assert getattr(found, name).tolist() == pytest.approx([getattr(each, name) for each in one], rel=1e-12)
    assert not found.outside.any()
    assert not found.exact.any()


def test_rows_outside_are_flagged(table: CostTable) -> None:
    columns = {"hidden": [256, 256, 384, 999], "intermediate": [256, 300, 768, 300], "heads": 4, "kv_heads": 2}
    found = table.estimate_many(columns)
    hidden, wide = 1 << DIMS.index("hidden"), 1 << DIMS.index("intermediate")
    assert found.outside.tolist() == [0, wide, 0, hidden | wide]
    assert np.isnan(found.ttft_ms).tolist() == [False, True, False, True]
    assert table.estimate_many(columns, relaxed=True).outside.tolist() == [0, 0, 0, hidden]
    with pytest.raises(OptionError, match=r"student 1: .* its intermediate \(256 to 768 in steps of 128\)"):
        table.estimate_many(columns, outside="raise")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"depth": [1]}, "'depth' is no dimension"),
        ({"hidden": [[64]]}, "column hidden has 2 axes"),
        ({"hidden": [256, 256], "layers": [1, 2, 3]}, "columns of"),
        ({"hidden": [256, "a"]}, "column hidden holds no numbers"),
        ({"intermediate": [[256], [256, 512]]}, "column intermediate holds no numbers, or lines of unequal length"),
    ],
)
def test_mistakes_of_columns(table: CostTable, columns: dict[str, list[int]], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        table.estimate_many(columns)


def test_mistakes_of_a_question(table: CostTable) -> None:
    with pytest.raises(OptionError, match="'smollm2-135m' is no configuration of a student: find_student gives that"):
        table.estimate("smollm2-135m")  # type: ignore[arg-type]
    for ask in (lambda: table.estimate(student(), outside="x"), lambda: table.estimate_many({}, outside="x")):  # type: ignore[arg-type]
        with pytest.raises(OptionError, match="outside is 'x': give 'exact', 'nan', 'raise'"):
            ask()


def test_more_layers_than_lines_are_refused(table: CostTable) -> None:
    columns = {"layers": [3], "hidden": 256, "heads": [[4, 4]], "kv_heads": 2, "intermediate": 256}
    assert table.estimate_many(columns).outside.tolist() == [1 << DIMS.index("layers")]


# Derivatives


@pytest.mark.parametrize("of", ["ttft_ms", "energy_mj"])
def test_slopes_are_those_of_the_costs(table: CostTable, of: str) -> None:
    at = {
        "layers": [3.0, 4.0],
        "hidden": [220.0, 300.0],
        "heads": [4.5, 7.0],
        "kv_heads": 2,
        "intermediate": [300.0, 700.0],
    }
    slopes = table.gradient(at, of)
    for name, step in (("layers", 1.0), ("hidden", 0.5), ("heads", 0.25), ("intermediate", 0.5)):
        more = {**at, name: [value + step for value in at[name]]}  # type: ignore[union-attr]
        values = [getattr(table.estimate_many(each, relaxed=True), of) for each in (at, more)]
        assert slopes[name] == pytest.approx((values[1] - values[0]) / step, rel=1e-6)
    assert (slopes["vocab"] == 0).all()


def test_slopes_per_layer(table: CostTable) -> None:
    wide = np.array([[300.0, 500.0, 700.0]])
    at = {"layers": [3], "hidden": [256], "heads": 4, "kv_heads": 2, "intermediate": wide}
    slopes = table.gradient(at)
    assert slopes["intermediate"].shape == (1, 3)
    here = table.estimate_many(at, relaxed=True).ttft_ms[0]
    for layer in range(3):
        more = wide + np.eye(3)[layer]
        value = table.estimate_many({**at, "intermediate": more}, relaxed=True).ttft_ms[0]
        assert slopes["intermediate"][0, layer] == pytest.approx(value - here, rel=1e-6)
    assert np.isnan(table.gradient({**at, "hidden": [9999]})["hidden"]).all()
    with pytest.raises(OptionError, match="'area' is not measured"):
        table.gradient(at, "area")


# The file


def test_round_trip(table: CostTable, tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    checked = table.checked(2, seed=1, jobs=1)
    checked.save(path)
    read = CostTable.load(path, MODEL)
    assert read.to_bytes() == checked.to_bytes() == path.read_bytes()
    assert read.accuracy == checked.accuracy
    assert read.space == table.space
    assert read.estimate(student(layers=4)) == table.estimate(student(layers=4))
    assert pickle.loads(pickle.dumps(read)).to_bytes() == read.to_bytes()


def test_damage_is_refused(table: CostTable, tmp_path: Path) -> None:
    data = table.to_bytes()
    about, arrays = unpacked(data, "here")
    path = tmp_path / "t.npz"
    unnoticed = 0
    for at in range(0, len(data), 997):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :])
        with contextlib.suppress(CostTableError):  # unless it is a byte that zip files do not look at
            assert CostTable.load(path, MODEL).to_bytes() == data
            unnoticed += 1
    assert unnoticed <= 2
    for cut in (0, 10, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:cut])
        with pytest.raises(CostTableError, match="is damaged or no cost table"):
            CostTable.load(path, MODEL)
    for changed, message in (
        ({**about, "code": "0"}, "measured by another version of the code"),
        ({**about, "operators": []}, "has cells of another space"),
        ({**about, "space": {}}, "no cost table of this version"),
    ):
        path.write_bytes(packed(changed, arrays))
        with pytest.raises(CostTableError, match=message):
            CostTable.load(path, MODEL)
    with pytest.raises(CostTableError, match="cannot read"):
        CostTable.load(tmp_path / "absent.npz", MODEL)
    with pytest.raises(CostTableError, match="cannot write"):
        table.save(path / "below.npz")


@pytest.mark.parametrize("changes", [{"prompt": 17}, {"decode": 1}, {"options": RunOptions(weights="int8")}])
def test_a_table_of_another_question(table: CostTable, tmp_path: Path, changes: dict[str, object]) -> None:
    table.save(tmp_path / "t.npz")
    with pytest.raises(CostTableError, match="is for another target, prompt, decode step or options"):
        CostTable.load(tmp_path / "t.npz", dataclasses.replace(MODEL, **changes))


# Building


def test_a_build_goes_on_where_it_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    model = CostModel(MODEL.target, prompt=4)
    measured = []
    measure = probes.measure

    def stop_at_second(model: CostModel, probe: StudentConfig, graph: probes.Graph) -> list[probes.Row]:
        if measured:
            raise KeyboardInterrupt
        measured.append(probe)
        return measure(model, probe, graph)

    monkeypatch.setattr(probes, "measure", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        model.table(SMALL, jobs=1)
    monkeypatch.setattr(
        probes, "measure", lambda model, probe, graph: measured.append(probe) or measure(model, probe, graph)
    )
    table = model.table(SMALL, jobs=1)
    assert [probe.hidden for probe in measured] == [192, 256]
    again = model.table(SMALL, jobs=1)
    assert again.to_bytes() == table.to_bytes()
    assert len(measured) == 2


def test_spawned_processes_build_and_answer_the_same(table: CostTable, cache: Path) -> None:
    model = CostModel(MODEL.target, prompt=4, decode=1)
    built = model.table(SMALL, jobs=1)
    here = built.to_bytes()
    for entry in cache.glob("results*"):
        entry.unlink()
    assert model.table(SMALL, jobs=2).to_bytes() == here
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        found, loaded = pool.submit(workers.quick_estimate, table, student(layers=3)).result()
    assert found == table.estimate(student(layers=3))
    assert not loaded
    each = student(layers=4, hidden=192)
    quick, exact = built.estimate(each, outside="raise"), model.exact(each)
    assert quick.tpot_ms == pytest.approx(exact.tpot_ms, rel=0.02)
    assert quick.token_energy_mj == pytest.approx(exact.token_energy_mj, rel=0.02)
    assert built.gradient({"hidden": [200.0], "heads": 4, "kv_heads": 2, "intermediate": 256}, "tpot_ms")["hidden"] > 0


def test_what_a_table_cannot_hold() -> None:
    for options, message in (
        (RunOptions(layer_bits=(4,)), "layer_bits names layers"),
        (RunOptions(weights="q4_k_m"), "weights q4_k_m differ from layer to layer"),
    ):
        with pytest.raises(OptionError, match=message):
            CostModel(MODEL.target, prompt=4, options=options).table(SMALL)
    with pytest.raises(OptionError, match="jobs is 0"):
        CostModel(MODEL.target, prompt=4).table(SMALL, jobs=0)


def test_other_families(cache: Path) -> None:
    for base in (QWEN2, dataclasses.replace(LLAMA, name="own-kv", kv_heads=4)):
        model = CostModel(MODEL.target, prompt=4, options=RunOptions(weights="fp16"))
        table = model.table(CostSpace.of(base, {"layers": "1:4:1", "intermediate": "96,160"}), jobs=1)
        each = dataclasses.replace(base, layers=4, intermediate=160)
        assert table.estimate(each, outside="raise").ttft_ms == pytest.approx(model.exact(each).ttft_ms, rel=0.02)
        assert table.estimate(each).tpot_ms is None


def test_a_training_loop_needs_no_compiler(table: CostTable, tmp_path: Path) -> None:
    table.save(tmp_path / "t.npz")
    code = (
        "import sys; from firsttoken import CostModel, Target; from firsttoken.cost_tables.table import CostTable\n"
        f"table = CostTable.load({str(tmp_path / 't.npz')!r}, "
        "CostModel(Target.load('systolic-128'), prompt=16))\n"
        "assert table.estimate(table.space.base).source == 'table'\n"
        "print(sorted({'tvm', 'onnx', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_grid_covers_every_cell(table: CostTable) -> None:
    bases = lookup.grid_of(table.space).bases
    assert table._each.shape == (len(table.operators), bases[-1], 1, 4)
    unmeasured = np.isnan(table._each).any(axis=(0, 2, 3))
    assert not unmeasured[bases[1] :].any()
    # kv_heads 4 go with 4 and 8 query heads, kv_heads 2 with 4, 6 and 8.
    assert unmeasured[: bases[1]].mean() == pytest.approx(1 / 6)


# The verb

TINY = [
    "costs", "smollm2-135m", "--target", "systolic-128", "--prompt", "2", "--jobs", "1", "--check", "2",
    *(f"--vary={what}" for what in ("layers=1:2:1", "hidden=64", "heads=2", "kv_heads=1", "head_dim=32", "vocab=256")),
]  # fmt: skip


def test_the_verb_builds_checks_and_writes(tmp_path: Path) -> None:
    path = tmp_path / "below" / "t.npz"
    run = [*TINY, "--vary", "intermediate=64,128", "-o", str(path)]
    done = CliRunner().invoke(app, [*run, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert found["space"]["intermediate"] == {"values": [64, 128], "measured": [64, 128]}
    assert [entry["cost"] for entry in found["accuracy"]] == ["ttft_ms", "energy_mj"]
    table = CostTable.load(path, CostModel(MODEL.target, prompt=2))
    assert [dataclasses.asdict(entry) for entry in table.accuracy] == found["accuracy"]
    screen = CliRunner().invoke(app, run).output
    for text in ("intermediate", "median %", "worst %", "of 2 random students", "Written to"):
        assert text in screen


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["smollm2-135m", "--vary", "hidden"], "give DIM=VALUES"),
        (["student.onnx"], "is a file, whose widths are given"),
        (["minilm-l6"], "minilm-l6 is an encoder"),
    ],
)
def test_mistakes_of_the_verb(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["costs", *arguments])
    assert message in str(done.exception)
