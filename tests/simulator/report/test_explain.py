from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firsttoken_simulator.energy import energy
from firsttoken_simulator.report.build import build_run
from firsttoken_simulator.report.document import RunDocument
from firsttoken_simulator.report.errors import ReportError
from firsttoken_simulator.report.explain import document, explain, facts, select, short, verdict
from firsttoken_simulator.report.html import step_chart
from firsttoken_simulator.report.steps import NAMES


@pytest.fixture(scope="module")
def run(make_case) -> RunDocument:
    program, timeline, target = make_case(200, 1, hosts=True)
    step = make_case(60, 2)
    made = build_run(program, timeline, target, energy(program, timeline, target), decode=(*step[:2], energy(*step)))
    return RunDocument.from_json(made.to_json())


def changed(run: RunDocument, **fields: Any) -> RunDocument:
    """With other ladders, and other fields of the document."""
    of_table = ("names", "rows", "holders", "critical", "dispatch_fs")
    steps = {name: fields.pop(name) for name in of_table if name in fields}
    table = None if run.steps is None else run.steps.model_copy(update=steps)
    return run.model_copy(update={"steps": table, **fields})


@settings(max_examples=20, deadline=None)
@given(count=st.integers(1, 150), seed=st.integers(0, 10_000), hosts=st.booleans())
def test_the_whole_is_the_sum_of_the_operators_and_of_the_steps(make_case, count: int, seed: int, hosts: bool) -> None:
    program, timeline, target = make_case(count, seed, hosts=hosts)
    run = build_run(program, timeline, target, energy(program, timeline, target))
    whole = explain(run)
    assert whole.total_fs == whole.run_fs == timeline.total_fs + round(target.host.dispatch_us * 1e9)
    assert sum(rung.fs for rung in whole.rungs) == sum(whole.critical.values()) == whole.total_fs
    assert sum(rung.cycles for rung in whole.rungs) == run.ttft_cycles
    assert tuple(rung.step.name for rung in whole.rungs) == NAMES
    names = dict.fromkeys(row.op for row in run.ops)
    parts = [explain(run, name) for name in names]
    assert sum(part.total_fs for part in parts) + whole.fs("dispatch") == whole.total_fs
    for part in parts:
        assert part.fs("dispatch") == 0
        assert part.total_fs >= part.fs("ideal")
        assert part.by_resource[part.binding] <= part.total_fs
    assert sum(sum(rung.percent for rung in part.rungs) for part in parts if part.total_fs) == pytest.approx(
        100 * sum(part.total_fs > 0 for part in parts)
    )


def test_a_pattern_covers_the_same_operator_of_all_layers(run: RunDocument) -> None:
    ups = select(run.ops, "layers.*.up")
    assert [run.ops[i].op for i in ups] == [f"layers.{n}.up" for n in range(1, len(ups) + 1)]
    assert len(ups) > 5
    assert explain(run, "layers.*.up").total_fs == sum(explain(run, run.ops[i].op).total_fs for i in ups)
    assert len(select(run.ops, "layers.2.*")) == 3
    assert select(run.ops, "layers.2.up") == [7]
    with pytest.raises(ReportError, match=r"no operator 'layers.\*.upp' in the run; nearest: layers.\*.up"):
        select(run.ops, "layers.*.upp")
    with pytest.raises(ReportError, match="no operator '\\[' in the run"):
        select(run.ops, "[")


def test_the_decode_step_has_a_ladder_of_its_own(run: RunDocument) -> None:
    assert run.decode is not None
    assert explain(run, decode=True).total_fs / 1e12 == pytest.approx(run.decode.tpot_ms, rel=1e-12)
    with pytest.raises(ReportError, match="no decode step: run again with --decode N"):
        explain(run.model_copy(update={"decode": None}), decode=True)


def test_hidden_products_do_not_bind(run: RunDocument) -> None:
    """The largest step is the matrix unit's, but the DMA holds the critical path."""
    assert run.steps is not None
    rows = [[0] * len(run.steps.names) for _ in run.ops]
    rows[0][run.steps.names.index("ideal")], rows[0][run.steps.names.index("dma_latency")] = 60, 40
    critical = [[0] * 4 for _ in run.ops]
    critical[0] = [90, 10, 0, 0]
    made = changed(run, rows=rows, critical=critical, dispatch_fs=0, host_ms=0.0, npu_ms=1e-10)
    found = explain(made, run.ops[0].op)
    assert next(iter(found.by_resource)) == "matrix unit"
    assert found.binding == "DRAM latency"
    assert "dma 90 %, matrix 10 %" in verdict(found)[-2]
    assert "of the matrix unit hide behind others" in verdict(found)[-2]
    assert "bound by: DRAM latency (40 %, most of it DRAM latency)" in verdict(found)[-1]


