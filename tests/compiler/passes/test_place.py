"""What stays in the scratchpad, and what is left to work in."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import combinations

import pytest
from launches import tiny_launches

from firsttoken_compiler.errors import AllocationError
from firsttoken_compiler.isa.types import Space
from firsttoken_compiler.passes.lower import Launches
from firsttoken_compiler.passes.place import WORKING_SHARE, Place
from firsttoken_compiler.target.target import Target

TARGET = Target.load("systolic-128")


@pytest.fixture(scope="module")
def lowered() -> Launches:
    return tiny_launches(TARGET)


def with_pad(nbytes: int) -> Target:
    return replace(TARGET, name="little", scratchpad=replace(TARGET.scratchpad, bytes=nbytes))


@pytest.mark.parametrize("nbytes", [2048, 4096, 16384, 1 << 22])
def test_values_share_bytes_only_when_never_live_together_and_leave_room_to_work(
    lowered: Launches, nbytes: int
) -> None:
    placement = Place(with_pad(nbytes)).run(lowered)
    lives = {storage.name: storage for storage in lowered.storages}
    assert set(placement.resident) | set(placement.dram) == set(lives)
    assert set(placement.spilled) == set(placement.dram)
    sizes = {name: lives[name].nbytes for name in placement.dram}
    for offsets, taken in ((placement.resident, placement.sizes), (placement.dram, sizes)):
        for one, other in combinations(offsets, 2):
            if lives[one].first <= lives[other].last and lives[other].first <= lives[one].last:
                first, second = sorted((one, other), key=offsets.__getitem__)
                assert offsets[first] + taken[first] <= offsets[second], (one, other)
        assert all(at % 64 == 0 for at in offsets.values())
    top = max((at + placement.sizes[name] for name, at in placement.resident.items()), default=0)
    assert placement.resident_bytes - 64 < top <= placement.resident_bytes
    assert top <= nbytes * (1 - WORKING_SHARE)
    assert placement.room.limit == nbytes - placement.resident_bytes
    assert placement.room.preferred == placement.room.limit // 2


def test_what_is_spilled_says_why(lowered: Launches) -> None:
    placement = Place(with_pad(2048)).run(lowered)
    assert placement.spilled
    for name, reason in placement.spilled.items():
        assert re.fullmatch(r"\d+ bytes, -?\d+ of 1126 bytes are free while it lives", reason), (name, reason)
    assert Place(TARGET).run(lowered).spilled == {}


def test_everything_that_fits_is_resident_and_parameters_never_are(lowered: Launches) -> None:
    placement = Place(TARGET).run(lowered)
    assert set(placement.resident) == {storage.name for storage in lowered.storages}
    for launch in lowered.launches:
        for value in (*launch.args, *launch.outs):
            assert placement.space(value) is (Space.SPAD if value.kind == "storage" else Space.DRAM)


def test_a_scratchpad_of_nothing_is_an_error(lowered: Launches) -> None:
    message = r"target little has a scratchpad of 960 bytes, .* at least 1024 are needed, raise scratchpad.bytes"
    with pytest.raises(AllocationError, match=message):
        Place(with_pad(960)).run(lowered)
