"""The memory plan of two built-in students on two targets: near the lower bound, and the same for what is shared."""

from __future__ import annotations

from pathlib import Path

import pytest

from firsttoken import api
from firsttoken.options import RunOptions
from firsttoken.student import StudentConfig
from firsttoken_compiler.isa.memory_plan import arena_use, kind_bytes, live_bytes
from firsttoken_compiler.isa.program import Program
from firsttoken_compiler.isa.types import Space
from firsttoken_compiler.passes.arena import Piece
from firsttoken_compiler.passes.arena import live_bytes as bound
from firsttoken_compiler.passes.lower import Launches
from firsttoken_compiler.passes.place import Place, Placement
from firsttoken_compiler.target.target import Target

MOST = 1.05
"""Peak over lower bound that a plan may take."""


@pytest.mark.parametrize(("tokens", "past"), [(64, 0), (1, 128)], ids=["prefill", "decode"])
@pytest.mark.parametrize("weights", ["int4", "fp16"])
@pytest.mark.parametrize("target", ["snapdragon-x-elite", "systolic-128"])
@pytest.mark.parametrize("student", ["smollm2-135m", "deepseek-r1-distill-qwen-1.5b"])
def test_every_plan_is_within_five_percent_of_the_bytes_that_are_live(
    student: str, target: str, weights: str, tokens: int, past: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[tuple[Launches, Placement]] = []
    place = Place.run

    def recorded(self: Place, launches: Launches) -> Placement:
        plans.append((launches, place(self, launches)))
        return plans[-1][1]

    monkeypatch.setattr(Place, "run", recorded)
    api.compile(student, target, prompt=tokens, past=past, options=RunOptions(weights=weights), stop_after="place")
    assert plans
    for launches, placement in plans:
        lives = {storage.name: storage for storage in launches.storages}
        sizes = {name: lives[name].nbytes for name in placement.dram}
        for offsets, taken in ((placement.resident, placement.sizes), (placement.dram, sizes)):
            pieces = [Piece(name, taken[name], lives[name].first, lives[name].last) for name in offsets]
            peak = max((offsets[name] + taken[name] for name in offsets), default=0)
            print(f"{len(pieces)} values, {peak} bytes, bound {bound(pieces)}")
            assert peak <= MOST * bound(pieces)


LITTLE = StudentConfig(
    name="little", family="llama", hidden=64, intermediate=96, layers=3, heads=4, kv_heads=2, head_dim=16, vocab=64,
    rope_theta=1e4, max_positions=256, rms_eps=1e-5, tie_embeddings=False, qkv_bias=False, source="made up for tests",
)  # fmt: skip


@pytest.fixture(scope="module")
def programs() -> list[Program]:
    """Two prompt lengths and a decode step."""
    return [api.compile(LITTLE, "snapdragon-x-elite", prompt=n, past=past) for n, past in ((8, 0), (40, 0), (1, 60))]


def test_weights_and_caches_begin_at_the_same_addresses_for_every_length(programs: list[Program]) -> None:
    shared = []
    for program in programs:
        caches = program.of_kind("kv")
        first = min(tensor.address for tensor in caches)
        shared.append(
            [(t.name, t.address, t.packing, t.nbytes) for t in program.of_kind("weight") if t.address < first]
        )
        assert len(shared[-1]) > 20
        assert caches[0].address == first
        assert first == min(tensor.address for tensor in programs[0].of_kind("kv"))
    assert shared[0] == shared[1] == shared[2]


def test_the_summary_agrees_with_a_count_by_operator(programs: list[Program]) -> None:
    for program in programs:
        for space in (Space.SPAD, Space.DRAM):
            use = arena_use(program, space)
            values = [t for t in program.of_kind("activation") if t.space is space]
            counted = [sum(t.nbytes for t in values if t.first <= op <= t.last) for op in range(len(program.ops))]
            assert live_bytes(values, len(program.ops)).tolist() == counted
            assert use.bound_bytes == max(counted)
            assert use.values == len(values)
            assert use.value_bytes == sum(t.nbytes for t in values)
            assert use.bound_bytes <= use.peak_bytes
            if values:
                assert use.reuse == use.value_bytes / use.peak_bytes > 3
                assert use.fragmentation == pytest.approx(1 - 1 / use.ratio)
        kinds = kind_bytes(program)
        assert sum(kinds.values()) <= program.dram_bytes
        assert kinds["weight"] == sum(t.nbytes for t in program.of_kind("weight"))


def test_dram_begins_on_the_targets_own_boundaries(programs: list[Program]) -> None:
    target = Target.load("snapdragon-x-elite")
    for tensor in programs[0].tensors:
        assert tensor.address % target.alignment(tensor.space) == 0
        if tensor.packing is not None and tensor.packing.form == "panels":
            assert tensor.address % 2048 == 0


def test_the_plan_outlives_its_file(programs: list[Program], tmp_path: Path) -> None:
    programs[1].save(tmp_path / "little.npu")
    assert Program.load(tmp_path / "little.npu").tensors == programs[1].tensors