def test_texts(run: RunDocument) -> None:
    found = explain(run, "layers.*.up")
    assert facts(found).startswith(f"layers.*.up: {len(found.ops)} operators, linear")
    assert f"{sum(row.cycles for row in found.ops):,} cycles (as in ops.csv)" in facts(found)
    assert facts(explain(run)) == f"the whole run: {len(run.ops)} operators"
    shares = [float(part.rsplit(" ", 2)[1]) for part in short(run).split(" + ")]
    assert sum(shares) == pytest.approx(100, abs=4)
    assert short(changed(run, steps=None)) == "-"
    idle = [[0] * len(row) for row in run.steps.rows]  # type: ignore[union-attr]
    nothing = changed(
        run, rows=idle, critical=[[0] * 4 for _ in idle], dispatch_fs=0, host_ms=0.0, npu_ms=0.0
    )  # fmt: skip
    assert verdict(explain(nothing)) == ["it takes no time of its own: other work hides it"]


def test_json_has_every_step(run: RunDocument) -> None:
    found = document(explain(run))
    assert [row["step"] for row in found["steps"]] == list(NAMES)
    assert sum(row["fs"] for row in found["steps"]) == found["total_fs"] == sum(found["critical_fs"].values())
    assert found["bound_fs"] == max(found["ideal_fs"], found["dram_peak_fs"])


def test_bars_of_the_page_follow_each_other(run: RunDocument) -> None:
    chart = step_chart(run)
    assert chart is not None
    shapes = [shape for _, shape in chart["rows"]]
    assert shapes[0].x == 0
    for before, after in pairwise(shapes):
        assert after.x == pytest.approx(before.x + before.width, abs=0.05)
    assert shapes[-1].x + shapes[-1].width == pytest.approx(chart["width"], abs=0.05)
    assert step_chart(run, decode=True) is not None
    assert step_chart(changed(run, steps=None)) is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": None}, "has no ladder .* an earlier release wrote it"),
        ({"clock_hz": 0.0}, "clock_hz is 0.0, expected 1 to 1e15"),
        ({"clock_hz": float("nan")}, "clock_hz is nan"),
        ({"dram_peak_bytes_per_s": float("inf")}, "dram_peak_bytes_per_s is inf"),
        ({"names": ["ideal", "ideal"]}, "steps.names has other names than ideal, fill_drain"),
        ({"names": ["other"]}, "steps.names has other names"),
        ({"holders": ["dma"]}, "steps.holders is not dma, matrix, vector, host"),
        ({"rows": []}, "steps.rows has 0 rows for 26 operators"),
        ({"critical": [[0] * 4] * 26}, "steps.rows and steps.critical have other sums"),
        ({"dispatch_fs": 1 << 70}, "its steps sum to"),
        ({"dispatch_fs": -1}, "its steps sum to"),
        ({"npu_ms": 1e9}, "its steps sum to .* ms, its time is 1000000000"),
        ({"npu_ms": float("nan")}, "its steps sum to"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(run: RunDocument, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ReportError, match=message):
        explain(changed(run, **fields))


@pytest.mark.parametrize("value", [-1, 1 << 63])
def test_a_step_that_no_run_takes_is_refused(run: RunDocument, value: int) -> None:
    assert run.steps is not None
    rows = [list(row) for row in run.steps.rows]
    rows[3][2] = value
    with pytest.raises(ReportError, match=r"steps.rows.3 must be 16 whole numbers from 0 to"):
        explain(changed(run, rows=rows))
    with pytest.raises(ReportError, match=r"steps.rows.0 must be 16 whole numbers"):
        explain(changed(run, rows=[row[:-1] for row in rows]))


def test_a_document_of_before_is_read_without_its_ladder(run: RunDocument) -> None:
    old = run.model_dump(mode="json")
    del old["steps"], old["decode"]["steps"]
    read = RunDocument.from_document(old)
    assert read.steps is None
    assert read.ops == run.ops
    with pytest.raises(ReportError, match="has no ladder"):
        explain(read)
