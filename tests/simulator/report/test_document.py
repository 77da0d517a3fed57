import csv
import io
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.host import HostLoad
from firsttoken_simulator.energy import energy
from firsttoken_simulator.report.build import build_run
from firsttoken_simulator.report.document import OpRow, RunDocument
from firsttoken_simulator.report.errors import ReportError
from firsttoken_simulator.report.ops_csv import ops_csv
from firsttoken_simulator.report.plain import plain


@pytest.fixture(scope="module")
def document(make_case) -> RunDocument:
    program, timeline, target = make_case(200, 1, hosts=True)
    result = energy(program, timeline, target)
    decoded = make_case(60, 2)
    step = (decoded[0], decoded[1], energy(*decoded))
    return build_run(program, timeline, target, result, decode=step)


@settings(max_examples=15, deadline=None)
@given(count=st.integers(1, 150), seed=st.integers(0, 10_000), hosts=st.booleans())
def test_totals_equal_the_sums_of_their_parts(make_case, count: int, seed: int, hosts: bool) -> None:
    program, timeline, target = make_case(count, seed, hosts=hosts)
    run = build_run(program, timeline, target, energy(program, timeline, target))
    assert sum(row.cycles for row in run.ops) + run.host_cycles == run.ttft_cycles
    assert run.ttft_ms == pytest.approx(run.host_ms + run.npu_ms, rel=1e-12)
    assert sum(run.time_by_bound_ms.values()) == pytest.approx(run.ttft_ms, rel=1e-12)
    assert sum(run.energy_by_component_mj.values()) == pytest.approx(run.energy_mj, rel=1e-12)
    assert sum(row.energy_nj for row in run.ops) + run.dispatch_energy_nj == pytest.approx(run.energy_mj * 1e6)
    assert len(run.host_calls) == len(program.hosts)
    assert sum(run.time_by_bound_ms.values()) - run.time_by_bound_ms["dispatch"] == pytest.approx(run.npu_ms)
    assert [row.dram_read_bytes + row.dram_write_bytes for row in run.ops if row.kind == "host"] == [
        call.dram_bytes for call in run.host_calls
    ]
    for row in run.ops:
        parts = (getattr(row, f"energy_{name}_nj") for name in ("mac", "vector", "sram", "dram", "bus", "static"))
        assert sum(parts) == pytest.approx(row.energy_nj)
    assert sum(run.dram_bytes_by_kind.values()) == run.dram_read_bytes + run.dram_write_bytes
    for column in ("macs", "dram_read_bytes", "dram_write_bytes"):
        assert sum(getattr(row, column) for row in run.ops) == getattr(run, column)
    assert sum(layer.ms for layer in run.layers) == pytest.approx(run.npu_ms)
    assert sum(layer.dram_bytes for layer in run.layers) == run.dram_read_bytes + run.dram_write_bytes
    assert run.average_power_w == pytest.approx(run.energy_mj / run.ttft_ms)
    assert run.ttft_cycles * timeline.period_fs / 1e12 == pytest.approx(run.ttft_ms, abs=2 * timeline.period_fs / 1e12)


def test_calls_of_the_host_are_listed_with_their_nodes_and_time(make_case, document: RunDocument) -> None:
    target = make_case(1)[2]
    ops = [3 + 4 * number for number in range(6)]
    assert document.host_fallbacks == [node for op in ops for node in (f"node{op}", "between")]
    assert document.host_ms == document.time_by_bound_ms["dispatch"] == pytest.approx(target.host.dispatch_us / 1e3)
    assert 0 < document.time_by_bound_ms["host_fallback"] <= sum(call.ms for call in document.host_calls)
    assert [call.name for call in document.host_calls] == [document.ops[op].op for op in ops]
    assert [op for op, row in enumerate(document.ops) if row.kind == row.engine == "host"] == ops
    for number, call in enumerate(document.host_calls):
        seconds = max(1000 / target.host.flops, 10**6 * number / target.host.bytes_per_s)
        moved = 7 * 256 / target.host.bytes_per_s
        assert call.ms == pytest.approx(target.host.fallback_us / 1e3 + (seconds + moved) * 1e3, rel=1e-9)
        assert (call.reason, call.dram_bytes) == ("no NPU operator", 7 * 256)


def test_without_calls_of_the_host_its_time_is_the_dispatch(make_case) -> None:
    program, timeline, target = make_case(100, 3)
    run = build_run(program, timeline, target, energy(program, timeline, target))
    assert (run.host_fallbacks, run.host_calls, run.time_by_bound_ms["host_fallback"]) == ([], [], 0)


