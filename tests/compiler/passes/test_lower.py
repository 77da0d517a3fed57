"""Lowering: launches in order, operands that were made before, a storage with a life for each value."""

from __future__ import annotations

import pytest
from launches import tiny_launches

from firsttoken_compiler.passes.lower import Launches
from firsttoken_compiler.target.target import Target

TARGET = Target.load("systolic-128")


@pytest.fixture(scope="module")
def lowered() -> Launches:
    return tiny_launches(TARGET)


def test_lowering_keeps_order_operands_and_results(lowered: Launches) -> None:
    kinds = [launch.spec.kind for launch in lowered.launches]
    assert kinds.count("attention") == 2
    assert kinds.count("linear") == 15
    assert kinds.count("kv_append") == 4
    written: set[tuple[str, str]] = {("param", name) for name in lowered.params}
    for launch in lowered.launches:
        assert len(launch.args) == len(launch.spec.args)
        assert [value.arg for value in (*launch.args, *launch.outs)] == [*launch.spec.args, *launch.spec.outs]
        assert all((value.kind, value.name) in written for value in launch.args), launch.label
        written.update((value.kind, value.name) for value in launch.outs)
    assert all((value.kind, value.name) in written for value in lowered.outputs)
    assert len(lowered.outputs) == 5


def test_each_value_has_a_storage_that_lives_from_its_launch_to_its_last_reader(lowered: Launches) -> None:
    storages = {storage.name: storage for storage in lowered.storages}
    touched: dict[str, list[int]] = {name: [] for name in storages}
    writers: dict[str, int] = {}
    for number, launch in enumerate(lowered.launches):
        for value in (*launch.args, *launch.outs):
            if value.kind == "storage":
                assert value.arg.nbytes <= storages[value.name].nbytes
                touched[value.name].append(number)
        for value in launch.outs:
            assert value.name not in writers
            writers[value.name] = number
    for name, storage in storages.items():
        assert storage.first == writers[name] == min(touched[name])
        assert storage.last == max(touched[name])
    assert not set(storages) & {value.name for value in lowered.outputs}
