"""Lowering: launches in order, operands that were made before, storage that is shared only in turn."""

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


def test_values_share_storage_only_when_never_live_together(lowered: Launches) -> None:
    """A storage that is written again is not read as what it was before."""
    holds: dict[str, object] = {}
    sizes = {storage.name: storage.nbytes for storage in lowered.storages}
    for number, launch in enumerate(lowered.launches):
        for value in launch.args:
            if value.kind == "storage":
                assert holds[value.name] == value.arg, (number, launch.spec.kind, value)
        for value in launch.outs:
            if value.kind == "storage":
                assert value.arg.nbytes <= sizes[value.name]
                holds[value.name] = value.arg
    assert len(sizes) < sum(value.kind == "storage" for launch in lowered.launches for value in launch.outs)


def test_labels_lead_to_onnx_nodes(lowered: Launches) -> None:
    assert all(launch.label for launch in lowered.launches if launch.spec.kind in ("linear", "attention"))
