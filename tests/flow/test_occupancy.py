"""What the scratchpad holds over time: never more than there is, and what does not lie there says why."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from firsttoken import RunOptions, Target, api
from firsttoken.student import StudentConfig
from firsttoken_compiler.isa.program import Program
from firsttoken_compiler.isa.types import Space
from firsttoken_simulator.energy import energy
from firsttoken_simulator.report.build import build_run
from firsttoken_simulator.report.html import page
from firsttoken_simulator.report.occupancy import MAX_POINTS, Occupancy, occupancy
from firsttoken_simulator.report.trace import trace
from firsttoken_simulator.timeline import Timeline

LITTLE = StudentConfig(
    name="little", family="llama", hidden=64, intermediate=192, layers=3, heads=4, kv_heads=2, head_dim=16, vocab=64,
    rope_theta=1e4, max_positions=256, rms_eps=1e-5, tie_embeddings=False, qkv_bias=False, source="made up for tests",
)  # fmt: skip
PRESET = Target.load("systolic-128")
TARGET = replace(PRESET, scratchpad=replace(PRESET.scratchpad, bytes=256 << 10))
Case = tuple[Program, Timeline, Occupancy]


@pytest.fixture(scope="module")
def case() -> Case:
    program = api.compile(LITTLE, TARGET, prompt=200, options=RunOptions(weights="fp16"))
    timeline = api.simulate(program, TARGET)
    return program, timeline, occupancy(program, timeline)


def test_it_never_holds_more_than_there_is_and_ends_empty(case: Case) -> None:
    program, timeline, found = case
    total = found.resident + found.working
    assert (found.at_fs[1:] > found.at_fs[:-1]).all()
    assert total.min() >= 0
    assert total[-1] == 0
    assert found.at_fs[-1] <= timeline.total_fs
    assert 0.5 * TARGET.scratchpad.bytes < total.max() <= program.spad_bytes <= TARGET.scratchpad.bytes
    values = [t for t in program.of_kind("activation") if t.space is Space.SPAD]
    assert found.resident.max() <= max(t.address + t.nbytes for t in values)
    # Every value is there when its writer ends.
    for tensor in values:
        op = program.ops[tensor.first]
        end = timeline.end_fs[op.first : op.last].max()
        at = int((found.at_fs < end).sum()) - 1
        assert found.resident[at] >= tensor.nbytes


def test_the_document_has_the_course_the_arenas_and_the_spilled_values(case: Case) -> None:
    program, timeline, found = case
    run = build_run(program, timeline, TARGET, energy(program, timeline, TARGET))
    assert len(run.sram_occupancy) == MAX_POINTS
    fullest = max(point.resident_bytes + point.working_bytes for point in run.sram_occupancy)
    assert fullest == int((found.resident + found.working).max())
    assert [row.memory for row in run.arenas] == ["spad", "dram"]
    assert all(row.peak_bytes <= 1.05 * row.bound_bytes for row in run.arenas)
    spilled = [t for t in program.of_kind("activation") if t.space is Space.DRAM]
    assert sum(row.count for row in run.spilled) == len(spilled) > 0
    for row in run.spilled:
        assert re.search(r"^\d+ bytes, -?\d+ of 144179 bytes are free while it lives$", row.reason), row
    text = page(run)
    assert "Scratchpad over time" in text
    assert run.spilled[0].reason in text
    assert len(re.findall(r"<polygon points=\"0,160 [0-9., ]+ 760,160\"", text)) == 2
    assert page(run.model_copy(update={"sram_occupancy": [], "arenas": [], "spilled": []}))


def test_the_trace_counts_what_is_held(case: Case) -> None:
    program, timeline, _ = case
    data = trace(program, timeline)
    assert b"scratchpad bytes of values" in data
    assert b"scratchpad bytes of kernels" in data
    assert trace(program, timeline) == data