def test_a_host_that_is_waited_for_is_what_the_time_is_spent_on(make_case) -> None:
    """A slow host holds the critical path."""
    program, timeline, target = make_case(32, 0, hosts=True, fallback_us=1e6)
    run = build_run(program, timeline, target, energy(program, timeline, target))
    assert run.time_by_bound_ms["host_fallback"] / run.npu_ms > 0.99
    assert [row.bound == "host" for row in run.ops] == [row.kind == "host" for row in run.ops]
    assert "host" in {link.bound for link in run.critical_path.chain}


def test_dram_bytes_follow_the_tensor_of_the_address(make_case) -> None:
    program, timeline, target = make_case(100, 3)
    run = build_run(program, timeline, target, energy(program, timeline, target))
    assert set(run.dram_bytes_by_kind) == {"weights", "activations", "kv"}
    assert all(run.dram_bytes_by_kind.values())
    # Weights are the first 4096 bytes; stores never go there.
    weights_only = replace(timeline, dram_read_bytes=timeline.dram_read_bytes * 0)
    stores = build_run(program, weights_only, target, energy(program, weights_only, target))
    assert stores.dram_bytes_by_kind["weights"] == 0


def test_dram_bytes_of_the_host_follow_their_tensor_too(make_case) -> None:
    program, timeline, target = make_case(32, 0, hosts=True)
    code = program.code.copy()
    loads = code[:, word.OPCODE] == HostLoad.OPCODE
    assert loads.sum() == 3
    before = build_run(program, timeline, target, energy(program, timeline, target)).dram_bytes_by_kind
    code[loads, word.operand_column(0) + 1] = 64
    moved = program.with_code(code)
    after = build_run(moved, timeline, target, energy(moved, timeline, target)).dram_bytes_by_kind
    assert after["weights"] == before["weights"] + 3 * 256
    assert sum(after.values()) == sum(before.values())


def test_json_round_trip_and_determinism(make_case, document: RunDocument) -> None:
    text = document.to_json()
    assert RunDocument.from_json(text) == document
    program, timeline, target = make_case(60, 2)
    twice = [build_run(program, timeline, target, energy(program, timeline, target)).to_json() for _ in range(2)]
    assert twice[0] == twice[1]
    assert '"schema_version": 1' in text
    with pytest.raises(ReportError, match=r"schema version 1: ttft_ms"):
        RunDocument.from_json(text.replace('"ttft_ms"', '"ttft"'))
    with pytest.raises(ReportError, match="not a run document"):
        RunDocument.from_json("{")


def test_decode_section(document: RunDocument) -> None:
    assert document.decode is not None
    assert document.tpot_ms == document.decode.tpot_ms
    assert document.tokens_per_s == pytest.approx(1e3 / document.decode.tpot_ms)
    assert sum(document.decode.time_by_bound_ms.values()) == pytest.approx(document.decode.tpot_ms)


def test_three_lines_of_advice_on_the_costliest(document: RunDocument) -> None:
    assert len(document.advice) == 3
    assert document.advice[0].startswith("layers.*.")
    assert all(" ms, " in line and ";" in line for line in document.advice)


def test_chain_covers_the_npu_time(document: RunDocument) -> None:
    chain = document.critical_path.chain
    assert chain[0].from_ms == 0
    assert chain[-1].to_ms == pytest.approx(document.npu_ms)
    for before, after in pairwise(chain):
        assert before.to_ms == after.from_ms
        assert before.op != after.op


def test_options_override_the_program(make_case) -> None:
    program, timeline, target = make_case(20)
    result = energy(program, timeline, target)
    run = build_run(program, timeline, target, result, options={"acts": "int16", "weights": None})
    assert (run.activations, run.weights) == ("int16", "int4")
    with pytest.raises(TypeError, match="mapping"):
        build_run(program, timeline, target, result, options=3)


def test_csv_has_every_column_and_no_formula(document: RunDocument, hostile: str) -> None:
    rows = list(csv.DictReader(io.StringIO(ops_csv(document.ops), newline="")))
    assert list(rows[0]) == list(OpRow.model_fields)
    assert len(rows) == len(document.ops)
    assert sum(int(row["cycles"]) for row in rows) + document.host_cycles == document.ttft_cycles
    assert rows[1]["op"] == "'" + plain(hostile)
