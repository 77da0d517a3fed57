"""What stays in the scratchpad, and what is left to work in."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

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
def test_residents_do_not_overlap_and_leave_room_to_work(lowered: Launches, nbytes: int) -> None:
    placement = Place(with_pad(nbytes)).run(lowered)
    spans = sorted((at, at + placement.sizes[name]) for name, at in placement.resident.items())
    for (_, end), (start, _) in pairwise(spans):
        assert end <= start
    assert placement.resident_bytes == max((end for _, end in spans), default=0)
    assert placement.resident_bytes <= nbytes * (1 - WORKING_SHARE)
    assert placement.room.limit == nbytes - placement.resident_bytes
    assert placement.room.preferred == placement.room.limit // 2
    assert all(at % 64 == 0 for at in placement.resident.values())


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
